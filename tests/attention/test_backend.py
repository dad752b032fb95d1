"""Backends of hard routing: objects with a name, that say why they refuse a problem."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

import bayes_router
from bayes_router import Backend, register_backend, routed_attention
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.hard import backend as registry
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw


class Doubled:
    """Twice what `dense` computes, of at most 20 queries."""

    name = "doubled"

    def refuses(self, problem: RoutedProblem) -> str | None:
        return "it counts to 20" if problem.q.shape[2] > 20 else None

    def attend(self, problem: RoutedProblem) -> Tensor:
        return 2 * DENSE.attend(problem)


@pytest.fixture
def doubled() -> Iterator[Backend]:
    yield register_backend(Doubled())
    del registry._REGISTRY["doubled"]


def test_a_backend_from_elsewhere_is_called_by_name_and_as_an_object(doubled: Backend) -> None:
    q, k, v = draw(2, 4, 2, 20)
    route = torch.arange(40).view(2, 20) % 3
    want = 2 * routed_attention(q, k, v, route, window=9, backend="dense")
    for backend in ("doubled", doubled):
        assert torch.equal(routed_attention(q, k, v, route, window=9, backend=backend), want)
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(4, 16, 9))
    cache = LayerCache(experts, 2, 20, 2)
    assert torch.equal(
        cache.attend(q, k, v, torch.zeros_like(route), backend="doubled")[:, :, :1],
        2 * v[:, [0, 0, 1, 1], :1],
    )


@pytest.mark.usefixtures("doubled")
def test_it_says_why_it_refuses_a_problem() -> None:
    q, k, v = draw(1, 4, 2, 21)
    route = torch.arange(21)[None] % 3
    with pytest.raises(
        RuntimeError,
        match="backend 'doubled' cannot run here: it counts to 20; backend='auto' picks one",
    ):
        routed_attention(q, k, v, route, window=9, backend="doubled")
    with pytest.raises(
        ValueError,
        match="backend: expected one of auto, dense, doubled, reference, .*; got 'trebled'",
    ):
        routed_attention(q, k, v, route, window=9, backend="trebled")


@pytest.mark.usefixtures("doubled")
def test_a_name_belongs_to_one_class() -> None:
    class Other(Doubled):
        """Of the same name."""

    with pytest.raises(
        ValueError,
        match="'doubled' is already a tests.attention.test_backend.Doubled; take another name",
    ):
        register_backend(Other())
    for nothing in (Doubled, "dense"):
        with pytest.raises(TypeError, match="expected an object with name, refuses and attend"):
            register_backend(nothing)  # type: ignore[type-var]
    assert bayes_router.Backend is Backend
