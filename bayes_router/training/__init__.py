"""Fitting, checkpoints, evaluation."""
