"""GGUF files, and the weights of built-in names, as checkpoint folders."""
