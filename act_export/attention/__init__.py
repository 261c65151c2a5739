"""An attention of our own inside a transformers model: as the model calls it, and who answers."""
