"""Experts: one attention mechanism a file, and the contract that they keep. Importing this registers them."""

from bayes_router.attention.experts import full, gated, linear, local, mapped  # noqa: F401  (registers them)
