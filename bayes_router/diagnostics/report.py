"""One self-contained HTML file.

The verdicts, the figures, and the text itself, coloured by route.
"""

import base64
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from typing import Any, NamedTuple

import jinja2
import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.figures import posterior as posterior_plots
from bayes_router.diagnostics.figures import run as plots
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.headline import commands, headline, settings, versions
from bayes_router.diagnostics.measures.collapse import kl_to_prior
from bayes_router.diagnostics.measures.uncertainty import probability_right
from bayes_router.diagnostics.measures.verdict import Severity
from bayes_router.diagnostics.reading import pieces, read, text_windows
from bayes_router.diagnostics.shading import SCALES
from bayes_router.routing.posterior import mutual_information, posterior_mean
from bayes_router.routing.watch import watching
from bayes_router.training.risk import read_risk

SHOWN_TOKENS = 4000
DRAWN_LAYERS = 8  # lines of a figure that are told apart
TEMPLATE = "report.html.j2"


class ShownText(NamedTuple):
    """A text as a run routes it, ready to be shown."""

    pieces: list[str]  # what each token shows
    concentration: Tensor  # [L, N, E], of the unit that is shown
    hard_choice: Tensor  # int64 [L, N], of that unit
    nll: Tensor  # [N], of the token itself given those before it in its window; nan for the first
    numbers: Mapping[str, Tensor] = {}  # [N] by the name of a `Scale`, those that the fit can say
    mean: Tensor | None = None  # [L, R, N, E], of every unit
    choice: Tensor | None = None  # int64 [L, R, N], of every unit


