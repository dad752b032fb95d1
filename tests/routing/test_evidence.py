import math
import threading

import pytest
import torch

from bayes_router.data.tokens import Batch
from bayes_router.routing.evidence import Evidence, LayerEvidence, Moments
from bayes_router.routing.watch import RunningMean, inputs_of, watching
from bayes_router.training.evidence import fit_evidence
from tests.tiny import tiny_batch, tiny_model


def rows(N: int = 6000, D: int = 12, seed: int = 0) -> torch.Tensor:
    """Correlated, far from zero, with directions of very different variance."""
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(D, D, generator=torch.Generator().manual_seed(7)) * torch.logspace(-0.5, 0, D)
    return torch.randn(N, D, generator=g) @ mix + 5


def moments_of(x: torch.Tensor, beside: float = 3.0) -> Moments:
    found = Moments(x.shape[-1])
    for part in x.split(1000):
        found.add(part, torch.full(part.shape[:1], beside))
    return found


def fitted_tiny(memory: int = 1):
    """A model with the evidence of random text."""
    model = tiny_model().eval()
    batches = [Batch(*tiny_batch(B=4, T=40, seed=s)) for s in range(6)]
    fit_evidence(model, batches, torch.tensor([0.5, 0.6, 0.7]), memory=memory)
    return model


def test_moments_of_a_stream_are_those_of_all_rows():
    x = rows()
    found = moments_of(x)
    torch.testing.assert_close(found.mean, x.double().mean(0))
    torch.testing.assert_close(
        found.covariance, x.double().T.cov(correction=0), rtol=1e-6, atol=1e-9
    )


def test_evidence_is_the_root_of_a_student_t_in_the_directions_of_least_variance():
    x, K = rows(), 4
    layer = LayerEvidence.of(moments_of(x, 3.0), K)
    variance, axes = torch.linalg.eigh(x.double().T.cov(correction=0))
    y = rows(50, seed=3) + 0.2
    d2 = (((y.double() - x.double().mean(0)) @ axes[:, :K]).square() / variance[:K]).sum(-1)
    torch.testing.assert_close(
        layer(y).exp().double(), 2 * 3.0 / (1 + d2 / K), rtol=1e-3, atol=1e-5
    )
    # K = 1: the density itself, relative to that one deviation away
    t = torch.distributions.StudentT(1.0)
    one = LayerEvidence.of(moments_of(torch.tensor([[-1.0], [1.0]]).repeat(3, 1), 1.0), 1)
    z = torch.tensor([[0.0], [0.5], [7.0]])
    torch.testing.assert_close(one(z), (t.log_prob(z) - t.log_prob(torch.tensor(1.0)))[:, 0])


def test_the_mean_distance_of_the_fits_own_text_is_one_and_a_planted_shift_is_far():
    x = rows()
    layer = LayerEvidence.of(moments_of(x), 6)
    assert float(layer.distance(x).mean()) == pytest.approx(1, abs=1e-3)
    held, least = rows(2000, seed=1), torch.linalg.eigh(x.double().T.cov())[1][:, 0].float()
    assert float(layer.distance(held).mean()) == pytest.approx(1, abs=0.1)
    moved = held + least * 10 * float((x @ least).std())
    assert (
        float(layer(moved).mean()) < float(layer(held).min())
        and float(layer.distance(moved).mean()) > 10
    )


def test_evidence_is_finite_however_far_and_where_a_direction_is_constant():
    x = rows()
    x[:, 0] = 1.0
    layer = LayerEvidence.of(moments_of(x), 3)
    far = layer(torch.full((2, 12), 1e15))
    assert (
        torch.isfinite(far).all()
        and torch.isfinite(layer(x)).all()
        and float(far.exp().max()) < 1e-20
    )
    assert float(layer(x.bfloat16())[:5].mean()) == pytest.approx(float(layer(x)[:5].mean()), abs=3)


def test_a_running_mean_forgets_and_goes_on_in_steps_as_in_one_pass():
    x = torch.randn(2, 300, generator=torch.Generator().manual_seed(0))
    whole, steps = RunningMean(20)(x), RunningMean(20)
    weights = torch.stack([0.95 ** (299 - torch.arange(300.0))])
    torch.testing.assert_close(whole[:, -1], (x * weights).sum(1) / weights.sum())
    parts = torch.cat([steps(x[:, :130]), *(steps(x[:, t : t + 1]) for t in range(130, 300))], 1)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(RunningMean(1)(x), x)
    changed = x.clone()
    changed[:, 200:] = 50
    torch.testing.assert_close(RunningMean(20)(changed)[:, :200], whole[:, :200])


