"""What dispatch does not do.

No T x T tensor, no expert that nobody took, no gathering where all take one, few operators.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.hard import auto, dispatch
from bayes_router.attention.hard.auto import BREAK_EVEN, choose_backend
from bayes_router.attention.hard.dense import DENSE
from bayes_router.attention.hard.dispatch import EXPERTS, routed_attention
from bayes_router.attention.hard.problem import RoutedProblem, resolve_experts
from bayes_router.attention.hard.rows import TORCH
from bayes_router.attention.hard.short import unsorted_pays
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import draw, gradient_errors, relative_error
from tests.attention.test_dispatch import draw_route

VIEWS = {
    "view",
    "transpose",
    "slice",
    "select",
    "as_strided",
    "unsqueeze",
    "expand",
    "t",
    "alias",
    "detach",
    "unbind",
}


class Watch(TorchDispatchMode):
    """The most elements that a tensor holds in memory of its own.

    And how many operators were more than views.
    """

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.operators = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.operators += func.overloadpacket.__name__ not in VIEWS
        for x in found if isinstance(found, (tuple, list)) else (found,):
            if isinstance(x, Tensor):  # of a view, what it stands in
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return found


def largest(T: int, kind: str, gradients: bool, sinks: int) -> int:
    """Per head, of a call of the backend `torch` that starts with its inputs."""
    H, W = 2, 100
    inputs = [x.requires_grad_(gradients) for x in draw(1, H, H, T)]
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(H, 16, W, sinks))
    with Watch() as watch:
        out = routed_attention(
            *inputs, draw_route(kind, 1, T), window=W, backend="torch", experts=experts
        )
        if gradients:
            out.sum().backward()
    return watch.largest // H


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize(
    ("kind", "sinks"), [("independent", 0), ("clustered", 4), ("full", 0), ("local", 0)]
)
def test_no_tensor_is_quadratic_in_the_text(kind: str, sinks: int, gradients: bool) -> None:
    short, long = (largest(T, kind, gradients, sinks) for T in (2048, 4096))
    assert long < 200 * 4096 and long <= 2.2 * short


def test_the_watch_sees_a_square() -> None:
    with Watch() as watch:
        x = torch.zeros(64, 1)
        (x @ x.T)[:1].softmax(-1)
    assert watch.largest == 64 * 64


class Unwanted(Expert):
    """Nobody takes it."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise AssertionError("an expert that no token took was computed")


@pytest.mark.parametrize("backend", ["torch", "dense", "auto"])
@pytest.mark.parametrize("T", [20, 300])
def test_an_expert_that_no_token_took_is_not_computed(backend: str, T: int) -> None:
    q, k, v = draw(2, 4, 2, T)
    unwanted = Unwanted(ExpertShape(4, 16, 9))
    route = draw_route("independent", 2, T) % 2
    got = routed_attention(
        q, k, v, route, window=9, backend=backend, experts=("full", "local", unwanted)
    )
    want = routed_attention(
        q, k, v, route, window=9, backend="reference", experts=("full", "local")
    )
    assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize("index", [0, 1, 2, 3])
