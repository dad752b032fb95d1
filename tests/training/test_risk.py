import copy

import pytest
import torch

from bayes_router.data.tokens import Batch
from bayes_router.routing.risk import LEAST_KL, RiskFit, RiskHead, risk_features
from bayes_router.routing.saving import load_risk, save_risk
from bayes_router.training.checkpoint import load_run
from bayes_router.training.evidence import fit_evidence
from bayes_router.training.risk import fit_risk, read_risk, reference_of, risk_data
from bayes_router.types import RoutingMode
from tests.tiny import EXPERTS, tiny_batch, tiny_model


def batches(count: int = 4) -> list[Batch]:
    return [Batch(*tiny_batch(B=4, T=40, seed=seed)) for seed in range(count)]


def ranks(x: torch.Tensor, y: torch.Tensor) -> float:
    a, b = (v.flatten().argsort().argsort().double() for v in (x, y))
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def test_a_risk_that_is_exactly_linear_is_found():
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6000, 10, generator=g) * torch.logspace(-2, 2, 10) + 3
    w = torch.randn(10, generator=g) / torch.logspace(-2, 2, 10)
    kl = (0.3 * ((x - 3) @ w) - 5).exp()
    head = RiskHead.fit(x[:4000], kl[:4000], RiskFit(300, 128, 1e-2, width=16))
    found, true = head(x[4000:]), kl[4000:]
    assert ranks(found, true) > 0.99
    assert float((found / true).log().abs().mean()) < 0.1
    assert float(found.mean() / true.mean()) == pytest.approx(1, abs=0.1)


def test_the_mean_of_the_estimates_is_that_of_the_text_though_kl_is_heavy_tailed():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4000, 3, generator=g)
    kl = (2 * torch.randn(4000, generator=g) + x[:, 0] - 4).exp()
    head = RiskHead.fit(x, kl, RiskFit(100, 128, width=16))
    assert float(head(x).mean()) == pytest.approx(float(kl.mean()), rel=1e-4)
    assert float(head.factor) > 2  # exp of a mean logarithm falls short of the mean


@torch.no_grad()
def test_the_reference_of_a_run_is_its_best_single_expert():
    model = tiny_model().eval()
    text = batches(2)
    losses = {}
    for name in EXPERTS:
        logits = torch.cat([model(b.tokens, force=name).logits for b in text]).flatten(0, 1)
        losses[name] = float(
            torch.nn.functional.cross_entropy(
                logits, torch.cat([b.targets for b in text]).flatten()
            )
        )
    best = min(losses, key=losses.__getitem__)
    reference = reference_of(model, text)
    torch.testing.assert_close(reference(text[0].tokens), model(text[0].tokens, force=best).logits)


def test_estimates_are_of_the_routed_pass_alone():
    model = tiny_model().eval()
    reference = reference_of(model, batches(1))
    fit_risk(model, batches(), reference, tokens=640, settings=RiskFit(300, 64, 1e-2, width=16))
    tokens, _ = tiny_batch()
    passes = []
    handle = model.network.register_forward_hook(lambda *_: passes.append(1))
    found = read_risk(model, tokens)
    handle.remove()
    assert len(passes) == 1 and found.shape == tokens.shape and bool((found > 0).all())
    true = risk_data(model, batches(), reference, 640)
    assert ranks(model.controller.risk(true.features), true.kl) > 0.5
    later = tokens.clone()
    later[:, 20:] = 1
    torch.testing.assert_close(read_risk(model, later)[:, :20], found[:, :20], rtol=1e-4, atol=1e-6)
    assert not any(
        "risk" in name for name in (*model.state_dict(), *dict(model.named_parameters()))
    )
    torch.testing.assert_close(read_risk(copy.deepcopy(model), tokens), found)


def test_features_are_hidden_gates_and_entropy_with_units_averaged():
    hidden, logits = torch.randn(2, 3, 5), torch.randn(2, 3, 7)
    q = torch.rand(4, 2, 3, 6, 2) + 0.1
    features = risk_features(hidden, q, logits)
    assert features.shape == (2, 3, 5 + 4 * 2 + 2)
    torch.testing.assert_close(features[..., :5], hidden)
    torch.testing.assert_close(features[..., 7:9], (q[1] / q[1].sum(-1, keepdim=True)).mean(-2))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(features[..., -2], entropy)
    torch.testing.assert_close(features[..., -1], (entropy + 1e-3).log())


def test_what_is_kept_comes_back(finished_run, tmp_path):
    _, model = load_run(finished_run)
    assert model.controller.risk is None and load_risk(tmp_path) is None
    with pytest.raises(ValueError, match=r"risk: expected a fitted estimate .* fit_risk\(texts\)"):
        read_risk(model, torch.zeros(1, 3, dtype=torch.int64))
    head = fit_risk(
        model,
        [Batch(*tiny_batch(B=4, T=32, vocab=256))],
        reference_of(model, []),
        settings=RiskFit(steps=5),
    )
    save_risk(tmp_path, head)
    back = load_risk(tmp_path)
    x = torch.randn(3, len(head.head.mean))
    assert back is not None
    torch.testing.assert_close(back(x), head(x), rtol=0, atol=0)
    (tmp_path / "risk.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="risk.safetensors: expected an estimate of risk; damaged"):
        load_risk(tmp_path)


def test_what_cannot_be_fitted():
    model = tiny_model().eval()

    def same(tokens: torch.Tensor) -> torch.Tensor:
        return model(tokens, RoutingMode.HARD).logits

    with pytest.raises(
        ValueError, match="texts: expected tokens at which routing changes the prediction"
    ):
        fit_risk(model, batches(1), same)
    with pytest.raises(ValueError, match="texts: expected at least one window"):
        fit_risk(model, [], same)
    with pytest.raises(ValueError, match="texts: expected at least 64 tokens"):
        RiskHead.fit(torch.zeros(3, 2), torch.ones(3))
    assert LEAST_KL > 0


def test_about_so_many_tokens_are_read_and_the_mode_is_as_before():
    model, read = tiny_model().train(), [Batch(*tiny_batch(B=2, T=20)) for _ in range(4)]
    read = [Batch(one.tokens.roll(i, 1), one.targets.roll(i, 1)) for i, one in enumerate(read)]
    found = risk_data(model, read, lambda tokens: model(tokens, force="full").logits, 50)
    assert found.kl.shape == (4, 20) and model.training  # two batches of 40 tokens
    centres = [
        fit_evidence(model, of, torch.ones(3), tokens=50).tensors()["centre"]
        for of in (read, read[:2], read[:1])
    ]
    assert torch.equal(centres[0], centres[1]) and not torch.equal(centres[0], centres[2])
