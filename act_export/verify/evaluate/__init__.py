"""Answers of files, and what their accuracy is worth."""
