"""Measures: what is computed of a posterior, one question a file."""
