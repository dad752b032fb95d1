"""One seed drawn for this run of the tests.

A failure prints it, and BAYES_ROUTER_SEED repeats it.
"""

import os
import secrets

import torch

DRAWN = int(os.environ.get("BAYES_ROUTER_SEED", secrets.randbits(31)))


def seeded(number: int) -> int:
    """Start torch's generator; what is printed here is shown where a test fails."""
    print(f"seed {number}; BAYES_ROUTER_SEED={number} repeats it")
    torch.manual_seed(number)
    return number
