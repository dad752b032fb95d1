import pytest
import torch

from bayes_router import load_patch, patch
from bayes_router.routing.guard import Guard
from bayes_router.routing.policy import Budget
from tests.integrations.tiny_models import tiny


def text(low: int, high: int, seed: int, rows: int = 1, T: int = 64) -> torch.Tensor:
    return torch.randint(low, high, (rows, T), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module", params=["layer", "head"])
def router(request):
    """Fitted by hand to send all to local; its evidence and its guard know ids below 12."""
    model = tiny("llama")
    found = patch(
        model, window=8, sinks=2, experts=("full", "local"), route_by=request.param, context=64
    )
    found.fit_evidence(text(0, 12, 0, T=6000)[0], context=64, batch_size=8)
    found.controller.evidence.memory = 16
    found.policy = Budget(tuple(found.cost_ratio.tolist()), 50.0)
    guarded = found.set_guard(text(0, 12, 1, T=3000)[0], context=64)
    assert guarded.windows >= 40 and guarded.bound <= 0.01 and guarded.cost <= 1.01 * guarded.bare
    return found


def on_full(route: torch.Tensor) -> float:
    return float((route == 0).float().mean())


def test_foreign_text_takes_full_attention_and_the_fits_own_hardly(router):
    assert isinstance(router.policy, Guard) and router.policy.price == 50.0
    assert on_full(router(text(0, 12, 2, 40)).route) < 0.02
    high = router.config.vocab_size
    assert on_full(router(text(12, high, 3, 4)).route[:, :, 40:]) > 0.95


def taken(router, run) -> torch.Tensor:
    """Routes [L, B, T, R] of the tokens of a run, pass by pass."""
    passes, before = [], router.decide

    def decide(index, q, mode, hidden):
        found = before(index, q, mode, hidden)
        passes.append((index, found))
        return found

    router.decide = decide
    try:
        run()
    finally:
        del router.decide
    L = len(router.layers)
    return torch.stack(
        [torch.cat([route for i, route in passes if i == layer], 1) for layer in range(L)]
    )


@pytest.mark.parametrize("padded", [False, True])
def test_decoding_goes_on_where_the_prompt_ended_padded_or_not(router, padded):
    high, start = router.config.vocab_size, 5 if padded else 0
    row = torch.cat([text(0, 12, 4, T=20), text(12, high, 5, T=24)], 1)
    prompt = torch.cat([torch.zeros(1, start, dtype=torch.int64), row], 1)
    mask = torch.cat([torch.zeros(1, start, dtype=torch.int64), torch.ones_like(row)], 1)
    new: list[torch.Tensor] = []

    def run() -> None:
        new.append(
            router.model.generate(
                prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=0
            )
        )

    stepped = taken(router, run)[:, :, start:]
    whole = router(new[0][:, start:-1]).route
    assert torch.equal(stepped, whole) and 0.1 < on_full(whole) < 0.9


def test_a_cache_that_forgot_is_a_reason_for_full_attention(router):
    model, row = router.model, text(0, 12, 6)
    out = model(row[:, :40], use_cache=True)
    assert (
        on_full(taken(router, lambda: model(row[:, 40:41], past_key_values=out.past_key_values)))
        == 0
    )
    out.past_key_values.crop(-11)
    assert (
        on_full(taken(router, lambda: model(row[:, 30:31], past_key_values=out.past_key_values)))
        == 1
    )


def test_a_guard_is_saved_and_loaded(router, tmp_path):
    row = torch.cat([text(0, 12, 7, 2, 32), text(12, router.config.vocab_size, 8, 2, 32)], 1)
    expected = router(row).route
    router.save(tmp_path / "patch")
    model = router.unpatch()
    back = load_patch(model, tmp_path / "patch")
    try:
        assert back.policy == router.policy and torch.equal(back(row).route, expected)
    finally:
        back.unpatch()


def test_a_guard_asks_for_evidence():
    found = patch(tiny("llama"), window=8)
    with pytest.raises(ValueError, match="evidence: expected a density"):
        found.set_guard(text(0, 12, 0, T=1000)[0])
    with pytest.raises(ValueError, match="texts: expected held-out text"):
        found.set_guard()


def test_text_that_was_fitted_on_promises_nothing(tmp_path):
    model = tiny("llama")
    found = patch(model, window=8, experts=("full", "local"))
    read = text(0, 200 if found.config.vocab_size >= 200 else found.config.vocab_size, 9, T=4000)[0]
    found.fit(read, steps=1, distil_steps=0, context=32, batch_size=2, progress=False)
    found.fit_evidence(read, context=64)
    for call in (
        lambda: found.set_guard(read[500:2500]),
        lambda: found.set_quality(0.5, read[500:2500]),
    ):
        with pytest.raises(
            ValueError,
            match="texts: expected text that fit did not read.* about 100% was fitted on",
        ):
            call()
    found.set_guard(context=32)  # what was held out is welcome
    found.save(tmp_path / "patch")
    found.unpatch()
    back = load_patch(model, tmp_path / "patch")
    assert back.fitted == found.fitted
    with pytest.raises(ValueError, match="was fitted on"):
        back.set_quality(0.5, read[500:2500])
    back.unpatch()