@pytest.mark.parametrize("T", [20, 300])
def test_where_all_take_one_expert_its_own_pass_is_taken(
    index: int, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> Tensor:
        raise AssertionError("dispatched")

    monkeypatch.setattr(dispatch, "run", refuse)
    inputs = [x.requires_grad_() for x in draw(2, 4, 2, T)]
    experts = resolve_experts(("full", "linear", "local", "gated"), ExpertShape(4, 16, 9))
    out = routed_attention(*inputs, torch.full((2, T), index), window=9, experts=experts)
    want = experts[index](*inputs)
    assert torch.equal(out, want)
    for got, true in zip(*(torch.autograd.grad(x.sum(), inputs) for x in (out, want)), strict=True):
        assert torch.equal(got, true)


@pytest.mark.parametrize("gradients", [False, True])
def test_auto_takes_the_faster_backend_by_length(gradients: bool) -> None:
    keys, short, long = BREAK_EVEN[False, gradients]
    assert 16 < keys < 1024 and (short, long) == (DENSE, TORCH)
    experts = resolve_experts(("full", "linear", "local"), ExpertShape(2, 16, 9))
    for T, want in ((1, short), (keys, short), (keys + 1, long), (8192, long)):
        q, k, v = (x.requires_grad_(gradients) for x in torch.zeros(3, 1, 2, T, 16))
        assert (
            choose_backend(
                RoutedProblem(q, k, v, q, k, torch.zeros(1, T, dtype=torch.long), experts)
            )
            is want
        )


@pytest.mark.parametrize(("T", "most"), [(16, 20), (128, 20), (256, 85)])
def test_a_short_text_takes_few_operators(T: int, most: int) -> None:
    """What a short text costs is their number: it was 109 at 16 tokens before they were counted."""
    q, k, v = draw(1, 8, 8, T, 64)
    route = torch.arange(T)[None] % 10  # 1 full, 6 linear, 3 local in 10
    route = torch.where(route == 0, 0, torch.where(route < 7, 1, 2))
    with Watch() as watch:
        routed_attention(q, k, v, route, window=256)
    assert watch.operators <= most


class TestGatedRows:
    """The chosen rows of gated attention on a CPU: what they are, and what they cost."""

    def expert(self, seed: int, H: int = 4) -> Expert:
        expert = expert_class("gated")(ExpertShape(H, 16, 9))
        generator = torch.Generator().manual_seed(seed)
        for parameter in expert.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
        return expert

    @pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
    @pytest.mark.parametrize(
        ("B", "Hkv", "T", "Tk"), [(2, 2, 37, 37), (1, 4, 300, 300), (2, 1, 150, 400), (1, 4, 1, 9)]
    )
    def test_they_are_those_of_the_recurrence(
        self, B: int, Hkv: int, T: int, Tk: int, share: float, seed: int
    ) -> None:
        expert, exact = self.expert(seed), self.expert(seed).double()
        q, k, v = (x.requires_grad_() for x in draw(B, 4, Hkv, Tk, seed=seed))
        eq, ek, ev = (x.detach().double().requires_grad_() for x in (q, k, v))
        chosen = torch.rand(B, T) < share
        chosen[0, -1] = True
        mask = chosen[:, None, :, None]
        got = expert.attend_rows(q[:, :, Tk - T :], k, v, chosen).where(mask, 0)
        want = exact(eq[:, :, Tk - T :], ek, ev).where(mask, 0)
        assert relative_error(got, want) < 1e-5
        weight = torch.randn(got.shape)
        leaves, truths = [q, k, v, *expert.parameters()], [eq, ek, ev, *exact.parameters()]
        found = torch.autograd.grad(
            (got * weight).sum(), leaves, allow_unused=True, materialize_grads=True
        )
        true = torch.autograd.grad((want * weight.double()).sum(), truths)
        assert max(gradient_errors(found, true)) < 1e-5

    @pytest.mark.parametrize("bias", [-80.0, 80.0])
    def test_gates_that_forget_or_keep_all(self, bias: float) -> None:
        expert = self.expert(0)
        expert.get_parameter("gate_bias").data.fill_(bias)
        q, k, v = (x.requires_grad_() for x in draw(1, 4, 4, 300))
        chosen = torch.rand(1, 300) < 0.5
        got, want = (
            x.where(chosen[:, None, :, None], 0)
            for x in (expert.attend_rows(q, k, v, chosen), expert(q, k, v))
        )
        assert relative_error(got, want.double()) < 1e-5
        assert all(g.isfinite().all() for g in torch.autograd.grad(got.sum(), (q, k, v)))

    def test_only_what_the_chosen_rows_need_is_computed(self) -> None:
        expert, (q, k, v) = self.expert(0, 8), draw(1, 8, 8, 2048, 16)

        def cost(call: Callable[[], Tensor]) -> int:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                call()
            return counter.get_total_flops()

        def rows(*positions: int) -> int:
            chosen = torch.zeros(1, 2048, dtype=torch.bool)
            chosen[0, list(positions)] = True
            return cost(lambda: expert.attend_rows(q, k, v, chosen))

        whole = cost(lambda: expert(q, k, v))
        assert rows(2047) < 0.3 * whole  # the state of all keys, and one reading
        assert rows(200) < 0.15 * rows(2047)  # later keys are not looked at
        assert rows(*range(0, 2048, 10)) < 0.5 * whole

    @pytest.mark.parametrize("backend", ["torch", "auto"])
    def test_dispatch_takes_them(self, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
        expert, (q, k, v) = self.expert(0), draw(2, 4, 2, 300)
        route, lengths = draw_route("independent", 2, 300), torch.tensor([300, 170])
        arguments = {"window": 9, "experts": ("full", expert, "local"), "lengths": lengths}
        want = routed_attention(q, k, v, route, backend="reference", **arguments)  # type: ignore[arg-type]

        def refuse(*args: object) -> Tensor:
            raise AssertionError("every row was computed")

        monkeypatch.setattr(type(expert), "forward", refuse)
        got = routed_attention(q, k, v, route, backend=backend, **arguments)  # type: ignore[arg-type]
        assert relative_error(got, want.double()) < 1e-5


@pytest.mark.parametrize(
    ("names", "rows", "captured", "short"),
    [
        (("full", "local"), auto.FILLING, True, True),
        (("full", "local"), 2 * auto.FILLING, True, False),
        (("full", "local"), 2 * auto.FILLING, False, True),
        (("full", "linear"), 2 * auto.FILLING, True, True),
    ],
)
def test_full_and_local_attention_that_fill_a_device_are_sorted_in_a_graph(
    names: tuple[str, ...], rows: int, captured: bool, short: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: captured)
    q = torch.zeros(1, 16, rows // 16, 64, device="meta")
    route = torch.zeros(1, rows // 16, 1, dtype=torch.int64, device="meta")
    experts = resolve_experts(names, ExpertShape(16, 64, 3))
    assert auto._launches_decide(RoutedProblem(q, q, q, q, q, route, experts)) is short


@pytest.mark.parametrize(
    ("changed", "forward", "training"),
    [  # the most keys of one row of 16 heads, of 256, 512, 1024 and 2048
        ({}, 256, 1024),
        ({"one_pair": True}, 512, 1024),
        ({"names": ("full", "local")}, 512, 1024),
        ({"B": 2, "one_pair": True}, 256, 512),
        ({"B": 8}, 256, 256),
        ({"B": 16}, 0, 256),
        ({"D": 32}, 512, 1024),
        ({"D": 128}, 256, 512),
        ({"D": 128, "one_pair": True}, 256, 512),
        ({"HK": 4}, 256, 512),
        ({"dtype": torch.float16}, 256, 1024),
        ({"dtype": torch.float32}, 0, 256),
        ({"dtype": torch.float32, "D": 128}, 0, 0),
    ],
)
def test_what_unsorted_kernels_are_taken_for(
    changed: dict[str, Any], forward: int, training: int
) -> None:
    asked = {"B": 1, "D": 64, "HK": 16, "dtype": torch.bfloat16, "names": EXPERTS, **changed}

    def pays(keys: int, gradients: bool) -> bool:
        q, k, plain_q, plain_k = (
            torch.zeros(
                asked["B"], heads, keys, asked["D"], dtype=asked["dtype"], device="meta"
            ).requires_grad_(gradients)
            for heads in (16, asked["HK"]) * 2
        )
        if asked.get("one_pair"):
            plain_q, plain_k = q, k
        route = torch.zeros(asked["B"], keys, 1, dtype=torch.int64, device="meta")
        experts = resolve_experts(asked["names"], ExpertShape(16, asked["D"], 3))
        return unsorted_pays(RoutedProblem(q, k, k, plain_q, plain_k, route, experts))

    for gradients, most in ((False, forward), (True, training)):
        lengths = (256, 512, 1024, 2048)
        assert [T for T in lengths if pays(T, gradients)] == [T for T in lengths if most >= T]


def test_an_expert_is_moved_to_the_queries_and_no_second_time() -> None:
    q, k, v = draw(1, 2, 2, 20, 8)
    here = expert_class("gated")(ExpertShape(2, 8, 3))
    elsewhere, moved = expert_class("gated")(ExpertShape(2, 8, 3)).to("meta"), []

    def move(device: torch.device) -> Expert:
        moved.append(device)
        return here

    elsewhere.to = move  # type: ignore[method-assign, assignment]
    want = routed_attention(q, k, v, 0, window=3, experts=[here])
    assert torch.equal(routed_attention(q, k, v, 0, window=3, experts=[elsewhere]), want)
    assert moved == [q.device]
    here.to = move  # type: ignore[method-assign, assignment]
    routed_attention(q, k, v, 0, window=3, experts=[here])
    assert len(moved) == 1
