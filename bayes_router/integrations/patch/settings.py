"""What a patch was asked for, and how it was fitted."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bayes_router.checks import check_kinds, choose, require, unknown
from bayes_router.config import PriorConfig
from bayes_router.files import PATCH
from bayes_router.hub import folder_of
from bayes_router.integrations.calls.layer import EXPERTS
from bayes_router.routing.cost import CostBy
from bayes_router.types import RouteBy

SETTINGS = PATCH
OLD_NAME = "linear"
"""What `mapped` was called in patches once; those that were saved then are read."""


@dataclass(frozen=True)
class RouterConfig:
    """What `patch` is asked for: `patch(model, config=RouterConfig(window=128))`.

    `router.save_pretrained` writes it into router.json; `RouterConfig.from_pretrained` reads it
    there, without the model.

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
        check_kinds(self)
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
        kind = type(self.prior).__name__
        require(isinstance(self.prior, PriorConfig), "prior", "a PriorConfig", kind)
        given = self.prior.cost_ratio
        require(
            given is None or len(given) == len(self.experts),
            "prior.cost_ratio",
            f"one number for each of the experts {', '.join(self.experts)}",
            given,
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RouterConfig":
        """What `to_dict` gave, also by way of JSON.

        Raises:
            ValueError: a field is unknown, or its value is refused.
        """
        names = {f.name for f in fields(cls)}
        for name in values:
            if name not in names:
                raise unknown("RouterConfig", name, names)
        return cls.from_saved(values)

    @classmethod
    def from_saved(cls, values: Mapping[str, Any]) -> "RouterConfig":
        """The settings in a router.json of any version: fields of before are left out."""
        known = _tuples(values, cls)
        known["prior"] = PriorConfig(**_tuples(values.get("prior", {}), PriorConfig))
        known["experts"] = tuple(
            "mapped" if name == OLD_NAME else name for name in known.get("experts", cls.experts)
        )
        return cls(**known)

    def to_json(self) -> str:
        """The settings as JSON; `from_json` reads it back unchanged."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> "RouterConfig":
        """What `to_json` wrote.

        Raises:
            ValueError: it is no JSON object of these settings.
        """
        values = json.loads(text)
        require(isinstance(values, dict), "RouterConfig", "a JSON object", text[:40])
        return cls.from_dict(values)

    @classmethod
    def from_pretrained(
        cls,
        folder_or_name: Path | str,
        *,
        revision: str | None = None,
        local_files_only: bool = False,
    ) -> "RouterConfig":
        """The settings of a saved router, from its folder or a repository of the hub.

        Args:
            folder_or_name: of `save_pretrained`, or OWNER/REPOSITORY.
            revision: branch, tag or commit of a repository.
            local_files_only: of a repository: take what the cache has and ask nobody.

        Raises:
            ValueError: there is no router.json, or it is damaged.
        """
        path = folder_of(folder_or_name, revision, local_files_only) / SETTINGS
        require(path.is_file(), "folder_or_name", f"a folder with {SETTINGS}", str(folder_or_name))
        try:
            saved = json.loads(path.read_text(encoding="utf-8"))
            return cls.from_saved(saved["settings"])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(
                f"{path}: expected the settings of a router; damaged: {error!r}"
            ) from error


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
        likelihood: model, text, both or the text's share, see `FitSettings`.
        budget: cost at which the fit was held, or (low, high) of the range that it serves; None: at
            the prior's own price.
        by: what the budget is over, flops or bytes, see `CostBy`.
        tokenizer: the name of the one that made the tokens; None where ids were given.
        text: `fingerprint` of what was read; () in a folder of before.
        read: what the last tenth of the steps read, by name: `nll` and, where the unpatched model
            is observed, `divergence` from it (nats per token), `kl` (nats per token, all layers),
            `cost` (executed, full attention = 1), their standard errors as `nll_se` and so on, and
            `steps`; {} in a folder of before.
    """

    context: int
    tokens: int
    kl_weight: float
    price: float
    straight_through: bool
    likelihood: str | float
    budget: float | tuple[float, float] | None = None
    tokenizer: str | None = None
    text: tuple[int, ...] = ()
    read: Mapping[str, float] = field(default_factory=dict, hash=False)
    by: str = CostBy.FLOPS.value

    def __post_init__(self) -> None:
        """A range is a list in a file."""
        object.__setattr__(self, "text", tuple(self.text))
        if isinstance(self.budget, list):
            object.__setattr__(self, "budget", tuple(self.budget))


def _tuples(values: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """The fields of `cls` among `values`, lists as tuples."""
    names = {f.name for f in fields(cls)}
    return {key: _tuple(value) for key, value in values.items() if key in names}


def _tuple(value: Any) -> Any:
    return tuple(map(_tuple, value)) if isinstance(value, list) else value
