"""Kernels: functions of tensors, eager and Triton; they know no expert."""
