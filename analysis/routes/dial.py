"""Does uncertainty buy anything on the dial?

`python -m analysis.routes.dial RUN ... [--cost flops] [--tokens 16384] [--out FOLDER]`.

Held-out nll against executed cost of fitted runs (one setting, several seeds) under two policies:
argmax with a price, and conservative (unsure tokens take the stronger expert) with a price, at
several thresholds. Each conservative point is compared with argmax at the same executed cost, on
the same windows, so the difference is paired. Writes dial.csv (argmax) and dial_conservative.csv (a
row a seed and budget), dial.png (means over seeds), dial.json (what made them, and the verdict).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
from tqdm.auto import tqdm

from analysis.routes.sweep import commit
from bayes_router.attention.cost import cost_ratios
from bayes_router.checks import choose
from bayes_router.config import load_config
from bayes_router.diagnostics.figures.run import PALETTE
from bayes_router.files import CONFIG, SUMMARY, require_file
from bayes_router.routing.policy import at_price
from bayes_router.training.checkpoint import load_run
from bayes_router.training.dial import GRID, BudgetUnreachable, Dial
from bayes_router.training.executed import Executed
from bayes_router.training.fit import load_data, pick_device
from bayes_router.transformer.build import build_experts
from bayes_router.types import CostModel

THRESHOLDS = (0.6, 0.75, 0.9)
NEAR = 0.01
"""How near to a budget a point may lie; the two policies are compared at the same cost exactly."""
MARKERS = ("s", "^", "D", "v", "P")


def at_cost(dial: Dial, cost: float) -> Executed:
    """What the dial's policy does at exactly `cost`.

    A lottery over windows between its two nearest prices.

    Linear in cost between them; one is within 0.005 of `cost` unless that lies in a jump.
    """
    with suppress(BudgetUnreachable):
        dial.solve(cost)
    above = min((r for r in dial.readings.values() if r.cost >= cost), key=lambda r: r.cost)
    below = max((r for r in dial.readings.values() if r.cost <= cost), key=lambda r: r.cost)
    share = (cost - below.cost) / (above.cost - below.cost) if above.cost > below.cost else 1.0
    return Executed(
        price=share * above.price + (1 - share) * below.price,
        cost=cost,
        load=share * above.load + (1 - share) * below.load,
        window_nll=share * above.window_nll + (1 - share) * below.window_nll,
        window_scored=above.window_scored,
    )


def compare(
    argmax: Dial, conservative: dict[float, Dial], budgets: Sequence[float]
) -> pd.DataFrame:
    """One row a threshold and budget, and one at price 0 (budget missing).

    Both policies at the conservative one's cost.
    """
    rows = []
    tries = [(threshold, budget) for threshold in conservative for budget in (None, *budgets)]
    for threshold, budget in tqdm(tries, unit="budget"):
        dial = conservative[threshold]
        try:
            cautious = dial.read(0.0) if budget is None else dial.solve(budget, NEAR)
        except BudgetUnreachable as error:
            if error.nearest is None:
                continue
            cautious = error.nearest
        plain = at_cost(argmax, cautious.cost)
        difference, error_ = cautious.nll_above(plain)
        rows.append(
            {
                "threshold": threshold,
                "budget": budget,
                "cost": cautious.cost,
                "price": cautious.price,
                "price_argmax": plain.price,
                "nll_conservative": cautious.nll,
                "nll_argmax": plain.nll,
                "difference": difference,
                "standard_error": error_,
            }
        )
    return pd.DataFrame(rows)


def pooled(frame: pd.DataFrame) -> pd.DataFrame:
    """One row a threshold and budget.

    Means over seeds, and the standard error of the mean difference.

    That between seeds where there are several, else the one over windows of the only run.
    """
    groups = frame.groupby(["threshold", "budget"], dropna=False)
    table = groups[
        ["cost", "nll_conservative", "nll_argmax", "difference", "standard_error"]
    ].mean()
    between = groups["difference"].sem()
    table["standard_error"] = between.where(between.notna(), table["standard_error"])
    return table.join(groups.size().rename("n")).reset_index()


def verdict(frame: pd.DataFrame, curve: pd.DataFrame) -> str:
    """In words, the lowest loss of each policy.

    And at how many costs each is ahead by more than two standard errors.

    A lead at a cost where both lose to a cheaper setting buys nothing: the lowest losses tell.
    """
    frame, curve = pooled(frame), curve.groupby("budget")[["cost", "nll_hard"]].mean()
    clear = frame["difference"].abs() > 2 * frame["standard_error"]
    better, worse = (
        int((clear & (frame["difference"] < 0)).sum()),
        int((clear & (frame["difference"] > 0)).sum()),
    )
    best = frame.sort_values("difference").iloc[0]
    plain, cautious = (
        curve.sort_values("nll_hard").iloc[0],
        frame.sort_values("nll_conservative").iloc[0],
    )
    return (
        f"{frame['n'].max()} seeds; at equal cost, conservative is ahead of argmax by more than "
        f"two standard errors at "
        f"{better} of {len(frame)} points, behind at {worse}, undecided at "
        f"{len(frame) - better - worse}; mean difference "
        f"{frame['difference'].mean():+.4f} nats per token, best {best['difference']:+.4f} +- "
        f"{best['standard_error']:.4f} at "
        f"threshold {best['threshold']:g}, cost {best['cost']:.3f}; lowest nll: argmax "
        f"{plain['nll_hard']:.4f} at cost "
        f"{plain['cost']:.3f}, conservative {cautious['nll_conservative']:.4f} at cost "
        f"{cautious['cost']:.3f}"
    )


def draw(curve: pd.DataFrame, frame: pd.DataFrame, cost: str, path: Path) -> None:
    """Loss against cost of both policies, and their difference with two standard errors.

    Means over seeds.
    """
    frame, curve = pooled(frame), curve.groupby("budget")[["cost", "nll_hard"]].mean()
    with sns.axes_style("ticks"), sns.plotting_context("notebook"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5), layout="constrained")
        left.plot(curve["cost"], curve["nll_hard"], "o-", color=PALETTE[0], label="argmax")
        right.axhline(0, color="0.7", zorder=0)
        for (threshold, part), colour, marker in zip(
            frame.groupby("threshold"), PALETTE[1:], MARKERS, strict=False
        ):
            ordered = part.sort_values("cost")
            style = {"color": colour, "marker": marker, "linestyle": "--", "markersize": 5}
            left.plot(
                ordered["cost"],
                ordered["nll_conservative"],
                label=f"conservative, {threshold:g}",
                **style,
            )
            right.errorbar(
                ordered["cost"],
                ordered["difference"],
                2 * ordered["standard_error"],
                capsize=3,
                **style,
            )
        left.set(
            xlabel=f"executed attention cost ({cost}, full = 1)",
            ylabel="held-out nll, HARD (nats per token)",
        )
        right.set(
            xlabel=f"executed attention cost ({cost}, full = 1)",
            ylabel="conservative - argmax (nats)\nbars: 2 standard errors",
        )
        left.legend(frameon=False)
        sns.despine(figure)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def study(
    run: Path,
    cost: CostModel,
    tokens: int,
    thresholds: Sequence[float],
    budgets: Sequence[float],
    device: str,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The curve of argmax, and the comparison."""
    config, model = load_run(run, str(pick_device(device)))
    config, data = load_data(config)
    ratios = cost_ratios(build_experts(config.model), cost, config.data.context)

    def dial(policy: str, **settings: float) -> Dial:
        return Dial(
            model,
            data.valid,
            ratios,
            context=config.data.context,
            batch_size=config.train.batch_size,
            limit=max(tokens, config.data.context),
            policy=at_price(policy, ratios.tolist(), **settings),
        )

    argmax = dial("argmax")
    curve = argmax.curve(budgets)
    # at the end there is one route for all
    budgets = curve.loc[curve["budget"] < float(ratios.max()), "budget"].tolist()
    return curve, compare(
        argmax, {t: dial("conservative", threshold=t) for t in thresholds}, budgets
    )