def route_text(
    run: FittedRun,
    text: bytes | None = None,
    limit: int = SHOWN_TOKENS,
    source: Any = None,
    unit: int = 0,
) -> ShownText:
    """Read a text, or the first held-out windows of the run, window by window.

    Args:
        run: the run.
        text: UTF-8; None takes held-out text.
        limit: tokens at most.
        source: held-out data, where `text` is None.
        unit: of routing, that is shown.

    Raises:
        ValueError: a unit that the run has not, an empty text, one that is not UTF-8, or text for a
            run whose tokens are none.
    """
    require(limit >= 1, "limit", "at least one token", limit)
    units = run.config.model.num_units
    require(
        0 <= unit < units,
        "unit",
        f"0 to {units - 1}",
        unit,
        f"the fit routes by {run.config.model.route_by}",
    )
    context = run.config.data.context
    if text is None:
        require(source is not None, "source", "held-out data where no text is given", None)
        shown = -(-limit // context) * context  # whole windows
        batches: Iterator[Batch] = (
            Batch(t[None], y[None])
            for b in source.windows(context, 8, shown)
            for t, y in zip(*b, strict=True)
        )
    else:
        tokeniser = run.tokeniser
        of = (
            "a patched model without its tokenizer"
            if run.patched
            else "a run on recall, whose tokens are no text"
        )
        require(tokeniser is not None, "text", "a fit on text", of)
        assert tokeniser is not None
        batches = text_windows(text, tokeniser, context, limit, run.causal)
    ids, concentration, choice, nll = [], [], [], []
    means, choices = [], []
    numbers: dict[str, list[Tensor]] = {}
    for reading in read(run.model, batches):
        ids += reading.tokens[0].tolist()
        concentration.append(reading.concentration[:, 0, :, unit].cpu())
        choice.append(reading.hard_choice[:, 0, :, unit].cpu())
        means.append(posterior_mean(reading.concentration[:, 0].double().cpu()).movedim(2, 1))
        choices.append(reading.hard_choice[:, 0].cpu().movedim(2, 1))
        nll.append(reading.own_nll(run.causal)[0].cpu())
        for key, values in token_numbers(run.model, reading.tokens).items():
            numbers.setdefault(key, []).append(values)
    parts = (torch.cat(concentration, 1), torch.cat(choice, 1), torch.cat(nll))
    said = {key: torch.cat(values)[:limit] for key, values in numbers.items()}
    text_of = pieces(ids[:limit], run.tokeniser)
    of_units = (torch.cat(means, 2)[:, :, :limit], torch.cat(choices, 2)[:, :, :limit])
    return ShownText(
        text_of, parts[0][:, :limit], parts[1][:, :limit], parts[2][:limit], said, *of_units
    )


@torch.no_grad()
def token_numbers(model: Any, tokens: Tensor) -> dict[str, Tensor]:
    """Risk [T] and how foreign each of tokens [1, T] is, as far as the fit kept what they need.

    One more pass.
    """
    controller, found = model.controller, dict[str, Tensor]()
    if controller.risk is None and controller.evidence is None:
        return found
    seen = nullcontext() if controller.evidence is None else watching(controller)
    with seen as watch:
        if controller.risk is not None:
            found["risk"] = read_risk(model, tokens)[0].cpu()
        else:
            model(tokens)
    if watch is not None:
        usual = torch.stack([layer.log_budget.cpu() for layer in controller.evidence.layers])
        found["foreign"] = (usual[:, None] - watch.log_evidence[:, 0]).mean(0)
    return found


def _kl(run: FittedRun, layer: int, q: Tensor, unit: int) -> Tensor:
    """KL of one unit's posteriors [N, E] to its prior, [N]."""
    return kl_to_prior(run.program, layer, q[:, None].expand(-1, run.config.model.num_units, -1))[
        :, unit
    ]


def layer_tables(run: FittedRun, shown: ShownText, unit: int = 0) -> list[dict[str, Any]]:
    """What the page needs of each layer, as short lists.

    Choice, posterior mean (per mille), and what a hover shows.
    """
    tables = []
    for layer, q in enumerate(shown.concentration):
        mean = posterior_mean(q.double())
        tables.append(
            {
                "choice": shown.hard_choice[layer].tolist(),
                "mean": (1000 * mean).round().int().tolist(),
                "sure": (1000 * probability_right(q)).round().int().tolist(),
                "total": [round(x, 2) for x in q.sum(-1).tolist()],
                "information": [round(x, 3) for x in mutual_information(q.double()).tolist()],
                "kl": [round(x, 2) for x in _kl(run, layer, q.to(run.device), unit).tolist()],
            }
        )
    return tables


def unit_tables(shown: ShownText) -> list[list[dict[str, str]]]:
    """Of each layer and unit the choices, a digit a token, and the means in 255ths as base64.

    Empty where there is one unit, which `layer_tables` has whole.
    """
    if shown.choice is None or shown.mean is None or shown.choice.shape[1] == 1:
        return []
    return [
        [
            {
                "choice": "".join(map(str, choice.tolist())),
                "mean": base64.b64encode(bytes((255 * mean).round().byte().flatten())).decode(),
            }
            for choice, mean in zip(choices, means, strict=True)
        ]
        for choices, means in zip(shown.choice, shown.mean, strict=True)
    ]


def figure(draw: Callable[[], Axes]) -> str:
    """A figure as the data of an <img>: PNG in base64."""
    with sns.axes_style("ticks"), sns.plotting_context("notebook", font_scale=0.85):
        drawn = draw().get_figure(root=True)
        assert drawn is not None
        buffer = io.BytesIO()
        drawn.savefig(buffer, dpi=110, bbox_inches="tight", format="png")
        plt.close(drawn)
    return base64.b64encode(buffer.getvalue()).decode()


def figures(examined: Examination, shown: ShownText, quick: bool) -> list[dict[str, str]]:
    """Title, caption and image of every figure that the run has."""
    run, layers = examined.run, examined.collapse.layers()
    experts = run.experts
    found = [("Load by layer", "Share of held-out tokens on each expert, the route executed.",
              lambda: posterior_plots.plot_load_by_layer(layers, experts,
                  tall(len(layers))))]  # fmt: skip
    if run.config.model.num_units > 1:
        found += _of_units(examined.collapse.units(), run)
    if len(experts) == 3:
        layer = int(layers["route_information"].argmax())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            prior = run.program.token_prior(layer).sample(torch.Size([250])).flatten(0, -2)
        found.append(
            (f"Posteriors on the simplex, layer {layer}",
                ("Draws from the posteriors of the " "tokens below, and from the prior."),
             lambda: posterior_plots.plot_simplex_density(shown.concentration[layer], prior,
                 experts))
        )  # fmt: skip
    positions, few = few_layers(examined.uncertainty.positions())
    found.append(
        (
            "Uncertainty by position",
            f"Mean over held-out windows, by place in the window{few}.",
            lambda: posterior_plots.plot_by_position(positions),
        )
    )
    kinds, few = few_layers(examined.uncertainty.kinds_frame())
    if len(kinds):
        caption = f"Mean over held-out text{few}."
        found.append(
            ("Uncertainty by kind of token", caption, lambda: posterior_plots.plot_by_kind(kinds))
        )
    training = examined.attempt("training")
    if training is not None and len(training):
        found.append(("Over training", "Filled where a collapse was raised.",
                      lambda: posterior_plots.plot_collapse_over_training(training)))  # fmt: skip
        metrics = pd.read_csv(run.path / "metrics.csv")
        found.append(
            (
                "Cost against nll",
                "One point an evaluation, joined in time.",
                lambda: plots.plot_cost(metrics),
            )
        )
        found += [
            (f"Over training: {title}", f"In {unit}.", partial(plots.plot_term, metrics, term))
            for term, (title, unit) in plots.TERMS.items()
        ]
    if not quick:
        found += [
            plot
            for diagnostic, result in examined.found()
            for plot in diagnostic.plots(examined, result)
        ]
    drawn = []
    for title, caption, draw in found:
        try:
            drawn.append({"title": title, "caption": caption, "image": figure(draw)})
        # of whatever kind: the other figures and the text are worth more than it
        except Exception as error:
            examined.leave_out(f"figure '{title}'", error)
    return drawn


def _of_units(units: pd.DataFrame, run: FittedRun) -> list[tuple[str, str, Callable[[], Axes]]]:
    """Heat maps, layer by unit, of the load of the costliest expert and of route information."""
    dearest = run.experts[int(torch.as_tensor(run.prior.cost_ratio).argmax())]
    load, information = f"load {dearest}", "route_information"
    return [
        (f"Heads on {dearest}", f"Share of held-out tokens on {dearest}, the route executed.",
         lambda: posterior_plots.plot_units(units, load, f"share on {dearest}")),
        ("What the token decides",
            ("Route information: 0 where a unit takes one route whatever " "the token."),
         lambda: posterior_plots.plot_units(units, information, "nats")),
    ]  # fmt: skip


def tall(num_layers: int) -> Axes:
    """Axes with room for a bar a layer."""
    axes: Axes = plt.subplots(figsize=(5, max(3.0, 0.22 * num_layers)))[1]
    return axes


def few_layers(frame: pd.DataFrame) -> tuple[pd.DataFrame, str]:
    """The rows of at most `DRAWN_LAYERS` layers, evenly spaced, and what the caption says of it."""
    layers = sorted(frame["layer"].unique())
    if len(layers) <= DRAWN_LAYERS:
        return frame, ""
    kept = [layers[round(i * (len(layers) - 1) / (DRAWN_LAYERS - 1))] for i in range(DRAWN_LAYERS)]
    return frame[frame["layer"].isin(kept)], f", {DRAWN_LAYERS} of {len(layers)} layers"


def write_report(
    examined: Examination,
    text: bytes | None = None,
    limit: int = SHOWN_TOKENS,
    quick: bool = False,
    name: str = "",
) -> str:
    """The report of a run as HTML.

    Args:
        examined: the diagnostics of the run.
        text: UTF-8 to show; None shows held-out text of the run.
        limit: tokens shown at most; the page was tried with 20,000.
        quick: leave out what needs more than one reading of the text (guide, calibration, other
            text).
        name: of the text, for the heading.

    Raises:
        ValueError: see `route_text`.
    """
    run = examined.run
    shown = route_text(run, text, limit, examined.source)
    order = list(Severity)[::-1]
    verdicts = sorted(examined.verdicts(quick), key=lambda verdict: order.index(verdict.severity))
    data = {
        "experts": run.experts,
        "colours": list(plots.expert_palette(run.experts).values()),
        "cost": [round(float(r), 4) for r in run.prior.cost_ratio],
        "pieces": shown.pieces,
        "nll": [None if x != x else round(x, 2) for x in shown.nll.tolist()],
        "layers": layer_tables(run, shown),
        "units": unit_tables(shown),
        "heat": heat(examined),
        "scales": [
            {
                "name": one.name,
                "meaning": one.meaning,
                "steps": one.steps(),
                "edges": one.edges,
                "values": [float(f"{x:.4g}") for x in shown.numbers[one.name].tolist()],
            }
            for one in SCALES
            if one.name in shown.numbers
        ],
    }
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bayes_router.diagnostics", "."), autoescape=True
    )
    layers = examined.collapse.layers()
    drawn = figures(examined, shown, quick)
    numbers = [] if quick else [(str(k), f"{v:.3f}") for k, v in examined.figures().items()]
    summary = layers.join(
        examined.uncertainty.layers()[
            ["entropy_of_mean", "mutual_information", "probability_right"]
        ]
    )
    return environment.get_template(TEMPLATE).render(
        run=str(run.path),
        text_name=name or f"Held-out text of {run.config.data.corpus}",
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        tokens=examined.collapse.tokens,
        verdicts=verdicts,
        left_out=examined.left_out(quick),
        figures=drawn,
        headline=headline(examined),
        commands=commands(examined),
        settings=settings(examined),
        versions=versions(),
        tables=_tables(examined, summary, numbers, quick),
        data=data,
    )


