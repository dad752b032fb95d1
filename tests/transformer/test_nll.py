"""A token's nll: by hand, in every shape and dtype, nothing where nothing is scored."""

import pytest
import torch

from bayes_router.inference.likelihood import ExpectedToken, NextToken
from bayes_router.transformer.nll import ROWS, mean_nll, token_kl, token_nll
from bayes_router.types import IGNORED


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_by_hand(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    logits = (3 * torch.randn(*shape, 11)).to(dtype)
    targets = torch.randint(11, shape)
    want = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    got = token_nll(logits, targets)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(NextToken(logits).log_prob(targets), -got)
    targets[..., ::2] = IGNORED
    assert torch.equal(token_nll(logits, targets), got.masked_fill(targets == IGNORED, 0.0))
    torch.testing.assert_close(
        mean_nll(logits, targets).double(), want[targets != IGNORED].mean(), rtol=1e-5, atol=1e-6
    )


def test_the_kl_of_two_predictions_is_that_of_their_distributions() -> None:
    torch.manual_seed(0)
    p, q = torch.randn(2, ROWS, 5), 2 * torch.randn(2, ROWS, 5)  # more rows than are read at once
    exact = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    torch.testing.assert_close(token_kl(p + 3, q.requires_grad_()), exact)
    assert not token_kl(p, q).requires_grad and float(token_kl(p, p).abs().max()) == 0


def test_a_teacher_is_heard_at_its_own_temperature() -> None:
    """Minus its entropy where the student says the same; by hand where not."""
    torch.manual_seed(0)
    logits, teacher, ids = (
        2 * torch.randn(2, 5, 7),
        3 * torch.randn(2, 5, 7),
        torch.zeros(2, 5, dtype=torch.long),
    )
    p = teacher.softmax(-1)
    torch.testing.assert_close(
        ExpectedToken(logits, teacher).log_prob(ids), (p * logits.log_softmax(-1)).sum(-1)
    )
    torch.testing.assert_close(
        ExpectedToken(teacher, teacher).log_prob(ids), (p * teacher.log_softmax(-1)).sum(-1)
    )
