import pandas as pd
import pytest
import torch

from bayes_router.diagnostics.measures.collapse import kl_to_prior, summarise_collapse
from bayes_router.diagnostics.measures.collapse_verdicts import (
    Collapse,
    CollapseThresholds,
    collapse_over_training,
)
from bayes_router.diagnostics.measures.verdict import Severity
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.posterior import dirichlet_kl
from tests.diagnostics.toy import MixtureNetwork, reading

EXPERTS = ["full", "gated", "local"]
PRIOR = torch.tensor([[0.1, 0.2, 0.2], [0.1, 0.2, 0.2]])


def program(price: float = 0.0) -> RoutingModel:
    return RoutingModel(MixtureNetwork(), PRIOR, torch.tensor([1.0, 0.15, 0.3]), price=price)


def healthy(tokens: int = 60) -> torch.Tensor:
    """Each expert is sure of a third of the tokens, [2, 1, N, 3]."""
    return (0.05 + 8 * torch.eye(3).repeat(tokens // 3, 1)).expand(2, 1, tokens, 3).clone()


def verdicts(q: torch.Tensor, **thresholds: float):
    return summarise_collapse([reading(q)], program(), EXPERTS).verdicts(
        CollapseThresholds(**thresholds)
    )


def test_a_healthy_router_raises_none():
    (only,) = verdicts(healthy())
    assert only.severity is Severity.GOOD and "none" in only.text and not only.advice


def test_routing_collapse_is_caught_in_its_layer():
    q = healthy()
    q[1] = torch.tensor([0.1, 0.2, 5.0]) * torch.linspace(0.5, 2, 60)[None, :, None]
    found = verdicts(q)
    assert [(v.topic, v.layers) for v in found if v.topic == Collapse.ROUTING.value] == [
        (Collapse.ROUTING.value, (1,))
    ]
    assert (
        "100.0% of the tokens take local" in found[0].text
        and found[0].advice
        and found[0].severity is Severity.WARNING
    )


def test_posterior_collapse_says_whether_it_is_the_prior():
    q = healthy()
    q[0] = PRIOR[0]
    at_prior = next(v for v in verdicts(q) if v.topic == Collapse.POSTERIOR.value)
    assert (
        at_prior.layers == (0,)
        and "equals the prior" in at_prior.text
        and "kl_weight" in at_prior.advice
    )
    q[0] = torch.tensor([3.0, 2.9, 0.1])
    elsewhere = next(v for v in verdicts(q) if v.topic == Collapse.POSTERIOR.value)
    assert "not the prior's" in elsewhere.text and "controller_lr" in elsewhere.advice


def test_the_two_collapses_are_told_apart():
    """One sure expert for every token is routing collapse.

    Soft routes that differ in nothing are posterior collapse alone.
    """
    q = torch.tensor([1.0, 1.1, 1.2]).expand(2, 1, 60, 3).clone()
    q[:, :, :30] = q[:, :, :30] * 1.0001
    choice = (torch.arange(60) % 3).view(60, 1).expand(2, 1, 60, 1)
    half = summarise_collapse([reading(q)._replace(hard_choice=choice)], program(), EXPERTS)
    assert {v.topic for v in half.verdicts()} == {Collapse.POSTERIOR.value}


def test_a_dead_expert_is_a_note():
    q = healthy()
    q[0, :, ::3] = torch.tensor([0.05, 8.05, 0.05])
    (found,) = verdicts(q)
    assert (found.topic, found.layers, found.severity) == (
        Collapse.DEAD_EXPERT.value,
        (0,),
        Severity.NOTE,
    )
    assert found.text.startswith("full taken by fewer")
    q[1] = q[0]
    (both,) = verdicts(q)
    assert both.layers == (0, 1) and str(both).startswith(
        "[note] dead expert, layers 0, 1: full taken"
    )


def test_thresholds_are_settings():
    q = healthy()
    q[0, :, : 3 * 6] = torch.tensor([0.05, 0.05, 8.05])
    assert verdicts(q)[0].severity is Severity.GOOD
    assert any(v.topic == Collapse.ROUTING.value for v in verdicts(q, routing_load=0.52))
    with pytest.raises(ValueError, match="routing_load: expected a share above one half"):
        CollapseThresholds(routing_load=0.2)


def test_figures_of_a_layer_are_the_known_ones():
    row = (
        summarise_collapse(
            [reading(healthy()[:, :, :30]), reading(healthy()[:, :, 30:])], program(), EXPERTS
        )
        .layers()
        .iloc[0]
    )
    assert row["effective_experts"] == pytest.approx(3) and row["largest_load"] == pytest.approx(
        1 / 3
    )
    assert row["share_sure"] == 1.0
    assert row["kl"] == pytest.approx(
        float(dirichlet_kl(healthy()[0, 0], PRIOR[0]).mean()), rel=1e-5
    )
    assert row["prior_distance"] == pytest.approx(0.5 * (2 / 15 + 1 / 15 + 1 / 15), abs=1e-6)


def test_kl_counts_the_tilt():
    """Against a tilted prior.

    Minus the entropy of q, less the expected log density, by sampling.
    """
    tilted, q = program(price=4.0), torch.tensor([2.0, 1.5, 3.0])
    torch.manual_seed(0)
    guide = torch.distributions.Dirichlet(q)
    draws = guide.sample((200_000,))
    sampled = (guide.log_prob(draws) - tilted.prior(0).log_prob(draws)).mean()
    assert float(kl_to_prior(tilted, 0, q)) == pytest.approx(float(sampled), abs=0.02)


def test_the_price_stands_apart_from_the_distance_to_the_prior():
    """A fit that holds a budget ends at thousands of nats per unit of cost."""
    priced, plain = (
        summarise_collapse([reading(healthy())], program(price=price), EXPERTS)
        for price in (5000.0, 0.0)
    )
    layers, units = priced.layers(), priced.units()
    assert layers["kl"][0] > 100 * layers["kl_untilted"][0]
    assert layers["kl_untilted"].to_numpy() == pytest.approx(plain.layers()["kl"].to_numpy())
    assert units["kl_untilted"].to_numpy() == pytest.approx(layers["kl_untilted"].to_numpy())
    assert plain.layers()["kl"].equals(plain.layers()["kl_untilted"])


def test_the_distance_from_the_prior_counts_the_tilt():
    """Between the mean route and the mean of draws, half the sum of absolute differences.

    The draws are of the tilted prior.
    """
    tilted = program(price=4.0)
    torch.manual_seed(0)
    mean = tilted.prior(0).sample(torch.Size([100_000])).mean(0)
    row = summarise_collapse([reading(healthy())], tilted, EXPERTS).layers().iloc[0]
    assert row["prior_distance"] == pytest.approx(0.5 * float((mean - 1 / 3).abs().sum()), abs=0.01)
    plain = summarise_collapse([reading(healthy())], program(), EXPERTS).layers().iloc[0]
    assert row["prior_distance"] > plain["prior_distance"] + 0.05


def test_an_expert_that_hardly_any_token_takes_is_dead():
    q = healthy(6000)
    q[0, :, ::3] = torch.tensor([0.05, 8.05, 0.05])
    q[0, :, 0] = torch.tensor([8.05, 0.05, 0.05])  # one of 6000
    (found,) = verdicts(q)
    assert found.topic == Collapse.DEAD_EXPERT.value and found.text.startswith(
        "full taken by fewer than 0.1%"
    )


def test_an_empty_text_is_refused():
    with pytest.raises(ValueError, match="text: expected at least one token"):
        summarise_collapse([], program(), EXPERTS)


def test_over_training_names_the_step_of_a_collapse():
    rows = []
    for step, load, information in ((10, (0.4, 0.3, 0.3), 0.3), (20, (0.0, 0.0, 1.0), 0.0)):
        row = {"step": step, "nll": 1.0, "route_information_0": information, "kl_0": 0.5}
        rows.append(
            row | {f"load_0_{name}": share for name, share in zip(EXPERTS, load, strict=True)}
        )
    rows.append({"step": 15, "nll": 1.2})  # a logged step without an evaluation
    frame = collapse_over_training(pd.DataFrame(rows), EXPERTS)
    assert frame["step"].tolist() == [10, 20]
    assert frame["collapse"].tolist() == ["", "routing collapse, posterior collapse"]
    assert frame["effective_experts"].tolist() == pytest.approx([2.97, 1.0], abs=0.01)
    with pytest.raises(ValueError, match="metrics: expected a column load_0_full"):
        collapse_over_training(pd.DataFrame({"step": [1]}), EXPERTS)
