"""What a run's posterior is worth, in tables and figures.

    python -m analysis.posterior RUN [--parts PART ...]
    python -m analysis.posterior PATCH --model MODEL --token-file TOKENS.npz

The second reads a patch, see `analysis.pretrained.uncertainty`.

Parts: collapse (load, information, distance from the prior, by layer and over training); prior
(what it says before any text); uncertainty (by layer, position and kind of token, k-hat, gap,
stability); evidence (AUROC by token against other text, with intervals; --text NAME=FILE adds a
text); confidence (forced routes: the first half of --windows is for fitting, the last for reading);
risk (the estimate against KL(best single expert || routed), on text that neither fit read; RUN
keeps it); quality (a promise read on held-out windows, and how often it is kept when the windows
are drawn anew); guard (set on held-out windows: what it costs, other text under it, decoding).
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd
import torch
from matplotlib.axes import Axes
from torch import Tensor

from analysis.figures import write
from analysis.guarded_run import alternate, guard_tables
from analysis.judged import Written, confidence, promised, risk, text_of
from analysis.pretrained.uncertainty import add_options, study
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.figures import posterior as draw
from bayes_router.diagnostics.figures import verdicts as verdict_plots
from bayes_router.diagnostics.fitted import FittedRun, load_fitted
from bayes_router.diagnostics.measures.collapse import prior_mean
from bayes_router.diagnostics.measures.evidence import evidence_apart
from bayes_router.diagnostics.measures.other_text import other_texts
from bayes_router.diagnostics.reading import read, windows
from bayes_router.routing.posterior import categorical_entropy, expected_entropy
from bayes_router.routing.risk import RiskFit
from bayes_router.training.guarantee import (
    strongest_single,
)

DRAWS = 250


def collapse(run: FittedRun, options: argparse.Namespace) -> Written:
    """Which layers have collapsed, and when."""
    examined = Examination(run, effort=Effort(tokens=options.tokens))
    layers, training = examined.collapse.layers(), examined.training
    tables, figures = (
        {"collapse_by_layer": layers},
        {"load_by_layer": lambda: draw.plot_load_by_layer(layers, run.experts)},
    )
    if len(training):
        tables["collapse_over_training"] = training
        figures["effective_experts"] = lambda: verdict_plots.plot_collapse_over_training(training)
        figures["route_information"] = lambda: verdict_plots.plot_collapse_over_training(
            training, "route_information"
        )
    return Written(
        tables, figures, "\n".join([text_of(layers), *map(str, examined.verdicts(quick=True))])
    )


def prior_table(run: FittedRun, layers: pd.DataFrame) -> pd.DataFrame:
    """One row a layer; entropies in nats, of the Dirichlet before the tilt.

    Cost is relative to full attention.
    """
    mean, concentration = prior_mean(run.program).mean(1), run.program.concentration.double().cpu()
    # over units
    concentration = concentration if concentration.dim() == 2 else concentration.mean(1)
    table = pd.DataFrame(mean.numpy(), columns=[f"prior mean {name}" for name in run.experts])
    table["prior cost"] = (mean @ run.prior.cost_ratio.double()).numpy()
    table["total concentration"] = concentration.sum(-1).numpy()
    table["entropy of prior mean"] = categorical_entropy(mean).numpy()
    table["expected entropy"] = expected_entropy(concentration).numpy()
    table.index.name = "layer"
    return table.join(layers[[f"load {name}" for name in run.experts] + ["kl", "prior_distance"]])


def prior(run: FittedRun, options: argparse.Namespace) -> Written:
    """What the prior says before any text, and how far the posterior moved."""
    examined = Examination(run, effort=Effort(tokens=options.tokens))
    layers = examined.collapse.layers()
    table, figures = prior_table(run, layers), dict[str, Callable[[], Axes]]()
    if len(run.experts) == 3:
        best = int(layers["route_information"].argmax())
        reading = next(read(run.model, windows(examined.source, run.config, options.tokens)))
        torch.manual_seed(0)
        drawn = run.program.token_prior(best).sample(torch.Size([DRAWS])).flatten(0, -2)
        concentration = reading.concentration[best].flatten(0, 2)
        figures["simplex"] = lambda: draw.plot_simplex_density(concentration, drawn, run.experts)
    return Written({"prior_by_layer": table}, figures, text_of(table))


def uncertainty(run: FittedRun, options: argparse.Namespace) -> Written:
    """Is it sure, and is it right, by the posterior's own account.

    What cannot be had is named, the rest stands.
    """
    examined = Examination(run, effort=Effort(tokens=options.tokens))
    summary = examined.uncertainty
    quoted = examined.figures().to_frame()
    quoted.index.name = "figure"
    tables = {
        "uncertainty_by_layer": summary.layers(),
        "uncertainty_by_position": summary.positions(),
        "uncertainty_by_kind": summary.kinds_frame(),
        "figures_to_quote": quoted,
    }
    figures: dict[str, Callable[[], Axes]] = {
        "uncertainty_by_position": lambda: draw.plot_by_position(summary.positions())
    }
    tables |= {
        part: table
        for part in ("regret", "stability", "k_hat")
        if (table := examined.attempt(part)) is not None
    }
    if "k_hat" in tables:
        figures["k_hat"] = lambda: verdict_plots.plot_k_hat(tables["k_hat"])
    if (calibration := examined.attempt("calibration")) is not None:
        tables |= {"reliability": calibration.before, "reliability_tempered": calibration.after}
        figures["reliability"] = lambda: verdict_plots.plot_reliability(
            calibration.before, calibration.after
        )
    other = examined.attempt("other_text")
    if other is not None and len(other):
        tables["other_text"] = other
        figures["other_text"] = lambda: verdict_plots.plot_other_text(other)
        figures["uncertainty_by_kind"] = lambda: draw.plot_by_kind(summary.kinds_frame())
    left_out = "".join(f"\nleft out: {line}" for line in examined.left_out())
    return Written(tables, figures, text_of(quoted) + left_out)


def evidence(run: FittedRun, options: argparse.Namespace) -> Written:
    """Is this text like the fit's, token by token."""
    own, context = held_out(run, options.tokens), run.config.data.context
    others = others_of(run, own, options.text)
    table = evidence_apart(run.model, own, others, context, min(options.draws, 100))
    return Written({"evidence": table}, {}, text_of(table))


