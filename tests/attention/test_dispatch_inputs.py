"""What `routed_attention` refuses, and how it says so.

The field, what was expected, what it got, and what to do.
"""

import re

import pytest
import torch
from torch import Tensor

from bayes_router.attention.experts.contract import expert_class
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw, relative_error
from tests.attention.test_dispatch import draw_route

SHAPE = ExpertShape(4, 16, 3)


def call(**changes: object) -> Tensor:
    """On q [2, 4, 8, 16] and two key heads, but for what is changed."""
    q, k, v = draw(2, 4, 2, 8)
    arguments: dict[str, object] = {
        "q": q,
        "k": k,
        "v": v,
        "route": torch.zeros(2, 8, dtype=torch.long),
        "window": 3,
    }
    return routed_attention(**{**arguments, **changes})  # type: ignore[arg-type]


def built(name: str, **changes: int) -> object:
    return expert_class(name)(SHAPE._replace(**changes))


ZEROS = torch.zeros(2, 2, 8, 16)
VALUES = [
    ({"route": torch.full((2, 8), 3)}, "route: expected values in 0..2; got 3..3"),
    ({"route": torch.full((2, 8), -1)}, "route: expected values in 0..2; got -1..-1"),
    ({"route": 3}, "route: expected values in 0..2; got 3"),
    ({"route": torch.zeros(2, 7, dtype=torch.long)}, "route: expected shape (2, 8, 1)"),
    ({"route": torch.zeros(2, 8)}, "route: expected int64 or int32; got torch.float32"),
    (
        {"route": torch.zeros(2, 8, dtype=torch.long, device="meta")},
        "route: expected shape (2, 8, 1) on cpu; got",
    ),
    ({"k": ZEROS.double()}, "k: expected torch.float32 on cpu like q; got torch.float64 on cpu"),
    ({"v": ZEROS.half()}, "v: expected torch.float32 on cpu like q; got torch.float16 on cpu"),
    ({"k": ZEROS.to("meta")}, "k: expected torch.float32 on cpu like q; got torch.float32 on meta"),
    ({"v": ZEROS.to("meta")}, "v: expected torch.float32 on cpu like q; got torch.float32 on meta"),
    ({"q": torch.zeros(2, 8, 16)}, "q: expected 4 dimensions [B, H, T, Dh]; got shape (2, 8, 16)"),
    ({"k": torch.zeros(2, 3, 8, 16)}, "v: expected shape (2, 3, 8, 16) like k"),
    ({"window": 0}, "window: expected at least 1 (a token sees itself); got 0"),
    ({"window": -5}, "window: expected at least 1 (a token sees itself); got -5"),
    (
        {"linear_q": torch.zeros(2, 4, 8, 4)},
        "linear_q: expected (2, 4, 8, 16), torch.float32 on cpu; got (2, 4, 8, 4)",
    ),
    (
        {"linear_k": ZEROS.double()},
        "linear_k: expected (2, 2, 8, 16), torch.float32 on cpu; got (2, 2, 8, 16), torch.float64",
    ),
    ({"lengths": torch.tensor([9, 1])}, "lengths: expected values in 0..8; got 1..9"),
    ({"lengths": torch.tensor([8.0, 1.0])}, "lengths: expected int64 or int32; got torch.float32"),
    ({"starts": torch.tensor([1, 0])}, "starts: expected values in 0..0; got 0..1"),
    (
        {"backend": "cuda"},
        "backend: expected one of auto, dense, reference, short, torch, triton; got 'cuda'",
    ),
    (
        {"backend": "flex"},
        "backend: expected one of auto, dense, reference, short, torch, triton; got 'flex'",
    ),
    ({"experts": ("full", "lineer")}, "expert: expected one of"),
    ({"experts": ()}, "experts: expected at least one"),
    (
        {"experts": (built("full", num_heads=2), "local")},
        "experts[0] (full): expected one built for 4 heads of 16, as q has; got 2 of 16; build it "
        "with ExpertShape(num_heads=4",
    ),
    (
        {"experts": ("full", built("gated", num_heads=8))},
        "experts[1] (gated): expected one built for 4 heads of 16",
    ),
    (
        {"experts": ("full", built("gated", head_dim=32))},
        "experts[1] (gated): expected one built for 4 heads of 16",
    ),
    (
        {"experts": ("full", built("local", window=5))},
        "window: expected 5, that of the built experts[1] (local); got 3; pass its window, or "
        "build it anew",
    ),
]
KINDS = [
    (
        {"route": [[0] * 8] * 2},
        "route: expected an int or a tensor int64 [B, T]; got list; use torch.tensor(route)",
    ),
    ({"route": None}, "route: expected an int or a tensor int64 [B, T]; got NoneType"),
    ({"route": True}, "route: expected an int or a tensor int64 [B, T]; got bool"),
    ({"route": 1.0}, "route: expected an int or a tensor int64 [B, T]; got float"),
    (
        {"window": None},
        "window: expected an int of at least 1, keys seen with the token's own; got None",
    ),
    (
        {"window": 2.5},
        "window: expected an int of at least 1, keys seen with the token's own; got 2.5",
    ),
    (
        {"window": "3"},
        "window: expected an int of at least 1, keys seen with the token's own; got '3'",
    ),
    (
        {"window": True},
        "window: expected an int of at least 1, keys seen with the token's own; got True",
    ),
    ({"q": [1.0]}, "q: expected a tensor; got list; make one with torch.tensor"),
    ({"k": None}, "k: expected a tensor; got NoneType"),
    ({"linear_k": [1.0]}, "linear_k: expected a tensor; got list"),
    ({"lengths": [8, 1]}, "lengths: expected a tensor; got list"),
    ({"starts": 0}, "starts: expected a tensor; got int"),
    (
        {"experts": ("full", None)},
        "experts[1]: expected a registered name or an Expert; got NoneType",
    ),
    (
        {"experts": (expert_class("full"),)},
        "experts[0]: expected a registered name or an Expert; got type",
    ),
]


@pytest.mark.parametrize(("change", "message"), VALUES)
def test_values_that_do_not_fit_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call(**change)


@pytest.mark.parametrize(("change", "message"), KINDS)
def test_things_of_another_kind_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        call(**change)


def test_what_fits_is_taken() -> None:
    want = call(window=5)
    for experts in (
        (built("full"), "linear", "local"),
        ("full", built("linear"), built("local", window=5)),
    ):
        assert torch.equal(call(window=5, experts=experts), want)


@pytest.mark.parametrize("backend", ["short", "triton"])
def test_a_backend_that_cannot_run_is_an_error(backend: str) -> None:
    with pytest.raises(
        RuntimeError,
        match=f"backend '{backend}' cannot run here: it needs CUDA tensors; these are on cpu; ",
    ):
        call(backend=backend)


@pytest.mark.parametrize("backend", ["torch", "dense", "reference", "auto"])
@pytest.mark.parametrize("T", [8, 300])
def test_int32_routes_are_routes(backend: str, T: int, fresh_seed: int) -> None:
    inputs = [x.requires_grad_() for x in draw(2, 4, 2, T, seed=fresh_seed)]
    route, results = draw_route("independent", 2, T, fresh_seed), []
    for dtype in (torch.int64, torch.int32):
        lengths = torch.tensor([T, T // 2], dtype=dtype)
        out = routed_attention(*inputs, route.to(dtype), window=9, backend=backend, lengths=lengths)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    for want, got in zip(*results, strict=True):
        assert relative_error(got, want.double()) == 0
