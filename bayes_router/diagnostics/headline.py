"""What a report says first: loss, cost, ELBO, settings, versions, and the command."""

import math
import platform
import shlex
import sys
from typing import Any

import pyro
import torch

from bayes_router import __version__
from bayes_router.diagnostics.examine import Examination
from bayes_router.files import CONFIG
from bayes_router.transformer.pretrained import read_summary

Pairs = list[tuple[str, str]]
UNITS = {"paper": "in the paper's units", "flops": "in FLOPs"}


def headline(examined: Examination) -> Pairs:
    """Loss, cost and ELBO on held-out text, with how many tokens; what is not known is said."""
    run = examined.run
    summary = read_summary(run.path)
    layers = examined.collapse.layers()
    load = torch.tensor(layers[[f"load {name}" for name in run.experts]].to_numpy())
    cost = float((load * run.prior.cost_ratio.double().cpu()).sum(-1).mean())
    here = f"{examined.collapse.tokens:,} tokens of held-out text"
    if summary is None or "nll" not in summary:
        perplexity = math.exp(examined.nll)
        return [
            (
                "loss, HARD",
                f"{examined.nll:.4f} nats per token (perplexity {perplexity:.2f}), {here}",
            ),
            ("executed cost, HARD", f"{cost:.3f} of full attention, in the prior's ratios, {here}"),
            ("KL to the prior", _kl(examined)),
            ("ELBO", "not read: a patch keeps no evaluation of its own"),
        ]
    losses = ", ".join(f"{mode.upper()} {value:.4f}" for mode, value in summary["nll"].items())
    costs = ", ".join(
        f"{value:.3f} {UNITS.get(name, f'in {name}')}"
        for name, value in summary["executed_cost"].items()
    )
    kl = sum(summary["kl_per_layer"])
    return [
        ("loss", f"{losses} nats per token, {summary['tokens']:,} tokens of held-out text"),
        ("executed cost, HARD", f"{costs}; full attention = 1"),
        ("ELBO", f"{summary['elbo']:.4f} nats per token; its KL {kl:.4f}, at weight 1"),
        ("trained", f"{summary['steps']} steps, {summary['tokens_seen']:,} tokens of "
                    f"{summary['corpus']['name']}, seed {summary['seed']}, on {summary['device']}"),
    ]  # fmt: skip


def _kl(examined: Examination) -> str:
    """How far posteriors are from the prior, apart from its price, and what of it a fit pays."""
    run, sums = examined.run, examined.collapse.layers()[["kl", "kl_untilted"]].sum()
    units, weight, price = run.program.num_units, run.kl_weight, run.program.price
    apart = sums["kl_untilted"] / (units * len(examined.collapse.layers()))
    tilt = "" if price == 0 else ", without the prior's tilt"
    priced = (
        "" if price == 0 else f" (with the tilt, by a price of {price:,.4g}, {sums['kl']:,.1f})"
    )
    return (
        f"{sums['kl_untilted']:.4f} nats per token, {apart:.4f} a unit{tilt}{priced}; "
        f"at the fit's KL weight, {weight:.3g}, it pays {weight * sums['kl']:.4f}"
    )


def settings(examined: Examination) -> Pairs:
    """Every setting of the run, or of the patch, as section.field."""
    run = examined.run
    if run.patched:
        asked: dict[str, Any] = run.model.settings.to_dict()  # type: ignore[operator, union-attr]
        return [(name, str(value)) for name, value in asked.items()]
    tables = run.config.to_dict()
    return [(f"{section}.{key}", str(v)) for section, of in tables.items() for key, v in of.items()]


def versions() -> Pairs:
    """Of what made the page."""
    found = [
        ("bayes-router", __version__),
        ("torch", torch.__version__),
        ("pyro", pyro.__version__),
    ]
    return [*found, ("Python", platform.python_version()), ("platform", platform.platform())]


def commands(examined: Examination) -> Pairs:
    """What makes this page again, and the fit."""
    run = examined.run
    page = shlex.join(["bayes-router", *sys.argv[1:]]) if "report" in sys.argv[1:2] else ""
    page = page or f"bayes-router report {shlex.quote(str(run.path))}"
    found = [("this page", page)]
    if not run.patched:
        config = shlex.quote(str(run.path / CONFIG))
        found.append(("the fit", f"bayes-router fit --config {config} --out NEW_FOLDER"))
    return found
