"""Work in steps, on fewer threads where these are disturbed: the same numbers, and its errors."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.attention.kernels.eager import threads
from bayes_router.attention.kernels.eager.threads import LONGEST, QUIET, Load, Steps, run


class Machine:
    """A clock, and a count of preemptions that grows while more than one thread is used beside a
    busy process.
    """

    def __init__(self) -> None:
        self.now, self.count = 0.0, 0
        self.load = Load(lambda: self.count, lambda: self.now)

    def work(self, seconds: float, most: int = 2, busy: bool = False) -> list[int]:
        """The threads taken at every hundredth of so many seconds."""
        taken = []
        for _ in range(round(seconds * 100)):
            taken.append(self.load.threads(most))
            self.now += 0.01
            self.count += 6 * (busy and taken[-1] > 1)
        return taken


def test_it_yields_to_a_neighbour_and_comes_back() -> None:
    machine = Machine()
    assert set(machine.work(1.0)) == {2}
    busy = machine.work(20.0, busy=True)
    assert 1 in busy[:4]  # by the third operator
    tried = [i for i in range(3, len(busy)) if busy[i - 1 : i + 1] == [1, 2]]
    assert 4 <= len(tried) <= 10 and busy.count(2) <= 3 * len(tried) + 3  # the waits are doubled
    waits = [b - a for a, b in zip(tried, tried[1:], strict=False)]
    assert waits[:3] == pytest.approx([50, 100, 200], abs=5)
    assert waits[3:] == pytest.approx([100 * LONGEST] * len(waits[3:]), abs=5)
    after = machine.work(2 * LONGEST)
    assert after[-1] == 2 and set(after[round(100 * LONGEST) + 5 :]) == {2}
    machine.count += 12
    assert machine.work(2 * QUIET)[0] == 1  # and the next wait is a short one
    assert machine.work(0.1)[-1] == 2


def test_seldom_is_nothing_and_many_threads_are_halved_one_by_one() -> None:
    machine = Machine()
    for _ in range(50):  # a daemon, some times in a tenth of a second
        machine.count += 4
        assert machine.work(0.1) == [2] * 10
    machine.now, machine.count = machine.now + 9.0, machine.count + 90  # elsewhere, long ago
    assert machine.load.threads(2) == 2
    machine.now, machine.count = machine.now + 1.0, machine.count + 200  # in one long operator
    assert machine.load.threads(16) == 8
    assert machine.work(0.08, most=16, busy=True) == [8, 8, 4, 4, 2, 2, 1, 1]
    assert machine.work(2.0, most=16)[-1] == 16


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Torch may use two threads, one of which is disturbed at every other operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    numbers = [1, 2, 2, 1, 1]

    def taken(most: int) -> int:
        numbers.append(numbers.pop(0))
        return min(numbers[0], most)

    monkeypatch.setattr(threads.LOAD, "threads", taken)
    yield
    torch.set_num_threads(before)


def attend(units: int, kv_heads: int, number: int) -> tuple[Tensor, ...]:
    """Two texts, one of them padded: output and gradients, and output without these."""
    torch.set_num_threads(number)
    torch.manual_seed(units)
    q, k, v, plain_q, plain_k = inputs = [
        torch.randn(2, heads, 150, 16, requires_grad=True)
        for heads in (8, kv_heads, kv_heads, 8, kv_heads)
    ]
    route = torch.randint(3, (2, 150, units))

    def once() -> Tensor:
        return routed_attention(
            q, k, v, route, window=20, linear_q=plain_q, linear_k=plain_k,
            lengths=torch.tensor([150, 90]), backend="torch",
        )  # fmt: skip

    out = once()
    weight = torch.randn_like(out)
    found = out, *torch.autograd.grad((out * weight).sum(), inputs)
    with torch.no_grad():
        return once(), *found


@pytest.mark.parametrize(("units", "kv_heads"), [(1, 8), (2, 8), (8, 2), (1, 1)])
def test_two_threads_compute_what_one_does(two: None, units: int, kv_heads: int) -> None:
    for ours, alone in zip(attend(units, kv_heads, 2), attend(units, kv_heads, 1), strict=True):
        torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


def test_what_trains_is_repeated_to_the_bit(two: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever disturbs it: some products round otherwise by another number of threads."""
    disturbed = attend(8, 2, 2)[1:]
    monkeypatch.setattr(threads.LOAD, "threads", lambda most: most)
    assert all(map(torch.equal, disturbed, attend(8, 2, 2)[1:]))


