"""Parity, evaluation and benchmark of an exported model."""
