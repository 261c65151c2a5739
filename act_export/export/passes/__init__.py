"""Rewrites of the exported graph, one per file. Each keeps what the graph computes."""
