"""What goes straight to a compiled kernel, here with what stands in for one."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton", minversion="3.6", exc_type=ImportError)
from bayes_router.attention.kernels.triton import launch as launching  # noqa: E402
from bayes_router.attention.kernels.triton.launch import launch  # noqa: E402


class Kernel:
    """Compiles for each call that reaches it; what is compiled writes down what it gets."""

    params = [SimpleNamespace(name=name) for name in ("x", "n", "BLOCK")]

    def __init__(self, scratch: int = 0) -> None:
        self.compiled, self.direct, self.whole = 0, list[Any](), list[Any]()
        self.scratch = scratch

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile(*args: Any, **constants: Any) -> Any:
            self.compiled += 1
            run = SimpleNamespace(
                global_scratch_size=self.scratch, profile_scratch_size=0, launch_pdl=False,
                launch_cooperative_grid=False, launch=lambda *got: self.direct.append(got),
            )  # fmt: skip
            return Compiled(self, run)

        return compile


class Compiled:
    """A compiled kernel of Triton 3.6, as far as it is asked."""

    function, packed_metadata = 11, (4, 1, 0)

    def __init__(self, kernel: Kernel, run: Any) -> None:
        self.kernel, self.run = kernel, run

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.kernel.whole.append((grid, args))


@pytest.fixture(autouse=True)
def hooks(monkeypatch: pytest.MonkeyPatch) -> Any:
    active = SimpleNamespace(get_current_stream=lambda device: 70 + device)
    runtime = SimpleNamespace(
        launch_enter_hook=SimpleNamespace(calls=[]), launch_exit_hook=SimpleNamespace(calls=[])
    )
    stands_in = SimpleNamespace(
        runtime=SimpleNamespace(driver=SimpleNamespace(active=active)),
        knobs=SimpleNamespace(runtime=runtime),
    )
    monkeypatch.setattr(launching, "triton", stands_in)
    for name, value in (("_COMPILED", {}), ("_FOLLOWS", False), ("_DIRECT", True)):
        monkeypatch.setattr(launching, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    return runtime


def test_what_is_known_gets_addresses_and_its_constants() -> None:
    kernel, x = Kernel(), torch.zeros(8)
    for n in (5, 5, 5):
        launch(kernel, (2,), x, n, BLOCK=16, num_warps=4)
    assert kernel.compiled == 1 and not kernel.whole
    known = (2, 1, 1, 73, 11, False, False, None, None, (4, 1, 0), None, None, None)
    assert kernel.direct == 2 * [(*known, x.data_ptr(), 5, 16)]
    launch(kernel, (2,), nn.Parameter(x), 5, BLOCK=16, num_warps=4)
    assert kernel.compiled == 1


@pytest.mark.parametrize(
    ("x", "n", "constants"),
    [
        (torch.zeros(8), 6, {}),
        (torch.zeros(9)[1:], 5, {}),
        (torch.zeros(8).double(), 5, {}),
        (torch.zeros(8), 5, {"BLOCK": 32}),
        (torch.zeros(8), 5, {"num_warps": 8}),
    ],
)
def test_what_looks_otherwise_is_compiled_anew(x: Tensor, n: int, constants: Any) -> None:
    kernel, usual = Kernel(), {"BLOCK": 16, "num_warps": 4}
    launch(kernel, (2,), torch.zeros(8), 5, **usual)
    launch(kernel, (2,), x, n, **usual | constants)
    assert kernel.compiled == 2
    launch(Kernel(), (2,), torch.zeros(8), 5, **usual)  # of another kernel nothing is known
    assert not kernel.direct


def test_a_tensor_of_another_device_goes_to_triton_which_refuses_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    launch(kernel, (2,), x, 5, BLOCK=16)
    monkeypatch.setattr(Tensor, "get_device", lambda self: 0)
    launch(kernel, (2,), x, 5, BLOCK=16)
    assert kernel.compiled == 2 and not kernel.direct


def test_scratch_memory_and_profilers_have_triton_s_own_way(hooks: Any) -> None:
    kernel, x = Kernel(scratch=64), torch.zeros(8)
    for _ in range(2):
        launch(kernel, (2, 3), x, 5, BLOCK=16)
    assert kernel.whole == [((2, 3, 1), (x, 5, 16))] and not kernel.direct
    watched = Kernel()
    launch(watched, (2,), x, 5, BLOCK=16)
    hooks.launch_exit_hook.calls.append(print)
    launch(watched, (2,), x, 5, BLOCK=16)
    assert len(watched.whole) == 1 and not watched.direct


@pytest.mark.parametrize("capturing", [False, True])
def test_kernels_follow_each_other_but_in_a_graph(
    capturing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, x = Kernel(), torch.zeros(8)
    monkeypatch.setattr(launching, "_FOLLOWS", True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    for _ in range(2):
        launch(kernel, (2,), x, 5, BLOCK=16)
    assert kernel.direct[0][6] is not capturing
