"""The schedule at its ends and between."""

import pytest
import torch

from bayes_router.config import ScheduleConfig
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.routing.schedule import Schedule

EXPERTS = ("full", "linear", "local")
PRIOR = ComputeAwarePrior([1.0, 0.15, 0.3], 2, total_concentration=0.5, temperature=0.3)


def schedule(price: float = 8.0, **settings: object) -> Schedule:
    return Schedule(ScheduleConfig(**settings), PRIOR, 100, EXPERTS, price)  # type: ignore[arg-type]


def test_it_ends_at_the_compute_aware_prior() -> None:
    state = schedule(start_experts=("full",), start_total_concentration=9.0, anneal_to=0.6).at(60)
    torch.testing.assert_close(state.concentration, PRIOR.concentration)
    assert state.price == 8.0


def test_it_starts_on_the_chosen_experts() -> None:
    state = schedule(
        start_experts=("full", "local"),
        start_share=0.8,
        start_total_concentration=2.0,
        anneal_from=0.1,
    ).at(10)
    torch.testing.assert_close(
        state.concentration, 2.0 * torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    )
    assert state.price == 0.0


def test_each_unit_of_a_layer_starts_on_its_own_expert() -> None:
    made = schedule(start_experts=("local", "full,linear"), start_share=0.8, anneal_to=0.6)
    layers = torch.tensor([[[0.1, 0.1, 0.8]] * 2, [[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]]])
    torch.testing.assert_close(made.at(0).concentration, 0.5 * layers)  # [L, R, E]
    torch.testing.assert_close(
        made.at(60).concentration, PRIOR.concentration[:, None].expand(2, 2, 3)
    )


def test_half_way_the_mean_is_half_way_and_the_total_is_the_geometric_mean() -> None:
    state = schedule(
        start_experts=("full",),
        start_share=0.9,
        start_total_concentration=8.0,
        anneal_from=0.2,
        anneal_to=0.6,
    ).at(40)
    total = state.concentration.sum(-1)
    torch.testing.assert_close(total, torch.full((2,), 2.0))
    torch.testing.assert_close(
        state.concentration[0] / 2, (torch.tensor([0.9, 0.05, 0.05]) + PRIOR.mean[0]) / 2
    )
    assert state.price == pytest.approx(4.0)


def test_the_kl_weight_warms_up() -> None:
    weights = [
        schedule(kl_weight=0.5, kl_warmup=0.5).at(step).kl_weight for step in (0, 25, 50, 99)
    ]
    assert weights == pytest.approx([0.005, 0.2525, 0.5, 0.5])
    assert schedule(kl_weight=0.5).at(0).kl_weight == 0.5


def test_straight_through_begins_when_told() -> None:
    assert [
        schedule(straight_through_from=0.7).at(step).straight_through for step in (0, 69, 70, 99)
    ] == [
        False,
        False,
        True,
        True,
    ]
    assert not schedule().at(99).straight_through


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"kl_weight": 0.0}, "kl_weight"),
        ({"start_total_concentration": -1.0}, "start_total_concentration"),
        ({"start_share": 1.0}, "start_share"),
        ({"anneal_from": 0.7, "anneal_to": 0.6}, "anneal_from"),
        ({"kl_warmup": 1.5}, "kl_warmup"),
        ({"straight_through_from": -0.1}, "straight_through_from"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, float], field: str) -> None:
    with pytest.raises(ValueError, match=f"^schedule.{field}: expected"):
        ScheduleConfig(**settings)  # type: ignore[arg-type]
