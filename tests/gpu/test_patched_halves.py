"""A patched model in bfloat16 and float16 on a CUDA device, against float32 on the CPU."""

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.speed.patched_model import send
from bayes_router.integrations.calls.fused_router import reference
from bayes_router.integrations.huggingface.graphs import Graphs
from bayes_router.integrations.patching import patch
from bayes_router.routing.controller import LayerController
from bayes_router.routing.evidence import LayerEvidence
from bayes_router.routing.watch import watching
from bayes_router.transformer.fused import called, controller_input, distance, fused
from tests.integrations.tiny_models import tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
HALVES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("hidden", "units"), [(0, 8), (64, 1), (64, 32)])
@pytest.mark.parametrize("T", [20, 333, 2000, 3000, 9000])  # in parts; then blocks of 64 and 128
def test_the_routers_kernel_is_its_formula(
    dtype: torch.dtype, hidden: int, units: int, T: int
) -> None:
    torch.manual_seed(units)
    layer = LayerController(1100, 2, hidden, units).requires_grad_(False)
    layer.out.weight.normal_(std=0.2)
    layer.out.bias.normal_(std=0.1)
    x, tilt = (3 * torch.randn(2, T, 1100)).to(dtype), 0.1 * torch.randn(units, 2)
    expected, expected_choice = reference(x, layer, 0.01, tilt)
    concentration, choice = fused(x.cuda(), layer.cuda(), 0.01, tilt.cuda())
    torch.testing.assert_close(concentration.cpu(), expected, rtol=2e-4, atol=2e-4)
    score = expected.log() - tilt
    clear = (score[..., 0] - score[..., 1]).abs() > 1e-3  # a near tie may fall to either side
    assert float(clear.float().mean()) > 0.95
    assert torch.equal(choice.cpu()[clear], expected_choice[clear])
    assert choice.unique().numel() == 2


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("T", [1, 333, 9000])
@pytest.mark.parametrize("normed", [False, True])
def test_the_kernel_of_evidence_is_the_densitys_distance(
    dtype: torch.dtype, T: int, normed: bool
) -> None:
    torch.manual_seed(T)
    density = LayerEvidence(torch.randn(8), 40 * torch.randn(8, 576), torch.tensor(1.0))
    x = (3 * torch.randn(2, T, 576)).to(dtype)
    expected = density.distance(controller_input(x) if normed else x)
    found = distance(density.cuda(), x.cuda(), normed).cpu()
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_a_watch_sees_beside_the_routers_kernel_what_a_called_controller_reads(
    dtype: torch.dtype,
) -> None:
    both = Both(dtype, "head")
    router, x = both.ours, tokens(2, 300).cuda()
    router.fit_evidence(tokens(1, 4000)[0].cuda(), context=400)

    def read() -> Tensor:
        with watching(router.controller) as watch:
            both.here(x)
        return watch.log_evidence

    beside = read()
    handles = [one.register_forward_pre_hook(lambda *_: None) for one in router.controller.layers]
    assert all(called(layer) for layer in router.controller.layers)
    torch.testing.assert_close(beside, read(), rtol=1e-3, atol=1e-3)
    for handle in handles:
        handle.remove()


