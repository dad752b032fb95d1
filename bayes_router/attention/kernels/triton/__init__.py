"""Kernels in Triton and their launches."""
