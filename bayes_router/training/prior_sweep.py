"""What a prior does to the posterior: short refits of a run under other settings, one row each."""

from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from bayes_router.checks import choose, require
from bayes_router.config import Config, with_changes
from bayes_router.progress import Progress
from bayes_router.training.executed import read_routes
from bayes_router.training.fit import Data, Trainer, load_data, pick_device
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import RoutingMode

if TYPE_CHECKING:
    import pandas as pd

KNOBS = ("prior.total_concentration", "schedule.kl_weight", "prior.temperature")
"""What a sweep moves by default, and reports always."""

Grid = Mapping[str, Sequence[Any]] | Sequence[Mapping[str, Any]]


class Refit(Enum):
    """Which weights a refit moves."""

    # the guide alone: what the prior does to the routes of a given network
    CONTROLLERS = "controllers"
    EVERYTHING = "everything"  # the network too, which learns to live with the routes


def sweep_prior(
    config: Config,
    grid: Grid,
    steps: int = 100,
    seeds: Sequence[int] = (0,),
    *,
    model: RoutedLanguageModel | None = None,
    refit: Refit | str | None = None,
    eval_tokens: int | None = None,
    progress: bool = False,
) -> "pd.DataFrame":
    """Refit under every setting of `grid` and read each refit on held-out text.

    A refit starts at the weights of `model` and runs under its final objective from the first step:
    no annealing of the prior, no KL warm-up. Settings that share a seed see the same batches and
    draws, so their differences are paired.

        config, model = load_run("runs/tiny")
        frame = sweep_prior(config, {"prior.temperature": [0.1, 0.3, 1.0]}, steps=100, seeds=(0, 1),
        model=model)

    Args:
        config: settings of the run; what `grid` does not name stays.
        grid: dotted settings of `prior` and `schedule` to values: every combination; or a list of
            settings to try as they are, see `one_at_a_time`.
        steps: of each refit.
        seeds: one refit a setting and seed.
        model: fitted weights to start from, unchanged afterwards; None starts at the initial
            weights of each seed.
        refit: controllers or everything; by default controllers where `model` is given, else
            everything.
        eval_tokens: held-out tokens to read after each refit; by default the run's
            `data.eval_tokens`.
        progress: show a bar, or without a terminal a line every few seconds.

    Returns:
        One row a setting and seed: the settings named in `grid` and those of `KNOBS`, steps, seed;
        prior_cost (of the prior predictive), posterior_cost (E_q of the cost, SAMPLE) and
        executed_cost (HARD) in the unit of the prior, cost_paper and cost_flops (executed), all
        ratios to full attention; nll_mean, nll_sample, nll_hard (nats per token); route_information
        and, of it, context_information (nats, mean over layers); kl (nats per token, summed over
        layers, from the prior as trained with, its price included); `load NAME` (HARD).

    Raises:
        ValueError: settings that are unknown, refused, outside `prior` and `schedule`, or overruled
            by one of the run's own; steps below 1; no seeds; controllers to refit and no model.
        TrainingDiverged: the loss of a refit is not finite.
    """
    import pandas as pd

    mode = choose(
        "refit", refit or (Refit.EVERYTHING if model is None else Refit.CONTROLLERS), Refit
    )
    require(
        model is not None or mode is Refit.EVERYTHING,
        "model",
        "fitted weights, to refit controllers alone",
        model,
    )
    require(steps >= 1, "steps", "at least 1", steps)
    require(len(seeds) >= 1, "seeds", "at least one", list(seeds))
    settings = _settings(config, grid)
    config, data = load_data(config)
    rows, tries = [], list(product(settings, seeds))
    for setting, seed in Progress("sweep", len(tries), unit="refit", shown=progress).over(tries):
        changed = _refit_config(with_changes(config, setting), steps, seed, eval_tokens)
        trainer = refit_model(changed, data, model, mode)
        rows.append(
            {**setting, **knobs(changed), "steps": steps, "seed": seed, **posterior_row(trainer)}
        )
    return pd.DataFrame(rows)


