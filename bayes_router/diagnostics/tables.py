"""What a report knows as numbers: its tables, and what the page shows of each layer and unit."""

import base64
from collections.abc import Sequence
from typing import Any, NamedTuple

import pandas as pd
from torch import Tensor

from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.measures.collapse import kl_to_prior
from bayes_router.diagnostics.measures.uncertainty import probability_right
from bayes_router.diagnostics.shown import ShownText
from bayes_router.routing.posterior import mutual_information, posterior_mean


def _kl(run: FittedRun, layer: int, q: Tensor, unit: int) -> Tensor:
    """KL of one unit's posteriors [N, E] to its prior without the tilt, [N]."""
    of_units = q[:, None].expand(-1, run.config.model.num_units, -1)
    return kl_to_prior(run.program, layer, of_units, tilted=False)[:, unit]


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


class Table(NamedTuple):
    """A table of the page, which can be had as CSV."""

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


def tables(
    examined: Examination, layers: pd.DataFrame, numbers: Sequence[tuple[str, str]], quick: bool
) -> list[Table]:
    """Those that a run has, the most telling first; what takes long is left out where `quick`."""
    same = "kl_untilted" if examined.run.program.price == 0 else "kl"  # the headline has the sums
    found = [_table("layers", "Layers", layers.drop(columns=same).reset_index())]
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
    names["context_information"] = "what of it the token's identity does not tell, nats"
    names["total_concentration"] = "evidence: mean total concentration of the posteriors"
    names["kl_untilted"] = "KL to the prior without its tilt by a price, nats per token"
    return [
        {
            "name": column.replace("_", " "),
            "meaning": meaning,
            "values": units[column].to_numpy().reshape(shape).round(3).tolist(),
        }
        for column, meaning in names.items()
    ]
