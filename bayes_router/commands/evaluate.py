"""`bayes-router evaluate`: read a run on held-out text, at a budget if one is given."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace
from torch import Tensor

from bayes_router.attention.cost import cost_ratios, read_ratios
from bayes_router.checks import require, unknown
from bayes_router.config import Config, config_from_dict
from bayes_router.data.load import Data, load_data
from bayes_router.data.tokens import TokenSource
from bayes_router.data.watched import WatchedSource
from bayes_router.files import write_json, write_text
from bayes_router.progress import Progress
from bayes_router.routing.cost import CostBy, counted
from bayes_router.routing.policy import Policy, at_price, policy_settings
from bayes_router.training.checkpoint import load_run
from bayes_router.training.dial import Dial
from bayes_router.training.distributed import pick_device
from bayes_router.training.evaluate import evaluate
from bayes_router.training.executed import CountedCost
from bayes_router.training.fitted_text import require_unread
from bayes_router.training.guarantee import (
    Guarantee,
    cheaper_from,
    check_promise,
    later_windows,
    promise,
    strongest_single,
)
from bayes_router.transformer.build import build_experts, build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import CostModel

if TYPE_CHECKING:
    import pandas as pd

CONFIDENCE = 0.95  # of a promise, where none is given


def run(options: Namespace) -> None:
    """Print the table of a run.

    With a budget, under the price that meets it, and nll against budget.
    """
    policy, settings = _check(options)
    config, model, data = _load(options)
    sizes: dict[str, Any] = {"context": config.data.context, "batch_size": config.train.batch_size}
    limit = max(options.tokens or config.data.eval_tokens, config.data.context)
    ratios, paid = _costs(options.cost, config)
    family = at_price(policy, ratios.tolist(), **settings)

    def dial(tokens: int, progress: Progress) -> Dial:
        source = WatchedSource(data.valid, progress)
        return Dial(model, source, paid, limit=tokens, policy=family, **sizes)

    price = 0.0
    if options.budget is not None:
        with Progress("solving for the budget", unit="window") as progress:
            setting = dial(limit, progress).solve(options.budget)
        price = setting.price
        print(
            f"budget {options.budget:g} ({options.cost}), policy {policy}: price {price:.4f} nats "
            f"per unit of cost, executed cost {setting.cost:.4f}"
        )
    if options.quality is not None:
        promised = _promise(options, config, model, data, (ratios, paid), family, limit)
        price = promised.kept.price
        print(promised)
    prior = build_prior(config.prior, config.model, config.model.num_layers, config.data.context)
    own = [] if options.cost == CostBy.BYTES.value else [CostModel(options.cost)]
    costs = tuple(dict.fromkeys((CostModel.PAPER, CostModel.FLOPS, *own)))
    with Progress("reading held-out text", limit // sizes["context"], unit="window") as progress:
        result = evaluate(
            model,
            WatchedSource(data.valid, progress),
            prior.concentration,
            prior_tilt=prior.tilt,
            limit=limit,
            policy=family(price),
            costs=costs,
            **sizes,
        )
    print(result.table())
    if options.freeze is not None or options.free is not None:
        model.policy = family(price)
        how: dict[str, Any] = {"share": options.freeze, "free": options.free}
        print(model.freeze(data.valid, **how, context=config.data.context, limit=limit))
        model.frozen = None
    curve = None
    if options.budget is not None:
        tokens = max(min(options.curve_tokens, limit), config.data.context)
        with Progress("nll against budget", unit="window") as progress:
            curve = dial(tokens, progress).curve()
        print(
            f"\nheld-out nll against budget ({options.cost}, full = 1), {tokens:,} tokens, every "
            f"route executed:"
        )
        print(curve_table(curve))
    if options.out is not None:
        _write(options.out, {"policy": policy, "price": price, **result.to_dict()}, curve)


def _write(out: Path, found: dict[str, Any], curve: "pd.DataFrame | None") -> None:
    """evaluation.json, and dial.csv where a curve was read."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "evaluation.json", found)
    if curve is not None:
        write_text(out / "dial.csv", curve.to_csv(index=False))


