"""`bayes-router evaluate`: read a run on held-out text, at a budget if one is given."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

import pandas as pd
from jsonargparse import Namespace

from bayes_router.attention.cost import cost_ratios
from bayes_router.checks import choose, require
from bayes_router.commands.options import Parser, add_run
from bayes_router.config import Config, config_from_dict
from bayes_router.routing.policy import PolicyName
from bayes_router.training.checkpoint import load_run, write_json, write_text
from bayes_router.training.dial import TOLERANCE, Dial
from bayes_router.training.evaluate import evaluate
from bayes_router.training.fit import Data, load_data, pick_device
from bayes_router.transformer.build import build_experts, build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import CostModel

HELP = "read a run on held-out text: losses, costs, loads, information; at a budget"
THRESHOLD = 0.7


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `evaluate`."""
    result = Parser(description="Read a fitted run on held-out text, its routes executed.")
    add_run(result)
    result.add_argument("--corpus", type=Optional[str], default=None, help="another corpus than the run's")
    result.add_argument("--tokens", type=Optional[int], default=None, help="read at most this many tokens")
    result.add_argument("--policy", type=str, default="argmax", help="of hard routes: argmax or conservative")
    result.add_argument(
        "--threshold",
        type=Optional[float],
        default=None,
        help=f"conservative: tokens whose argmax is right with a lower probability take a stronger expert ({THRESHOLD})",
    )
    result.add_argument(
        "--budget",
        type=Optional[float],
        default=None,
        help=f"attention cost to spend, full = 1: the price is set so that executed routes meet it within {TOLERANCE}",
    )
    result.add_argument("--cost", type=str, default="paper", help="unit of the budget: paper, flops or latency")
    result.add_argument(
        "--curve_tokens",
        "--curve-tokens",
        type=int,
        default=16_384,
        help="tokens of each pass of the table of nll against budget",
    )
    result.add_argument("--out", type=Optional[Path], default=None, help="folder for evaluation.json and dial.csv")
    return result


def run(options: Namespace) -> None:
    """Print the table of a run; with a budget, under the price that meets it, and nll against budget."""
    policy, cost, threshold = _check(options)
    config, model, data = _load(options)
    context, batch_size = config.data.context, config.train.batch_size
    limit = max(options.tokens or config.data.eval_tokens, context)
    ratios = cost_ratios(build_experts(config.model), cost, context)
    family = policy.at_price(ratios.tolist(), threshold)

    def dial(tokens: int) -> Dial:
        return Dial(model, data.valid, ratios, context=context, batch_size=batch_size, limit=tokens, policy=family)

    price = 0.0
    if options.budget is not None:
        setting = dial(limit).solve(options.budget)
        price = setting.price
        print(
            f"budget {options.budget:g} ({cost.value}), policy {policy.value}: price {price:.4f} nats per unit of cost, "
            f"executed cost {setting.cost:.4f}"
        )
    prior = build_prior(config.prior, config.model, config.model.num_layers, context)
    result = evaluate(
        model,
        data.valid,
        prior.concentration,
        prior_price=config.prior.price * prior.cost_ratio,
        context=context,
        batch_size=batch_size,
        limit=limit,
        policy=family(price),
        costs=tuple(dict.fromkeys((CostModel.PAPER, CostModel.FLOPS, cost))),
    )
    print(result.table())
    curve = None
    if options.budget is not None:
        tokens = max(min(options.curve_tokens, limit), context)
        curve = dial(tokens).curve()
        print(f"\nheld-out nll against budget ({cost.value}, full = 1), {tokens:,} tokens, every route executed:")
        print(curve_table(curve))
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        write_json(options.out / "evaluation.json", {"policy": policy.value, "price": price, **result.to_dict()})
        if curve is not None:
            write_text(options.out / "dial.csv", curve.to_csv(index=False))


def _check(options: Namespace) -> tuple[PolicyName, CostModel, float]:
    """The policy, the unit of cost and the threshold; what can be refused before anything is read is refused."""
    policy, cost = choose("policy", options.policy, PolicyName), choose("cost", options.cost, CostModel)
    used = options.threshold is None or policy is PolicyName.CONSERVATIVE
    require(used, "threshold", "none under argmax", options.threshold, "give --policy conservative")
    for name in ("tokens", "curve_tokens"):
        require(options[name] is None or options[name] >= 1, name, "at least 1", options[name])
    return policy, cost, THRESHOLD if options.threshold is None else options.threshold


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


def curve_table(curve: pd.DataFrame) -> str:
    """The table of `Dial.curve`; a star marks a budget in a jump, where the nearest cost is shown."""
    shown = curve.assign(budget=[f"{b:.2f}{'' if met else '*'}" for b, met in zip(curve["budget"], curve["met"], strict=True)])
    text = shown.drop(columns="met").to_string(index=False, float_format=lambda x: f"{x:.3f}")
    return text if curve["met"].all() else text + "\n* no price realises this budget; the nearest cost is shown"
