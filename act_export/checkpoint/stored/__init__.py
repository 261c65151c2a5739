"""Weights as they lie in the files of a checkpoint."""
