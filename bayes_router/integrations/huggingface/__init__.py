"""Patches of Hugging Face models."""
