import pytest
import torch

from bayes_router.data import fingerprint as module
from bayes_router.data.fingerprint import fingerprint, require_unseen, seen_before


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


def test_passages_of_bytes_are_longer_than_what_texts_share():
    words = torch.stack([text(seed, 20) for seed in range(40)])  # of 20 bytes each
    one, other = (words[text(seed, 3000, 40)].flatten() for seed in (50, 51))
    assert seen_before(other, fingerprint(one)) > 0.2
    # 64 bytes touch four words or more: by chance 3000 of 40^4 such sequences, 0.1%
    assert seen_before(other, fingerprint(one, length=64), 64) < 0.01
    assert seen_before(one[5000:9000], fingerprint(one, length=64), 64) == 1.0
    assert module.passage_of(256) == 64 and module.passage_of(257) == 16


def test_hashes_are_those_of_before():
    tokens = torch.arange(40) * 7 % 23
    found = torch.zeros(25, dtype=torch.int64)
    for i in range(16):
        found = found * module.FACTOR + tokens[i : 25 + i] + 1
    found = (found ^ (found >> 29)) * module.MIX
    found = (found ^ (found >> 32)) * module.FACTOR
    assert fingerprint(tokens) == tuple(found.unique().tolist())


def test_a_short_piece_of_a_long_text_is_known_again():
    """Of a text a thousand times as long: a fixed number of hashes would know it rarely."""
    long = torch.randint(0, 256, (3_000_000,), generator=torch.Generator().manual_seed(0))
    sketch, starts = fingerprint(long, length=64), range(0, 2_900_000, 300_000)
    for start in starts:
        with pytest.raises(ValueError, match="was fitted on"):
            require_unseen(long[start : start + 8000], sketch, "", 64)
    other = torch.randint(0, 256, (8000,), generator=torch.Generator().manual_seed(1))
    require_unseen(other, sketch, "", 64)
