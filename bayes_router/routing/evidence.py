"""Is this text like the fit's?

A density of what the controllers read, and the total concentration that it grants.

Natural posterior networks (arXiv 2105.04471) let an input add to the prior as many
pseudo-observations as its density grants:

    n_post(h) = n_prior + n(h)        chi_post(h) = (n_prior chi_prior + n(h) chi(h)) / n_post(h)

For a Dirichlet, n is the total concentration and chi the mean. `Watch.total` is n_post; the mean
that routes tokens stays the controller's, so that budgets, losses and times do.

The density is a multivariate Student t in K whitened directions of h, those in which the text of
the fit varies least: p(h) is proportional to (1 + d2(h) / K)^-K, with d2 the squared distance from
the mean in standard deviations. n is its K-th root (the paper, too, lets its budget grow with the
dimension),

    n(h) = 2 budget / (1 + d2(h) / K)

which is the budget for a token at the mean squared distance of the fit's text, d2 = K, and
underflows nowhere in float32.
"""

import math

import torch
from torch import Tensor, nn

from bayes_router.checks import require

DIRECTIONS = 8
MEMORY = 128
FLATTEST = 1e-4
"""Least variance of a direction, relative to the mean of all: below that float32 tells noise from
signal no more."""


class Moments:
    """Mean [D] and covariance [D, D] of the rows of a stream, by sums in float64.

    And the mean of one number beside each row.
    """

    def __init__(self, width: int):
        self.count, self.beside = 0, 0.0
        # near the mean: sums of squares of what is far from zero lose digits
        self._shift: Tensor | None = None
        self._sum, self._square = (
            torch.zeros(width, dtype=torch.float64),
            torch.zeros(width, width, dtype=torch.float64),
        )

    def add(self, rows: Tensor, beside: Tensor) -> None:
        """Take in rows [..., D] and numbers [...]."""
        device = rows.device if rows.is_cuda else "cpu"  # who has float64
        x = rows.detach().reshape(-1, rows.shape[-1]).to(device, torch.float64)
        if self._shift is None:
            self._shift = x.mean(0)
            self._sum, self._square = self._sum.to(device), self._square.to(device)
        x = x - self._shift
        self.count += len(x)
        self._sum += x.sum(0)
        self._square += x.T @ x
        self.beside += float(beside.detach().double().sum())

    @property
    def mean(self) -> Tensor:
        """[D], float64."""
        assert self._shift is not None
        return (self._shift + self._sum / self.count).cpu()

    @property
    def covariance(self) -> Tensor:
        """[D, D], float64."""
        centre = self._sum / self.count
        return (self._square / self.count - torch.outer(centre, centre)).cpu()


class LayerEvidence(nn.Module):
    """hidden [..., D] -> log n(hidden) [...], nats; see the file's head."""

    centre: Tensor  # [K], the mean of the fit's text in the directions
    directions: Tensor  # [K, D], each divided by its standard deviation
    log_budget: Tensor  # []

    def __init__(self, centre: Tensor, directions: Tensor, log_budget: Tensor):
        super().__init__()
        for name, value in (
            ("centre", centre),
            ("directions", directions),
            ("log_budget", log_budget),
        ):
            # a file of its own: runs of before have none
            self.register_buffer(name, value, persistent=False)

    @classmethod
    def of(cls, moments: Moments, dimensions: int = DIRECTIONS) -> "LayerEvidence":
        """The evidence of a stream; its budget is the mean of what stood beside the rows.

        Raises:
            ValueError: fewer rows than numbers in a row.
        """
        width = len(moments.mean)
        require(
            moments.count > width,
            "texts",
            f"more than {width} tokens",
            moments.count,
            "give more text",
        )
        variance, axes = torch.linalg.eigh(moments.covariance)  # ascending
        scale = variance.clamp_min(FLATTEST * variance.mean()).rsqrt()
        kept = min(dimensions, width)
        directions = (axes * scale).T[:kept]
        budget = torch.tensor(moments.beside / moments.count)
        return cls(
            (directions @ moments.mean).float(), directions.float().contiguous(), budget.log()
        )

    def distance(self, hidden: Tensor) -> Tensor:
        """Squared distance over K, about 1 on text like the fit's; [...]."""
        if self.centre.device != hidden.device:
            self.to(hidden.device)
        with torch.autocast(hidden.device.type, enabled=False):
            return (hidden.float() @ self.directions.T - self.centre).square().mean(-1)

    def forward(self, hidden: Tensor) -> Tensor:
        """See the class."""
        return log_granted(self.log_budget, self.distance(hidden))


def log_granted(log_budget: Tensor, distance: Tensor) -> Tensor:
    """Log n of what is at a squared distance over K: log(2 budget / (1 + distance))."""
    return log_budget + math.log(2) - distance.log1p()


class Evidence(nn.Module):
    """What the text of a fit grants to the posteriors of every layer.

    Args:
        layers: one a layer.
        prior_total: [L], the total concentration of the prior.
        memory: tokens over which a running mean forgets, see `Watch`.
    """

    prior_total: Tensor

    def __init__(self, layers: list[LayerEvidence], prior_total: Tensor, memory: int = MEMORY):
        super().__init__()
        require(memory >= 1, "memory", "at least 1 token", memory)
        self.layers, self.memory = nn.ModuleList(layers), memory
        self.register_buffer("prior_total", prior_total.float(), persistent=False)

    def of(self, layer: int) -> LayerEvidence:
        """The density of a layer."""
        found = self.layers[layer]
        assert isinstance(found, LayerEvidence)
        return found

    def log_granted(self, layers: list[int], distance: Tensor) -> Tensor:
        """Log n of what is at distances [L, B, T] in these layers: [L, B, T]."""
        budgets = torch.stack([self.of(layer).log_budget for layer in layers])
        return log_granted(budgets.to(distance.device)[:, None, None], distance)

    def log_evidence(self, layer: int, hidden: Tensor) -> Tensor:
        """Log n(hidden) of tokens [..., D] in a layer: [...]."""
        found: Tensor = self.of(layer)(hidden)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """What is kept on disk."""
        parts = [self.of(layer) for layer in range(len(self.layers))]
        stacked = {
            n: torch.stack([getattr(p, n).cpu() for p in parts])
            for n in ("centre", "directions", "log_budget")
        }
        return stacked | {
            "prior_total": self.prior_total.cpu(),
            "memory": torch.tensor(self.memory),
        }

    @classmethod
    def from_tensors(cls, kept: dict[str, Tensor], num_layers: int, width: int) -> "Evidence":
        """The inverse of `tensors`.

        Raises:
            ValueError: tensors are missing, or are those of another model.
        """
        names = {"centre", "directions", "log_budget", "prior_total", "memory"}
        require(set(kept) == names, "evidence", f"tensors {', '.join(sorted(names))}", sorted(kept))
        L, K, D = kept["directions"].shape if kept["directions"].dim() == 3 else (0, 0, 0)
        shapes = {
            "directions": (num_layers, K, width),
            "centre": (num_layers, K),
            "log_budget": (num_layers,),
        }
        for name, shape in (shapes | {"prior_total": (num_layers,), "memory": ()}).items():
            require(
                tuple(kept[name].shape) == shape,
                f"evidence {name}",
                f"shape {shape}",
                tuple(kept[name].shape),
            )
        finite = all(bool(torch.isfinite(kept[name]).all()) for name in names)
        require(finite, "evidence", "finite numbers", "others")
        rows = zip(kept["centre"], kept["directions"], kept["log_budget"], strict=True)
        return cls([LayerEvidence(*row) for row in rows], kept["prior_total"], int(kept["memory"]))
