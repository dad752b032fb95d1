"""The small parts of the Transformer by what they promise: rotary positions and right padding."""

import torch

from bayes_router.transformer.padding import last_token, real_tokens
from bayes_router.transformer.rotary import rotary_angles, rotate


def test_a_score_depends_on_the_distance_alone_and_lengths_stay() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 1, 2, 1, 8, dtype=torch.float64)
    q, k = q.expand(-1, -1, 40, -1), k.expand(-1, -1, 40, -1)  # one query and one key at all places
    angles = rotary_angles(torch.arange(40), 8, 100.0)
    turned_q, turned_k = rotate(q, angles), rotate(k, angles)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    scores = turned_q @ turned_k.mT  # [1, 2, 40, 40]
    for distance in (0, 1, 17):
        along = scores.diagonal(-distance, -2, -1)
        torch.testing.assert_close(along, along[..., :1].expand_as(along), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores.diagonal(0, -2, -1)[..., 0], (q * k).sum(-1)[..., 0])
    assert not torch.allclose(scores[..., 20, 0], scores[..., 0, 0], atol=0.01)


def test_a_row_has_as_many_real_tokens_as_it_says() -> None:
    lengths = torch.tensor([0, 1, 3, 4])
    real = real_tokens(lengths, 4)
    assert real.tolist() == [[i < n for i in range(4)] for n in (0, 1, 3, 4)]
    x = torch.arange(16).view(4, 4)
    assert last_token(x, lengths).flatten().tolist() == [0, 4, 10, 15]
    assert last_token(x, None).flatten().tolist() == [3, 7, 11, 15]
