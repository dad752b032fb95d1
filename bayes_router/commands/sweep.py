"""`bayes-router sweep`: the prior that costs what a target says, as settings.

With a run, what such priors do to it.
"""

from dataclasses import replace
from typing import Any

import pandas as pd
import tomli_w
import torch
from jsonargparse import Namespace
from torch import Tensor

from bayes_router.checks import choose, require, unknown
from bayes_router.config import Config, load_config
from bayes_router.diagnostics.figures.prior import draw_prior, draw_sweep
from bayes_router.files import CONFIG, require_file, write_text
from bayes_router.presets import preset
from bayes_router.routing.posterior import categorical_entropy
from bayes_router.routing.prior import PRIOR_MAPS, ComputeAwarePrior
from bayes_router.training.checkpoint import load_run
from bayes_router.training.distributed import pick_device
from bayes_router.training.prior_sweep import Refit, knobs, one_at_a_time, sweep_prior
from bayes_router.transformer.build import build_prior
from bayes_router.types import CostModel

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FACTORS = {
    "prior.total_concentration": (0.2, 4.0, 20.0),
    "schedule.kl_weight": (0.1, 10.0, 100.0),
    "prior.temperature": (0.25, 0.5, 2.0, 4.0),
}
"""What the sweep multiplies each knob by, one at a time."""
SHOWN = [
    "prior_cost",
    "posterior_cost",
    "executed_cost",
    "nll_mean",
    "nll_hard",
    "route_information",
    "context_information",
    "kl",
]


