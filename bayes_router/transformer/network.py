"""The Transformer whose layers ask where each token goes.

Plain PyTorch: it knows neither Pyro nor the prior.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.decoding.model_cache import RoutedCache
from bayes_router.attention.experts.contract import Expert
from bayes_router.checks import require
from bayes_router.config import ModelConfig
from bayes_router.transformer.layer import Angles, AttentionMixture
from bayes_router.transformer.padding import check_lengths, check_tokens, last_token
from bayes_router.transformer.rotary import rotary_angles
from bayes_router.types import Route


class Block(nn.Module):
    """h <- h + attention(norm(h), route); h <- h + MLP(norm(h))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        hidden = int(config.mlp_ratio * config.d_model)
        self.attention_norm, self.mlp_norm = nn.RMSNorm(config.d_model), nn.RMSNorm(config.d_model)
        self.attention = AttentionMixture(config)
        self.up = nn.Linear(config.d_model, hidden, bias=False)
        self.down = nn.Linear(hidden, config.d_model, bias=False)

    def forward(
        self,
        h: Tensor,
        route: Callable[[Tensor], Tensor | int],
        angles: Angles,
        cache: LayerCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after this block, [B, T, D].

        `route` is asked once, with norm(h).
        """
        x = self.attention_norm(h)
        h = h + self.attention(x, route(x), angles, cache, lengths)
        return h + self.mlp(self.mlp_norm(h))

    def mlp(self, h: Tensor) -> Tensor:
        """Squared ReLU (So et al. 2021, arXiv 2109.08668): cheaper than GELU, no worse."""
        return self.down(F.relu(self.up(h)).square())


class RoutedTransformer(nn.Module):
    """Token embedding, L routed blocks, tied head.

    `route(layer, hidden)` is called once a layer with the normalised hidden state [B, T, D] that
    the layer attends on, and answers with weights [B, T, R, E] or choices int64 [B, T, R].
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        require(isinstance(config, ModelConfig), "config", "a ModelConfig", type(config).__name__)
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.d_model)
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 1 / fan_in); what writes to the residual stream is divided by sqrt(2 L)."""
        for name, weight in self.named_parameters():
            if weight.dim() == 2 and "experts" not in name:
                std = (
                    self.config.d_model**-0.5 if name == "embed.weight" else weight.shape[1] ** -0.5
                )
                if name.endswith(("attention.out.weight", "down.weight")):
                    std /= (2 * self.config.num_layers) ** 0.5
                nn.init.normal_(weight, std=std)

    def forward(
        self,
        tokens: Tensor,
        route: Route,
        cache: RoutedCache | None = None,
        last_only: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, T, V] for tokens int64 [B, T], which continue `cache` if given.

        With `lengths` [B], the first so many tokens of each row are real, the rest is right
        padding, whose logits mean nothing. With `last_only` [B, 1, V], of each row's last real
        token.
        """
        hidden = self.hidden(tokens, route, cache, lengths)
        if last_only:
            hidden = last_token(hidden, lengths)
        return F.linear(self.norm(hidden), self.embed.weight)

    def hidden(
        self,
        tokens: Tensor,
        route: Route,
        cache: RoutedCache | None = None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """The residual stream after the last block, [B, T, D]."""
        check_tokens(tokens, self.config.vocab_size, self.embed.weight.device)
        if lengths is not None:
            check_lengths(lengths, tokens)
        if cache is not None:
            self._check_cache(cache, tokens)
        angles = self._angles(tokens, cache)
        # embeddings have norm about 1, the stream's unit is sqrt(D)
        h = self.embed(tokens) * self.config.d_model**0.5
        for layer, block in enumerate(self.blocks):
            layer_cache = None if cache is None else cache[layer]
            h = block(h, partial(route, layer), angles, layer_cache, lengths)
        return h

    def _check_cache(self, cache: RoutedCache, tokens: Tensor) -> None:
        """Refuse a cache of another model or batch before anything is written."""
        fix = "build it with new_cache of this model"
        require(isinstance(cache, RoutedCache), "cache", "a RoutedCache", type(cache).__name__, fix)
        require(
            len(cache) == self.config.num_layers,
            "cache",
            f"{self.config.num_layers} layers",
            len(cache),
            fix,
        )
        for layer, experts in enumerate(self.experts()):
            cache[layer].check_owner(experts, f"cache[{layer}]")
        rows = len(cache.lengths)
        require(
            rows == tokens.shape[0],
            "cache",
            f"the batch of tokens, {tokens.shape[0]} rows",
            rows,
            fix,
        )

    def _angles(self, tokens: Tensor, cache: RoutedCache | None) -> Angles:
        positions = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        if cache is not None:
            positions = cache.lengths[:, None] + positions  # [B, T]
        cos, sin = rotary_angles(positions, self.config.head_dim, self.config.rope_base)
        dtype = self.embed.weight.dtype  # once, not in every layer
        return cos.to(dtype), sin.to(dtype)

    @property
    def num_layers(self) -> int:
        """L."""
        return self.config.num_layers

    @property
    def num_experts(self) -> int:
        """E: over how many a route is."""
        return len(self.config.experts)

    @property
    def num_units(self) -> int:
        """R: routing units of a layer."""
        return self.config.num_units

    def experts(self) -> list[Sequence[Expert]]:
        """The experts of each layer."""
        return [list(block.attention.experts) for block in self.blocks]  # type: ignore[union-attr, arg-type]

    def new_cache(
        self, batch: int, capacity: int, short: Sequence[Sequence[int]] = ()
    ) -> RoutedCache:
        """An empty cache for `batch` sequences of at most `capacity` tokens.

        In the dtype of the model's keys (autocast: its). `short`: by layer, the key heads that keep
        their window alone, as no query head of theirs ever looks further.
        """
        weight = self.embed.weight
        kind, dtype = weight.device.type, weight.dtype
        if dtype == torch.float32 and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
        return RoutedCache.build(
            self.experts(),
            batch=batch,
            capacity=capacity,
            num_kv_heads=self.config.kv_heads,
            device=weight.device,
            dtype=dtype,
            short=short,
        )
