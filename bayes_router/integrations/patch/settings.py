"""What a patch was asked for, the layers that it found, and how it was fitted."""

from dataclasses import asdict, dataclass, field
from typing import Any

from bayes_router.checks import choose, require, unknown
from bayes_router.config import PriorConfig
from bayes_router.integrations.calls.layer import EXPERTS
from bayes_router.types import RouteBy

OLD_NAME = "linear"
"""What `mapped` was called in patches once; those that were saved then are read."""


@dataclass(frozen=True)
class PatchSettings:
    """What `patch` was asked for.

    Attributes:
        window: keys that `local` sees, the token itself included.
        experts: names, in the order of the routing latent; `full` is always among them.
        route_by: what chooses: `layer`, `kv_head` or `head`.
        layers: indices of the attention layers to route, in the order in which the model runs them;
            None: all.
        sinks: first tokens that `local` sees beside its window.
        prior: the compute-aware prior of `fit`.
        context: tokens at which FLOPs and latency are compared, where the prior's cost asks for
            them; a layer whose own window is shorter pays for that window.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.
    """

    window: int = 256
    experts: tuple[str, ...] = ("full", "mapped", "local")
    route_by: str = "layer"
    layers: tuple[int, ...] | None = None
    sinks: int = 0
    prior: PriorConfig = field(default_factory=lambda: PriorConfig(price=2.0))
    context: int = 1024
    controller_hidden: int = 64
    concentration_floor: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        require(self.window >= 1, "window", "at least 1 (a token sees itself)", self.window)
        require(self.sinks >= 0, "sinks", "0 or more tokens", self.sinks)
        require(self.context >= 1, "context", "at least 1 token", self.context)
        choose("route_by", self.route_by, RouteBy)
        require(
            "full" in self.experts,
            "experts",
            "'full' among them (the model's own attention)",
            self.experts,
        )
        require(
            OLD_NAME not in self.experts,
            "experts",
            "'mapped' for linear attention with a learned feature map; 'linear' is another "
            "mechanism, which no patch has",
            self.experts,
            "write 'mapped' in its place",
        )
        for name in self.experts:
            if name not in EXPERTS:
                raise unknown("experts", name, EXPERTS)
        require(
            len(set(self.experts)) == len(self.experts), "experts", "no name twice", self.experts
        )
        require(
            self.layers is None or len(self.layers) > 0,
            "layers",
            "at least one index, or None for all",
            self.layers,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FitRecord:
    """How a patch was fitted, as its folder remembers it.

    What its Pyro program and its diagnostics need to know.

    Attributes:
        context: tokens of a sequence.
        tokens: of text that was read for fitting.
        kl_weight: of the objective at the end.
        price: of the prior's tilt at the end, nats per unit of cost.
        straight_through: whether draws were executed as their argmax at the end.
        likelihood: model or text, see `FitSettings`.
        budget: cost at which the fit was held, or (low, high) of the range that it serves; None: at
            the prior's own price.
        tokenizer: the name of the one that made the tokens; None where ids were given.
        text: `fingerprint` of what was read; () in a folder of before.
    """

    context: int
    tokens: int
    kl_weight: float
    price: float
    straight_through: bool
    likelihood: str
    budget: float | tuple[float, float] | None = None
    tokenizer: str | None = None
    text: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """A range is a list in a file."""
        object.__setattr__(self, "text", tuple(self.text))
        if isinstance(self.budget, list):
            object.__setattr__(self, "budget", tuple(self.budget))
