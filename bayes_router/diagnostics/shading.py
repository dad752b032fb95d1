"""A text coloured by a number of each token, in five shades: by risk, or by how foreign it is."""

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import unknown


class Scale(NamedTuple):
    """From a number to a shade, 0 to 4."""

    name: str
    edges: tuple[float, float, float, float]
    meaning: str

    def shades(self, values: Tensor) -> list[int]:
        """The shade of each of values [N]."""
        found: list[int] = torch.bucketize(
            values.double(), torch.tensor(self.edges, dtype=torch.float64)
        ).tolist()
        return found

    def steps(self) -> list[str]:
        """What each shade stands for."""
        ends = [f"{edge:g}" for edge in self.edges]
        return [f"to {ends[0]}", *(f"to {end}" for end in ends[1:]), f"above {ends[-1]}"]


SCALES = (
    Scale("risk", (0.001, 0.01, 0.03, 0.1), "estimated KL(unrouted || routed), nats"),
    Scale(
        "foreign",
        (0.5, 1.0, 2.0, 4.0),
        "nats by which log evidence of the last tokens lies below the fit's budget",
    ),
)
HEADS = Scale("heads", (0.2, 0.4, 0.6, 0.8), "share of a layer's units on its costliest expert")
"""Edges fixed, so that shades of two texts compare."""


def scale(name: str) -> Scale:
    """The scale called `name`.

    Raises:
        ValueError: there is none.
    """
    known = {one.name: one for one in (*SCALES, HEADS)}
    if name not in known:
        raise unknown("by", name, ("route", *known))
    return known[name]
