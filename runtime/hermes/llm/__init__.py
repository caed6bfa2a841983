"""LLM clients: continuous batching over a step-cost table, with block memory and preemption."""