def others_of(run: FittedRun, own: Tensor, given: Sequence[str]) -> dict[str, Tensor]:
    """Ids of other texts as long as the own one, by name: `other_texts`, and NAME=FILE."""
    assert run.tokeniser is not None
    others = other_texts(own, run.tokeniser)
    for name, path in (text.split("=", 1) for text in given):
        ids = run.tokeniser.encode(Path(path).read_bytes()[: 8 * len(own)])
        others[name] = torch.from_numpy(ids.astype("int64"))[: len(own)]
    return others


def guard(run: FittedRun, options: argparse.Namespace) -> Written:
    """What a guard costs, and what it does to other text."""
    valid, context = Examination(run).source, run.config.data.context
    count = max(options.tokens or run.config.data.eval_tokens, context) // context
    calibration, own = alternate(valid, context, count)
    refuge = strongest_single(run.model, calibration, run.prior.cost_ratio)
    texts = {"held out": own}
    for name, ids in others_of(run, own[:, :-1].flatten(), options.text).items():
        at = torch.arange((len(ids) - 1) // context)[:, None] * context
        texts[name] = ids[at + torch.arange(context + 1)][: len(own)]
    set_to, table, decoded = guard_tables(run, calibration, texts, refuge, min(options.draws, 400))
    shown = f"{set_to}; refuge {run.experts[refuge]}\n{text_of(table)}\n\n{text_of(decoded)}"
    return Written({"guard": table, "decoding": decoded}, {}, shown)


def held_out(run: FittedRun, tokens: int | None) -> Tensor:
    """Token ids of the run's held-out text."""
    context = run.config.data.context
    limit = max(tokens or run.config.data.eval_tokens, context)
    batches = list(Examination(run).source.windows(context, 1, limit))
    return torch.cat([*(batch.tokens.flatten() for batch in batches), batches[-1].targets[0, -1:]])


PARTS: dict[str, Callable[[FittedRun, argparse.Namespace], Written]] = {
    "collapse": collapse,
    "prior": prior,
    "uncertainty": uncertainty,
    "evidence": evidence,
    "confidence": confidence,
    "risk": risk,
    "quality": promised,
    "guard": guard,
}


def main() -> None:
    """Parse, then each part: examine, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run folder")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=dict.fromkeys((*PARTS, "decoding")),
        help="what to examine (default: all that is known of a run or patch)",
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: RUN/analysis)")
    parser.add_argument(
        "--tokens", type=int, help="held-out tokens to read (default: the run's eval_tokens)"
    )
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="another text for evidence"
    )
    parser.add_argument(
        "--windows", type=int, default=96, help="in which routes are forced, for confidence"
    )
    parser.add_argument("--pairs", type=int, default=32, help="of token and layer, forced in each")
    parser.add_argument(
        "--draws", type=int, default=400, help="of a bootstrap; at most 100 where tokens are many"
    )
    parser.add_argument(
        "--risk-steps", type=int, default=RiskFit().steps, help="of the estimate of risk"
    )
    add_options(parser)
    options = parser.parse_args()
    options.out = options.out or options.run / "analysis"
    if options.model is not None or options.readings is not None:
        print(f"\n{study(options)} files in {options.out}")
        return
    run, count = load_fitted(options.run, options.device), 0
    for name in options.parts or PARTS:
        try:
            found = PARTS[name](run, options)
        except ValueError as error:
            print(f"\n## {name}: left out: {error}", file=sys.stderr)
            continue
        count += len(write(options.out, found.tables, found.figures))
        print(f"\n## {name}\n{found.shown}", flush=True)
    print(f"\n{count} files in {options.out}")


if __name__ == "__main__":
    main()
