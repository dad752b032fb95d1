"""Falcon, which does not follow the attention interface.

Its attention module gets a forward pass that does.

Only the call of the kernel is new; projections, heads, rotary positions and cache are the module's
own parts.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.models.falcon.modeling_falcon import FalconAttention, apply_rotary_pos_emb

from bayes_router.checks import require
from bayes_router.integrations.huggingface.registered import compiled_interface
from bayes_router.integrations.patch.binding import BINDING, Binding, replace_forward

OWN = "falcon"
"""What `check_model` answers for a model that this file serves."""


def serves(model: PreTrainedModel) -> bool:
    """Whether this file serves the model.

    Raises:
        ValueError: a Falcon whose attention is not SDPA.
    """
    if model.config.get_text_config().model_type != "falcon":
        return False
    base = model.config._attn_implementation
    require(
        base == "sdpa",
        "attn_implementation",
        "sdpa for Falcon",
        base,
        "load it with attn_implementation='sdpa'",
    )
    return True


def install(model: PreTrainedModel) -> list[Callable[[], None]]:
    """Replace the forward pass of each attention module; what undoes it."""
    return [replace_forward(m, forward) for m in model.modules() if isinstance(m, FalconAttention)]


def forward(
    self: FalconAttention,
    hidden_states: Tensor,
    alibi: Tensor | None,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    layer_past: Any = None,
    use_cache: bool = False,
    output_attentions: bool = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, T, D] -> [B, T, D]; ALiBi comes inside the mask.

    Falcon drops attention weights only with ALiBi.
    """
    if output_attentions:
        binding = getattr(self, BINDING, None)
        if isinstance(binding, Binding) and binding.awaits:
            binding.require_full("output_attentions")
        rest = (position_ids, layer_past, use_cache, True, position_embeddings)
        original: tuple[Tensor, Tensor | None] = FalconAttention.forward(
            self, hidden_states, alibi, attention_mask, *rest
        )
        return original
    B, T, _ = hidden_states.shape
    heads = (x.transpose(1, 2) for x in self._split_heads(self.query_key_value(hidden_states)))
    q, k, v = (x.reshape(B, -1, T, self.head_dim) for x in heads)
    if alibi is None:
        assert position_embeddings is not None
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
    if layer_past is not None:
        k, v = layer_past.update(k, v, self.layer_idx)
    dropout = self.attention_dropout.p if alibi is not None and self.training else 0.0
    out, _ = compiled_interface(
        "sdpa",
        self,
        q,
        k,
        v,
        attention_mask,
        dropout=dropout,
        scaling=None,
        is_causal=self.is_causal,
    )
    return self.dense(out.flatten(2)), None  # [B, T, H, Dh] -> [B, T, D]
