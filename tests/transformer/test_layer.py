"""The standalone layer: no Pyro at the call, the numbers that the Pyro path gives."""

import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch.distributions import Dirichlet, kl_divergence

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert
from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.inference.elbo import RoutingELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.controller import MetaController
from bayes_router.routing.statistics import routing_statistics
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.standalone import RoutedAttention
from tests.tiny import EXPERTS, tiny_config

COST = torch.tensor([1.0, 0.15, 0.3, 0.15])


def layer_and_input(seed: int = 0, price: float = 10.0) -> tuple[RoutedAttention, torch.Tensor]:
    torch.manual_seed(seed)
    layer = RoutedAttention(tiny_config(), PriorConfig(temperature=0.5, price=price))
    torch.nn.init.normal_(layer.controller.out.weight, std=1.5)
    return layer, torch.randn(2, 30, 16)


@pytest.mark.parametrize("price", [0.0, 10.0, 50.0])
def test_the_same_numbers_as_the_pyro_path(price: float) -> None:
    layer, x = layer_and_input(price=price)

    class OneLayer(torch.nn.Module):
        """The layer as a network over its fixed input: its output is the logits."""

        def __init__(self) -> None:
            super().__init__()
            self.attention = layer.attention

        def forward(self, tokens, route):  # type: ignore[no-untyped-def]
            return self.attention(x, route(0, x))

    controller = MetaController(16, 1, 4, 8, layer.config.concentration_floor)
    controller.layers[0] = layer.controller
    model = RoutingModel(OneLayer(), layer.prior_concentration[None], layer.cost_ratio, price)
    guide = RoutingGuide(model, controller)
    tokens = torch.randint(16, (2, 30))
    elbo = RoutingELBO(1.0)
    torch.manual_seed(5)
    with pyro.settings.context(module_local_params=True):
        loss = elbo.differentiable_loss(model, guide, tokens, tokens)
    layer.train()
    torch.manual_seed(5)
    out = layer(x)
    nll = torch.nn.functional.cross_entropy(out.output.flatten(0, 1), tokens.flatten())
    assert elbo.terms is not None
    torch.testing.assert_close(out.kl, elbo.terms.kl)
    torch.testing.assert_close(nll + out.kl, loss)
    parameters = list(layer.parameters())
    for a, b in zip(
        torch.autograd.grad(nll + out.kl, parameters),
        torch.autograd.grad(loss, parameters),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_in_half_precision_the_prior_and_its_kl_stay_as_they_are() -> None:
    layer, x = layer_and_input(price=10.0)
    layer.eval()
    with torch.no_grad():
        exact, cast = layer(x), layer.bfloat16()(x.bfloat16())
    assert cast.output.dtype == torch.bfloat16
    assert {b.dtype for b in layer.buffers(recurse=False)} == {torch.float32}
    own = exact.concentration.bfloat16().float()  # the posterior alone is that of other weights
    assert float((cast.concentration - own).abs().max()) < 0.5
    torch.testing.assert_close(cast.kl, exact.kl, rtol=2e-2, atol=0)
    assert layer.double()(x.double()).kl.dtype == torch.float64


def test_kl_is_the_exact_divergence_from_the_prior() -> None:
    layer, x = layer_and_input(price=0.0)
    out = layer(x, "mean")
    want = kl_divergence(Dirichlet(out.concentration), Dirichlet(layer.prior_concentration)).mean()
    torch.testing.assert_close(out.kl, want)


def test_modes() -> None:
    layer, x = layer_and_input()
    assert layer.train()(x).route.is_floating_point()
    assert layer.eval()(x).route.dtype == torch.int64
    torch.testing.assert_close(layer(x, "mean").output, layer(x, "mean").output)
    assert not torch.equal(layer(x, "sample").output, layer(x, "sample").output)


def test_a_plain_loop_learns_and_the_kl_reaches_the_controller() -> None:
    layer, x = layer_and_input()
    target = x.cumsum(1).tanh()
    optimiser = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        out = layer(x)
        loss = (out.output - target).square().mean() + 0.01 * out.kl
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
    assert (
        layer.controller.out.bias.grad is not None
        and float(layer.controller.out.bias.grad.abs().max()) > 0
    )


def test_statistics_are_read_off_the_executed_route() -> None:
    concentration = torch.tensor([[[[8.0, 1.0, 1.0, 1.0]], [[1.0, 8.0, 1.0, 1.0]]]])  # [1, 2, 1, 4]
    hard = routing_statistics(concentration, concentration.argmax(-1), COST, EXPERTS)
    assert hard.load == (0.5, 0.5, 0.0, 0.0)
    assert hard.cost == pytest.approx((1.0 + 0.15) / 2)
    mean = torch.tensor([9.0, 9.0, 2.0, 2.0]) / 22
    entropy = lambda p: -float((p * p.log()).sum())  # noqa: E731
    token = torch.tensor([8.0, 1.0, 1.0, 1.0]) / 11
    assert hard.entropy_of_mean == pytest.approx(entropy(token), rel=1e-5)
    assert hard.route_information == pytest.approx(entropy(mean) - entropy(token), rel=1e-5)
    assert hard.total_concentration == pytest.approx(11.0)
    assert hard.collapse == "none"
    assert "full 50.0%" in repr(hard) and "collapse: none" in repr(hard)
    draws = dist.Dirichlet(torch.tensor([8.0, 1.0, 1.0, 1.0])).sample(torch.Size([50_000]))
    assert hard.expected_entropy == pytest.approx(
        float(-torch.xlogy(draws, draws).sum(-1).mean()), abs=0.01
    )


def test_both_collapses_are_told_apart() -> None:
    same = torch.tensor([2.0, 1.0, 1.5, 1.0]).expand(1, 50, 1, 4)
    assert (
        routing_statistics(same, same / same.sum(-1, keepdim=True), COST, EXPERTS).collapse
        == "posterior"
    )
    assert (
        routing_statistics(same, torch.zeros(1, 50, 1, dtype=torch.int64), COST, EXPERTS).collapse
        == "routing"
    )


def test_bad_input() -> None:
    layer, x = layer_and_input()
    with pytest.raises(ValueError, match=r"x: expected shape \[B, T, 16\]; got \(2, 30, 8\)"):
        layer(x[..., :8])
    with pytest.raises(ValueError, match="model.d_model: expected a multiple"):
        ModelConfig(d_model=100, num_heads=7)


def test_the_call_runs_no_pyro() -> None:
    """In a process where Pyro cannot sample, the layer still works."""
    code = (
        "import torch, pyro, bayes_router\n"
        "def refuse(*a, **k): raise AssertionError('pyro was called')\n"
        "pyro.sample = pyro.param = pyro.module = refuse\n"
        "layer = bayes_router.RoutedAttention()\n"
        "print(layer(torch.randn(1, 8, 128)).kl.item() >= -1e-5)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "True"


@pytest.mark.parametrize("soft", [True, False])
@pytest.mark.parametrize("cached", [True, False])
def test_padding_comes_out_as_zero_and_matters_to_nobody(soft: bool, cached: bool) -> None:
    layer, x = layer_and_input()
    mixture, lengths = layer.attention, torch.tensor([30, 11])
    route = torch.rand(2, 30, 4).softmax(-1) if soft else torch.randint(4, (2, 30))
    with torch.no_grad():
        want = mixture(x, route)
        x[1, 11:] = 1e6
        cache = (
            LayerCache([e for e in mixture.experts if isinstance(e, Expert)], 2, 30, 2)
            if cached
            else None
        )
        got = mixture(x, route, cache=cache, lengths=lengths)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1, :11], want[1, :11], rtol=1e-5, atol=1e-5)
    assert not got[1, 11:].any()


def test_a_cache_of_another_layer_is_refused() -> None:
    (layer, x), (other, _) = layer_and_input(), layer_and_input(seed=1)
    cache = LayerCache([e for e in other.attention.experts if isinstance(e, Expert)], 2, 30, 2)
    with pytest.raises(ValueError, match="cache.experts: expected this layer's own experts"):
        layer.attention(x, 0, cache=cache)
    assert cache.lengths.tolist() == [0, 0]


def test_the_price_of_the_settings_is_in_the_prior_and_in_the_kl() -> None:
    config = tiny_config()
    prior = build_prior(PriorConfig(price=7.0), config, 2, 64)
    assert prior.price == 7.0 and prior.prior_predictive().cost < prior.prior_predictive(0.0).cost
    kls = [
        layer(x, "mean").kl
        for layer, x in (layer_and_input(price=0.0), layer_and_input(price=50.0))
    ]
    assert float((kls[0] - kls[1]).abs()) > 1.0
