"""One self-contained HTML file.

The verdicts, the figures, and the text itself, coloured by route.
"""

from datetime import UTC, datetime
from typing import Any

import jinja2

from bayes_router.diagnostics.drawn import figures
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.figures import run as plots
from bayes_router.diagnostics.headline import commands, headline, settings, versions
from bayes_router.diagnostics.measures.verdict import Severity
from bayes_router.diagnostics.shading import SCALES
from bayes_router.diagnostics.shown import SHOWN_TOKENS, ShownText, route_text
from bayes_router.diagnostics.tables import heat, layer_tables, tables, unit_tables

TEMPLATE = "report.html.j2"


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
        tables=tables(examined, summary, numbers, quick),
        data=_data(examined, shown),
    )


def _data(examined: Examination, shown: ShownText) -> dict[str, Any]:
    """What the script of the page reads."""
    run = examined.run
    return {
        "experts": run.experts,
        "price": run.program.price,
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
