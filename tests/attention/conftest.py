"""Seeds of randomised tests: one that never changes, and one drawn for this run, which a failure prints."""

import os
import secrets

import pytest
import torch

DRAWN = int(os.environ.get("BAYES_ROUTER_SEED", secrets.randbits(31)))


@pytest.fixture(params=["fixed", "fresh"])
def seed(request: pytest.FixtureRequest) -> int:
    """Both in turn; torch's own generator starts from it too."""
    return seeded(0 if request.param == "fixed" else DRAWN)


@pytest.fixture
def fresh_seed() -> int:
    """The one of this run."""
    return seeded(DRAWN)


def seeded(number: int) -> int:
    """Start torch's generator; what is printed here is shown where a test fails."""
    print(f"seed {number}; BAYES_ROUTER_SEED={number} repeats it")
    torch.manual_seed(number)
    return number
