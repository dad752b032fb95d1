"""Calls: what one attention layer of a patched model computes in one pass."""
