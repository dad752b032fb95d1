"""The whole objective by hand, in about a hundred lines and float64.

No Pyro, no chunks, no shared code but the weights.

loss = mean over tokens of -log p(y | x, route) + kl_weight * sum over layers of the mean over
tokens of KL(q || p)
"""

import torch
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

from bayes_router.attention.hard.reference import linear_attention, softmax_attention
from bayes_router.transformer.model import RoutedLanguageModel


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    epsilon = torch.finfo(x.dtype).eps
    return x / (x.square().mean(-1, keepdim=True) + epsilon).sqrt() * gain


def rotate(x: Tensor, base: float) -> Tensor:
    """Rotate the pairs (i, i + Dh / 2) of x [B, H, T, Dh], as complex numbers.

    By t * base^(-2 i / Dh).
    """
    T, Dh = x.shape[-2:]
    exponent = torch.arange(0, Dh, 2, dtype=torch.float32) / Dh
    angle = torch.arange(T, dtype=torch.float32)[:, None] * base**-exponent
    turn = torch.complex(angle.cos().double(), angle.sin().double())
    turned = torch.complex(x[..., : Dh // 2], x[..., Dh // 2 :]) * turn
    return torch.cat([turned.real, turned.imag], -1)


def gated_attention(
    q: Tensor, k: Tensor, v: Tensor, gate: Tensor, bias: Tensor, log_scale: Tensor
) -> Tensor:
    """The recurrence S_t = a_t S_{t-1} + phi(k_t) v_t^T, token by token."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scale = log_scale.exp()[:, None, None]
    phi_q, phi_k = (q * scale).softmax(-1), (k * scale).softmax(-1)
    a = torch.sigmoid((k * gate[:, None]).sum(-1) + bias[:, None])
    S, z, out = 0.0, 0.0, []
    for t in range(q.shape[2]):
        S = a[:, :, t, None, None] * S + phi_k[:, :, t, :, None] * v[:, :, t, None]
        z = a[:, :, t, None] * z + phi_k[:, :, t]
        numerator = torch.einsum("bhd,bhde->bhe", phi_q[:, :, t], S)
        out.append(numerator / (torch.einsum("bhd,bhd->bh", phi_q[:, :, t], z)[..., None] + 1e-6))
    return torch.stack(out, 2)


def expert_outputs(model: RoutedLanguageModel, layer: int, x: Tensor) -> Tensor:
    """[B, T, E, D] of a layer's experts before the output projection."""
    config, attention = model.config, model.network.blocks[layer].attention
    B, T, _ = x.shape
    H, Hkv, Dh = config.num_heads, config.kv_heads, config.head_dim
    projected = (x @ attention.qkv.weight.T).view(B, T, H + 2 * Hkv, Dh).transpose(1, 2)
    q, k, v = projected[:, :H], projected[:, H : H + Hkv], projected[:, H + Hkv :]
    turned_q, turned_k = rotate(q, config.rope_base), rotate(k, config.rope_base)
    outputs = []
    for name, expert in zip(config.experts, attention.experts, strict=True):
        if name == "full":
            out = softmax_attention(turned_q, turned_k, v)
        elif name == "local":
            out = softmax_attention(turned_q, turned_k, v, config.window)
        elif name == "linear":
            out = linear_attention(q, k, v)
        else:
            out = gated_attention(q, k, v, expert.gate, expert.gate_bias, expert.log_scale)
        outputs.append(out.transpose(1, 2).reshape(B, T, H * Dh))
    return torch.stack(outputs, 2)


def negative_elbo(
    model: RoutedLanguageModel,
    prior: Tensor,
    kl_weight: float,
    tokens: Tensor,
    targets: Tensor,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, nll, KL summed over layers), nats per token.

    Routes drawn after seeding torch with `seed`.
    """
    torch.manual_seed(seed)
    network, D = model.network, model.config.d_model
    h = network.embed.weight[tokens] * D**0.5
    kl = torch.zeros((), dtype=torch.float64)
    for layer, block in enumerate(network.blocks):
        x = rms_norm(h, block.attention_norm.weight)
        controller = model.controller.layers[layer]
        inner = x @ controller.hidden.weight.T + controller.hidden.bias
        raw = (inner * torch.sigmoid(inner)) @ controller.out.weight.T + controller.out.bias
        q = Dirichlet(model.config.concentration_floor + torch.log1p(raw.exp()))
        route = q.rsample()
        kl = kl + kl_divergence(q, Dirichlet(prior[layer].double().expand_as(route))).mean()
        mixed = (route[..., None] * expert_outputs(model, layer, x)).sum(2)
        h = h + mixed @ block.attention.out.weight.T
        y = rms_norm(h, block.mlp_norm.weight)
        h = h + (y @ block.up.weight.T).clamp_min(0).square() @ block.down.weight.T
    logits = rms_norm(h, network.norm.weight) @ network.embed.weight.T
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    nll = -log_p.gather(-1, targets[..., None]).mean()
    return nll + kl_weight * kl, nll, kl
