"""Routed attention on threads of ours: the same numbers, the caller's modes, its errors."""

import os
import signal
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bayes_router.attention.hard import rows
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.kernels.eager.threads import in_threads, pool_of


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch may use two threads, and texts of 64 tokens are shared between them."""
    before = torch.get_num_threads()
    monkeypatch.setattr(rows, "SHARED", 64)
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def attend(units: int, kv_heads: int, threads: int) -> tuple[Tensor, ...]:
    """Output and gradients of two texts, one of them padded."""
    torch.set_num_threads(threads)
    torch.manual_seed(units)
    q, k, v, plain_q, plain_k = (
        torch.randn(2, heads, 150, 16, requires_grad=True)
        for heads in (8, kv_heads, kv_heads, 8, kv_heads)
    )
    out = routed_attention(
        q, k, v, torch.randint(3, (2, 150, units)), window=20, linear_q=plain_q, linear_k=plain_k,
        lengths=torch.tensor([150, 90]), backend="torch",
    )  # fmt: skip
    weight = torch.randn_like(out)
    return out, *torch.autograd.grad((out * weight).sum(), (q, k, v, plain_q, plain_k))


@pytest.mark.parametrize(("units", "kv_heads"), [(1, 8), (2, 8), (8, 8), (8, 2), (4, 4), (1, 1)])
def test_two_threads_compute_what_one_does(two: None, units: int, kv_heads: int) -> None:
    for ours, alone in zip(attend(units, kv_heads, 2), attend(units, kv_heads, 1), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


def test_every_thread_computes_alone(two: None) -> None:
    """In at most as many threads as torch may use, and torch's own setting is as it was."""
    seen: dict[str, int] = {}
    meet = threading.Barrier(2)

    def piece() -> None:
        meet.wait(timeout=20)  # two run at a time
        seen[threading.current_thread().name] = torch.get_num_threads()

    pool_of.cache_clear()
    in_threads([piece] * 4)
    assert list(seen.values()) == [1, 1] and threading.current_thread().name not in seen
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]


def test_modes_are_the_callers_and_errors_reach_it(two: None) -> None:
    found: list[tuple[bool, bool, bool]] = []

    def piece() -> None:
        modes = torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found.append((torch.is_grad_enabled(), *modes))

    def broken() -> None:
        raise ValueError("this piece")

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            in_threads([piece, piece])
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        in_threads([piece, piece])
    assert (
        found
        == [(True, False, False)] * 2 + [(False, False, False)] * 2 + [(False, True, True)] * 2
    )
    with pytest.raises(ValueError, match="this piece"):
        in_threads([piece, broken])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(two: None) -> None:
    in_threads([int, int])
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        done: list[int] = []
        in_threads([lambda: done.append(1)] * 4)
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
