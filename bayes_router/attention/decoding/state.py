"""What the experts that keep a state remember of new tokens, where rows end at different tokens.

Masks, no loop over rows.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.experts.contract import Expert
from bayes_router.attention.experts.sums import SumExpert, advance
from bayes_router.attention.hard.problem import RoutedProblem


def extend(
    expert: Expert, new: RoutedProblem, state: Tensor, empty: bool
) -> tuple[Tensor | None, Tensor]:
    """The output of every new token and the state after the real ones, of a stateful expert.

    On padding the output is zero.

    No output where the state was `empty` and is known without one: any backend computes the pass
    over a first chunk. With padding, an expert of the user's is taken row by row, which reads the
    lengths on the host; the others wait for nothing.
    """
    q, k, v = new.inputs(expert)
    real = new.real()
    # a subclass may compute anything
    known = expert if isinstance(expert, SumExpert) and expert.kernel.sums else None
    if known is not None and empty:
        return None, advance(known, k, v, state, real)
    if real is None or q.shape[2] == 0:
        return expert.extend(q, k, v, state)
    if known is None:
        return _row_by_row(expert, new, state)
    out = expert.extend(q, k, v, state)[0]  # real tokens come first: none sees padding
    return torch.where(real[:, None, :, None], out, 0.0), advance(known, k, v, state, real)


def _row_by_row(expert: Expert, new: RoutedProblem, state: Tensor) -> tuple[Tensor, Tensor]:
    outs, states = [], []
    for b, one in enumerate(new.sequences()):
        out, after = expert.extend(*one.inputs(expert), state[b : b + 1])
        outs.append(F.pad(out, (0, 0, 0, new.q.shape[2] - out.shape[2])))
        states.append(after)
    return torch.cat(outs), torch.cat(states)
