"""Seeds of randomised tests: one that never changes, and one drawn for this run."""

import pytest

from tests.attention.seeds import DRAWN, seeded


@pytest.fixture(params=["fixed", "fresh"])
def seed(request: pytest.FixtureRequest) -> int:
    """Both in turn; torch's own generator starts from it too."""
    return seeded(0 if request.param == "fixed" else DRAWN)


@pytest.fixture
def fresh_seed() -> int:
    """The one of this run."""
    return seeded(DRAWN)
