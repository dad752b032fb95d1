"""Every expert over every token, then each token's own row.

The backend `dense`, which gathers nothing.

In a short text on a CPU the time goes into the number of operators, and there it is the fastest:
full and local attention are one call, with a mask where a window hides something, and linear
attention is one masked product, quadratic as it is. An expert that no token took is not computed
where the host may look (on a CPU).
"""

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, Kernel
from bayes_router.attention.hard.backend import register_backend
from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.attention.kernels.eager.chunks import feature_map, normalised, with_ones
from bayes_router.attention.kernels.eager.fused import fused_attention
from bayes_router.attention.shapes import by_head, repeat_heads, widen

SHORT = 256
"""Keys up to which a CPU takes the quadratic forms."""
_HIDDEN = 2**31 - 1


class _Dense:
    """Every expert over every token, then selected; any device."""

    name = "dense"

    def refuses(self, problem: RoutedProblem) -> str | None:
        """It refuses nothing."""
        return None

    def attend(self, problem: RoutedProblem) -> Tensor:
        """See `Backend.attend`."""
        problem.assert_route()
        if problem.starts is not None:
            return problem.stack([_selected(one) for one in problem.sequences()])
        return problem.without_padding(_selected(problem))


DENSE = register_backend(_Dense())


def _selected(problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a problem without `starts`.

    Rows of experts `elsewhere` are zero, those of padding are not.
    """
    q, route = problem.q, problem.route
    wanted, out = dict(problem.computed()), None
    if q.device.type == "cpu":
        taken = {index for index, count in enumerate(route.flatten().bincount().tolist()) if count}
        wanted = {index: expert for index, expert in wanted.items() if index in taken}
        covered = len(wanted) == len(taken)
    else:  # counting would wait for the device
        covered = not problem.elsewhere
    for indices, found in _outputs(problem, wanted):
        if out is None and covered:  # its other rows are replaced by those that follow
            out = found
            continue
        out = torch.where(
            problem.chosen(*indices), found, torch.zeros_like(q) if out is None else out
        )
    return torch.zeros_like(q) if out is None else out


def _outputs(
    problem: RoutedProblem, wanted: dict[int, Expert]
) -> Iterator[tuple[list[int], Tensor]]:
    """Which experts, and their output over every token."""
    num_keys = problem.k.shape[2]
    short = problem.q.device.type == "cpu" and num_keys <= SHORT
    softmax = {index: expert for index, expert in wanted.items() if short and expert.kernel.softmax}
    soft = {index: reach for index, expert in softmax.items() if (reach := expert.reach(num_keys))}
    if soft:
        yield list(soft), _softmax(problem, soft)
    for index, expert in wanted.items():
        if index not in soft:
            inputs = problem.inputs(expert)
            yield (
                [index],
                _linear(*inputs) if short and expert.kernel is Kernel.LINEAR else expert(*inputs),
            )


def _softmax(problem: RoutedProblem, reaches: dict[int, int]) -> Tensor:
    """Softmax attention of every token over as many keys back as its expert sees.

    Of other experts' tokens, anything.
    """
    (_, H, Tq, _), (_, Hkv, Tk, _) = problem.q.shape, problem.k.shape
    inputs, grouped = (problem.q, problem.k, problem.v), Hkv != H
    if Tq == Tk and all(reach == Tk for reach in reaches.values()):
        return fused_attention(*inputs, is_causal=True, enable_gqa=grouped)
    table = torch.tensor(
        [reaches.get(index, Tk) for index in range(len(problem.experts))], dtype=torch.int32
    )
    seen = _age(Tq, Tk) < by_head(table[problem.route], H)  # [B, H or 1, Tq, Tk]
    return fused_attention(*inputs, attn_mask=seen, enable_gqa=grouped)


@lru_cache(16)
def _age(num_queries: int, num_keys: int) -> Tensor:
    """[Tq, Tk] int32: how many tokens back of a query a key is; of a later key, a huge number."""
    key = torch.arange(num_keys, dtype=torch.int32, device="cpu")
    age = key[num_keys - num_queries :, None] - key
    return age.masked_fill(age < 0, _HIDDEN)


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`LinearAttention` of every token by all its weights."""
    k, v = (repeat_heads(x, q.shape[1]) for x in (k, v))
    weight = (feature_map(widen(q)) @ feature_map(widen(k)).transpose(-1, -2)).tril_(
        k.shape[2] - q.shape[2]
    )
    return normalised(weight @ with_ones(widen(v))).to(v.dtype)
