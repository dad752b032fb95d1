"""One tiny random model of each architecture that is served.

And controllers that route its tokens differently.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="5.0")

from bayes_router.integrations.patching import patch  # noqa: E402

VOCAB = 101
GENERAL: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**GENERAL, "num_key_value_heads": 2}


def _build(name: str, config: str, settings: dict[str, Any]) -> nn.Module:
    model: nn.Module = getattr(transformers, name)(getattr(transformers, config)(**settings))
    return model


GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "eos_token_id": 2,
    "bos_token_id": 1,
}
FALCON = {**GENERAL, "ffn_hidden_size": 48, "alibi": False, "attention_dropout": 0.1}
HYBRID = {
    **GROUPED,
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "full_attention"],
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}

DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": lambda: _build("GPT2LMHeadModel", "GPT2Config", GPT2),
    "llama": lambda: _build("LlamaForCausalLM", "LlamaConfig", GROUPED),
    "mistral": lambda: _build(
        "MistralForCausalLM", "MistralConfig", {**GROUPED, "sliding_window": 12}
    ),
    "mixtral": lambda: _build(
        "MixtralForCausalLM", "MixtralConfig", {**GROUPED, **MOE, "sliding_window": None}
    ),
    "phi": lambda: _build("PhiForCausalLM", "PhiConfig", GENERAL),
    "phi3": lambda: _build("Phi3ForCausalLM", "Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "qwen2": lambda: _build("Qwen2ForCausalLM", "Qwen2Config", GROUPED),
    "qwen3": lambda: _build("Qwen3ForCausalLM", "Qwen3Config", {**GROUPED, "head_dim": 8}),
    "gemma": lambda: _build("GemmaForCausalLM", "GemmaConfig", {**GROUPED, "head_dim": 16}),
    "gemma2": lambda: _build(
        "Gemma2ForCausalLM", "Gemma2Config", {**HYBRID, "attn_logit_softcapping": 0.5}
    ),
    "gemma3": lambda: _build("Gemma3ForCausalLM", "Gemma3TextConfig", HYBRID),
    "gpt_oss": lambda: _build("GptOssForCausalLM", "GptOssConfig", {**HYBRID, **MOE}),
    "gpt_neox": lambda: _build("GPTNeoXForCausalLM", "GPTNeoXConfig", GENERAL),
    "opt": lambda: _build(
        "OPTForCausalLM", "OPTConfig", {**GENERAL, "ffn_dim": 48, "word_embed_proj_dim": 32}
    ),
    "falcon": lambda: _build("FalconForCausalLM", "FalconConfig", FALCON),
    "falcon grouped": lambda: _build(
        "FalconForCausalLM",
        "FalconConfig",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon alibi": lambda: _build(
        "FalconForCausalLM", "FalconConfig", {**FALCON, "alibi": True, "multi_query": False}
    ),
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: _build("BertForMaskedLM", "BertConfig", GENERAL),
    "roberta": lambda: _build("RobertaForMaskedLM", "RobertaConfig", GENERAL),
}
ALL = {**DECODERS, **ENCODERS}


def tiny(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    return ALL[name]().eval()


def tokens(B: int = 2, T: int = 40, seed: int = 1) -> Tensor:
    return torch.randint(3, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))


def scatter_routes(router: Any, seed: int = 3) -> None:
    """Random controllers and experts: neighbouring tokens take different experts."""
    torch.manual_seed(seed)
    bias = router.controller.layers[0].out.bias
    for controller in router.controller.layers:
        nn.init.normal_(controller.hidden.weight, std=0.5)
        nn.init.normal_(controller.out.weight, std=2.0)
        nn.init.zeros_(controller.out.bias)
    for parameter in router.layers.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    assert bias is not None


def patched(name: str, seed: int = 0, **settings: Any) -> tuple[Any, Any]:
    """(model, router) with scattered routes over a window of 6 keys."""
    model = tiny(name, seed)
    defaults = {
        "window": 6,
        "experts": ("full", "mapped", "local")
        if name in ENCODERS
        else ("full", "mapped", "gated", "local"),
    }
    router = patch(model, **{**defaults, **settings})
    scatter_routes(router)
    return model, router


def left_padded(B: int = 3, T: int = 24, seed: int = 1) -> tuple[Tensor, Tensor, list[int]]:
    """(ids, attention mask, real tokens of each row), padding on the left."""
    ids, lengths = tokens(B, T, seed), [T - 5 * b for b in range(B)]
    mask = torch.zeros(B, T, dtype=torch.int64)
    for b, length in enumerate(lengths):
        mask[b, T - length :] = 1
    return ids * mask, mask, lengths
