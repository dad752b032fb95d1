"""Decoding: what generation remembers, and one new token a row."""
