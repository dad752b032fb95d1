"""The built-in experts against the contract and the float64 oracle; the registry."""

import pytest
import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, expert_class, register_expert
from bayes_router.attention.hard import reference
from bayes_router.attention.hard.problem import check_attention_inputs
from bayes_router.attention.kernels.eager.chunks import decayed_prefix
from bayes_router.attention.shapes import ExpertShape
from tests.attention.expert_contract import WINDOW, ExpertContract, draw


class TestFull(ExpertContract):
    name = "full"

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.softmax_attention(q, k, v)


class TestLinear(ExpertContract):
    name = "linear"

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.linear_attention(q, k, v)


class TestLocal(ExpertContract):
    name = "local"

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.softmax_attention(q, k, v, WINDOW)

    @pytest.mark.parametrize("window", [1, 2, 64, 70, 199, 500])
    def test_window_counts_the_token_itself(self, window: int) -> None:
        q, k, v = draw(1, 4, 4, 200)
        want = reference.softmax_attention(q, k, v, window)
        torch.testing.assert_close(
            self.build(window=window)(q, k, v).double(), want, rtol=1e-4, atol=1e-5
        )


class TestLocalWithSinks(TestLocal):
    sinks = 3

    def build(self, num_heads: int = 4, head_dim: int = 16, window: int = WINDOW) -> Expert:
        return expert_class("local")(ExpertShape(num_heads, head_dim, window, self.sinks))

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.softmax_attention(q, k, v, WINDOW, self.sinks)

    @pytest.mark.parametrize("window", [1, 2, 64, 70, 199, 500])
    def test_window_counts_the_token_itself(self, window: int) -> None:
        q, k, v = draw(1, 4, 4, 200)
        want = reference.softmax_attention(q, k, v, window, self.sinks)
        torch.testing.assert_close(
            self.build(window=window)(q, k, v).double(), want, rtol=1e-4, atol=1e-5
        )

    def test_changing_a_sink_reaches_the_last_token_and_the_key_after_them_does_not(self) -> None:
        q, k, v = draw(1, 4, 2, 200)
        expert = self.build()
        before = expert(q, k, v)
        for key, seen in ((self.sinks - 1, True), (self.sinks, False)):
            other = v.clone()
            other[:, :, key] += 3.0
            assert torch.equal(expert(q, k, other)[:, :, -1], before[:, :, -1]) is not seen


class TestLocalWithMoreSinksThanWindow(TestLocalWithSinks):
    sinks = WINDOW + 60


def test_as_many_sinks_as_tokens_is_full_attention() -> None:
    q, k, v = draw(2, 4, 2, 150)
    local = expert_class("local")(ExpertShape(4, 16, WINDOW, 150))
    torch.testing.assert_close(
        local(q, k, v), expert_class("full")(ExpertShape(4, 16, WINDOW))(q, k, v)
    )


def test_a_window_of_one_is_the_value_itself() -> None:
    q, k, v = draw(1, 4, 4, 90)
    torch.testing.assert_close(expert_class("local")(ExpertShape(4, 16, 1))(q, k, v), v)


def test_unknown_expert_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="expert: expected one of .*full, gated, linear, local.*got 'fulll'"
    ):
        expert_class("fulll")


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'full' is already"):

        @register_expert("full")
        class Another(Expert):
            pass


def test_sinks_below_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="sinks: expected 0 or more tokens; got -1"):
        expert_class("local")(ExpertShape(4, 16, 3, -1))


def test_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window: expected at least 1"):
        expert_class("local")(ExpertShape(4, 16, 0))


@pytest.mark.parametrize(
    ("shape", "field"),
    [
        ((2, 3, 5, 8), "k"),
        ((1, 4, 5, 8), "k"),
        ((2, 4, 3, 8), "k"),
        ((2, 4, 5, 4), "k"),
        ((2, 4, 8), "k"),
    ],
)
def test_shapes_that_do_not_fit_are_named(shape: tuple[int, ...], field: str) -> None:
    q = torch.zeros(2, 4, 5, 8)
    with pytest.raises(ValueError, match=f"^{field}: expected"):
        check_attention_inputs(q, torch.zeros(shape), torch.zeros(shape))


class TestGated(ExpertContract):
    name = "gated"

    def build(self, num_heads: int = 4, head_dim: int = 16, window: int = WINDOW) -> Expert:
        expert = super().build(num_heads, head_dim, window)
        generator = torch.Generator().manual_seed(1)
        for parameter in expert.parameters():
            parameter.data += 0.5 * torch.randn(parameter.shape, generator=generator)
        return expert

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The recurrence, one token after another."""
        expert = self.build().double()
        gate, bias, log_scale, features = (
            expert.gate,
            expert.gate_bias,
            expert.log_scale,
            self.features,
        )
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scale = log_scale.exp()[:, None]
        state, total, outputs = 0.0, 0.0, []
        for t in range(q.shape[2]):
            a = torch.sigmoid((k[:, :, t] * gate).sum(-1) + bias)[..., None]  # [B, H, 1]
            phi_k, phi_q = ((features(expert, x[:, :, t]) * scale).softmax(-1) for x in (k, q))
            state = a[..., None] * state + phi_k[..., None] * v[:, :, t, None]
            total = a * total + phi_k
            outputs.append(
                (phi_q[..., None] * state).sum(-2) / ((phi_q * total).sum(-1, keepdim=True) + 1e-6)
            )
        return torch.stack(outputs, 2)

    def features(self, expert: Expert, x: Tensor) -> Tensor:
        """What the softmax is taken of, but for its scale, of x [B, H, Dh]."""
        return x


class TestMapped(TestGated):
    name = "mapped"

    def features(self, expert: Expert, x: Tensor) -> Tensor:
        """See the base class."""
        return torch.einsum("hij,bhj->bhi", expert.map, x)


@pytest.mark.parametrize("length", [1, 63, 64, 65, 500, 64 * 64 + 7])
def test_a_decayed_prefix_is_its_recurrence(length: int) -> None:
    generator = torch.Generator().manual_seed(0)
    entries = torch.randn(2, length, 3, generator=generator, dtype=torch.float64)
    log_decay = -torch.rand(2, length, generator=generator, dtype=torch.float64)
    state, want = torch.zeros(2, 3, dtype=torch.float64), []
    for n in range(length):
        state = log_decay[:, n, None].exp() * state + entries[:, n]
        want.append(state)
    torch.testing.assert_close(decayed_prefix(entries, log_decay), torch.stack(want, 1))