def noted(found: list[tuple[str, int]], steps: int = 12) -> Steps[str]:
    """Steps that note which thread takes them, and how many torch would use there."""
    for _ in range(steps):
        found.append((threading.current_thread().name, torch.get_num_threads()))
        yield
    return "done"


def test_each_step_has_the_threads_of_its_time(two: None) -> None:
    """And torch's own setting is as it was, for this thread and for those to come."""
    found: list[tuple[str, int]] = []
    assert run(noted(found)) == "done"
    assert [number for _, number in found[:5]].count(1) == 3 and len(found) == 12
    assert {name for name, _ in found} == {threading.current_thread().name}
    assert torch.get_num_threads() == 2 == in_a_new_thread()


def in_a_new_thread() -> int:
    """How many threads torch uses there."""
    numbers: list[int] = []
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return numbers[0]


def test_a_thread_that_is_born_meanwhile_has_all(two: None, monkeypatch: Any) -> None:
    monkeypatch.setattr(threads.LOAD, "threads", lambda most: 1)

    def steps() -> Steps[int]:
        yield
        assert torch.get_num_threads() == 1
        time.sleep(2 * threads.LATER)
        yield  # a long pass: another thread gives theirs back to threads to come
        time.sleep(0.3)
        assert torch.get_num_threads() == 1
        return in_a_new_thread()

    assert run(steps()) == 2


def test_a_pass_goes_on_with_fewer_threads_in_its_midst(
    two: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Routed attention, and local attention alone."""
    machine = Machine()
    numbers: list[int] = []

    def preempted() -> int:
        numbers.append(torch.get_num_threads())
        return 12 * (len(numbers) > 3)

    calls: list[Callable[[], Tensor]] = [
        lambda: routed_attention(
            *torch.randn(3, 1, 2, 900, 16), torch.randint(3, (1, 900)), window=200
        ),
        lambda: routed_attention(*torch.randn(3, 1, 2, 900, 16), 2, window=200),
    ]
    for call in calls:
        numbers.clear()
        monkeypatch.setattr(threads, "LOAD", Load(preempted, lambda: machine.now))
        call()
        assert numbers[:4] == [2] * 4 and len(numbers) > 6 and set(numbers[4:]) == {1}
        assert torch.get_num_threads() == 2


@pytest.mark.parametrize("route", [torch.arange(900)[None] % 3, 2], ids=["mixed", "local alone"])
def test_what_is_filled_is_filled_in_a_step(
    two: None, monkeypatch: pytest.MonkeyPatch, route: Tensor | int
) -> None:
    """One shared operator beside a busy process takes as long as a short text."""
    monkeypatch.setattr(threads.LOAD, "threads", lambda most: 1)
    numbers: list[int] = []

    def noting(make: Callable[..., Tensor], *args: Any, **given: Any) -> Tensor:
        numbers.append(torch.get_num_threads())
        return make(*args, **given)

    for name in ("new_zeros", "new_empty"):
        made = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda *x, m=made, **given: noting(m, *x, **given))
    routed_attention(*torch.randn(3, 1, 2, 900, 16), route, window=200)
    assert numbers and set(numbers) == {1} and torch.get_num_threads() == 2


def test_an_error_leaves_all_as_it_was(two: None) -> None:
    def broken() -> Steps[None]:
        yield from noted([], 3)
        raise ValueError("this step")

    with pytest.raises(ValueError, match="this step"):
        run(broken())
    assert torch.get_num_threads() == 2 and run(noted([])) == "done"


def test_steps_within_steps_stay_where_these_are(two: None) -> None:
    found: list[tuple[str, int]] = []

    def outer() -> Steps[None]:
        for _ in range(6):
            within: list[tuple[str, int]] = []
            run(noted(within))
            assert len(set(within)) == 1
            found.extend(set(within))
            yield

    run(outer())
    assert len(set(found)) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(two: None) -> None:
    run(noted([]))
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        done: list[tuple[str, int]] = []
        run(noted(done))
        os._exit(len(done))
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 12
