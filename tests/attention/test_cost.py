"""Analytic costs against brute force, torch's own counter where it is right, and measured latencies that are kept."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bayes_router.attention import latency, reference
from bayes_router.attention.cost import (
    Mode,
    cost_ratios,
    flops,
    hard_decode_bytes,
    hard_flops,
    matmul_weights,
    model_flops,
    read_bytes,
    state_bytes,
)
from bayes_router.attention.expert import Expert, ExpertShape, expert_class
from bayes_router.types import CostModel

SHAPE = ExpertShape(num_heads=2, head_dim=8, window=5)


def experts() -> list[Expert]:
    return [expert_class(name)(SHAPE) for name in ("full", "linear", "local")]


@pytest.mark.parametrize("T", [1, 3, 5, 17])
def test_flops_agree_with_a_count_of_visible_pairs(T: int) -> None:
    full, linear, local = experts()
    pairs = 4 * SHAPE.num_heads * SHAPE.head_dim  # of one query and one key
    assert flops(full, T) * T == pytest.approx(pairs * int(reference.visible(T, T).sum()))
    assert flops(local, T) * T == pytest.approx(pairs * int(reference.visible(T, T, SHAPE.window).sum()))
    assert flops(linear, T) == 2 * SHAPE.num_heads * 2 * SHAPE.head_dim * (SHAPE.head_dim + 1)
    for sinks in (1, 3, 9, 20):
        local = expert_class("local")(SHAPE._replace(sinks=sinks))
        seen = reference.visible(T, T, SHAPE.window, sinks)
        assert flops(local, T) * T == pytest.approx(pairs * int(seen.sum()))
        assert local.keys_read(T) == int(seen[-1].sum())


@pytest.mark.parametrize("T", [1, 4, 5, 17])
def test_a_decoding_step_is_the_last_row(T: int) -> None:
    full, linear, local = experts()
    pairs = 4 * SHAPE.num_heads * SHAPE.head_dim
    assert flops(full, T, Mode.DECODE) == pytest.approx(pairs * T)
    assert flops(local, T, Mode.DECODE) == pytest.approx(pairs * min(T, SHAPE.window))
    assert flops(linear, T, Mode.DECODE) == pytest.approx(flops(linear, T))


def test_torch_counts_the_same_where_it_is_right() -> None:
    """A decoding step has no mask; of a causal pass torch counts the full square."""
    full, T = experts()[0], 32
    q, k, v = torch.randn(3, 1, SHAPE.num_heads, T, SHAPE.head_dim)

    def counted(q: Tensor) -> int:
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            full(q, k, v)
        return counter.get_total_flops()

    assert counted(q[:, :, -1:]) == flops(full, T, Mode.DECODE)
    assert counted(q) * (T + 1) / (2 * T) == flops(full, T) * T


def test_ratios_are_relative_to_full() -> None:
    paper = cost_ratios(experts(), CostModel.PAPER, 64)
    torch.testing.assert_close(paper, torch.tensor([1.0, 0.15, 0.30]))
    ratios = cost_ratios(experts(), CostModel.FLOPS, 1000)
    assert ratios.dtype == torch.float32
    torch.testing.assert_close(ratios, torch.tensor([1.0, 18 / 1001, 4.99 / 500.5]), rtol=1e-3, atol=0)
    only_local = cost_ratios(experts()[2:], CostModel.FLOPS, 1000)
    assert only_local[0] == ratios[2]


def test_bytes() -> None:
    full, linear, local = experts()
    assert state_bytes(full, 2) == 0 and state_bytes(linear, 2) == 2 * 8 * 9 * 4
    assert read_bytes(full, 100, 2, 2, Mode.DECODE) == 100 * 2 * 2 * 8 * 2
    assert read_bytes(local, 100, 2, 2, Mode.DECODE) == 5 * 2 * 2 * 8 * 2
    assert read_bytes(linear, 100, 2, 2, Mode.DECODE) == 2 * state_bytes(linear, 2)
    assert read_bytes(full, 100, 1, 2) == 2 * (2 + 1) * 8 * 2
    hard = hard_decode_bytes(experts(), 100, 2, 2)
    assert hard.own[1] == 0 and hard.shared == 2 * 2 * 8 * 2 + 2 * state_bytes(linear, 2)


def test_every_token_pays_for_the_state() -> None:
    cost = hard_flops(experts(), 100, 2)
    linear = flops(experts()[1], 100)
    assert cost.shared == linear / 2  # the update; the read is the token's own
    assert cost.mean(torch.tensor([0.0, 1.0, 0.0])) == pytest.approx(linear)
    assert cost.mean(torch.tensor([1.0, 0.0, 0.0])) == pytest.approx(flops(experts()[0], 100) + linear / 2)


def test_a_whole_model() -> None:
    weights = matmul_weights(nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Linear(5, 2, bias=False)))
    assert weights == 25
    assert model_flops(weights, [100.0, 1.0]) == 151


def test_latency_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    first = cost_ratios(experts(), CostModel.LATENCY, 64, device="cpu")
    assert first[0] > 0 and (first > 0).all()
    monkeypatch.setattr(latency, "_measure", lambda *_: pytest.fail("measured again"))
    torch.testing.assert_close(cost_ratios(experts(), CostModel.LATENCY, 64, device="cpu"), first)
    assert "threads | 2." in latency.cache_path().read_text()


def test_a_damaged_cache_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    latency.cache_path().parent.mkdir(parents=True)
    latency.cache_path().write_text("{not json")
    assert (cost_ratios(experts(), CostModel.LATENCY, 32, device="cpu") > 0).all()


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="experts: expected at least one"):
        cost_ratios([], CostModel.PAPER, 10)
    with pytest.raises(ValueError, match="context: expected at least 1"):
        cost_ratios(experts(), CostModel.FLOPS, 0)
    with pytest.raises(ValueError, match="cost_model: expected one of flops, latency, paper"):
        cost_ratios(experts(), "paperr", 10)  # type: ignore[arg-type]