def run(options: Namespace) -> None:
    """Print the solved settings and what they imply; with a run, the sweep too."""
    _check(options)
    config = _starting_config(options)
    solved = options.target_cost is not None
    prior, config = _solve(config, options) if solved else (_prior_of(config), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        draws = prior.sample(max(1, options.samples // prior.num_layers)).flatten(0, 1)  # [N, E]
    toml = tomli_w.dumps(_tables(prior, config, options))
    print(toml + "\n" + _comment(_summary(prior, draws, config)))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_text(options.out / "prior.toml", toml)
        targets = options.target_cost, options.target_entropy
        draw_prior(
            draws, prior.cost_ratio, config.model.experts, options.out / "prior.png", *targets
        )
    if options.run is not None and options.steps > 0:
        _sweep(config, options)


def _check(options: Namespace) -> None:
    """Refuse what can be refused before anything is read."""
    require(
        options.target_cost is not None or options.run is not None,
        "target_cost",
        "a cost to solve for, or a run to sweep",
        "neither",
        "give --target-cost 0.25, or a run folder",
    )
    for name in ("target_entropy", "total_concentration", "map", "price"):
        alone = options[name] is not None and options.target_cost is None
        require(not alone, name, "a target_cost beside it", options[name], "give --target-cost too")
    for name, least in (("samples", 1), ("steps", 0), ("seeds", 1), ("tokens", 1)):
        require(options[name] >= least, name, f"at least {least}", options[name])
    require(
        options.context is None or options.context >= 1,
        "context",
        "at least 1 token",
        options.context,
    )
    price_ok = options.price is None or options.price >= 0
    require(price_ok, "price", "0 or more nats per unit of cost", options.price)
    choose("refit", options.refit, Refit)
    if options.map is not None and options.map not in PRIOR_MAPS:
        raise unknown("map", options.map, PRIOR_MAPS)


def _starting_config(options: Namespace) -> Config:
    """The settings of the run or the preset, with the cost model and context of the options."""
    config = (
        preset(options.preset)
        if options.run is None
        else load_config(require_file(options.run, CONFIG))
    )
    if options.cost is not None:
        cost = choose("cost", options.cost, CostModel).value
        config = replace(config, prior=replace(config.prior, cost=cost, cost_ratio=None))
    if options.context is not None:
        config = replace(config, data=replace(config.data, context=options.context))
    return config


def _prior_of(config: Config) -> ComputeAwarePrior:
    return build_prior(config.prior, config.model, config.model.num_layers, config.data.context)


def _solve(config: Config, options: Namespace) -> tuple[ComputeAwarePrior, Config]:
    """The prior that meets the targets, and the settings with it, the same for every layer."""
    total, price = options.total_concentration, options.price or 0.0
    if total is None and options.target_entropy is None:
        total = config.prior.total_concentration
    of_layers: dict[str, Any] = {
        name.removeprefix("prior."): None for name in config.prior.by_layer()
    }
    plain = replace(config.prior, **of_layers)
    ratios = build_prior(plain, config.model, 1, config.data.context).cost_ratio
    prior = ComputeAwarePrior.for_target_cost(
        ratios,
        config.model.num_layers,
        options.target_cost,
        target_entropy=options.target_entropy,
        map=options.map or config.prior.map,
        total_concentration=total,
        price=price,
    )
    solved = replace(
        plain,
        map=prior.map,
        temperature=prior.temperature[0],
        total_concentration=prior.total_concentration[0],
        price=price,
    )
    return prior, replace(config, prior=solved)


def _tables(prior: ComputeAwarePrior, config: Config, options: Namespace) -> dict[str, Any]:
    """The settings to print, as TOML tables that `fit --config` reads over any preset."""
    started = _starting_config(options).prior
    settings = config.prior
    table = {
        name: getattr(settings, name)
        for name in ("cost", "map", "temperature", "total_concentration", "price")
    }
    if settings.cost_ratio is not None or settings.cost == CostModel.LATENCY.value:
        # measured here: another machine would measure others
        table["cost_ratio"] = prior.cost_ratio.tolist()
    per_layer = {
        "layer_mean": prior.mean.tolist(),
        "layer_temperature": list(prior.temperature),
        "layer_total_concentration": list(prior.total_concentration),
    }
    table |= {
        name: value for name, value in per_layer.items() if getattr(started, name) is not None
    }
    uses_context = options.context is not None or settings.cost != CostModel.PAPER.value
    return {"prior": table} | ({"data": {"context": config.data.context}} if uses_context else {})


def _summary(prior: ComputeAwarePrior, draws: Tensor, config: Config) -> str:
    """What the prior implies, analytically and over its draws."""
    predictive = prior.prior_predictive()
    cost = draws.double() @ prior.cost_ratio.double()
    implied = {"cost": cost, "entropy (nats)": categorical_entropy(draws.double())}
    rows = {
        name: [float(x) for x in values.quantile(torch.tensor(QUANTILES, dtype=torch.float64))]
        + [float(values.mean())]
        for name, values in implied.items()
    }
    table = pd.DataFrame(rows, index=[*(f"{q:.0%}" for q in QUANTILES), "mean"]).T
    ratios = ", ".join(
        f"{n} {r:.3f}" for n, r in zip(config.model.experts, prior.cost_ratio.tolist(), strict=True)
    )
    load = ", ".join(
        f"{n} {r:.1%}" for n, r in zip(config.model.experts, predictive.load.tolist(), strict=True)
    )
    return (
        f"cost ratios ({config.prior.cost} at {config.data.context} tokens): {ratios}\n"
        f"prior predictive: cost {predictive.cost:.4f}, expected entropy "
        f"{predictive.expected_entropy:.4f} nats, "
        f"entropy of mean {predictive.entropy_of_mean:.4f} nats\nload: {load}\n"
        f"{len(draws):,} draws: cost {float(cost.mean()):.4f} +- "
        f"{float(cost.std()) / len(cost) ** 0.5:.4f}; "
        "quantiles of a draw:\n" + table.to_string(float_format=lambda x: f"{x:.4f}")
    )


def _sweep(config: Config, options: Namespace) -> None:
    """Refit the run around the settings, one knob at a time; print, and draw where asked."""
    _, model = load_run(options.run, str(pick_device(options.device)))
    centre = knobs(config)
    values = {
        name: [factor * centre[name] for factor in factors] for name, factors in FACTORS.items()
    }
    frame = sweep_prior(
        replace(config, train=replace(config.train, device=options.device)),
        one_at_a_time(config, values),
        options.steps,
        range(options.seeds),
        model=model,
        refit=options.refit,
        eval_tokens=options.tokens,
        progress=True,
    )
    shown = (
        frame.groupby(list(centre), sort=False)[SHOWN]
        .mean()
        .reset_index()
        .rename(columns=lambda c: c.split(".")[-1])
    )
    title = (
        f"posterior after {options.steps} steps of {options.refit}, mean of {options.seeds} seeds, "
        f"{options.tokens:,} tokens:"
    )
    print(
        "\n"
        + _comment(title + "\n" + shown.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    )
    if options.out is not None:
        write_text(options.out / "sweep.csv", frame.to_csv(index=False))
        draw_sweep(frame, centre, options.out / "sweep.png")


def _comment(text: str) -> str:
    """As TOML comments: the whole output stays a file that `fit --config` reads."""
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())
