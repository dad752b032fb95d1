"""Numbers that are none, or of another kind: each is refused by its name, before a pass is run."""

import math
from typing import Any

import pytest
import torch

from bayes_router.integrations.huggingface.fit_settings import FitSettings
from bayes_router.integrations.patching import patch
from tests.integrations.tiny_models import VOCAB, tiny
from tests.tiny import tiny_model

TEXT = torch.randint(3, VOCAB, (600,), generator=torch.Generator().manual_seed(0))
NO_NUMBER = ("a", None, [3])
NO_COUNT = (*NO_NUMBER, -1, 0, 2.5, math.nan, True)
COUNTS = {
    "context": ("set_budget", "set_quality", "set_guard", "fit_evidence", "fit_risk", "freeze"),
    "limit": ("set_budget", "set_quality", "set_guard", "freeze"),
    "tokens": ("fit_evidence", "fit_risk"),
    "batch_size": ("fit_evidence", "fit_risk"),
}
FIRST: dict[str, tuple[Any, ...]] = {"set_budget": (0.6, TEXT), "set_quality": (0.1, TEXT)}


@pytest.fixture(scope="module")
def router() -> Any:
    return patch(tiny("llama"), window=6, experts=("full", "local"), route_by="head")


@pytest.mark.parametrize("name", COUNTS)
@pytest.mark.parametrize("value", NO_COUNT)
def test_what_is_no_whole_number_above_0(router: Any, name: str, value: Any) -> None:
    for method in COUNTS[name]:
        given = {"context": 20, name: value}
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number, 1 or more; got"):
            getattr(router, method)(*FIRST.get(method, (TEXT,)), **given)


@pytest.mark.parametrize("value", [*NO_NUMBER, True, math.nan, -1, 0, 1])
def test_what_is_no_probability(router: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="^confidence: expected a probability between 0 and 1"):
        router.set_quality(0.1, TEXT, context=20, confidence=value)
    router.fit_evidence(TEXT, context=20)
    for name in ("confidence", "spend"):
        with pytest.raises(ValueError, match=f"^{name}: expected"):
            router.set_guard(TEXT, context=20, **{name: value})


@pytest.mark.parametrize("value", [*NO_NUMBER, True, -1, math.nan])
def test_what_is_no_budget_tolerance_or_share(router: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="^budget: expected"):
        router.set_budget(value, TEXT, context=20)
    with pytest.raises(ValueError, match="^budget: expected"), router.holding(value):
        pass
    if value is not True:
        with pytest.raises(ValueError, match="^tolerance: expected 0 or more"):
            router.set_budget(0.6, TEXT, context=20, tolerance=value)
        with pytest.raises(ValueError, match="^valid_fraction: expected a share of the text"):
            router.fit(TEXT, valid_fraction=value, steps=1, context=20)


@pytest.mark.parametrize("value", [*NO_NUMBER, True, -1, 2.5, math.nan])
def test_short_texts_are_left_up_to_a_whole_number_of_tokens(router: Any, value: Any) -> None:
    with pytest.raises(ValueError, match="^full_up_to: expected a whole number, 0 or more"):
        router.full_up_to = value
    router.full_up_to = 0
    assert router.full_up_to == 0


def test_a_range_has_two_ends_and_is_one_as_a_list_too() -> None:
    assert FitSettings(budget=[0.3, 0.6]) == FitSettings(budget=(0.3, 0.6))  # type: ignore[arg-type]
    assert FitSettings(budget=[0.3, 0.6]).gradient_of == "mean"  # type: ignore[arg-type]
    assert FitSettings(budget=torch.tensor(0.5)).budget == 0.5  # type: ignore[arg-type]
    for value in ((0.5,), [0.5], ()):
        with pytest.raises(ValueError, match="^budget: expected a cost"):
            FitSettings(budget=value)  # type: ignore[arg-type]


def test_weights_that_are_no_numbers_are_no_route(router: Any) -> None:
    with pytest.raises(ValueError, match="^force: expected weights that are finite numbers"):
        router.force(torch.full((2, 1, 20, 4, 2), math.nan))
    assert not router.forced


@pytest.mark.parametrize("value", ["a", [3], -1, 0, 2.5, math.nan, True])
def test_freezing_a_model_reads_a_whole_number_of_tokens(value: Any) -> None:
    model = tiny_model()
    for name in ("context", "limit"):
        with pytest.raises(ValueError, match=f"^{name}: expected a whole number, 1 or more"):
            model.freeze(torch.randint(23, (200,)), **{name: value})
