"""What goes straight to a compiled kernel: `python -m pytest -m gpu tests/gpu/test_launch.py`."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def distances(x: Tensor, directions: Tensor, centre: Tensor) -> Tensor:
    from bayes_router.attention.kernels.triton.distance import launch_distance

    out = torch.empty(len(x), device="cuda")
    launch_distance(x, directions, centre, out, False)
    return out


def drawn() -> tuple[Tensor, Tensor, Tensor]:
    x, directions = torch.randn(40, 64, device="cuda"), torch.randn(64, 64, device="cuda")
    return x, directions, torch.randn(64, device="cuda")


def test_a_launch_that_is_known_computes_the_same_wherever_its_tensors_lie() -> None:
    x, directions, centre = drawn()
    first = distances(x, directions, centre)
    assert first.gt(0).all()
    for _ in range(2):  # compiled, then known
        odd = torch.empty(x.numel() + 1, device="cuda")[1:].view_as(x).copy_(x)  # 4 bytes off
        assert torch.equal(distances(odd, directions, centre), first)
        assert torch.equal(distances(nn.Parameter(x, False), directions, centre), first)
    x += 1  # what is known is the place, not the values
    assert not torch.equal(distances(x, directions, centre), first)


def test_triton_s_own_profiler_sees_launches_that_are_known() -> None:
    import triton

    problem, seen = drawn(), list[str]()
    distances(*problem)

    def look(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    hooks = triton.knobs.runtime.launch_enter_hook
    hooks.add(look)
    try:
        distances(*problem)
    finally:
        hooks.remove(look)
    distances(*problem)
    assert seen == ["distance_kernel"]


def test_a_graph_and_another_stream_launch_where_they_are_current() -> None:
    problem = drawn()
    want, stream, graph = distances(*problem), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = distances(*problem)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(beside, want)
    with torch.cuda.graph(graph):
        out = distances(*problem)
    problem[0].add_(1)
    graph.replay()
    assert torch.equal(out, distances(*problem)) and not torch.equal(out, want)
