# mypy: disable-error-code="no-untyped-def, no-untyped-call"
"""What the kernels ask of tokens, keys and tables, and the constants that they share."""

import triton
import triton.language as tl

from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.eager import chunks

EPSILON = tl.constexpr(chunks.EPSILON)
LOG2_E = tl.constexpr(capability.LOG2_E)
# below every score, and finite: a row without visible keys gets weight 0, not NaN
HIDDEN = tl.constexpr(-1.0e30)
# sums of a row kept apart, so that a thread adds up its own entries alone
LANES = tl.constexpr(8)


@triton.jit
def phi(x):
    """The feature map elu(x) + 1, in float32."""
    return tl.where(x > 0, x + 1, tl.exp2(tl.minimum(x, 0.0) * LOG2_E))


@triton.jit
def load_rows(X, t, real, x_t, D: tl.constexpr):
    """Rows t of X [T, D], zero where not real."""
    d = tl.arange(0, D)
    return tl.load(X + t[:, None].to(tl.int64) * x_t + d[None, :], mask=real[:, None], other=0.0)


@triton.jit
def table_row(b, h, H, UNIT):
    """Row of the tables of `plan` that query head h of row b reads.

    That of its routing unit of UNIT heads.
    """
    return b * (H // UNIT) + h // UNIT


@triton.jit
def count_rows(Before, u, kind, T, NB, SORTED: tl.constexpr):
    """How many tokens of row u of the tables are of this kind; all of them if not SORTED."""
    return tl.load(Before + (u * 3 + kind) * (NB + 1) + NB) if SORTED else tl.cast(T, tl.int32)


@triton.jit
def rows_before(Before, u, kind, token, T, NB, SORTED: tl.constexpr):
    """How many tokens of this kind stand before `token`.

    SORTED: before the last multiple of 64 up to it.
    """
    return (
        tl.load(Before + (u * 3 + kind) * (NB + 1) + tl.minimum(token // 64, NB))
        if SORTED
        else tl.minimum(token, T)
    )


@triton.jit
def nth_token(Order, u, kind, r, real, T, SORTED: tl.constexpr):
    """The r-th token of this kind; 0 where not real."""
    return (
        tl.load(Order + (u * 3 + kind) * T + r, mask=real, other=0)
        if SORTED
        else tl.where(real, r, 0)
    )


@triton.jit
def gather_rows(Order, Before, u, kind, block, T, NB, SORTED: tl.constexpr, BM: tl.constexpr):
    """Tokens of a block of one kind [BM], which of them exist, and the first and last."""
    count = count_rows(Before, u, kind, T, NB, SORTED)
    r = block * BM + tl.arange(0, BM)
    real = r < count
    t = nth_token(Order, u, kind, r, real, T, SORTED)
    return t, real, tl.min(tl.where(real, t, 2147483647), 0), tl.max(t, 0)


@triton.jit
def sees(pos, n, reach):
    """Whether a query at `pos` sees key n, no more than `reach` keys back, itself included.

    One unsigned comparison.
    """
    # an argument equal to 1 is a constexpr
    return (pos - n).to(tl.uint32, bitcast=True) < tl.cast(reach, tl.uint32)


@triton.jit
def reach_of(n, window, SINKS: tl.constexpr):
    """How many keys back key n is still seen by a local query, itself included.

    A sink from everywhere.
    """
    return tl.where(n < SINKS, 2147483647, window) if SINKS else window


@triton.jit
def band_start(first, window, SINKS: tl.constexpr, BN: tl.constexpr):
    """Where the tiles of keys in the window of a query at `first` start.

    And how many keys of tiles of sinks come before them.
    """
    lo = tl.maximum(first - window + 1, 0) // BN * BN
    return lo, tl.minimum((SINKS + BN - 1) // BN * BN, lo) if SINKS else 0


@triton.jit
def band_tile(x, lo, sunk, SINKS: tl.constexpr):
    """First key of the tile at x, lo - sunk and on: first those of the sinks, then from `lo`."""
    return tl.where(x < lo, x - lo + sunk, x) if SINKS else x


@triton.jit
def load_keys(K, V, n0, num_keys, k_t, v_t, MASKED: tl.constexpr, BN: tl.constexpr,
              D: tl.constexpr):  # fmt: skip
    """Positions n0 .. n0 + BN, their keys and their values; MASKED: zero from num_keys on."""
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, D)
    at_k, at_v = n[:, None] * k_t + d[None, :], n[:, None] * v_t + d[None, :]
    if MASKED:
        k = tl.load(K + at_k, mask=n[:, None] < num_keys, other=0.0)
        v = tl.load(V + at_v, mask=n[:, None] < num_keys, other=0.0)
    else:
        k = tl.load(K + at_k)
        v = tl.load(V + at_v)
    return n, k, v
