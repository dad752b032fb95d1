import pytest
import torch

from bayes_router.data import fingerprint as module
from bayes_router.data.fingerprint import fingerprint, seen_before


def text(seed: int, N: int = 60_000, vocab: int = 50) -> torch.Tensor:
    return torch.randint(0, vocab, (N,), generator=torch.Generator().manual_seed(seed))


def test_a_text_knows_its_own_passages_again_and_no_others(monkeypatch):
    whole, other = text(0), text(1)
    sketch = fingerprint(whole)
    assert len(sketch) == 2048 and list(sketch) == sorted(sketch)
    monkeypatch.setattr(module, "AT_A_TIME", 1000)
    assert fingerprint(whole) == sketch  # whatever the size of the parts
    assert seen_before(whole[20_123:30_123], sketch) == 1.0
    assert seen_before(other, sketch) == 0.0
    half = torch.cat([whole[5_000:25_000], other[:20_000]])
    assert seen_before(half, sketch) == pytest.approx(0.5, abs=0.05)


def test_a_quotation_and_a_text_without_passages_are_not_known():
    sketch = fingerprint(text(0))
    assert seen_before(torch.cat([text(1, 3000), text(0)[:30]]), sketch) == 0.0
    assert fingerprint(text(0)[:15]) == () and seen_before(text(0), ()) == 0.0
    assert seen_before(text(0)[:15], sketch) == 0.0