def one_at_a_time(config: Config, values: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Settings that each move one knob of `config`, the others as they are.

    The configuration itself comes first, once.
    """
    centre = {name: _value(config, name) for name in values}
    moved = [
        {**centre, name: value}
        for name, options in values.items()
        for value in options
        if value != centre[name]
    ]
    return [centre, *moved]


def knobs(config: Config) -> dict[str, Any]:
    """What a configuration says of each of `KNOBS`."""
    return {name: _value(config, name) for name in KNOBS}


def refit_model(
    config: Config, data: Data, model: RoutedLanguageModel | None, refit: Refit
) -> Trainer:
    """Train for `config.train.steps` from the weights of `model`.

    The generator of the caller is left as it was.
    """
    device = pick_device(config.train.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        trainer = Trainer(config, data, device)
        if model is not None:
            trainer.model.load_state_dict(model.state_dict())
        # without a gradient the optimiser passes over a weight, decay included
        trainer.model.network.requires_grad_(refit is Refit.EVERYTHING)
        for step in range(config.train.steps):
            trainer.step(step)
    return trainer


def posterior_row(trainer: Trainer) -> dict[str, float]:
    """What the posterior of a refit does on held-out text; columns as in `sweep_prior`."""
    config, prior = trainer.config, trainer.prior
    result = trainer.evaluate()
    context, limit = config.data.context, max(config.data.eval_tokens, config.data.context)
    drawn = read_routes(
        trainer.model,
        trainer.data.valid,
        prior.cost_ratio,
        context=context,
        batch_size=config.train.batch_size,
        limit=limit,
        mode=RoutingMode.SAMPLE,
    )
    shares = torch.tensor(result.load_per_layer).mean(0)
    row = {
        "prior_cost": prior.prior_predictive().cost,
        "posterior_cost": drawn.cost,
        "executed_cost": float(shares @ prior.cost_ratio),
        **{f"cost_{name}": value for name, value in result.executed_cost.items()},
        **{f"nll_{name}": value for name, value in result.nll.items()},
        "route_information": sum(result.route_information_per_layer) / prior.num_layers,
        "context_information": sum(result.context_information_per_layer) / prior.num_layers,
        "kl": sum(result.kl_per_layer),
    }
    return row | {
        f"load {name}": share for name, share in zip(result.experts, shares.tolist(), strict=True)
    }


def _settings(config: Config, grid: Grid) -> list[dict[str, Any]]:
    """The settings of a grid, each tried once against the configuration.

    A wrong one is refused at once.
    """
    if isinstance(grid, Mapping):
        settings = [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
    else:
        settings = [dict(setting) for setting in grid]
    require(len(settings) >= 1, "grid", "at least one setting", grid)
    for setting in settings:
        for name in setting:
            known = name.partition(".")[0] in ("prior", "schedule") and name.count(".") == 1
            require(
                known,
                "grid",
                "settings named prior.FIELD or schedule.FIELD",
                name,
                "others do not fit the run's weights",
            )
            _check_not_overruled(config, name)
        with_changes(config, setting)
    return settings


OVERRULED_BY = {
    "temperature": ("layer_temperature", "layer_mean"),
    "cost_ratio": ("layer_cost_ratio",),
    "total_concentration": ("layer_total_concentration",),
    "map": ("layer_mean",),
    "cost": ("cost_ratio", "layer_cost_ratio"),
}


def _check_not_overruled(config: Config, name: str) -> None:
    section, _, field = name.partition(".")
    for other in OVERRULED_BY.get(field, ()) if section == "prior" else ():
        set_ = getattr(config.prior, other)
        require(
            set_ is None,
            name,
            f"a run without prior.{other}, which overrules it",
            set_,
            f"sweep prior.{other} instead",
        )


def _refit_config(config: Config, steps: int, seed: int, eval_tokens: int | None) -> Config:
    """The final objective from the first step on, and a short warm-up of the learning rate."""
    changes = {
        "train.steps": steps,
        "train.seed": seed,
        "train.warmup": min(config.train.warmup, steps // 10),
        "schedule.kl_warmup": 0.0,
        "schedule.anneal_from": 0.0,
        "schedule.anneal_to": 0.0,
        "schedule.straight_through_from": 0.0 if config.schedule.straight_through_from < 1 else 1.0,
        "data.eval_tokens": eval_tokens or config.data.eval_tokens,
    }
    return with_changes(config, changes)


def _value(config: Config, name: str) -> Any:
    section, field = name.split(".")
    return getattr(getattr(config, section), field)
