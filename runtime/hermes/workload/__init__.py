"""Workloads: when requests arrive, how long they are, and what they go through.

Each workload owns its random streams, so another workload, client or metric does not change it.
"""
