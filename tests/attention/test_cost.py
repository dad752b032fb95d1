"""Analytic costs against loops that compute the output and count as they go.

And against torch's own counter.
"""

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from bayes_router.attention.cost import Mode, cost_ratios, flops, hard_bytes, hard_flops, own_flops
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.experts.gated import GatedLinearAttention
from bayes_router.attention.experts.mapped import MappedGatedAttention
from bayes_router.attention.kernels.eager import chunks
from bayes_router.attention.kernels.eager.chunks import feature_map
from bayes_router.attention.shapes import ExpertShape
from bayes_router.transformer.cost import model_cost
from bayes_router.types import CostModel
from tests.tiny import tiny_batch, tiny_model

SHAPE = ExpertShape(num_heads=4, head_dim=6, window=5)
MADE = {
    "full": SHAPE,
    "linear": SHAPE,
    "gated": SHAPE,
    "mapped": SHAPE,
    "local": SHAPE,
    "local, 2 sinks": SHAPE._replace(sinks=2),
    "local, 9 sinks": SHAPE._replace(sinks=9),
}


def make(case: str) -> Expert:
    torch.manual_seed(0)
    expert = expert_class(case.split(",")[0])(MADE[case])
    for parameter in expert.parameters():
        torch.nn.init.normal_(parameter)
    return expert


def experts() -> list[Expert]:
    return [make(case) for case in MADE]


