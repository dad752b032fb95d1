"""Two fits side by side: what differs, then the two reports, on one page."""

import math
from typing import NamedTuple

import jinja2
import torch

from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.headline import headline, settings
from bayes_router.diagnostics.measures.bootstrap import LEVEL, clustered

TEMPLATE = "beside.html.j2"


class Page(NamedTuple):
    """A fit, what was read of it, and its report."""

    name: str
    examined: Examination
    html: str


def write_beside(one: Page, other: Page) -> str:
    """The page as HTML; each report lies in a frame of its own."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("bayes_router.diagnostics", "."), autoescape=True
    )
    pages = (one, other)
    said = [dict(headline(page.examined)) for page in pages]
    names = list(dict.fromkeys(name for table in said for name in table))
    known = [dict(settings(page.examined)) for page in pages]
    keys = sorted({key for table in known for key in table})
    differing = [
        (key, *(table.get(key, "") for table in known))
        for key in keys
        if known[0].get(key) != known[1].get(key)
    ]
    return environment.get_template(TEMPLATE).render(
        pages=pages,
        difference=difference(one.examined, other.examined),
        headline=[(name, *(table.get(name, "") for table in said)) for name in names],
        differing=differing,
    )


def difference(one: Examination, other: Examination) -> str:
    """How much more the second loses under HARD, paired by window, or why that cannot be said."""
    a, b = one.window_nll, other.window_nll
    known = [page.run.config.data.tokeniser for page in (one, other)]
    if known[0] != known[1] or not torch.equal(one.window_print, other.window_print):
        return "They were read on other texts: their losses are not compared."
    if len(a) < 2:
        return "One window was read: no interval can be given, so nothing is compared."
    lost, scored = (b[:, 0] - a[:, 0]).numpy(), a[:, 1].numpy()
    found = clustered(lambda rows: float(lost[rows].sum() / scored[rows].sum()), range(len(lost)))
    sign = "no difference is shown" if found.low <= 0 <= found.high else (
        "the second loses more" if found.value > 0 else "the second loses less"
    )  # fmt: skip
    return (
        f"HARD loss of the second minus the first: {found.value:+.4f} nats per token "
        f"({math.floor(100 * LEVEL)}% {found.low:+.4f} to {found.high:+.4f}, paired over "
        f"{len(lost)} windows of the same text): {sign}."
    )
