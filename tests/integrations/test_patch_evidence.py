import pytest
import torch

from bayes_router import load_patch, patch
from bayes_router.routing.saving import EVIDENCE
from bayes_router.routing.watch import watching
from tests.integrations.tiny_models import tiny


@pytest.fixture(scope="module")
def text() -> torch.Tensor:
    """Few of the ids, over and over."""
    return torch.randint(0, 12, (3000,), generator=torch.Generator().manual_seed(0))


def test_a_patch_keeps_the_evidence_of_its_text(text, tmp_path):
    model = tiny("llama")
    router = patch(model, window=8, sinks=2)
    tokens = text[None, :64]
    before = router(tokens)
    with (
        pytest.raises(ValueError, match="evidence: expected a density"),
        watching(router.controller),
    ):
        pass
    router.fit_evidence(text, context=64, batch_size=4)
    after = router(tokens)
    torch.testing.assert_close(after.logits, before.logits, rtol=0, atol=0)
    torch.testing.assert_close(after.concentration, before.concentration, rtol=0, atol=0)
    other = torch.randint(
        12, router.config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(1)
    )
    with watching(router.controller) as watch:
        router(tokens)
        like = watch.log_evidence
        router(other)
        unlike = watch.log_evidence
    assert float(unlike[-1].mean()) < float(like[-1].mean()) - 0.5
    router.save(tmp_path / "patch")
    router.unpatch()
    back = load_patch(model, tmp_path / "patch")
    with watching(back.controller) as watch:
        back(tokens)
    torch.testing.assert_close(watch.log_evidence, like)
    back.unpatch()
    (tmp_path / "patch" / EVIDENCE).unlink()
    assert load_patch(model, tmp_path / "patch").controller.evidence is None


def test_generation_goes_on_with_the_running_mean(text):
    model = tiny("llama")
    router = patch(model, window=8, sinks=2)
    router.fit_evidence(text, context=64, batch_size=4)
    prompt = text[None, :20]
    with watching(router.controller) as watch:
        out = model.generate(
            prompt,
            max_new_tokens=4,
            do_sample=False,
            pad_token_id=0,
            attention_mask=torch.ones_like(prompt),
        )
        stepped = watch.log_evidence
        router(out[:, :-1])
    torch.testing.assert_close(stepped[..., -1], watch.log_evidence[..., -1], rtol=1e-4, atol=1e-4)


def test_evidence_is_of_all_of_a_text_not_of_its_beginning(text):
    """Documents follow one another: a density of the first alone calls the others foreign."""
    router = patch(tiny("llama"), window=8, sinks=2)
    other = torch.randint(60, 72, (3000,), generator=torch.Generator().manual_seed(3))
    rows = torch.stack([text[:64], other[:64]])

    def gap() -> float:
        with watching(router.controller, memory=1) as watch:
            router(rows)
        known, unknown = watch.log_evidence[-1].mean(1)
        return float(known - unknown)

    router.fit_evidence(text, context=64, batch_size=4, tokens=1024)
    assert gap() > 0.5
    router.fit_evidence(torch.cat([text, other]), context=64, batch_size=4, tokens=1024)
    assert abs(gap()) < 0.3
