"""Checkpoints that don't fit in memory: weights are read from their files one at a time."""
