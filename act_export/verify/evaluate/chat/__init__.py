"""Conversations in several turns: what the calibrated model says beside what the plain one says."""
