"""Faults planted on purpose.

`python -m tests.mutants` says how many of them the tests beside them catch.
"""
