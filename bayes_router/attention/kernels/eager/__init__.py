"""Kernels in plain torch."""
