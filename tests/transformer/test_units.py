"""Routes by layer, key head and query head.

One shape everywhere, no future, cached equals full, old weights load.
"""

import pytest
import torch

from bayes_router.config import ModelConfig, PriorConfig
from bayes_router.inference.elbo import NegativeELBO
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.cost import token_cost
from bayes_router.routing.statistics import routing_statistics
from bayes_router.training.evaluate import evaluate
from bayes_router.transformer.generate import Sampling, generate
from bayes_router.transformer.standalone import RoutedAttention
from tests.tiny import EXPERTS, tiny_batch, tiny_concentration, tiny_config, tiny_model

UNITS = {"layer": 1, "kv_head": 2, "head": 4}
COST = torch.tensor([1.0, 0.15, 0.3, 0.15])


@pytest.mark.parametrize("route_by", UNITS)
@pytest.mark.parametrize("mode", ["hard", "mean"])
def test_each_head_gets_the_expert_of_its_unit(route_by: str, mode: str) -> None:
    """The same as a model that routes by head and is told each head's route."""
    model, (tokens, _) = tiny_model(route_by=route_by).eval(), tiny_batch()
    by_head = tiny_model(route_by="head").eval()
    by_head.network.load_state_dict(model.network.state_dict())
    with torch.no_grad():
        out = model(tokens, mode)
        R = UNITS[route_by]
        assert out.concentration.shape == (3, 2, 40, R, 4) and out.route.shape[:4] == (3, 2, 40, R)
        assert R == 1 or mode == "mean" or bool((out.route != out.route[:, :, :, :1]).any())
        same = by_head(tokens, force=out.route.repeat_interleave(4 // R, dim=3))
    torch.testing.assert_close(out.logits, same.logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("route_by", ["kv_head", "head"])
@pytest.mark.parametrize("mode", ["hard", "mean", "sample"])
def test_no_unit_looks_ahead(route_by: str, mode: str) -> None:
    model, (tokens, _) = tiny_model(route_by=route_by).eval(), tiny_batch(T=30)
    later = tokens.clone()
    later[:, 20:] = (later[:, 20:] + 5) % 23
    with torch.no_grad():
        torch.manual_seed(0)
        before = model(tokens, mode)
        force = before.route if mode == "sample" else None
        after = model(later, mode, force=force)
    torch.testing.assert_close(before.logits[:, :20], after.logits[:, :20], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(before.logits[:, 20:], after.logits[:, 20:])


@pytest.mark.parametrize("route_by", ["kv_head", "head"])
@pytest.mark.parametrize(
    "experts", [EXPERTS, ("full", "gated", "local"), ("local", "gated"), ("full", "mapped")]
)
def test_cached_equals_full_in_every_unit(route_by: str, experts: tuple[str, ...]) -> None:
    """Prefill, a chunk, steps of one token; rows of unequal length."""
    model, (tokens, _) = tiny_model(route_by=route_by, experts=experts).eval(), tiny_batch(T=30)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.network.new_cache(2, 40)
        lengths = torch.tensor([12, 7])
        model(tokens[:, :12], cache=cache, lengths=lengths)
        starts = [12, 7]
        for step in (5, 1, 1, 4, 1):
            new = torch.stack([tokens[b, s : s + step] for b, s in enumerate(starts)])
            out = model(new, cache=cache)
            for b, s in enumerate(starts):
                torch.testing.assert_close(
                    out.logits[b], whole.logits[b, s : s + step], rtol=1e-3, atol=1e-3
                )
                assert torch.equal(out.route[:, b], whole.route[:, b, s : s + step])
            starts = [s + step for s in starts]


def test_soft_routes_behind_a_cache() -> None:
    model, (tokens, _) = tiny_model(route_by="head").eval(), tiny_batch(T=20)
    with torch.no_grad():
        whole, cache = model(tokens, "mean"), model.network.new_cache(2, 20)
        parts = [
            model(tokens[:, a:b], "mean", cache=cache).logits
            for a, b in ((0, 11), (11, 12), (12, 20))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole.logits, rtol=1e-3, atol=1e-3)


def test_generation_by_head_goes_on_as_each_row_alone() -> None:
    model, prompt = tiny_model(route_by="head"), tiny_batch(B=3, T=9)[0]
    lengths, greedy = torch.tensor([9, 4, 6]), Sampling(temperature=0)
    tokens, routes = generate(model, prompt, 6, greedy, lengths=lengths)
    assert routes.shape == (3, 3, 6, 4)
    for b, n in enumerate(lengths.tolist()):
        alone, route = generate(model, prompt[b : b + 1, :n], 6, greedy)
        assert torch.equal(tokens[b : b + 1, : n + 6], alone) and torch.equal(
            routes[:, b : b + 1], route
        )


def test_weights_from_before_units_load_by_layer_alone() -> None:
    """The last map of a controller is [E, hidden] for a layer, as it always was."""
    old = tiny_model()
    assert ModelConfig().route_by == "layer" and ModelConfig().num_units == 1
    assert old.controller.layers[0].out.weight.shape == (4, 8)
    with pytest.raises(RuntimeError, match="size mismatch"):
        tiny_model(route_by="head").load_state_dict(old.state_dict())
    with pytest.raises(
        ValueError, match="model.route_by: expected one of head, kv_head, layer; got 'heads'"
    ):
        tiny_config(route_by="heads")


@pytest.mark.parametrize("route_by", UNITS)
@pytest.mark.parametrize("per_unit", [False, True])
def test_the_kl_is_summed_over_units(route_by: str, per_unit: bool) -> None:
    """Of a program whose prior may differ by unit, against the sum written out.

    The gradient reaches every unit.
    """
    model, (tokens, targets) = tiny_model(route_by=route_by), tiny_batch()
    R, prior = UNITS[route_by], tiny_concentration(model.config)
    prior = prior[:, None].repeat(1, R, 1) * (1 + torch.arange(R)[:, None]) if per_unit else prior
    program = RoutingModel(model.network, prior, COST, 2.0)
    objective = NegativeELBO(program, RoutingGuide(program, model.controller), 0.1)
    torch.manual_seed(3)
    loss, terms = objective(tokens, targets)
    loss.backward()
    bias = model.controller.layers[1].out.bias.grad.view(R, 4)
    assert bool((bias.abs().sum(-1) > 0).all())
    source = _Once(tokens, targets)
    own = evaluate(model, source, prior, context=40, batch_size=2, prior_tilt=2.0 * COST, seed=3)
    assert own.elbo == pytest.approx(-own.nll["sample"] - sum(own.kl_per_layer))
    torch.manual_seed(3)
    assert float(terms.kl) == pytest.approx(_kl_by_hand(model, program, tokens), rel=1e-4)
    assert len(own.load_per_unit[0]) == R and sum(own.load_per_unit[0][0]) == pytest.approx(1)


class _Once:
    def __init__(self, tokens: torch.Tensor, targets: torch.Tensor):
        self.batch = tokens, targets

    def windows(self, *_: object) -> list[object]:
        from bayes_router.data.tokens import Batch

        return [Batch(*self.batch)]


@torch.no_grad()
def _kl_by_hand(model: object, program: RoutingModel, tokens: torch.Tensor) -> float:
    total = 0.0

    def route(layer: int, hidden: torch.Tensor) -> torch.Tensor:
        nonlocal total
        q = model.controller.posterior(layer, hidden)  # type: ignore[attr-defined]
        for r in range(q.concentration.shape[2]):
            one, p = q.concentration[:, :, r].double(), program.token_prior(layer)
            base, log_z = p.base.concentration, p.log_normaliser
            base = base[r] if base.dim() == 2 else base
            log_z = log_z[r] if log_z.dim() == 1 else log_z
            kl = torch.distributions.kl_divergence(
                torch.distributions.Dirichlet(one),
                torch.distributions.Dirichlet(base.double().expand_as(one)),
            )
            total += float(
                (kl + one / one.sum(-1, keepdim=True) @ (2.0 * COST.double()) + log_z).mean()
            )
        order = q.concentration if q.concentration.shape[2] == 1 else q.concentration.movedim(2, 0)
        draw = torch.distributions.Dirichlet(order, validate_args=False).rsample()
        return draw if q.concentration.shape[2] == 1 else draw.movedim(0, 2)

    model.network(tokens, route)  # type: ignore[attr-defined]
    return total


def test_flops_are_paid_by_unit_and_bytes_by_key_head() -> None:
    """Query heads 0 and 1 share key head 0: what one of them reads, both have read."""
    full, local = 0, 2
    # [T, R]
    route = torch.tensor(
        [[full, local, local, local], [full, full, local, local], [full, local, local, full]]
    )
    cost = torch.tensor([1.0, 0.0, 0.25, 0.0])
    torch.testing.assert_close(token_cost(route, cost), torch.tensor([1.75, 2.5, 2.5]) / 4)
    torch.testing.assert_close(
        token_cost(route, cost, sharing=2), torch.tensor([1.25, 1.25, 2.0]) / 2
    )
    by_layer = torch.stack([cost, 2 * cost])
    torch.testing.assert_close(
        token_cost(torch.stack([route, route]), by_layer)[1], token_cost(route, 2 * cost)
    )


def test_statistics_of_a_layer_are_the_means_of_its_units() -> None:
    q = torch.rand(2, 9, 3, 4) + 0.1
    one = routing_statistics(q, q.argmax(-1), COST, EXPERTS)
    assert len(one.units) == 3
    for r, unit in enumerate(one.units):
        alone = routing_statistics(q[:, :, r : r + 1], q[:, :, r : r + 1].argmax(-1), COST, EXPERTS)
        assert unit == alone
    assert one.cost == pytest.approx(sum(u.cost for u in one.units) / 3)
    stuck = q.argmax(-1)
    stuck[:, :, :2] = 0
    assert routing_statistics(q, stuck, COST, EXPERTS).collapse == "none"


@pytest.mark.parametrize("route_by", UNITS)
def test_the_standalone_layer(route_by: str) -> None:
    torch.manual_seed(0)
    layer, x = (
        RoutedAttention(tiny_config(route_by=route_by), PriorConfig(price=1.0)),
        torch.randn(2, 11, 16),
    )
    out = layer(x)
    assert out.route.shape == (2, 11, UNITS[route_by], 4)
    # untrained, every unit has the same posterior
    one = RoutedAttention(tiny_config(), PriorConfig(price=1.0))(x)
    torch.testing.assert_close(out.kl, UNITS[route_by] * one.kl)
    (out.output.square().sum() + out.kl).backward()
    assert bool(layer.controller.out.bias.grad.view(-1, 4).abs().sum(-1).all())
