"""Generation: equal to argmax over full passes, honest draws, stop tokens, bad input."""

import pytest
import torch
from torch import Tensor

from bayes_router.transformer.generate import Sampling, choose_token, generate, stream
from tests.tiny import EXPERTS, tiny_batch, tiny_model

GREEDY = Sampling(temperature=0.0)


@pytest.mark.parametrize("force", [None, *EXPERTS])
def test_greedy_with_the_cache_equals_full_passes(force: str | None) -> None:
    model, prompt = tiny_model(), tiny_batch(T=9)[0]
    tokens, routes = generate(model, prompt, 12, GREEDY, force=force)
    by_hand = prompt
    for step in range(12):
        out = model(by_hand, "hard", force=force)
        assert torch.equal(routes[:, :, step], out.route[:, :, -1])
        by_hand = torch.cat([by_hand, out.logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(tokens, by_hand)


def test_a_seed_repeats_and_another_differs() -> None:
    model, prompt = tiny_model(), tiny_batch(T=9)[0]
    first, again, other = (generate(model, prompt, 20, Sampling(seed=s))[0] for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def frequencies(logits: Tensor, sampling: Sampling, draws: int = 40_000) -> Tensor:
    tokens = choose_token(logits.expand(draws, -1), sampling, torch.Generator().manual_seed(0))
    return torch.bincount(tokens, minlength=logits.shape[-1]) / draws


def test_draws_have_the_stated_distribution() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, -1.0])
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(frequencies(logits, Sampling(0.7)), p, rtol=0, atol=0.01)
    kept = torch.tensor([0.0, 1.0, 1.0, 0.0]) * p
    torch.testing.assert_close(frequencies(logits, Sampling(0.7, top_k=2)), kept / kept.sum(), rtol=0, atol=0.01)
    assert float(frequencies(logits, Sampling(0.7, top_p=0.5))[1]) == 1.0  # the likeliest holds more than half
    top = torch.tensor([1.0, 1.0, 1.0, 0.0]) * p
    assert float(p[1] + p[2]) < 0.97
    torch.testing.assert_close(frequencies(logits, Sampling(0.7, top_p=0.97)), top / top.sum(), rtol=0, atol=0.01)


def test_stop_tokens_end_each_row() -> None:
    model, prompt = tiny_model(), tiny_batch(T=9)[0]
    free, _ = generate(model, prompt, 12, GREEDY)
    stop = int(free[0, 9 + 3])
    stopped, _ = generate(model, prompt, 12, GREEDY, stop_tokens=[stop])
    for row_free, row in zip(free[:, 9:], stopped[:, 9:], strict=True):
        end = (row_free == stop).nonzero()
        length = int(end[0]) + 1 if len(end) else len(row)
        assert torch.equal(row[:length], row_free[:length])
        assert bool((row[length:] == stop).all())


def test_the_stream_yields_as_it_goes() -> None:
    model, prompt = tiny_model(), tiny_batch(T=9)[0]
    whole, routes = generate(model, prompt, 5, GREEDY)
    steps = stream(model, prompt, 5, GREEDY)
    first = next(steps)
    assert torch.equal(first.tokens, whole[:, 9])
    assert torch.equal(first.route, routes[:, :, 0])


@pytest.mark.parametrize(
    ("prompt", "new", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), 5, "prompt: expected at least one token"),
        (torch.zeros(1, 3, dtype=torch.int64), 0, "max_new_tokens: expected at least 1"),
        (torch.full((1, 3), 99), 5, "tokens: expected ids"),
    ],
)
def test_bad_prompts_are_refused(prompt: Tensor, new: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(tiny_model(), prompt, new)


@pytest.mark.parametrize("changes", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_bad_sampling_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected"):
        Sampling(**changes)  # type: ignore[arg-type]
