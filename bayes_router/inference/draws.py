"""Posterior draws that hang on the row of the batch alone.

Who computes it, or beside which others, does not matter.
"""

from collections.abc import Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger

from bayes_router.inference.sites import route_site


class RowDraws(Messenger):
    """Draws the routes of each row after seeding torch with that row's seed and the layer.

    A batch cut into parts, on one process or on several, then gives the routes of the whole batch
    (up to rounding of the concentrations). It costs a sampling call for each row and layer where
    usually one serves all rows.

    Args:
        seeds: one for each row of the batch that the model is about to read.
    """

    def __init__(self, seeds: Sequence[int]):
        super().__init__()
        self.seeds = seeds
        self._layer = 0

    def __enter__(self) -> "RowDraws":
        self._layer = 0
        super().__enter__()
        return self

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if msg["name"] != route_site(self._layer) or msg["is_observed"] or msg["done"]:
            return
        # of the posterior, as the guide has it: [(R,) B, T, E]
        rows = msg["fn"].concentration.unbind(-3)
        family = type(msg["fn"])
        draws = []
        for seed, row in zip(self.seeds, rows, strict=True):
            torch.manual_seed((seed + 7_919 * self._layer) % 2**63)
            draws.append(family(row, validate_args=False).rsample())
        msg["value"], msg["done"] = torch.stack(draws, -3), True
        self._layer += 1
