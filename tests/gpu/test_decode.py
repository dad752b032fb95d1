"""Decoding on a CUDA device.

The kernel of a step against float64, in a CUDA graph, and over a store poisoned with NaN.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.routing.policy import Argmax, Budget, Conservative, Policy
from tests.attention.decode_check import (
    DECODERS,
    Decoder,
    Inputs,
    feed,
    needed_only,
    per_row,
    prefilled,
    steps_equal_the_full_pass,
)
from tests.attention.expert_contract import relative_error
from tests.gpu.waiting import waits
from tests.tiny import EXPERTS, tiny_batch, tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOLERANCE = {torch.bfloat16: 1e-2, torch.float16: 1e-2, torch.float32: 1e-5}
PROMPTS = (1300, 70, 1, 0, 600)


def decoder(names: tuple[str, ...] = ("full", "gated", "local"), **changes: object) -> Decoder:
    settings: dict[str, object] = {
        "B": 5,
        "H": 4,
        "Hkv": 2,
        "Dh": 64,
        "window": 70,
        "capacity": 3000,
    }
    settings |= {"device": "cuda", "dtype": torch.bfloat16}
    return Decoder(names, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    from bayes_router.attention.kernels.triton import launch_decode  # only where Triton is

    calls, step = [], launch_decode.decode_step

    def counted(*args: object, **named: object) -> Tensor:
        calls.append(1)
        return step(*args, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(launch_decode, "decode_step", counted)
    return calls


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("names", DECODERS)
def test_steps_equal_the_full_pass(
    names: tuple[str, ...], dtype: torch.dtype, kernel_calls: list[int]
) -> None:
    steps_equal_the_full_pass(
        decoder(names, dtype=dtype), PROMPTS, steps=6, tolerance=TOLERANCE[dtype]
    )
    assert len(kernel_calls) == 6


@pytest.mark.parametrize(("units", "Hkv"), [(2, 2), (4, 2), (4, 1)])
@pytest.mark.parametrize(
    "names", [("full", "gated", "local"), ("local", "gated", "linear", "full")]
)
def test_every_unit(names: tuple[str, ...], units: int, Hkv: int, kernel_calls: list[int]) -> None:
    one = decoder(names, Hkv=Hkv, units=units)
    steps_equal_the_full_pass(one, PROMPTS, steps=6, tolerance=1e-2)
    assert len(kernel_calls) == 6
    needed_only(one, PROMPTS, tolerance=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("H", "Hkv", "Dh"), [(8, 8, 128), (8, 1, 128), (6, 2, 80), (3, 1, 16), (2, 2, 24), (2, 1, 256)]
)
def test_heads_and_head_sizes(
    H: int, Hkv: int, Dh: int, dtype: torch.dtype, kernel_calls: list[int]
) -> None:
    names = ("full", "gated", "local", "linear")
    one = decoder(names, H=H, Hkv=Hkv, Dh=Dh, dtype=dtype)
    steps_equal_the_full_pass(one, PROMPTS, steps=4, tolerance=TOLERANCE[dtype])
    assert len(kernel_calls) == 4


@pytest.mark.parametrize("names", [("local",), ("local", "gated")])
def test_a_ring(names: tuple[str, ...], kernel_calls: list[int]) -> None:
    one = decoder(names)
    assert one.cache().ring
    steps_equal_the_full_pass(one, PROMPTS, steps=90, tolerance=1e-2)
    assert len(kernel_calls) == 90


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", [*DECODERS, ("local", "gated")])
def test_what_no_row_needs_is_not_read(names: tuple[str, ...], dtype: torch.dtype) -> None:
    needed_only(decoder(names, dtype=dtype), PROMPTS, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("names", [*DECODERS, ("local", "gated")])
def test_a_graph_replays_a_step_with_new_routes_and_longer_rows(
    names: tuple[str, ...], dtype: torch.dtype
) -> None:
    one, steps = decoder(names, dtype=dtype), 40
    total = max(PROMPTS) + steps + 1
    inputs, route = one.draw(total), one.routes(total)
    eager, replayed = (prefilled(one, inputs, route, PROMPTS) for _ in range(2))
    held = Inputs(*(x.clone() for x in per_row(inputs, eager.lengths, 1)))
    choice = route.gather(1, eager.lengths[:, None, None])
    feed(prefilled(one, inputs, route, PROMPTS), held, choice)  # loads and compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = feed(replayed, held, choice)
    for _ in range(steps):
        now = per_row(inputs, eager.lengths, 1)
        taken = route.gather(1, eager.lengths[:, None, None])
        for x, y in zip(held, now, strict=True):
            x.copy_(y)
        choice.copy_(taken)
        graph.replay()
        torch.testing.assert_close(out, feed(eager, now, taken), rtol=0, atol=0)
    assert replayed.lengths.tolist() == eager.lengths.tolist() == [n + steps for n in PROMPTS]
    for index, state in eager.states.items():
        torch.testing.assert_close(replayed.states[index], state, rtol=0, atol=0)


@pytest.mark.parametrize("names", [*DECODERS, ("local",)])
def test_neither_chunks_nor_steps_wait_for_the_device(names: tuple[str, ...]) -> None:
    """Right-padded prompts, a right-padded second chunk, then a step; a ring too."""
    one = decoder(names)
    inputs, choice = one.draw(1000), one.routes(1)
    chunks = [
        (inputs.part(0, max(sizes)), one.routes(max(sizes)), torch.tensor(sizes, device="cuda"))
        for sizes in ((900, 1, 300, 20, 5), (7, 40, 1, 0, 90))
    ]

    def pass_over(cache: LayerCache) -> None:
        for chunk in chunks:
            feed(cache, *chunk)
        feed(cache, inputs.part(0, 1), choice)

    pass_over(one.cache())  # loads and compiles
    cache = one.cache()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        pass_over(cache)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("names", [("full", "gated", "local"), ("local", "gated")])
def test_the_path_without_kernels_agrees(names: tuple[str, ...], kernel_calls: list[int]) -> None:
    """Float64 has none; a ring too."""
    steps_equal_the_full_pass(decoder(names, dtype=torch.float64), PROMPTS, steps=6, tolerance=1e-6)
    assert not kernel_calls


BAD_ROUTE = """
import torch
from tests.attention.decode_check import Decoder, feed
names = "full", "gated", "local"
one = Decoder(names, B=2, H=2, Hkv=1, Dh=64, window=9, capacity=50, device="cuda", dtype={dtype})
cache, inputs = one.cache(), one.draw({T})
feed(cache, inputs, one.routes({T}))
torch.cuda.synchronize()
print("fine so far", flush=True)
feed(cache, inputs, torch.full((2, {T}), {wrong}, device="cuda"))
torch.cuda.synchronize()
print("silent")
"""


@pytest.mark.parametrize("wrong", [-1, 3])
@pytest.mark.parametrize(
    ("dtype", "T"), [("torch.bfloat16", 1), ("torch.bfloat16", 9), ("torch.float64", 1)]
)
def test_a_route_out_of_range_ends_the_program(dtype: str, T: int, wrong: int) -> None:
    """In the kernel, in a chunk, in the masked path.

    In a process of its own, for the device is lost.
    """
    code = BAD_ROUTE.format(dtype=dtype, T=T, wrong=wrong)
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert found.returncode != 0 and found.stdout == "fine so far\n", found.stderr
    assert "assert" in found.stderr


@pytest.mark.parametrize("names", [EXPERTS, ("full", "gated", "local"), ("local",)])
def test_rows_of_a_model_are_each_as_if_alone(names: tuple[str, ...]) -> None:
    """Padded prompts of several lengths and then steps through the network.

    On the routes of its controllers.
    """
    model, tokens = tiny_model(experts=names).cuda(), tiny_batch(B=3)[0].cuda()
    lengths = torch.tensor([30, 4, 17], device="cuda")
    cache, got = model.network.new_cache(3, 40), []
    with torch.no_grad():
        out = model(tokens[:, :30], cache=cache, lengths=lengths, last_only=True)
        for step in range(5):
            got.append(out.logits[:, 0])
            out = model(tokens.gather(1, lengths[:, None] + step), cache=cache)
        for b, length in enumerate(lengths.tolist()):
            alone = model(tokens[b : b + 1, : length + 4]).logits[0, length - 1 :]
            assert relative_error(torch.stack([x[b] for x in got]), alone.double()) < 1e-3


COSTS = (1.0, 0.15, 0.3, 0.15)


@pytest.mark.parametrize(
    "policy", [Argmax(), Budget(COSTS, 1.0), Conservative(COSTS, 0.7, price=1.0)]
)
@torch.no_grad()
def test_no_policy_waits_for_the_device(policy: Policy) -> None:
    """Nor does anything else in a model's pass over a prompt and the step behind it."""
    model, tokens = tiny_model().cuda().eval(), tiny_batch(B=3)[0].cuda()
    model.policy = policy

    def run() -> None:
        cache = model.network.new_cache(3, 60)
        model(tokens, "hard", cache=cache, last_only=True)
        model(tokens[:, :1], "hard", cache=cache)

    assert waits(run) == 0
