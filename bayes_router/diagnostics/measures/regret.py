"""What other routes of a sampled token would have cost: the loss under each of them."""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.routing.posterior import (
    entropy_of_mean,
    mutual_information,
    posterior_mean,
    probability_of_largest,
)
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import token_nll
from bayes_router.types import IGNORED, RoutingMode

RECENT = 8  # tokens of a mean of surprise
SEEN = ("surprise", "recent_surprise", "likeliest", "second")  # columns of `seen_of`
ROWS = 16  # forced tokens that go through the network together


@torch.no_grad()
def routing_regret(
    model: RoutedLanguageModel,
    batches: Iterable[Batch],
    per_sequence: int = 8,
    seed: int = 0,
    causal: bool = True,
) -> pd.DataFrame:
    """Loss of sampled tokens under each route that a layer could have given them.

    One token's route in one layer is changed, everything else stays on the HARD path: the layers
    above do not decide again. The loss is that token's own nll, which is known in hindsight alone:
    no router that does not see the targets has regret 0. Whether it knows how often it will have
    been right is a fair question, and that is what `calibrate` asks.

    Args:
        model: the fitted model.
        batches: windows of text.
        per_sequence: triples of (token, layer, unit) to sample from each window, without
            repetition.
        seed: of the sample.
        causal: nothing looks ahead, so what comes after a token need not be computed; of an encoder
            it is read.

    Returns:
        One row a triple: sequence, position, layer, unit, choice, loss_<expert> (nats),
        largest_<expert> (posterior probability that its weight is the largest), regret (loss of the
        choice less that of the best), entropy_of_mean, mutual_information, mean_<expert>,
        total_concentration, and predictive_entropy (nats, of the next token as the routed pass
        predicts it), those of `seen_of`, and of `other_targets` foreseen, redrawn and
        redrawn_again.
    """
    require(per_sequence >= 1, "per_sequence", "at least 1", per_sequence)
    device, random = next(model.parameters()).device, np.random.default_rng(seed)
    experts, rows, sequence = list(model.config.experts), [], 0
    for batch in batches:
        for tokens, targets in zip(batch.tokens.to(device), batch.targets.to(device), strict=True):
            rows += _regret_rows(model, tokens, targets, per_sequence, random, sequence, causal)
            sequence += 1
    require(len(rows) > 0, "text", "at least one scored token", "none", "read a longer text")
    return with_regret(pd.DataFrame(rows), experts)


def with_regret(frame: pd.DataFrame, experts: Sequence[str]) -> pd.DataFrame:
    """With the column regret: the loss of the choice less that of the best."""
    losses = frame[[f"loss_{name}" for name in experts]].to_numpy()
    chosen = losses[np.arange(len(frame)), [list(experts).index(n) for n in frame["choice"]]]
    return frame.assign(regret=chosen - losses.min(1))


def spread_of(frame: pd.DataFrame, experts: Sequence[str]) -> npt.NDArray[np.float64]:
    """What hangs on each route, nats: the worst expert's loss less the best one's."""
    losses = frame[[f"loss_{name}" for name in experts]].to_numpy()
    return np.asarray(losses.max(1) - losses.min(1))