def _costs(cost: str, config: Config) -> tuple[Tensor, Tensor | CountedCost]:
    """What experts cost, [E], and what routes over them pay: in bytes, a key head for its units."""
    experts, context = build_experts(config.model), config.data.context
    if cost != CostBy.BYTES.value:
        ratios = cost_ratios(experts, CostModel(cost), context)
        return ratios, ratios
    reads = read_ratios(experts, context)
    return reads, counted(reads, max(config.model.num_units // config.model.kv_heads, 1))


def _promise(
    options: Namespace,
    config: Config,
    model: RoutedLanguageModel,
    data: Data,
    costs: tuple[Tensor, Tensor | CountedCost],
    family: Callable[[float], Policy],
    limit: int,
) -> Guarantee:
    """Calibrated on held-out text after that which is evaluated.

    The best single expert is the one on the latter.
    """
    context, batch_size = config.data.context, config.train.batch_size
    with Progress("promising a quality", unit="window") as progress:
        windows = later_windows(
            WatchedSource(data.valid, progress), context, batch_size, limit, limit
        )
        require_unread(Path(options.run), _own_text(options, data), windows)
        early = WatchedSource(data.valid, progress).windows(context, batch_size, limit)
        best = strongest_single(model, list(early), costs[0])
        prices = cheaper_from(0.0)
        return promise(
            model, windows, costs[1], family, best, options.quality, options.confidence, prices
        )


def _own_text(options: Namespace, data: Data) -> TokenSource | None:
    """What the run was fitted on; None where that corpus cannot be loaded."""
    if options.corpus is None:
        return data.train
    try:
        return load_data(load_run(options.run)[0])[1].train
    except ValueError:
        return None


def _check(options: Namespace) -> tuple[str, dict[str, float]]:
    """The policy and its settings.

    What can be refused before anything is read is refused.
    """
    policy = options.policy
    units = [*(model.value for model in CostModel), CostBy.BYTES.value]
    if options.cost not in units:
        raise unknown("cost", options.cost, units)
    used = options.threshold is None or "threshold" in policy_settings(policy)
    require(
        used, "threshold", f"none under {policy}", options.threshold, "give --policy conservative"
    )
    require(
        options.quality is None or options.budget is None,
        "quality",
        "no --budget beside it",
        options.budget,
    )
    require(
        options.quality is not None or options.confidence is None,
        "confidence",
        "--quality beside it",
        options.confidence,
        "it is the confidence of a promise: give --quality LOST too",
    )
    if options.confidence is None:
        options.confidence = CONFIDENCE
    if options.quality is not None:
        check_promise(options.quality, options.confidence)
    if options.freeze is not None:
        require(
            0 <= options.freeze < 0.5,
            "freeze",
            "a share of the tokens below a half",
            options.freeze,
        )
    if options.free is not None:
        require(options.freeze is None, "free", "no --freeze beside it", options.free)
        require(0 < options.free < 1, "free", "a share of the cache below 1", options.free)
    for name in ("tokens", "curve_tokens"):
        require(options[name] is None or options[name] >= 1, name, "at least 1", options[name])
    return policy, {} if options.threshold is None else {"threshold": options.threshold}


def _load(options: Namespace) -> tuple[Config, RoutedLanguageModel, Data]:
    """The run, and the corpus to read it on."""
    config, model = load_run(options.run, str(pick_device(options.device)))
    if options.corpus is not None:
        config = config_from_dict({"data": {"corpus": options.corpus}}, config)
    needed, data = load_data(config)
    if needed.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"corpus: expected one of the run's vocabulary, {config.model.vocab_size} ids; "
            f"{config.data.corpus} has {needed.model.vocab_size}"
        )
    return config, model, data


def curve_table(curve: "pd.DataFrame") -> str:
    """The table of `Dial.curve`.

    A star marks a budget in a jump, where the nearest cost is shown.
    """
    shown = curve.assign(
        budget=[
            f"{b:.2f}{'' if met else '*'}"
            for b, met in zip(curve["budget"], curve["met"], strict=True)
        ]
    )
    text = shown.drop(columns="met").to_string(index=False, float_format=lambda x: f"{x:.3f}")
    return (
        text
        if curve["met"].all()
        else text + "\n* no price realises this budget; the nearest cost is shown"
    )
