"""Diagnostics of several routing units.

Tables by unit, a layer as the mean of its units, a heat map.
"""

import matplotlib.pyplot as plt
import pytest
import torch

from bayes_router.diagnostics.figures.posterior import plot_units
from bayes_router.diagnostics.measures.collapse import summarise_collapse
from bayes_router.diagnostics.measures.collapse_verdicts import Collapse
from bayes_router.diagnostics.measures.uncertainty import UncertaintySummary
from bayes_router.diagnostics.reading import Reading
from bayes_router.inference.model import RoutingModel
from tests.diagnostics.toy import MixtureNetwork, reading

EXPERTS = ["full", "local"]
COST = torch.tensor([1.0, 0.2])


def routed(q: torch.Tensor) -> Reading:
    """Of concentrations [L, B, T, R, E]."""
    return reading(q[:, :, :, 0])._replace(concentration=q, hard_choice=q.argmax(-1))


def summary(q: torch.Tensor):
    program = RoutingModel(MixtureNetwork(), torch.full((len(q), 2), 0.3), COST)
    return summarise_collapse([routed(q)], program, EXPERTS)


def test_a_layer_is_the_mean_of_its_units_and_its_kl_their_sum():
    torch.manual_seed(0)
    q = torch.rand(2, 3, 40, 4, 2) + 0.05
    whole, alone = summary(q), [summary(q[:, :, :, r : r + 1]).layers() for r in range(4)]
    layers, units = whole.layers(), whole.units()
    for column in (
        "load full",
        "route_information",
        "context_information",
        "largest_load",
        "share_sure",
        "effective_experts",
        "prior_distance",
    ):
        mean = sum(frame[column] for frame in alone) / 4
        assert layers[column].to_numpy() == pytest.approx(mean.to_numpy()), column
    for column in ("kl", "kl_untilted"):
        total = sum(frame[column] for frame in alone)
        assert layers[column].to_numpy() == pytest.approx(total.to_numpy()), column
    assert len(units) == 8
    row = units[(units["layer"] == 1) & (units["unit"] == 2)].iloc[0]
    assert row["load full"] == pytest.approx(alone[2]["load full"][1])
    assert row["route_information"] == pytest.approx(alone[2]["route_information"][1])
    assert row["kl_untilted"] == pytest.approx(alone[2]["kl_untilted"][1])
    total = q[1, :, :, 2].sum(-1).mean()  # the evidence that its routes rest on
    assert row["total_concentration"] == pytest.approx(float(total), rel=1e-6)


def test_a_layer_has_not_collapsed_while_one_of_its_units_moves():
    q = torch.tensor([9.0, 0.1]).repeat(1, 1, 60, 2, 1)
    assert Collapse.ROUTING.value in {v.topic for v in summary(q).verdicts()}
    q[:, :, ::2, 1] = torch.tensor([0.1, 9.0])
    assert Collapse.ROUTING.value not in {v.topic for v in summary(q).verdicts()}


def test_uncertainty_is_the_mean_over_units():
    q = torch.rand(2, 3, 10, 4, 2) + 0.05
    whole = UncertaintySummary(COST).add(routed(q)).layers()
    parts = [UncertaintySummary(COST).add(routed(q[:, :, :, r : r + 1])).layers() for r in range(4)]
    assert whole.to_numpy() == pytest.approx((sum(parts) / 4).to_numpy())


def test_the_heat_map_shows_layer_by_unit():
    units = summary(torch.rand(3, 1, 30, 4, 2) + 0.05).units()
    ax = plot_units(units, "load full", "share")
    shown = ax.images[0].get_array()
    assert shown.shape == (3, 4)
    row = units[(units["layer"] == 2) & (units["unit"] == 1)].iloc[0]
    assert shown[2, 1] == pytest.approx(row["load full"])
    plt.close("all")