class Loops:
    """One sequence, token by token, head by head.

    Every multiply-add of a product of vectors is counted as it is done.

    `updates` [T] is what a token costs whoever reads it, `reads` [T] what its own output costs.
    """

    def __init__(self, expert: Expert, q: Tensor, k: Tensor, v: Tensor):
        self.expert, self.q, self.k, self.v = expert, q, k, v
        (self.H, self.T, self.Dh), self.Hkv = q.shape, k.shape[0]
        self.updates, self.reads = [0] * self.T, [0] * self.T
        self.out = torch.zeros_like(q)
        (self._states if expert.stateful else self._pairs)()

    def _dot(self, counts: list[int], t: int, a: Tensor, b: Tensor) -> Tensor:
        assert a.dim() == b.dim() == 1
        counts[t] += 2 * len(a)
        return (a * b).sum()

    def _pairs(self) -> None:
        window = self.T if self.expert.name == "full" else self.expert.shape.window
        sinks = 0 if self.expert.name == "full" else self.expert.shape.sinks
        for h in range(self.H):
            keys, values = self.k[h * self.Hkv // self.H], self.v[h * self.Hkv // self.H]
            for t in range(self.T):
                seen = [s for s in range(t + 1) if t - s < window or s < sinks]
                scores = (
                    torch.stack([self._dot(self.reads, t, self.q[h, t], keys[s]) for s in seen])
                    / self.Dh**0.5
                )
                for weight, s in zip(scores.softmax(0), seen, strict=True):
                    self.out[h, t] += weight * values[s]
                    self.reads[t] += 2 * self.Dh

    def _states(self) -> None:
        expert, gated = self.expert, isinstance(self.expert, GatedLinearAttention)
        heads = self.H if gated else self.Hkv  # a gate is a query head's own
        for own in range(heads):
            head, mine = (
                own * self.Hkv // heads,
                range(own * self.H // heads, (own + 1) * self.H // heads),
            )
            state = torch.zeros(self.Dh, self.Dh + 1).double()
            for t in range(self.T):
                k, v = self.k[head, t], torch.cat([self.v[head, t], torch.ones(1)])
                if isinstance(expert, GatedLinearAttention):
                    state *= torch.sigmoid(
                        self._dot(self.updates, t, expert.gate[own].double(), k)
                        + expert.gate_bias[own]
                    )
                for i, feature in enumerate(self._feature(k, own, self.updates, t)):
                    state[i] += feature * v
                    self.updates[t] += 2 * len(v)
                for h in mine:
                    phi = self._feature(self.q[h, t], own, self.reads, t)
                    summed = torch.stack(
                        [self._dot(self.reads, t, phi, column) for column in state.T]
                    )
                    self.out[h, t] = summed[:-1] / (summed[-1] + 1e-6)

    def _feature(self, x: Tensor, head: int, counts: list[int], t: int) -> Tensor:
        expert = self.expert
        if isinstance(expert, MappedGatedAttention):
            x = torch.stack([self._dot(counts, t, row.double(), x) for row in expert.map[head]])
        return (
            (x * expert.log_scale[head].exp()).softmax(-1)
            if isinstance(expert, GatedLinearAttention)
            else feature_map(x)
        )


@torch.no_grad()
def looped(case: str, T: int, Hkv: int = 4) -> tuple[Expert, Loops]:
    """An expert, and the loops that gave the same output."""
    expert = make(case)
    q, k, v = (
        torch.randn(4, T, 6).double(),
        torch.randn(Hkv, T, 6).double(),
        torch.randn(Hkv, T, 6).double(),
    )
    loops = Loops(expert, q, k, v)
    torch.testing.assert_close(
        expert(q[None], k[None], v[None])[0], loops.out, rtol=1e-6, atol=1e-6
    )
    return expert, loops


@pytest.mark.parametrize("T", [1, 3, 5, 12])
@pytest.mark.parametrize("case", MADE)
def test_flops_are_those_of_the_loops(case: str, T: int) -> None:
    expert, loops = looped(case, T)
    assert flops(expert, T) * T == pytest.approx(sum(loops.updates) + sum(loops.reads))
    assert flops(expert, T, Mode.DECODE) == pytest.approx(loops.updates[-1] + loops.reads[-1])


@pytest.mark.parametrize("Hkv", [4, 2, 1])
@pytest.mark.parametrize("case", MADE)
def test_hard_flops_are_those_of_the_loops(case: str, Hkv: int) -> None:
    T = 9
    expert, loops = looped(case, T, Hkv)
    whole, step = (hard_flops([expert], T, Hkv, mode) for mode in Mode)
    assert whole.own[0] == pytest.approx(sum(loops.reads) / T) and whole.shared == pytest.approx(
        loops.updates[0]
    )
    assert step.own[0] == pytest.approx(loops.reads[-1]) and step.shared == pytest.approx(
        loops.updates[-1]
    )
    assert set(loops.updates) == {loops.updates[0]}  # the same at every position


def test_grouped_heads_update_a_state_for_each_key_head() -> None:
    cost = hard_flops([expert_class("linear")(ExpertShape(8, 64, 5))], 100, num_kv_heads=1)
    assert (float(cost.own[0]), cost.shared) == (66_560, 8_320)


def test_routes_are_counted_at_their_positions() -> None:
    B, T, start = 3, 11, 4
    made = [looped(case, start + T, Hkv=2) for case in MADE]
    route = torch.randint(len(made), (B, T))
    taken = torch.nn.functional.one_hot(route, len(made)).sum(0)
    want = sum(made[int(route[b, t])][1].reads[start + t] for b in range(B) for t in range(T)) / (
        B * T
    )
    assert own_flops([expert for expert, _ in made], taken, start) == pytest.approx(want)
    whole = torch.ones(start + T, 1)
    for expert, loops in made:
        assert own_flops([expert], whole) == pytest.approx(
            float(hard_flops([expert], start + T, 2).own[0])
        )
        assert own_flops([expert], whole) == pytest.approx(sum(loops.reads) / (start + T))


def counted(call: object, *inputs: object) -> int:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        call(*inputs)  # type: ignore[operator]
    return int(counter.get_total_flops())


def test_torch_counts_the_same_where_it_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoding step has no mask; of a causal pass torch counts the full square.

    Outer products by `*` it does not count.
    """
    full, linear, T, (H, Dh) = make("full"), make("linear"), 32, SHAPE[:2]
    q, k, v = torch.randn(3, 1, H, T, Dh)
    assert counted(full, q[:, :, -1:], k, v) == flops(full, T, Mode.DECODE)
    assert counted(full, q, k, v) * (T + 1) / (2 * T) == flops(full, T) * T
    kv = k[:, :2]
    last = [x[:, :, -1:] for x in (q, kv, kv)]
    assert (
        counted(linear.extend, *last, linear.init_state(q, kv, kv))
        == hard_flops([linear], T, 2, Mode.DECODE).own[0]
    )
    # a chunk of one token: two products of its own with itself beside
    monkeypatch.setattr(chunks, "CHUNK", 1)
    cost = hard_flops([linear], T, 2)
    assert counted(linear, q, kv, kv) == T * (
        cost.own[0] + cost.shared + 2 * H * Dh + 2 * H * (Dh + 1)
    )


def test_ratios_are_relative_to_full() -> None:
    three = [expert_class(name)(ExpertShape(2, 8, 5)) for name in ("full", "linear", "local")]
    torch.testing.assert_close(
        cost_ratios(three, CostModel.PAPER, 64), torch.tensor([1.0, 0.15, 0.30])
    )
    ratios = cost_ratios(three, CostModel.FLOPS, 1000)
    assert ratios.dtype == torch.float32
    torch.testing.assert_close(
        ratios, torch.tensor([1.0, 18 / 1001, 4.99 / 500.5]), rtol=1e-3, atol=0
    )
    assert cost_ratios(three[2:], CostModel.FLOPS, 1000)[0] == ratios[2]


@pytest.mark.parametrize(
    "names", [("full", "linear", "local"), ("full", "gated", "local"), ("linear",), ("full",)]
)
@pytest.mark.parametrize("Hkv", [4, 2])
def test_bytes_of_a_step_are_those_that_the_cache_holds(names: tuple[str, ...], Hkv: int) -> None:
    """A step on full reads every slot but the spare one, and every state is read and written."""
    T, made = 10, [expert_class(name)(SHAPE) for name in names]
    cache, two_bytes = LayerCache(made, 1, T, Hkv, dtype=torch.bfloat16), torch.bfloat16.itemsize
    slots = 0 if cache.keys is None else (cache.keys.nbytes + cache.values.nbytes) * T // (T + 1)  # type: ignore[union-attr]
    states = sum(state.nbytes for state in cache.states.values())
    token = 2 * Hkv * SHAPE.head_dim * two_bytes  # its key and value, written
    cost = hard_bytes(made, T, Hkv, two_bytes, Mode.DECODE)
    read = {"full": slots, "local": 5 * token}
    assert cost.own.tolist() == [read.get(name, 0) for name in names]
    assert cost.shared == (token if slots else 0) + 2 * states
    whole = hard_bytes(made, T, Hkv, two_bytes)
    assert (
        whole.own.tolist() == [0] * len(names)
        and whole.shared == 2 * (4 + Hkv) * SHAPE.head_dim * two_bytes
    )


def test_a_mean_weighs_the_load() -> None:
    cost = hard_flops([make("full"), make("linear")], 100, 4)
    assert cost.mean(torch.tensor([0.0, 1.0])) == pytest.approx(flops(make("linear"), 100))
    assert cost.mean(torch.tensor([1.0, 0.0])) == pytest.approx(
        flops(make("full"), 100) + cost.shared
    )


@pytest.mark.parametrize("last_only", [False, True])
def test_a_whole_model_as_torch_counts_it(last_only: bool) -> None:
    """Every token on full; of a causal pass torch counts the full square.

    The rest of the model costs the same at any route.
    """
    T, model = 12, tiny_model().eval()
    tokens, _ = tiny_batch(1, T)
    found = counted(lambda: model(tokens, force="full", last_only=last_only))
    heads = model.config.num_layers * model.config.d_model
    cost = model_cost(model, T, last_only=last_only).flops
    square = 4 * heads * T * (T - 1) // 2  # pairs that are masked
    states = (
        model.config.num_layers
        * hard_flops(model.network.experts()[0], T, model.config.kv_heads).shared
    )
    assert T * (float(cost.own[0]) + cost.shared - states) == pytest.approx(found - square)
    assert cost.own.tolist() == [
        pytest.approx(model.config.num_layers * float(x))
        for x in hard_flops(model.network.experts()[0], T, 2).own
    ]


def test_a_decoding_step_of_a_whole_model_as_torch_counts_it() -> None:
    T, model = 12, tiny_model(experts=("full",)).eval()
    tokens, _ = tiny_batch(1, T)
    cache = model.network.new_cache(1, T)
    model(tokens[:, :-1], cache=cache)
    cost = model_cost(model, T, Mode.DECODE)
    assert counted(lambda: model(tokens[:, -1:], cache=cache)) == cost.flops.mean(torch.ones(1))
    weights = sum(p.numel() for p in model.parameters())
    token = 2 * model.config.kv_heads * model.config.head_dim
    # 3 layers; its own key and value written
    assert cost.bytes.mean(torch.ones(1)) == 4 * (weights + 3 * (T + 1) * token)
    shared = model_cost(model, T, Mode.DECODE, batch=10).bytes
    assert shared.mean(torch.ones(1)) == pytest.approx(4 * (weights / 10 + 3 * (T + 1) * token))
    assert model_cost(model, T, batch=2).bytes.shared == pytest.approx(
        4 * (weights / (2 * T) + 3 * (2 * 16 + token))
    )


def test_a_whole_model_with_other_experts() -> None:
    """What the rival of a routed model costs.

    The network alone, every token on full, nothing kept for other experts.
    """
    T, model, lean = 40, tiny_model(), tiny_model(experts=("full",))
    full = model.network.experts()[0][:1]
    for mode in Mode:
        got, want = (
            model_cost(model.network, T, mode, experts=full),
            model_cost(lean.network, T, mode),
        )
        assert got.flops.mean(torch.ones(1)) == want.flops.mean(torch.ones(1))
        assert model_cost(model, T, mode).flops.shared > got.flops.shared  # controllers, states


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="experts: expected at least one"):
        cost_ratios([], CostModel.PAPER, 10)
    with pytest.raises(ValueError, match="context: expected at least 1"):
        cost_ratios([make("full")], CostModel.FLOPS, 0)
    with pytest.raises(ValueError, match="cost_model: expected one of flops, latency, paper"):
        cost_ratios([make("full")], "paperr", 10)  # type: ignore[arg-type]
