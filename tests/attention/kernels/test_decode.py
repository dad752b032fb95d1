"""The kernels of a decoding step in Triton's interpreter: `TRITON_INTERPRET=1 python -m pytest`.

float32, small sizes.
"""

import os

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)

from bayes_router.attention.kernels import capability
from bayes_router.attention.kernels.triton import launch_decode
from tests.attention import decode_check
from tests.attention.decode_check import DECODERS, Decoder, needed_only, steps_equal_the_full_pass


@pytest.fixture(autouse=True)
def small_kernels_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The cache takes the kernel, a few keys a stretch; how often it was called."""
    calls = []
    launch = launch_decode.decode_step

    def counted(*args: object, **named: object) -> Tensor:
        calls.append(1)
        return launch(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(launch_decode, "decode_step", counted)
    monkeypatch.setattr(launch_decode, "MIN_KEYS", 8)
    monkeypatch.setattr(capability, "computes", lambda *xs: xs[0].dtype == torch.float32)
    return calls


@pytest.fixture
def assertions(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter drops device-side assertions else."""
    from triton.runtime import interpreter

    kept = interpreter.InterpreterOptions(debug=True, sanitize_overflow=False)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", kept)


def steps(names: tuple[str, ...], H: int, Hkv: int, Dh: int, calls: list[int]) -> None:
    """Rows of different lengths and experts, those changing at every step.

    Keys in one stretch and in several.
    """
    decoder = Decoder(names, B=3, H=H, Hkv=Hkv, Dh=Dh, window=9, capacity=40)
    steps_equal_the_full_pass(decoder, prompts=(30, 7, 1), steps=4, tolerance=1e-5)
    assert len(calls) == 4


@pytest.mark.parametrize("names", DECODERS)
def test_steps_equal_the_full_pass(
    names: tuple[str, ...], small_kernels_on_the_cpu: list[int]
) -> None:
    steps(names, 2, 1, 16, small_kernels_on_the_cpu)


@pytest.mark.parametrize(("H", "Hkv", "Dh"), [(2, 2, 16), (3, 1, 24), (1, 1, 8)])
def test_heads_and_head_sizes(
    H: int, Hkv: int, Dh: int, small_kernels_on_the_cpu: list[int]
) -> None:
    steps(("full", "gated", "local", "linear"), H, Hkv, Dh, small_kernels_on_the_cpu)


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2), (4, 1)])
def test_every_unit(units: int, Hkv: int, small_kernels_on_the_cpu: list[int]) -> None:
    decoder = Decoder(
        ("full", "gated", "local", "linear"), 3, 4, Hkv, 16, window=9, capacity=40, units=units
    )
    steps_equal_the_full_pass(decoder, prompts=(30, 7, 1), steps=4, tolerance=1e-5)
    assert len(small_kernels_on_the_cpu) == 4
    needed_only(decoder, prompts=(30, 20, 3), tolerance=1e-5)


def test_columns_of_the_state_in_parts_and_stretches_of_several_tiles(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(launch_decode, "STATE_ENTRIES", 64)  # 4 columns
    monkeypatch.setattr(launch_decode, "MIN_KEYS", 150)
    decoder = Decoder(
        ("full", "gated", "local", "linear"), B=4, H=2, Hkv=1, Dh=16, window=130, capacity=300
    )
    steps_equal_the_full_pass(decoder, prompts=(290, 150, 64, 0), steps=3, tolerance=1e-5)


@pytest.mark.parametrize("names", DECODERS)
def test_what_no_row_needs_is_not_read(names: tuple[str, ...]) -> None:
    needed_only(
        Decoder(names, B=3, H=2, Hkv=1, Dh=16, window=9, capacity=40),
        prompts=(30, 20, 3),
        tolerance=1e-5,
    )


def test_the_store_of_a_window_goes_round() -> None:
    decoder = Decoder(("local", "gated"), B=3, H=2, Hkv=1, Dh=16, window=6, capacity=100)
    assert decoder.cache().ring
    steps_equal_the_full_pass(decoder, prompts=(4, 0, 17), steps=7, tolerance=1e-5)


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.usefixtures("assertions")
def test_a_route_out_of_range_is_a_device_side_assertion(wrong: int) -> None:
    """Also for a model without an expert that looks at keys."""
    decoder = Decoder(("full", "gated", "local"), B=2, H=2, Hkv=1, Dh=16, window=6, capacity=20)
    q, k, v, _, _ = decoder.draw(1)
    route, lengths = torch.tensor([[[0]], [[wrong]]]), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(Exception, match="route out of range"):
        launch_decode.decode_step(
            q, k, v, q, k, None, None, None, route, lengths, (-1, -1, -1), 1, num_experts=3
        )


@pytest.mark.usefixtures("assertions")
def test_a_full_store_is_a_device_side_assertion() -> None:
    """After the replays of a graph the host no longer knows how long the rows are."""
    decoder = Decoder(("full",), B=2, H=2, Hkv=1, Dh=16, window=6, capacity=3)
    cache, inputs = decoder.cache(), decoder.draw(1)
    cache.lengths.fill_(3)
    with pytest.raises(Exception, match="the cache is full"):
        decode_check.feed(cache, inputs)
