"""Speed and memory, measured beside other files and PyTorch."""
