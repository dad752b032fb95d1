"""The figures of a report: which a run has, each drawn as an image of the page."""

import base64
import io
from collections.abc import Callable
from functools import partial

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes

from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.figures import posterior as posterior_plots
from bayes_router.diagnostics.figures import run as plots
from bayes_router.diagnostics.figures import verdicts as verdict_plots
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.shown import ShownText

DRAWN_LAYERS = 8  # lines of a figure that are told apart


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
                      lambda: verdict_plots.plot_collapse_over_training(training)))  # fmt: skip
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
    """Heat maps, layer by unit: load of the costliest expert, information, and evidence."""
    dearest = run.experts[int(torch.as_tensor(run.prior.cost_ratio).argmax())]
    load, information = f"load {dearest}", "route_information"
    return [
        (f"Heads on {dearest}", f"Share of held-out tokens on {dearest}, the route executed.",
         lambda: posterior_plots.plot_units(units, load, f"share on {dearest}")),
        ("What the token decides",
            ("Route information: 0 where a unit takes one route whatever " "the token."),
         lambda: posterior_plots.plot_units(units, information, "nats")),
        ("What the context decides", "Of that, what the token's identity does not tell.",
         lambda: posterior_plots.plot_units(units, "context_information", "nats")),
        ("Evidence of each head", "Mean total concentration of the posteriors.",
         lambda: posterior_plots.plot_units(units, "total_concentration", "observations")),
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
