"""Experts: one attention mechanism a file, and the contract that they keep.

Importing this registers them all.
"""

from importlib import import_module
from pkgutil import iter_modules

for _module in iter_modules(__path__):
    import_module(f"{__name__}.{_module.name}")
