"""Keeping to a time: what a group of calls will take at the least.

It is told by those of its kind that were measured before it.
"""

import torch

from bayes_router.benchmark.cases import WINDOW, Shape
from bayes_router.benchmark.plan import BESIDE

BACKWARD = 3.5
"""Work of a forward and backward pass over that of a forward one: two products against seven."""
ROUNDS = 2
"""Times that every call is made at the least: to warm up, and to be measured."""
PROCESS = 5.0
"""Seconds in which a fresh process imports torch, to read its peak memory on a CPU; at the least.
"""
TRIED = 2048
"""Tokens of the text on which a kind that was never measured is tried before a longer one."""
SHARE = 1 / 3
"""Of the time that is left, which one group may take: others are to come."""


class Pace:
    """Learns how fast this device is, and says whether a group still fits.

    On a GPU a new length takes seconds to compile, which no earlier one foretells: there everything
    fits.
    """

    def __init__(self, device: torch.device, share: float = SHARE):
        self.learns, self.share = device.type == "cpu", share
        # for a unit of work, of each kind of pass; the slowest so far
        self.seconds: dict[str, float] = {}
        self.process = PROCESS
        """Seconds of a reading in a process of its own; of the slowest so far."""

    def learn(self, what: str, shape: Shape, once: float) -> None:
        """A turn of the calls of a group took `once` seconds."""
        if self.learns:
            self.seconds[what] = max(self.seconds.get(what, 0.0), once / work(what, shape))

    def expected(self, what: str, shape: Shape, variants: int = 1) -> float:
        """Seconds that a group will take at the least; 0 where nothing like it was measured."""
        if what == "training memory":  # each variant once, on one thread, in a process of its own
            forward = self.seconds.get("forward", 0.0) * torch.get_num_threads()
            return (
                variants * (self.process + forward * work("forward+backward", shape))
                if self.learns
                else 0.0
            )
        return ROUNDS * self.seconds.get(what, 0.0) * work(what, shape)

    def unknown(self, what: str, shape: Shape) -> bool:
        """Whether nothing says how long such a group takes, though its text is long."""
        causal = what in ("forward", "forward+backward", "decode", BESIDE)
        return self.learns and causal and shape.T > TRIED and what not in self.seconds

    def fits(self, what: str, shape: Shape, left: float, variants: int = 1) -> bool:
        """Whether a group may begin with so many seconds left."""
        return left > 0 and self.expected(what, shape, variants) <= left * self.share


def work(what: str, shape: Shape) -> float:
    """Operations of the calls of a kind, up to a factor that is the same for all lengths."""
    keys = {"decode": 1, "alone": WINDOW}.get(what, shape.T)
    return (
        shape.B
        * shape.H
        * shape.Dh
        * shape.T
        * keys
        * (BACKWARD if what == "forward+backward" else 1.0)
    )
