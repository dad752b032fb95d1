"""Patches for models made elsewhere."""
