"""A run's guard: what it costs text like the fit's, what it does to other text, and decoding.

Set on held-out windows, read on others between them and on other text, against the bare policy and
against the refuge: the run's best single expert, for from scratch full attention alone may be the
worst. Then tokens decoded one by one behind a prompt of half a window, beside one pass.
"""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from analysis.pretrained.uncertainty import added_of, lost_of, over_windows
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.routing.policy import Policy
from bayes_router.training.executed import execute
from bayes_router.training.guarantee import Single
from bayes_router.training.guarding import Guarded, set_guard
from bayes_router.transformer.nll import token_nll
from bayes_router.types import RoutingMode

DECODED = 48  # windows of each text


def alternate(source: TokenSource, context: int, count: int) -> tuple[list[Batch], Tensor]:
    """(windows to set a guard on, windows [W, T + 1] to read) by turns, spread over held-out text.

    `count` of each at most. Windows one after another are of few documents, and not exchangeable.
    """
    rows = [torch.cat([b.tokens, b.targets[:, -1:]], 1) for b in source.windows(context, 8)]
    every = torch.cat(rows)
    kept = every[torch.linspace(0, len(every) - 1, min(2 * count, len(every))).long()]
    early = [Batch(part[:, :-1], part[:, 1:]) for part in kept[::2].split(8)]
    return early, kept[1::2]


def guard_tables(
    run: FittedRun, calibration: list[Batch], texts: Mapping[str, Tensor], refuge: int, draws: int
) -> tuple[Guarded, pd.DataFrame, pd.DataFrame]:
    """(the guard, a row a text and policy, a row a text decoded) of windows [W, T + 1]."""
    model, cost = run.model, run.prior.cost_ratio
    bare = model.policy
    set_to = set_guard(model, model.controller, calibration, cost, refuge)
    model.policy = bare
    policies: dict[str, Policy] = {"bare": bare, "guard": set_to.policy}
    read, decoded = list[dict[str, object]](), list[dict[str, object]]()
    for name, rows in texts.items():
        batches = [Batch(part[:, :-1], part[:, 1:]) for part in rows.split(8)]
        base = windows_under(run, batches, Single(refuge))
        found = {one: windows_under(run, batches, policy) for one, policy in policies.items()}
        for one, (nll, spent) in found.items():
            scored = np.full(len(nll), float(rows.shape[1] - 1))
            row = {"text": name, "policy": one, "cost": float(spent.mean())}
            lost = over_windows(lost_of(nll - base[0], scored), len(nll), draws)
            row |= {"lost": lost.value, "low": lost.low, "high": lost.high}
            added = over_windows(added_of(spent, found["bare"][1]), len(nll), draws)
            row |= {"cost added": added.value, "added low": added.low, "added high": added.high}
            read.append(row | {"added at most": set_to.bound, "windows": len(nll)})
        model.policy = set_to.policy
        decoded.append({"text": name} | decoding_row(run, rows[:DECODED], draws))
        model.policy = bare
    return set_to, pd.DataFrame(read), pd.DataFrame(decoded)


def windows_under(
    run: FittedRun, batches: list[Batch], policy: Policy
) -> tuple[np.ndarray, np.ndarray]:
    """(nats, executed cost) of each window."""
    nll, spent = [], []
    for batch in batches:
        found = execute(run.model, [batch], run.prior.cost_ratio, RoutingMode.HARD, policy, 0.0)
        nll.append(found.reading.window_nll)
        spent.append(run.prior.cost_ratio.double()[found.route.cpu()].mean((0, 2, 3)))
    return torch.cat(nll).numpy(), torch.cat(spent).numpy()


@torch.no_grad()
def decoding_row(run: FittedRun, rows: Tensor, draws: int) -> dict[str, object]:
    """Decoded behind half of each window, under the policy of now; `lost` by that over one pass."""
    model, T = run.model, rows.shape[1] - 1
    tokens, targets, prompt = rows[:, :-1], rows[:, 1:], (rows.shape[1] - 1) // 2
    whole, cache = model(tokens), model.network.new_cache(len(rows), T)
    model(tokens[:, :prompt], cache=cache)
    outs = [model(tokens[:, t : t + 1], cache=cache) for t in range(prompt, T)]
    routes = torch.cat([out.route for out in outs], 2)
    late = slice(prompt, T)
    steps = torch.cat([out.logits for out in outs], 1)
    nll, once = (token_nll(x, targets[:, late]).double() for x in (steps, whole.logits[:, late]))
    same = (routes == whole.route[:, :, late]).double()
    each = same.mean((0, 2, 3)).numpy()
    as_one = over_windows(lambda i: float(each[i].mean()), len(rows), draws)
    more, scored = (nll - once).sum(1).numpy(), np.full(len(rows), float(T - prompt))
    lost = over_windows(lost_of(more, scored), len(rows), draws)
    spent = run.prior.cost_ratio.double()[routes].mean()
    row: dict[str, object] = {"texts": len(rows), "tokens": int(scored.sum())}
    row |= {"cost": float(spent), "as one pass": as_one.value, "as one pass, low": as_one.low}
    return row | {"lost": lost.value, "low": lost.low, "high": lost.high}