class Both:
    """A model in a half precision on the GPU and the same weights in float32 on the CPU, patched
    alike, and what the unpatched one loses to its precision.
    """

    hidden = 64  # neurons of a controller

    def __init__(self, dtype: torch.dtype, route_by: str):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=101,
            hidden_size=256,
            intermediate_size=256,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        model = LlamaForCausalLM(config).eval().to(dtype)
        self.there, self.here = copy.deepcopy(model).float(), model.cuda()
        self.plain = copy.deepcopy(self.here)
        self.theirs, self.ours = (self._patched(x, route_by) for x in (self.there, self.here))
        send(self.theirs, 0.5, partial(self.there, tokens(1, 300)))
        self.ours.controller.load_state_dict(self.theirs.controller.state_dict())

    def _patched(self, model: LlamaForCausalLM, route_by: str) -> Any:
        router = patch(
            model,
            window=20,
            sinks=3,
            experts=("full", "local"),
            route_by=route_by,
            controller_hidden=self.hidden,
        )
        router.full_up_to = 0
        for layer in router.controller.layers:
            layer.get_parameter("out.weight").data.normal_(std=0.5)
        return router

    @torch.no_grad()
    def noise(self, ids: Tensor) -> float:
        """The largest error of an unpatched logit."""
        self.theirs.force("full")
        expected = self.there(ids).logits
        self.theirs.force(None)
        return float((self.plain(ids.cuda()).logits.float().cpu() - expected).abs().max())


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("route_by", ["layer", "kv_head", "head"])
@pytest.mark.parametrize("T", [300, 4500])  # by the kernel for short texts and by the sorted one
def test_a_routed_pass_loses_no_more_than_an_unpatched_one(
    dtype: torch.dtype, route_by: str, T: int
) -> None:
    both, ids = Both(dtype, route_by), tokens(1, T)
    expected = both.there(ids).logits
    routes = [both.theirs.last.executed[index] for index in range(3)]
    assert all(0.1 < float((route == 0).float().mean()) < 0.9 for route in routes)
    both.here(ids.cuda())
    for index, route in enumerate(routes):
        assert float((both.ours.last.executed[index].cpu() == route).float().mean()) > 0.95
    both.ours.force(torch.stack(routes).cuda())
    found = both.here(ids.cuda()).logits.float().cpu()
    assert float((found - expected).abs().max()) < 2 * both.noise(ids)


class Told(Both):
    """Tokens carry their route: one channel of the residual stream says the parity of the token, no
    layer writes there, and the controllers read nothing else. So no choice is a near tie, and every
    way through the model takes the same routes.
    """

    hidden = 0

    def __init__(self, dtype: torch.dtype, route_by: str):
        super().__init__(dtype, route_by)
        for model, router in ((self.there, self.theirs), (self.here, self.ours)):
            model.model.embed_tokens.weight.data[:, 0] = 0.5
            model.model.embed_tokens.weight.data[1::2, 0] = -0.5
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.data[0] = 0
                layer.mlp.down_proj.weight.data[0] = 0
            for controller in router.controller.layers:
                sign = 1 - 2 * (torch.arange(controller.num_units) % 2)  # units differ
                controller.out.weight.data.zero_()
                controller.out.weight.data[::2, 0] = (3.0 * sign).to(controller.out.weight)
                controller.out.bias.data.zero_()
        self.plain.load_state_dict(self.here.state_dict())

    def routes(self, ids: Tensor) -> Tensor:
        """[B, T, R]: what the tokens say."""
        units = torch.arange(self.ours.config.num_units) % 2
        return ((ids[..., None] % 2) != units).long()


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("route_by", ["layer", "kv_head", "head"])
def test_graphs_lose_no_more_than_an_unpatched_pass(dtype: torch.dtype, route_by: str) -> None:
    """Every prompt and every step, with no routes to fall to the other side."""
    both, ids = Told(dtype, route_by), tokens(1, 90)
    expected, graphs = both.there(ids).logits, Graphs(both.here, 128, bucket=64)
    most = 2 * both.noise(ids)
    for length in (70, 80):
        found = [(length - 1, graphs.prefill(ids[:, :length].cuda()).float().cpu())]
        for t in range(length, length + 5):
            found.append((t, graphs.step(ids[:, t, None].cuda()).float().cpu()))
            taken = torch.stack([both.ours.last.executed[i].cpu() for i in range(3)])
            assert torch.equal(taken, both.routes(ids[:, t, None]).expand_as(taken))
        for t, logits in found:
            assert float((logits - expected[:, t]).abs().max()) < most
