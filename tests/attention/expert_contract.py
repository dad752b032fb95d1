"""What every attention expert must satisfy.

Inherit `ExpertContract`, set `name`, and give the oracle.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from bayes_router.attention.experts.contract import Expert, expert_class
from bayes_router.attention.shapes import ExpertShape

WINDOW = 7


def draw(
    B: int, H: int, Hkv: int, T: int, Dh: int = 16, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, Dh, generator=generator)
    k, v = torch.randn(2, B, Hkv, T, Dh, generator=generator)
    return q, k, v


class ExpertContract:
    name: str

    def oracle(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise NotImplementedError

    def build(self, num_heads: int = 4, head_dim: int = 16, window: int = WINDOW) -> Expert:
        return expert_class(self.name)(ExpertShape(num_heads, head_dim, window))

    @pytest.mark.parametrize(
        ("B", "Hkv", "T"), [(2, 4, 1), (1, 4, 5), (2, 2, 64), (3, 1, 65), (1, 4, 200), (2, 4, 131)]
    )
    def test_agrees_with_the_oracle_in_value_and_gradient(self, B: int, Hkv: int, T: int) -> None:
        inputs = [x.requires_grad_() for x in draw(B, 4, Hkv, T)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        out, want = self.build()(*inputs), self.oracle(*exact)
        assert relative_error(out, want) < 1e-5
        weight = torch.randn(out.shape)
        got = torch.autograd.grad((out * weight).sum(), inputs)
        true = torch.autograd.grad((want * weight).sum(), exact)
        for name, g, t in zip("qkv", got, true, strict=True):
            assert relative_error(g, t) < 1e-5, name

    @pytest.mark.parametrize("T", [40, 150])
    def test_no_future_leak(self, T: int) -> None:
        q, k, v = draw(2, 4, 2, T)
        before = self.build()(q, k, v)
        for x in (q, k, v):
            x[:, :, T // 2 :] += 3.0
        after = self.build()(q, k, v)
        assert torch.equal(before[:, :, : T // 2], after[:, :, : T // 2])
        assert not torch.allclose(before[:, :, T // 2 :], after[:, :, T // 2 :])

    @pytest.mark.parametrize("new", [1, 3, 90])
    def test_the_last_queries_equal_the_full_pass(self, new: int) -> None:
        q, k, v = draw(2, 4, 2, 150)
        expert = self.build()
        torch.testing.assert_close(
            expert(q[:, :, -new:], k, v), expert(q, k, v)[:, :, -new:], rtol=1e-5, atol=1e-6
        )

    def test_a_state_carried_over_chunks_equals_the_full_pass(self) -> None:
        expert = self.build()
        if not expert.stateful:
            pytest.skip("keeps no state")
        q, k, v = draw(2, 4, 2, 150)
        state, parts = expert.init_state(q, k, v), []
        for a, b in ((0, 1), (1, 70), (70, 71), (71, 150)):
            out, state = expert.extend(q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], state)
            parts.append(out)
        torch.testing.assert_close(torch.cat(parts, 2), expert(q, k, v), rtol=1e-5, atol=1e-5)

    def test_long_text_taken_in_segments_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        inputs = [x.requires_grad_() for x in draw(2, 4, 2, 150)]
        expert, weight = self.build(), torch.randn(2, 4, 150, 16)
        results = []
        for size in (10_000, 48, 1):
            monkeypatch.setattr("bayes_router.attention.shapes.SEGMENT", size)
            out = expert(*inputs)
            results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
        for whole, *pieces in zip(*results, strict=True):
            for piece in pieces:
                torch.testing.assert_close(piece, whole, rtol=1e-4, atol=1e-5)

    def test_half_precision_stays_close(self) -> None:
        q, k, v = draw(2, 4, 4, 130)
        out = self.build()(q.bfloat16(), k.bfloat16(), v.bfloat16())
        assert out.dtype == torch.bfloat16
        assert relative_error(out, self.oracle(*(x.bfloat16().double() for x in (q, k, v)))) < 2e-2

    def test_no_tokens_no_output(self) -> None:
        q, k, v = draw(2, 4, 4, 8)
        none = self.build()(q[:, :, :0], k[:, :, :0], v[:, :, :0])
        assert none.shape == (2, 4, 0, 16)
        assert self.build()(q[:, :, :0], k, v).shape == (2, 4, 0, 16)

    def test_costs_something(self) -> None:
        expert = self.build()
        assert expert.flops_per_token(128) > 0
        assert 0 < expert.cost_ratio <= 1


def gradient_errors(got: Sequence[Tensor], want: Sequence[Tensor]) -> list[float]:
    """Relative errors by q, k, v, and by all parameters as one vector.

    A gate's bias alone is a sum of terms that cancel.
    """
    both = [
        (*grads[:3], *([torch.cat([x.flatten() for x in grads[3:]])] if grads[3:] else []))
        for grads in (got, want)
    ]
    return [relative_error(g, t) for g, t in zip(*both, strict=True)]


def relative_error(
    got: Tensor, want: Tensor, beside: Tensor | None = None, share: float = 0.05
) -> float:
    """Error of the whole tensor, relative.

    Where the truth is next to nothing absolute, or, below a share of `beside`, relative to that.

    Attention to one key has no gradient by its query (linear attention: but for EPSILON). What is
    found there is the rounding of terms that cancel, and these are of the size of the gradient by
    the value.
    """
    got, want = got.detach().double(), want.detach()
    scale = want.norm().clamp_min(1.0)
    if beside is not None and want.norm() < share * beside.norm():
        scale = beside.detach().norm().clamp_min(1.0)
    return float((got - want).norm() / scale)