def main() -> None:
    """Parse, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--cost", default="paper", help="paper, flops or latency")
    parser.add_argument("--tokens", type=int, default=16_384, help="held-out tokens of each pass")
    parser.add_argument("--thresholds", type=float, nargs="+", default=THRESHOLDS)
    parser.add_argument("--budgets", type=float, nargs="+", default=GRID)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    options = parser.parse_args()
    cost = choose("cost", options.cost, CostModel)
    seeds = [load_config(require_file(run, CONFIG)).train.seed for run in options.runs]
    summaries = [json.loads(require_file(run, SUMMARY).read_text()) for run in options.runs]
    if len(set(seeds)) < len(seeds):
        parser.error(f"runs: expected one run a seed; got seeds {seeds}; leave the others out")
    curves, frames = {}, {}
    for seed, run in zip(seeds, options.runs, strict=True):
        curves[seed], frames[seed] = study(
            run, cost, options.tokens, options.thresholds, options.budgets, options.device
        )
    curve, frame = (
        pd.concat(tables, names=["seed"]).reset_index("seed") for tables in (curves, frames)
    )
    options.out.mkdir(parents=True, exist_ok=True)
    curve.to_csv(options.out / "dial.csv", index=False, float_format="%.6g")
    frame.to_csv(options.out / "dial_conservative.csv", index=False, float_format="%.6g")
    draw(curve, frame, cost.value, options.out / "dial.png")
    made: dict[str, Any] = {
        "command": " ".join(["python -m analysis.routes.dial", *sys.argv[1:]]),
        "commit": commit(),
        "device": str(pick_device(options.device)),
        "runs": summaries,
        "verdict": verdict(frame, curve),
    }
    (options.out / "dial.json").write_text(json.dumps(made, indent=2) + "\n")
    print(curve.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    print(frame.to_string(index=False, float_format=lambda x: f"{x:.4f}"))
    print(made["verdict"])


if __name__ == "__main__":
    main()
