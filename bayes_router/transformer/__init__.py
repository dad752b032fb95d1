"""Routed layers, the language model, generation: plain modules, no Pyro."""
