"""The section `model`."""

from dataclasses import dataclass
from typing import Optional

from bayes_router.checks import check_kinds, choose, require
from bayes_router.types import RouteBy


@dataclass(frozen=True)
class ModelConfig:
    """The Transformer and its experts.

    Attributes:
        vocab_size: number of token ids; set from the tokeniser by `fit`.
        d_model: width of the residual stream.
        num_layers: routed layers.
        num_heads: query heads; d_model must be a multiple.
        num_kv_heads: key and value heads (grouped queries); by default num_heads.
        experts: registered names, in the order of the routing latent.
        route_by: what chooses: `layer` (all heads of a token together), `kv_head` (each key and
            value head), `head`.
        window: keys that `local` sees, the token itself included.
        mlp_ratio: hidden width of the MLP over d_model.
        rope_base: base of the rotary frequencies.
        controller_hidden: hidden width of each layer's controller; 0 for a linear one.
        concentration_floor: least concentration of the posterior.
    """

    vocab_size: int = 256
    d_model: int = 128
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: Optional[int] = None
    experts: tuple[str, ...] = ("full", "gated", "local")
    route_by: str = "layer"
    window: int = 32
    mlp_ratio: float = 4.0
    rope_base: float = 10_000.0
    controller_hidden: int = 64
    concentration_floor: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_kinds(self, "model.")
        for name in ("vocab_size", "d_model", "num_layers", "num_heads", "window"):
            require(getattr(self, name) >= 1, f"model.{name}", "at least 1", getattr(self, name))
        require(
            self.d_model % (2 * self.num_heads) == 0,
            "model.d_model",
            f"a multiple of 2 x num_heads = {2 * self.num_heads} (rotary positions pair "
            f"dimensions)",
            self.d_model,
            "change d_model or num_heads",
        )
        kv = self.kv_heads
        require(
            kv >= 1 and self.num_heads % kv == 0,
            "model.num_kv_heads",
            f"a divisor of num_heads {self.num_heads}",
            kv,
        )
        choose("model.route_by", self.route_by, RouteBy)
        require(
            len(self.experts) >= 1, "model.experts", "at least one registered name", self.experts
        )
        require(
            len(set(self.experts)) == len(self.experts),
            "model.experts",
            "no name twice",
            self.experts,
        )
        require(self.mlp_ratio > 0, "model.mlp_ratio", "a positive number", self.mlp_ratio)
        require(self.rope_base > 1, "model.rope_base", "a number above 1", self.rope_base)
        require(
            self.controller_hidden >= 0,
            "model.controller_hidden",
            "0 (linear) or more",
            self.controller_hidden,
        )
        require(
            self.concentration_floor > 0,
            "model.concentration_floor",
            "a positive number",
            self.concentration_floor,
        )

    @property
    def kv_heads(self) -> int:
        """Key and value heads."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def num_units(self) -> int:
        """R, routing units of a layer."""
        return choose("model.route_by", self.route_by, RouteBy).units(self.num_heads, self.kv_heads)

    @property
    def head_dim(self) -> int:
        """Dimensions of one head."""
        return self.d_model // self.num_heads
