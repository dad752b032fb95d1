"""Local attention block by block: the formula, and what each block reads."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.experts.local import LocalAttention
from bayes_router.attention.kernels.eager import band
from bayes_router.attention.shapes import ExpertShape


def written_out(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    key, query = (
        torch.arange(k.shape[2]),
        torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None],
    )
    seen = (key <= query) & (key > query - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)


@pytest.mark.parametrize(
    ("Tq", "Tk", "window", "key_heads"),
    [(300, 300, 128, 2), (512, 512, 256, 4), (200, 500, 128, 1), (129, 130, 128, 2),
     (77, 700, 128, 4), (700, 700, 257, 2)],
)  # fmt: skip
def test_blocks_are_the_formula_and_read_views_of_what_they_see(
    monkeypatch: pytest.MonkeyPatch, Tq: int, Tk: int, window: int, key_heads: int
) -> None:
    torch.manual_seed(0)
    q = torch.randn(2, 4, Tq, 16)
    k, v = (torch.randn(2, key_heads, Tk, 16) for _ in range(2))
    compared, views, usual = [], [], band.fused_attention

    def fused(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        views.append(k._base is not None)
        share = q.shape[0] * q.shape[1] / 8  # of texts and heads
        compared.append(share * q.shape[2] * k.shape[2] / (2 if "is_causal" in options else 1))
        return usual(q, k, v, **options)

    monkeypatch.setattr(band, "fused_attention", fused)
    found = LocalAttention(ExpertShape(4, 16, window))(q, k, v)
    torch.testing.assert_close(found, written_out(q, k, v, window), rtol=1e-5, atol=1e-6)
    assert all(views) and sum(compared) < 1.6 * Tq * window
    q.requires_grad_()
    compared.clear()
    LocalAttention(ExpertShape(4, 16, window))(q, k, v)
    assert len(compared) <= 1  # gradients take one call