class Table(NamedTuple):
    """A table of the page, which can be had as CSV."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def _tables(
    examined: Examination, layers: pd.DataFrame, numbers: Sequence[tuple[str, str]], quick: bool
) -> list[Table]:
    found = [_table("layers", "Layers", layers.reset_index())]
    if examined.run.config.model.num_units > 1:
        found.append(_table("units", "Units", examined.collapse.units()))
    rivals = None if quick else examined.attempt("rivals")
    if rivals is not None:
        found.insert(0, _table("rivals", "Dial and static rivals", rivals))
    if numbers:
        found.append(Table("numbers", "Numbers", ("name", "value"), numbers))
    return found


def _table(name: str, title: str, frame: pd.DataFrame) -> Table:
    columns = [str(column).replace("_", " ") for column in frame.columns]
    return Table(name, title, columns, [list(map(_cell, row)) for row in frame.to_numpy().tolist()])


def _cell(value: object) -> str:
    if not isinstance(value, float):
        return str(value)
    return "" if value != value else str(int(value)) if value.is_integer() else f"{value:.3f}"


def heat(examined: Examination) -> list[dict[str, Any]]:
    """What the map of layers and units can show: a name, a sentence, and values [L][R]."""
    units = examined.collapse.units()
    shape = (len(examined.collapse.layers()), -1)
    names = {f"load {name}": f"share of tokens on {name}" for name in examined.run.experts}
    names["route_information"] = "route information, nats: 0 where no token moves the route"
    return [
        {
            "name": column.replace("_", " "),
            "meaning": meaning,
            "values": units[column].to_numpy().reshape(shape).round(3).tolist(),
        }
        for column, meaning in names.items()
    ]
