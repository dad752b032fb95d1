"""An expert says which kernel computes it and how far it sees.

A subclass that computes something else has no kernel.
"""

import copy
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, Kernel, expert_class
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw, relative_error
from tests.attention.test_dispatch import draw_route

SHAPE = ExpertShape(4, 16, 9)


def negated(name: str, method: str = "forward") -> Expert:
    """A subclass of the expert `name` with one method whose output has its sign changed."""
    parent = expert_class(name)

    class Forward(parent):  # type: ignore[valid-type, misc]
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return -super().forward(q, k, v)

    class Segment(parent):  # type: ignore[valid-type, misc]
        def extend_segment(
            self, q: Tensor, k: Tensor, v: Tensor, state: Tensor
        ) -> tuple[Tensor, Tensor]:
            out, after = super().extend_segment(q, k, v, state)
            return -out, after

    made: Expert = (Forward if method == "forward" else Segment)(SHAPE)
    return made


def declared(name: str) -> Expert:
    """A subclass that says that its parent's kernel computes it."""
    parent = expert_class(name)

    class Declared(parent):  # type: ignore[valid-type, misc]
        kernel: ClassVar[Kernel] = parent.kernel

    made: Expert = Declared(SHAPE)
    return made


@pytest.mark.parametrize("name", ["full", "local", "linear", "gated"])
@pytest.mark.parametrize("backend", ["torch", "dense", "auto", "reference"])
@pytest.mark.parametrize("T", [20, 300])
def test_what_overrides_forward_is_not_computed_by_its_parents_kernel(
    name: str, backend: str, T: int
) -> None:
    q, k, v = draw(2, 4, 2, T)
    route, parent = draw_route("independent", 2, T) % 2, expert_class(name)(SHAPE)
    mine = negated(name)
    assert mine.kernel is Kernel.NONE and parent.kernel is not Kernel.NONE
    got, plain = (
        routed_attention(q, k, v, route, window=9, backend=backend, experts=("full", expert))
        for expert in (mine, parent)
    )
    want = torch.where((route == 1)[:, None, :, None], -plain, plain)
    assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize("name", ["full", "local", "linear", "gated"])
@pytest.mark.parametrize("lengths", [None, (12, 7)])
def test_nor_when_decoding(name: str, lengths: tuple[int, int] | None) -> None:
    q, k, v = draw(2, 4, 2, 20)
    parent = expert_class(name)(SHAPE)
    mine = negated(name, "extend_segment" if parent.stateful else "forward")

    def decoded(expert: Expert) -> Tensor:
        cache = LayerCache([expert], 2, 20, 2)
        cut = None if lengths is None else torch.tensor(lengths)
        parts = [cache.attend(q[:, :, :12], k[:, :, :12], v[:, :, :12], 0, lengths=cut)]
        for t in range(12, 20):
            parts.append(
                cache.attend(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1], 0)
            )
        return torch.cat(parts, 2)

    assert relative_error(decoded(mine), -decoded(parent).double()) < 1e-5


@pytest.mark.parametrize("name", ["full", "local", "linear", "gated"])
def test_a_subclass_may_say_that_it_computes_the_same(name: str) -> None:
    q, k, v = draw(2, 4, 2, 300)
    route, mine, parent = (
        draw_route("independent", 2, 300) % 2,
        declared(name),
        expert_class(name)(SHAPE),
    )
    assert mine.kernel is parent.kernel
    for backend in ("torch", "dense"):
        got, want = (
            routed_attention(q, k, v, route, window=9, backend=backend, experts=("full", e))
            for e in (mine, parent)
        )
        assert torch.equal(got, want)


def test_reach_is_how_many_keys_back_a_query_sees() -> None:
    """Read off the experts themselves: a change of a key counts or does not."""
    for name, shape in (
        ("full", SHAPE),
        ("local", SHAPE),
        ("local", ExpertShape(4, 16, 9, sinks=2)),
    ):
        expert, (q, k, v) = expert_class(name)(shape), draw(1, 4, 4, 30)
        for T in (5, 30):
            seen = []
            for back in range(T):
                changed = v.clone()
                changed[:, :, T - 1 - back] += 1.0
                pair = (
                    expert(q[:, :, :T], k[:, :, :T], x[:, :, :T])[:, :, -1] for x in (v, changed)
                )
                seen.append(not torch.equal(*pair))
            reach = expert.reach(T)
            assert reach is None or seen == [back < reach for back in range(T)]
            assert (reach is None) == (shape.sinks > 0 and T > 9)


def test_the_decoding_kernel_knows_the_librarys_features_alone() -> None:
    class Shifted(GatedLinearAttention):
        kernel = Kernel.GATED

        def feature(self, x: Tensor) -> Tensor:
            return super().feature(x + 1.0)

    experts = [expert_class(name)(SHAPE) for name in ("gated", "mapped")] + [Shifted(SHAPE)]
    assert [e.fixed_map for e in experts if isinstance(e, GatedLinearAttention)] == [
        True,
        False,
        False,
    ]
    assert [LayerCache([copy.deepcopy(e)], 1, 4, 4)._native[3] for e in experts] == [0, -1, -1]
