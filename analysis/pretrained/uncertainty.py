"""What a patch's uncertainty is worth: tables with intervals over windows.

Of the arrays of `analysis.pretrained.uncertain_passes`, reached by

    python -m analysis.posterior PATCH --model MODEL --token-file TOKENS.npz [--device cuda]

PATCH is a folder, or the name of a patch that comes with the package; the policy is the one that
it was saved with, but for promise and guard, which choose their own price. TOKENS.npz is written by
`analysis.pretrained.texts`. The arrays go to READINGS.npz in the folder of the tables; with
--readings alone, and no model, the tables are made of those again.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import binomtest

from analysis.figures import write
from analysis.pretrained.authors import author_rows
from analysis.pretrained.loading import load_model
from analysis.pretrained.uncertain_passes import (
    AUTHORS,
    PatchReading,
    ReadArrays,
    Study,
    load,
    looked_up,
    of,
)
from analysis.pretrained.uncertain_passes import read as read_parts
from bayes_router import load_patch
from bayes_router.diagnostics.measures.bootstrap import Estimate, clustered
from bayes_router.diagnostics.measures.calibration import auroc, rank_correlation
from bayes_router.diagnostics.measures.confidence import confidence_table
from bayes_router.diagnostics.measures.evidence import auroc_of
from bayes_router.training.executed import Executed
from bayes_router.training.guarantee import keep_promise

TOLERANCES = (0.001, 0.0001)  # nats: one head of one layer at one token is worth no more
LOST = (0.0025, 0.005, 0.01)
RESPLITS = 400
SIZES = 4  # numbers of windows that a promise is made on, doubled each


def evidence(found: ReadArrays, draws: int) -> pd.DataFrame:
    """AUROC of each score against the own text; of authors, against those that evidence knows."""
    rows = []
    for name in (name for name in texts_of(found) if name != AUTHORS):
        for score in ("recent", "passage", "token", "posterior", "nll"):
            other, own = (found[f"{text}/{score}"].astype(np.float64) for text in (name, "own"))
            told = auroc_of(other, own, draws)
            row = {"text": name, "against": "own", "score": score, **told._asdict()}
            rows.append(row | {"windows": len(other)})
    rows += spread_of(found, draws)
    if authors := of(found, AUTHORS):
        rows += author_rows(authors, draws)
    return pd.DataFrame(rows).rename(columns={"value": "auroc"})


def spread_of(found: ReadArrays, draws: int) -> list[dict[str, object]]:
    """How far single texts of one kind lie apart, by the last tokens' evidence.

    Each half of the novels by others against the own text (in the file an author follows another),
    and the most and the least familiar window of own text against the rest of it.
    """
    own, rows = found["own/recent"].astype(np.float64), []
    halves = np.array_split(found["novels by others/recent"].astype(np.float64), 2)
    for name, part in zip(("first", "last"), halves, strict=True):
        row = {"text": f"novels by others, {name} half", "against": "own", "score": "recent"}
        rows.append(row | auroc_of(part, own, draws)._asdict() | {"windows": len(part)})
    each = [auroc(x, np.delete(own, i, 0).ravel()) for i, x in enumerate(own)]
    for name, value in (("most", min(each)), ("least", max(each))):
        row = {"text": f"own, its {name} familiar window", "against": "the rest of own"}
        rows.append(row | {"score": "recent", "value": value, "n": own.size, "windows": len(own)})
    return rows


def risk(found: ReadArrays, draws: int) -> pd.DataFrame:
    """The estimate against the true KL."""
    rows = []
    for name in ("own", *texts_of(found)):
        keys = ("estimate", "kl", "entropy", "estimate mean", "kl mean")
        estimate, kl, entropy, says, true = (
            found[f"{name}/{key}"].astype(np.float64) for key in keys
        )
        figures: dict[str, Callable[[np.ndarray], float]] = {
            "rank correlation": ranked(estimate, kl),
            "rank correlation of the entropy": ranked(entropy, kl),
            "mean over true mean": lambda i, a=says, b=true: float(a[i].mean() / b[i].mean()),  # type: ignore[misc]
            "true mean (nats)": lambda i, b=true: float(b[i].mean()),  # type: ignore[misc]
        }
        for figure, statistic in figures.items():
            told = over_windows(statistic, len(kl), draws)._replace(n=kl.size)
            rows.append({"text": name, "figure": figure, **told._asdict(), "windows": len(kl)})
    return pd.DataFrame(rows)


def ranked(x: np.ndarray, y: np.ndarray) -> Callable[[np.ndarray], float]:
    """Rank correlation of the tokens of windows drawn."""
    return lambda rows: rank_correlation(x[rows].ravel(), y[rows].ravel())


def over_windows(
    statistic: Callable[[np.ndarray], float], windows: int, draws: int = 400
) -> Estimate:
    """A figure of windows with its interval."""
    return clustered(statistic, np.arange(windows), draws=draws)


def confidence(found: ReadArrays, draws: int) -> pd.DataFrame:
    """Fitted on the calibration windows, read on later ones of the own text and on other text."""
    frames = {
        name: pd.DataFrame(of(found, name))
        for name in dict.fromkeys(key.split("/")[0] for key in found)
    }
    fitted = frames.pop("calibration")
    experts = [c.removeprefix("loss_") for c in fitted.columns if c.startswith("loss_")]
    tables = {
        (tolerance, name): confidence_table(fitted, frame, experts, tolerance, draws)
        for tolerance in TOLERANCES
        for name, frame in frames.items()
    }
    return pd.concat(tables, names=["tolerance", "text"]).reset_index(["tolerance", "text"])


def quality(found: ReadArrays, draws: int) -> pd.DataFrame:
    """How often a promise made on windows of the own text is kept there, and on other text.

    By the number of windows that it is made on, drawn anew from those that were read: where few
    windows are not enough to come near the policy of hindsight, how many would be.
    """
    both = dict(found)
    for key in ("nll", "cost", "scored"):
        parts = [found[f"{name}/{key}"] for name in ("calibration", "own")]
        both[f"own/{key}"] = np.concatenate(parts, -1)
    base, known = looked_up(both, "own")
    truth = {name: excess_of(*looked_up(both, name)) for name in ("own", "wikitext", "python")}
    read, rows = len(base.window_nll), []
    for lost in LOST:
        allowed = math.log1p(lost)
        cheapest = min(known[p].cost for p in known if truth["own"][p] <= allowed)
        for windows in (read // 2, *(read * 2**i for i in range(SIZES))):
            kept = promised(base, known, lost, windows)
            cost = float(np.mean([known[p].cost for p in kept])) if kept else math.nan
            for name, excess in truth.items():
                row = {"lost": lost, "promised on": "own", "read on": name, "windows": windows}
                row |= share([excess[price] <= allowed for price in kept])
                row |= {"refused": RESPLITS - len(kept), "hindsight": cheapest}
                own = name == "own"
                rows.append(row | {"cost over hindsight": cost / cheapest if own else math.nan})
    return pd.DataFrame(rows)


def prices(found: ReadArrays, draws: int) -> pd.DataFrame:
    """What each price costs and loses on the calibration windows and on the own ones."""
    parts = [looked_up(found, name) for name in ("calibration", "own")]
    nll, scored = (
        np.concatenate([found[f"{name}/{key}"] for name in ("calibration", "own")], -1)
        for key in ("nll", "scored")
    )
    rows = []
    for i, price in enumerate(parts[0][1]):
        cost = float(np.mean([known[price].cost for _, known in parts]))
        told = over_windows(lost_of(nll[i + 1] - nll[0], scored), nll.shape[1], draws)
        row = {"price": price, "cost": cost, "lost": told.value, "low": told.low}
        rows.append(row | {"high": told.high, "windows": nll.shape[1]})
    return pd.DataFrame(rows)


def promised(
    base: Executed, known: Mapping[float, Executed], lost: float, windows: int
) -> list[float]:
    """Prices kept, of `RESPLITS` times that windows are drawn; refused ones are left out."""
    kept = []
    for seed in range(RESPLITS):
        drawn = np.random.default_rng(seed).integers(0, len(base.window_nll), windows)
        at = torch.from_numpy(drawn)
        try:
            found = keep_promise(
                lambda p, at=at: known[p].of_windows(at),  # type: ignore[misc]
                base.of_windows(at), lost, 0.95, list(known),
            )  # fmt: skip
        except ValueError:
            continue
        kept.append(found.kept.price)
    return kept


def share(held: list[bool]) -> dict[str, object]:
    """How often, with its interval (Wilson's, at 95%), and of how many."""
    n = len(held)
    if not n:
        return {"kept": math.nan, "kept low": math.nan, "kept high": math.nan, "trials": 0}
    told = binomtest(sum(held), n).proportion_ci(method="wilson")
    return {"kept": sum(held) / n, "kept low": told.low, "kept high": told.high, "trials": n}


def excess_of(base: Executed, known: Mapping[float, Executed]) -> dict[float, float]:
    """Nats per token over full attention, by price."""
    return {
        price: float((one.window_nll - base.window_nll).sum() / base.window_scored.sum())
        for price, one in known.items()
    }


def guard(found: ReadArrays, draws: int) -> pd.DataFrame:
    """Cost and loss of every text, bare and guarded, at the price of each promise."""
    rows = []
    for promise in dict.fromkeys(key.split("/")[0] for key in found):
        part = of(found, promise)
        price, _, _, bound = part["set"].tolist()
        for name in dict.fromkeys(k.split("/")[0] for k in part if "/" in k):
            base, scored = part[f"{name}/full/nll"], part[f"{name}/scored"]
            bare = part[f"{name}/bare/cost"]
            for policy in ("bare", "guard"):
                more, cost = part[f"{name}/{policy}/nll"] - base, part[f"{name}/{policy}/cost"]
                lost = over_windows(lost_of(more, scored), len(more), draws)
                added = over_windows(added_of(cost, bare), len(more), draws)
                rows.append({"promise": float(promise), "price": price, "text": name})
                rows[-1] |= {"policy": policy, "cost": float(cost.mean())}
                rows[-1] |= {"lost": lost.value, "low": lost.low, "high": lost.high}
                if policy == "guard":
                    rows[-1] |= {"cost added": added.value, "added low": added.low}
                    rows[-1] |= {"added high": added.high, "added at most": bound}
                rows[-1]["windows"] = len(more)
    return pd.DataFrame(rows)


def lost_of(more: np.ndarray, scored: np.ndarray) -> Callable[[np.ndarray], float]:
    """Share of perplexity lost by windows drawn."""
    return lambda rows: math.expm1(more[rows].sum() / scored[rows].sum())


def added_of(cost: np.ndarray, bare: np.ndarray) -> Callable[[np.ndarray], float]:
    """Share by which windows drawn cost more."""
    return lambda rows: float(cost[rows].mean() / bare[rows].mean() - 1)


def decoding(found: ReadArrays, draws: int) -> pd.DataFrame:
    """Tokens decoded one by one under the guard, beside one pass over the same."""
    rows = []
    for name in dict.fromkeys(key.split("/")[0] for key in found):
        part, row = of(found, name), dict[str, object]({"text": name})
        row |= {"texts": len(part["nll"]), "as one pass": float(part["as one pass"].mean())}
        row["cost"] = float(part["cost"].mean())
        for key in ("nll", "nll one pass"):
            tokens = np.full(len(part["nll"]), float(part["decoded"]))
            lost = over_windows(lost_of(part[key] - part["nll full"], tokens), len(tokens), draws)
            kind = "lost" if key == "nll" else "lost in one pass"
            row |= {kind: lost.value, f"{kind}, low": lost.low, f"{kind}, high": lost.high}
        rows.append(row)
    return pd.DataFrame(rows)


def texts_of(found: ReadArrays) -> list[str]:
    """Names of the texts that are not the own one."""
    return [name for name in dict.fromkeys(k.split("/")[0] for k in found) if name != "own"]


TABLES = {
    "evidence": evidence, "confidence": confidence, "risk": risk, "quality": quality,
    "guard": guard, "decoding": decoding,
}  # fmt: skip


def add_options(parser: argparse.ArgumentParser) -> None:
    """What a patch is read with."""
    group = parser.add_argument_group("a patch")
    group.add_argument("--model", type=Path, help="folder of the pretrained model")
    group.add_argument("--token-file", type=Path, help="of `analysis.pretrained.texts`")
    group.add_argument("--readings", type=Path, help="file of arrays (default: OUT/readings.npz)")
    group.add_argument("--device", default="cpu")
    for name, kind in PatchReading.__annotations__.items():
        if kind in (int, float):
            option = f"--patch-{name}"
            group.add_argument(option, type=kind, default=PatchReading._field_defaults[name])


def study(options: argparse.Namespace) -> int:
    """Passes, where a model is given, then tables; how many files were written."""
    parts = options.parts or list(TABLES)
    file = options.readings or options.out / "readings.npz"
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.model is not None:
        plan = PatchReading(**{
            name: getattr(options, f"patch_{name}")
            for name in PatchReading._fields if hasattr(options, f"patch_{name}")
        })  # fmt: skip
        model = load_model(options.model, torch.device(options.device))
        router = load_patch(model, options.run)
        router.full_up_to = 0  # routes are read at every length
        with np.load(options.token_file) as ids:
            held = Study.of(router, dict(ids), plan)
        found = read_parts(held, parts, file)
    else:
        found = load(file)
    count = 0
    for part in (part for part in TABLES if part in parts):
        arrays = of(found, part)
        if not arrays:
            continue
        tables = {part: TABLES[part](arrays, options.draws)}
        if part == "quality":
            tables["prices"] = prices(arrays, options.draws)
        for name, table in tables.items():
            count += len(write(options.out, {f"patch_{name}": table}, {}))
            shown = table.to_string(index=False, float_format=lambda x: f"{x:.4f}")
            print(f"\n## {name}\n{shown}")
    return count
