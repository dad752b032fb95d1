"""The kernel of evidence in Triton's interpreter, and a watch beside the router's kernel."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from bayes_router.data.tokens import Batch
from bayes_router.integrations.calls import fused_router
from bayes_router.routing.evidence import LayerEvidence
from bayes_router.routing.policy import Budget
from bayes_router.routing.watch import inputs_of, watching
from bayes_router.training.evidence import fit_evidence
from bayes_router.transformer import fused
from bayes_router.transformer.fused import controller_input, distance
from tests.integrations.tiny_models import patched, tokens
from tests.tiny import tiny_batch, tiny_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("K", "N", "dim"), [(8, 37, 72), (1, 1, 16), (20, 70, 33)])
@pytest.mark.parametrize("normed", [False, True])
def test_the_distance_is_the_densitys(
    K: int, N: int, dim: int, normed: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(N)
    directions, centre = 40 * torch.randn(K, dim), torch.randn(K)
    density = LayerEvidence(centre, directions, torch.tensor(1.0))
    x = (3 * torch.randn(2, N, dim) + 1).to(dtype)
    found = distance(density, x, normed)
    read = controller_input(x.float()) if normed else x.float()
    exact = ((read.double() @ directions.double().T - centre.double()) ** 2).mean(-1)
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)
    strided = x.transpose(0, 1)
    torch.testing.assert_close(distance(density, strided, normed), found.T, rtol=0, atol=0)
    assert distance(density, x[:, :0], normed).shape == (2, 0)


@torch.no_grad()
def watched(
    controller: Any, passed: Callable[[], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """What a watched pass finds, what it gives, and what its controllers read."""
    with watching(controller) as watch, inputs_of(controller) as inputs:
        out = passed()
    return watch.log_evidence, out, inputs


def test_a_watch_beside_a_language_models_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model().eval().requires_grad_(False)
    batches = [Batch(*tiny_batch(B=4, T=40, seed=s)) for s in range(6)]
    fit_evidence(model, batches, torch.tensor([0.5, 0.6, 0.7]), memory=8)
    x = tiny_batch()[0]

    want = watched(model.controller, lambda: model(x).concentration)
    taken: list[Any] = []
    monkeypatch.setattr(fused, "available", lambda hidden, layer: not taken.append(layer))
    got = watched(model.controller, lambda: model(x).concentration)
    assert len(taken) == 3
    torch.testing.assert_close(got, want, rtol=2e-5, atol=1e-4)


def test_a_watch_beside_a_patchs_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    model, router = patched("llama", window=6, experts=("full", "local"), route_by="head")
    router.policy = Budget(tuple(router.cost_ratio.tolist()), 0.1)
    x = tokens(2, 30)
    router.fit_evidence(tokens(1, 4000)[0], context=40)

    want = watched(router.controller, lambda: model(x).logits)
    taken: list[Any] = []
    monkeypatch.setattr(fused_router, "available", lambda hidden, layer: not taken.append(layer))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    got = watched(router.controller, lambda: model(x).logits)
    assert len(taken) == len(router.controller.layers)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