def test_padding_is_no_token_of_a_running_mean():
    x, real = torch.randn(1, 9), torch.tensor([[False] * 4 + [True] * 5])
    poisoned = torch.where(real, x, torch.nan)
    torch.testing.assert_close(RunningMean(3)(poisoned, real)[:, 4:], RunningMean(3)(x[:, 4:]))


def test_a_watch_reads_what_the_controllers_read_and_changes_nothing():
    model = fitted_tiny()
    tokens, _ = tiny_batch()
    plain = model(tokens)
    with watching(model.controller) as watch, inputs_of(model.controller) as inputs:
        watched = model(tokens)
    torch.testing.assert_close(watched.logits, plain.logits, rtol=0, atol=0)
    torch.testing.assert_close(watched.concentration, plain.concentration, rtol=0, atol=0)
    evidence = model.controller.evidence
    expected = torch.stack([evidence.log_evidence(layer, h) for layer, h in enumerate(inputs)])
    torch.testing.assert_close(watch.log_evidence, expected)
    torch.testing.assert_close(
        watch.total(), expected.exp() + torch.tensor([0.5, 0.6, 0.7])[:, None, None]
    )
    model(tokens[:, :7])
    assert watch.log_evidence.shape == (3, 2, 40)  # nothing is computed outside
    assert not any(layer._forward_pre_hooks for layer in model.controller.layers)


def test_a_watch_follows_decoding():
    model = fitted_tiny(memory=8)
    tokens, _ = tiny_batch()
    with watching(model.controller) as watch:
        model(tokens)
        whole = watch.log_evidence
        cache = model.network.new_cache(2, 40)
        model(tokens[:, :30], cache=cache)
        stepped = [watch.log_evidence]
        for t in range(30, 40):
            model(tokens[:, t : t + 1], cache=cache)
            stepped.append(watch.log_evidence)
    torch.testing.assert_close(torch.cat(stepped, -1), whole, rtol=1e-4, atol=1e-4)


def test_a_pass_that_broke_off_leaves_nothing_to_the_next():
    model, (tokens, _) = fitted_tiny(memory=8), tiny_batch()
    width = model.config.d_model
    with watching(model.controller) as watch:
        model(tokens)
        whole = watch.log_evidence
        for length in (7, tokens.shape[1]):  # the next pass is of another length, or of the same
            model.controller.layers[2](torch.randn(2, length, width))
            model(tokens)
            torch.testing.assert_close(watch.log_evidence, whole)


def test_a_watch_is_of_its_own_thread():
    model, (tokens, _) = fitted_tiny(), tiny_batch()
    with watching(model.controller) as watch:
        other = threading.Thread(target=model, args=(tokens,))
        other.start()
        other.join()
    assert not watch.last


def test_the_budget_is_the_mean_total_of_the_posterior():
    model = tiny_model().eval()
    batch = Batch(*tiny_batch(B=4, T=40))
    evidence = fit_evidence(model, [batch], torch.full((3,), 0.5))
    total = model(batch.tokens).concentration.sum(-1).mean((1, 2, 3))
    torch.testing.assert_close(
        torch.stack([layer.log_budget for layer in evidence.layers]).exp(), total, rtol=1e-5, atol=0
    )


def test_what_is_kept_comes_back_and_what_is_damaged_does_not():
    evidence = fitted_tiny(memory=8).controller.evidence
    kept = evidence.tensors()
    back = Evidence.from_tensors(kept, 3, 16)
    hidden = torch.randn(2, 16)
    torch.testing.assert_close(
        back.log_evidence(2, hidden), evidence.log_evidence(2, hidden), rtol=0, atol=0
    )
    assert back.memory == 8
    for damaged, layers in (
        ({k: v for k, v in kept.items() if k != "centre"}, 3),
        (kept, 4),
        (kept | {"centre": kept["centre"][:, :2]}, 3),
        (kept | {"log_budget": torch.full((3,), math.nan)}, 3),
    ):
        with pytest.raises(ValueError, match="evidence"):
            Evidence.from_tensors(damaged, layers, 16)


def test_what_cannot_be_asked():
    with (
        pytest.raises(ValueError, match=r"evidence: expected a density .* fit_evidence\(texts\)"),
        watching(tiny_model().controller),
    ):
        pass
    with (
        pytest.raises(ValueError, match="memory: expected at least 1"),
        watching(fitted_tiny().controller, memory=0),
    ):
        pass
    with pytest.raises(ValueError, match="texts: expected more than 16 tokens"):
        fit_evidence(tiny_model(), [Batch(*tiny_batch(B=1, T=9))], torch.ones(3))
    with pytest.raises(ValueError, match="texts: expected at least one window"):
        fit_evidence(tiny_model(), [], torch.ones(3))