def _regret_rows(
    model: RoutedLanguageModel,
    tokens: Tensor,
    targets: Tensor,
    count: int,
    random: np.random.Generator,
    sequence: int,
    causal: bool,
) -> list[dict[str, object]]:
    """The triples of one sequence; tokens and targets [T]."""
    out = model(tokens[None], RoutingMode.HARD)
    choice, experts = out.route, list(model.config.experts)  # [L, 1, T, R]
    L, R = choice.shape[0], choice.shape[3]
    scored = (targets != IGNORED).nonzero()[:, 0].tolist()
    picked = random.choice(len(scored) * L * R, min(count, len(scored) * L * R), replace=False)
    pairs = [(int(p) % (L * R), scored[int(p) // (L * R)]) for p in picked]
    if not pairs:
        return []
    # so that what goes through the network together ends at a like position
    pairs.sort(key=lambda pair: pair[1])
    parts = [pairs[i : i + ROWS] for i in range(0, len(pairs), ROWS)]
    ends = [part[-1][1] + 1 if causal else len(tokens) for part in parts]
    taken = torch.tensor([int(choice[p // R, 0, t, p % R]) for p, t in pairs])
    found = [
        forced_logits(model, tokens[:end], choice, part)
        for part, end in zip(parts, ends, strict=True)
    ]
    logits = torch.cat(found)  # [P, E, V]
    loss = losses_of(logits, targets[[position for _, position in pairs]])
    redrawn = other_targets(logits, taken, sequence)
    log_p = out.logits[0].double().log_softmax(-1)
    predictive = -(log_p.exp() * log_p).sum(-1)  # [T]
    seen = seen_of(out.logits[0], tokens)
    rows: list[dict[str, object]] = []
    for i, (latent, at_position) in enumerate(pairs):
        layer, unit = divmod(latent, R)
        q = out.concentration[layer, 0, at_position, unit].double().cpu()
        where = {"sequence": sequence, "position": at_position, "layer": layer, "unit": unit}
        row = regret_row(experts, int(taken[i]), loss[i], q, float(predictive[at_position]))
        row |= {name: float(x[at_position]) for name, x in seen.items()}
        rows.append(where | row | {name: float(x[i]) for name, x in redrawn.items()})
    return rows


def losses_of(logits: Tensor, targets: Tensor) -> Tensor:
    """Nats [P, E] of the targets [P] under every route's logits [P, E, V]."""
    return token_nll(logits, targets[:, None].expand(logits.shape[:2]))


def other_targets(logits: Tensor, taken: Tensor, seed: int) -> dict[str, Tensor]:
    """What the regret would have been, had another token followed.

    Args:
        logits: [P, E, V], under every route.
        taken: [P], the choice.
        seed: of the draws.

    Returns:
        foreseen, the regret expected of a token of the routed pass's own prediction: what could be
        known of it without the token; redrawn and redrawn_again, its regret under two such tokens:
        how well one measures the other bounds how well anything foretells them. Each [P], nats.
    """
    random, log = np.random.default_rng(seed), logits.double().log_softmax(-1)
    routed = log[torch.arange(len(log)), taken.to(log.device)]  # [P, V]
    regret = log.max(1).values - routed  # [P, V], of every token that may follow
    p = routed.exp()
    found = {"foreseen": (p * regret).sum(-1)}
    for name in ("redrawn", "redrawn_again"):
        u = torch.from_numpy(random.random(len(log))).to(log.device)
        drawn = (p.cumsum(-1) < u[:, None]).sum(-1).clamp_max(p.shape[-1] - 1)
        found[name] = regret.gather(1, drawn[:, None])[:, 0]
    return {name: x.cpu() for name, x in found.items()}


def seen_of(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    """What a pass knows at each of its tokens beside entropies and routes: `SEEN`, each [T], nats.

    How much the token surprised a pass that had read what stands before it (of the first token, of
    which nothing was said, log V), the mean of that over the last `RECENT`, and the logarithms of
    the two largest probabilities of the next token. Where the pass reads to both sides a surprise
    is none, only a number that it knows.

    Args:
        logits: [T, V], of the pass.
        tokens: [T], that it read.
    """
    log = logits.float().log_softmax(-1)
    first = torch.full_like(log[:1, 0], math.log(logits.shape[-1]))
    surprise = torch.cat([first, token_nll(log[:-1], tokens[1:])]).double().cpu()
    total, end = F.pad(surprise.cumsum(0), (1, 0)), torch.arange(1, len(tokens) + 1)
    begin = (end - RECENT).clamp_min(0)
    recent = (total[end] - total[begin]) / (end - begin)
    likeliest, second = log.topk(2).values.double().cpu().unbind(-1)
    return dict(zip(SEEN, (surprise, recent, likeliest, second), strict=True))


def regret_row(
    experts: Sequence[str], choice: int, loss: Tensor, q: Tensor, entropy: float
) -> dict[str, object]:
    """What `routing_regret` says of a triple beside where it is, without the regret.

    Args:
        experts: names.
        choice: index of the expert taken.
        loss: [E], nats under each.
        q: [E], concentration of the posterior, float64.
        entropy: of the next token as predicted, nats.
    """
    E = len(experts)
    largest, mean = probability_of_largest(q.expand(E, E), torch.arange(E)), posterior_mean(q)
    row: dict[str, object] = {"choice": experts[choice]}
    for kind, values in (("loss", loss), ("largest", largest)):
        row |= {f"{kind}_{name}": float(values[e]) for e, name in enumerate(experts)}
    row |= {
        "entropy_of_mean": float(entropy_of_mean(q)),
        "mutual_information": float(mutual_information(q)),
    }
    row |= {f"mean_{name}": float(mean[e]) for e, name in enumerate(experts)}
    return row | {"total_concentration": float(q.sum()), "predictive_entropy": entropy}


def forced_logits(
    model: RoutedLanguageModel, tokens: Tensor, choice: Tensor, pairs: list[tuple[int, int]]
) -> Tensor:
    """Logits at each (layer times R plus unit, position) under each expert, [P, E, V]."""
    E, R, end = len(model.config.experts), choice.shape[3], len(tokens)
    forced = choice[:, :, :end].repeat(1, len(pairs) * E, 1, 1)  # [L, P E, end, R]
    for i, (latent, position) in enumerate(pairs):
        layer, unit = divmod(latent, R)
        forced[layer, i * E : (i + 1) * E, position, unit] = torch.arange(E, device=choice.device)
    where = torch.tensor(
        [position for _, position in pairs], device=tokens.device
    ).repeat_interleave(E)
    logits = model(tokens.expand(forced.shape[1], -1), force=forced).logits
    at = logits[torch.arange(len(where), device=where.device), where]
    return at.unflatten(0, (-1, E))
