"""The operators on NVIDIA GPUs: kernels in Triton, compiled ahead of time into the native library."""
