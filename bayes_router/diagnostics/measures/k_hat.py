"""k-hat of the guide by the length of the text, and what it means."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from bayes_router.checks import positive, require
from bayes_router.diagnostics.measures.importance import (
    effective_sample_size,
    importance_bound,
    importance_weights,
    k_hat_limit,
    pareto_k,
    smoother,
)
from bayes_router.diagnostics.measures.verdict import Severity, Verdict
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel


@dataclass(frozen=True)
class FitThresholds:
    """Where a verdict on the guide begins.

    Attributes:
        k_hat: above which importance sampling cannot be relied on; None: `k_hat_limit` of the
            number of draws.
        gap: nats per token of ELBO that fitting a sequence by itself may gain.
    """

    k_hat: float | None = None
    gap: float = 0.05


def k_hat_frame(
    program: RoutingModel,
    guide: RoutingGuide,
    sequences: Sequence[tuple[Tensor, Tensor]],
    lengths: Sequence[int] = (1, 4, 16, 64),
    draws: int = 400,
    bounds: Sequence[int] = (1, 10, 100),
    seed: int = 0,
    kl_weight: float = 1.0,
) -> pd.DataFrame:
    """k-hat, effective sample size and bounds of prefixes of held-out sequences.

    The bounds are importance-weighted.

    Args:
        program: the generative program.
        guide: what draws.
        sequences: (tokens [T], targets [T]), T at least the longest of `lengths`.
        lengths: of the prefixes, in tokens.
        draws: of the guide for each sequence.
        bounds: draws inside each bound.
        seed: of the first sequence's draws.
        kl_weight: of the fit.

    Returns:
        One row a sequence, target and prefix. `target` is "joint" (the exact joint) or "cold" (what
        training with `kl_weight` pursues, see `tempered`); bounds in nats per token, and for the
        joint alone.
    """
    require(
        len(sequences) > 0, "sequences", "at least one", "none", "read a text that is long enough"
    )
    positive("kl_weight", kl_weight)
    smoother()  # missed before minutes of draws, not after
    rows = []
    for index, (tokens, targets) in enumerate(sequences):
        require(
            len(tokens) >= max(lengths),
            "lengths",
            f"at most the {len(tokens)} tokens of a sequence",
            max(lengths),
        )
        weights = importance_weights(
            program, guide, tokens[: max(lengths)], targets[: max(lengths)], draws, seed + index
        )
        for target, power in (("joint", 1.0), ("cold", 1 / kl_weight)):
            for length in lengths:
                w = weights.log_weight(length, power).cpu()
                row = {
                    "sequence": index,
                    "target": target,
                    "length": length,
                    "draws": draws,
                    "k_hat": pareto_k(w),
                }
                row["ess"] = effective_sample_size(w)
                for k in bounds if target == "joint" else ():
                    mean, error = importance_bound(w, k)
                    row[f"bound_{k}"], row[f"bound_{k}_error"] = mean / length, error / length
                rows.append(row)
    return pd.DataFrame(rows)


def k_hat_verdicts(frame: pd.DataFrame, thresholds: FitThresholds | None = None) -> list[Verdict]:
    """What the k-hats of `k_hat_frame` mean, at its shortest and longest prefix."""
    t, found = thresholds or FitThresholds(), []
    by_length = frame[frame["target"] == "joint"].groupby("length")["k_hat"]
    joint = by_length.median()
    limit = k_hat_limit(int(frame["draws"].min())) if t.k_hat is None else t.k_hat
    for length in sorted({joint.index.min(), joint.index.max()}):
        k = joint[length]
        good = k <= limit
        text = (
            f"median Pareto k-hat of {length} {'token' if length == 1 else 'tokens'} against the "
            f"exact joint is {k:.2f} ({by_length.min()[length]:.2f} to "
            f"{by_length.max()[length]:.2f} over {by_length.count()[length]} windows) "
            + (
                f"(good: at most {limit:.2g}): its draws can be reweighted to the exact posterior."
                if good
                else f"(above {limit:.2g}): reweighting its draws does not give the exact "
                f"posterior; read it as what it is, "
                "the router that is deployed."
            )
        )
        advice = (
            ""
            if good
            else (
                "a schedule.kl_weight nearer 1 brings the guide to the joint, at the price of "
                "posterior collapse."
            )
        )
        found.append(Verdict("guide", Severity.GOOD if good else Severity.WARNING, text, advice))
    return found
