"""Generation: equal to argmax over full passes, honest draws, stop tokens, bad input."""

import pytest
import torch
from torch import Tensor

from bayes_router.transformer import generate as generate_module
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
    torch.testing.assert_close(
        frequencies(logits, Sampling(0.7, top_k=2)), kept / kept.sum(), rtol=0, atol=0.01
    )
    # the likeliest holds more than half
    assert float(frequencies(logits, Sampling(0.7, top_p=0.5))[1]) == 1.0
    top = torch.tensor([1.0, 1.0, 1.0, 0.0]) * p
    assert float(p[1] + p[2]) < 0.97
    torch.testing.assert_close(
        frequencies(logits, Sampling(0.7, top_p=0.97)), top / top.sum(), rtol=0, atol=0.01
    )


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


def test_a_row_that_has_ended_repeats_its_stop_token_whatever_the_model_would_say(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # row 0 ends at the second step, row 1 at the fourth
    said = iter(torch.tensor([[1, 4], [5, 2], [7, 3], [8, 5], [9, 9]]))
    monkeypatch.setattr(generate_module, "choose_token", lambda *_: next(said))
    steps = [
        step.tokens.tolist()
        for step in stream(tiny_model(), tiny_batch(T=9)[0], 10, stop_tokens=[5])
    ]
    assert steps == [[1, 4], [5, 2], [5, 3], [5, 5]]


def test_the_stream_yields_as_it_goes() -> None:
    model, prompt = tiny_model(), tiny_batch(T=9)[0]
    whole, routes = generate(model, prompt, 5, GREEDY)
    steps = stream(model, prompt, 5, GREEDY)
    first = next(steps)
    assert torch.equal(first.tokens, whole[:, 9])
    assert torch.equal(first.route, routes[:, :, 0])


PROMPTS = (9, 1, 14, 6)


def unequal(junk: int = 22) -> tuple[Tensor, Tensor]:
    """Prompts [B, T] of several lengths [B], and what stands on their padding."""
    tokens, lengths = tiny_batch(B=4, T=max(PROMPTS))[0], torch.tensor(PROMPTS)
    return torch.where(torch.arange(tokens.shape[1]) < lengths[:, None], tokens, junk), lengths


@pytest.mark.parametrize(
    "experts", [EXPERTS, ("full", "gated", "local"), ("local", "gated"), ("local",), ("gated",)]
)
def test_rows_of_unequal_length_go_on_as_if_each_were_alone(experts: tuple[str, ...]) -> None:
    """From its own last token and position, by its own routes, whatever the ids on the padding.

    As a list, the same.
    """
    model, new = tiny_model(experts=experts), 12
    prompt, lengths = unequal(junk=-7)
    tokens, routes = generate(model, prompt, new, GREEDY, lengths=lengths)
    assert tokens.shape == (4, max(PROMPTS) + new) and routes.shape == (3, 4, new, 1)
    for b, length in enumerate(PROMPTS):
        alone, route = generate(model, prompt[b : b + 1, :length], new, GREEDY)
        assert torch.equal(tokens[b : b + 1, : length + new], alone)
        assert torch.equal(routes[:, b : b + 1], route)
        assert not tokens[b, length + new :].any()
    listed = generate(model, [row[:n] for row, n in zip(prompt, PROMPTS, strict=True)], new, GREEDY)
    assert torch.equal(listed[0], tokens) and torch.equal(listed[1], routes)


@pytest.mark.parametrize("force", EXPERTS)
def test_unequal_rows_on_one_expert(force: str) -> None:
    model, (prompt, lengths) = tiny_model(), unequal()
    tokens, _ = generate(model, prompt, 8, GREEDY, lengths=lengths, force=force)
    for b, length in enumerate(PROMPTS):
        alone, _ = generate(model, prompt[b : b + 1, :length], 8, GREEDY, force=force)
        assert torch.equal(tokens[b : b + 1, : length + 8], alone)


def test_unequal_rows_stop_each_at_its_own_token() -> None:
    model, (prompt, lengths) = tiny_model(), unequal()
    free, _ = generate(model, prompt, 10, GREEDY, lengths=lengths)
    stops = {int(free[b, length + 2]) for b, length in enumerate(PROMPTS)}
    steps = torch.stack(
        [
            step.tokens
            for step in stream(model, prompt, 10, GREEDY, lengths=lengths, stop_tokens=stops)
        ],
        1,
    )
    assert steps.shape[1] <= 3
    for b, length in enumerate(PROMPTS):
        end = next(i for i in range(3) if int(free[b, length + i]) in stops)
        assert torch.equal(steps[b, : end + 1], free[b, length : length + end + 1])
        assert bool((steps[b, end:] == steps[b, end]).all())


ROW = torch.zeros(1, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": ROW[:, :0]}, "prompt: expected at least one token"),
        ({"prompt": ROW[0]}, r"prompt: expected at least one token, shape \[B, T\]; got \(3,\)"),
        ({"prompt": ROW + 99}, "prompt: expected ids from 0 to 22"),
        ({"prompt": ROW.float()}, "prompt: expected torch.int64"),
        (
            {"prompt": ROW.to("meta")},
            r"prompt: expected the device of the model, cpu; got meta; move one with .to\(device\)",
        ),
        ({"prompt": [[1, 2, 3]]}, "prompt: expected a tensor .* or a list of tensors"),
        ({"prompt": [ROW[0], ROW[0, :0]]}, "prompt: .* at least one token each"),
        ({"prompt": [ROW[0].to("meta")]}, "prompt: expected the device of the model"),
        ({"prompt": []}, "prompt: expected at least one row"),
        ({"prompt": 5}, "prompt: expected a tensor"),
        ({"prompt": [ROW[0]], "lengths": torch.tensor([3])}, "lengths: expected None with a list"),
        ({"lengths": [3]}, "lengths: expected int64 or int32 of shape .1,. on cpu; got 'list'"),
        ({"lengths": torch.tensor([3, 3])}, "lengths: expected .* got torch.int64 of shape .2,."),
        ({"lengths": torch.tensor([0])}, r"lengths: expected values in 1..3; got \(0, 0\)"),
        ({"lengths": torch.tensor([4])}, "lengths: expected values in 1..3"),
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1"),
        ({"stop_tokens": [23]}, r"stop_tokens: expected ids from 0 to 22; got \[23\]"),
        ({"force": "ful"}, "force: expected one of full, gated, linear, local; got 'ful'"),
        ({"force": torch.zeros(3, 1, 3)}, "force: expected the name of an expert; got 'Tensor'"),
    ],
)
def test_bad_arguments_are_refused_at_the_call(changes: dict[str, object], message: str) -> None:
    """Not at the first step, which may be far from the mistake."""
    with pytest.raises(ValueError, match=message):
        stream(tiny_model(), **{"prompt": ROW, "max_new_tokens": 5, **changes})  # type: ignore[arg-type]


def test_a_stream_that_is_left_gives_the_model_back_as_it_was() -> None:
    model = tiny_model().train()
    steps = stream(model, ROW, 5)
    assert model.training  # nothing has run yet
    next(steps)
    steps.close()  # type: ignore[attr-defined]
    assert model.training


@pytest.mark.parametrize(
    "changes", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_bad_sampling_is_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(changes))}: expected"):
        Sampling(**changes)  # type: ignore[arg-type]
