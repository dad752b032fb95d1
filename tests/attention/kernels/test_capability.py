"""What is asked of kernels without importing Triton."""

import pytest

from bayes_router.attention.kernels.capability import ceil_div, head_size, power_of_2


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 63, 64, 65, 4096])
def test_sizes(n: int) -> None:
    assert power_of_2(n) in (p for p in (2**i for i in range(14)) if n <= p < 2 * n)
    assert head_size(n) == max(16, power_of_2(n))
    for b in (1, 3, 64):
        assert (ceil_div(n, b) - 1) * b < n <= ceil_div(n, b) * b
