"""HERMES: simulating multi-stage serving of language models (arXiv 2504.09775).

A request is a chain of stages, a stage runs on a client, and each client asks a step-cost table
(or another pure function) how long one step takes.
"""
