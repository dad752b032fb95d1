import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bayes_router.data.tokenisers import ByteTokeniser
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.calibration import (
    CalibrationThresholds,
    at_temperature,
    auroc,
    calibrate,
    calibration_verdicts,
    expected_calibration_error,
    fit_temperature,
    rank_correlation,
    reliability,
    stability,
)
from bayes_router.diagnostics.measures.other_text import (
    other_text_verdict,
    other_texts,
    passage_scores,
    tell_apart,
)
from bayes_router.diagnostics.measures.regret import (
    SEEN,
    other_targets,
    routing_regret,
    seen_of,
)
from bayes_router.diagnostics.measures.verdict import Severity
from bayes_router.routing.policy import Argmax
from bayes_router.routing.posterior import probability_of_largest
from bayes_router.types import RoutingMode, RoutingOutput
from tests.tiny import EXPERTS, tiny_batch, tiny_model


def test_regret_is_what_forcing_one_token_costs():
    model = tiny_model().eval()
    batch = Batch(*tiny_batch(B=2, T=20))
    frame = routing_regret(model, [batch], per_sequence=6)
    assert (
        len(frame) == 12
        and frame["sequence"].tolist() == [0] * 6 + [1] * 6
        and (frame["regret"] >= 0).all()
    )
    for row in (frame.iloc[1], frame.iloc[8]):
        tokens, targets = batch.tokens[row["sequence"]][None], batch.targets[row["sequence"]][None]
        out = model(tokens, RoutingMode.HARD)
        losses = []
        for e, name in enumerate(EXPERTS):
            force = out.route.clone()
            force[row["layer"], 0, row["position"], row["unit"]] = e
            logits = model(tokens, force=force).logits[0, row["position"]]
            losses.append(F.cross_entropy(logits, targets[0, row["position"]]).item())
            assert row[f"loss_{name}"] == pytest.approx(losses[-1], abs=1e-5)
        choice = EXPERTS.index(row["choice"])
        assert row["regret"] == pytest.approx(losses[choice] - min(losses), abs=1e-5)
        q = out.concentration[row["layer"], 0, row["position"], row["unit"]]
        stated = float(probability_of_largest(q.detach(), torch.tensor(choice)))
        assert row[f"largest_{row['choice']}"] == pytest.approx(stated, abs=1e-5)
    assert frame[[f"largest_{name}" for name in EXPERTS]].sum(axis=1).to_numpy() == pytest.approx(
        1, abs=1e-4
    )


def test_regret_under_other_tokens_is_that_of_the_routed_prediction():
    p = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.1, 0.4]])  # of two routes, over three tokens
    logits = p.log().expand(20_000, 2, 3)
    found = other_targets(logits, torch.ones(20_000, dtype=torch.long), seed=0)
    # by the second route's prediction: the first is better for tokens 0 and 1
    regret = [math.log(0.7 / 0.5), math.log(0.2 / 0.1), 0.0]
    expected = 0.5 * regret[0] + 0.1 * regret[1]
    assert found["foreseen"][0].item() == pytest.approx(expected, rel=1e-5)
    for name in ("redrawn", "redrawn_again"):
        share = [(found[name] - one).abs().lt(1e-5).double().mean().item() for one in regret]
        assert share == pytest.approx([0.5, 0.1, 0.4], abs=0.015)
    together = torch.stack([found["redrawn"], found["redrawn_again"]])
    assert abs(torch.corrcoef(together)[0, 1].item()) < 0.03  # two draws, not one twice


def test_a_frame_says_what_other_tokens_would_have_cost():
    model, batch = tiny_model().eval(), Batch(*tiny_batch(B=1, T=20))
    frame = routing_regret(model, [batch], per_sequence=6)
    row = frame.iloc[2]
    out, log = model(batch.tokens, RoutingMode.HARD), []
    for e in range(len(EXPERTS)):
        force = out.route.clone()
        force[row["layer"], 0, row["position"], row["unit"]] = e
        log.append(model(batch.tokens, force=force).logits[0, row["position"]].log_softmax(-1))
    routed = log[EXPERTS.index(row["choice"])]
    expected = (routed.exp() * (torch.stack(log).max(0).values - routed)).sum()
    assert row["foreseen"] == pytest.approx(expected.item(), abs=1e-6) and row["foreseen"] > 0


def test_a_frame_says_what_the_pass_had_seen():
    model, batch = tiny_model().eval(), Batch(*tiny_batch(B=1, T=20))
    frame = routing_regret(model, [batch], per_sequence=40)
    log = model(batch.tokens, RoutingMode.HARD).logits[0].log_softmax(-1)
    tokens, V = batch.tokens[0].tolist(), log.shape[-1]
    surprise = [math.log(V), *(-log[t - 1, tokens[t]].item() for t in range(1, 20))]
    assert {0, 19} & set(frame["position"])
    for _, row in frame.iterrows():
        t = row["position"]
        assert row["surprise"] == pytest.approx(surprise[t], abs=1e-5)
        last = surprise[max(0, t - 7) : t + 1]
        assert row["recent_surprise"] == pytest.approx(sum(last) / len(last), abs=1e-5)
        two = log[t].sort(descending=True).values[:2].tolist()
        assert [row["likeliest"], row["second"]] == pytest.approx(two, abs=1e-5)
    # of the future nothing: neither the next token nor how it surprised
    later = batch.tokens.clone()
    later[:, 11:] = (later[:, 11:] + 1) % V
    before, after = (seen_of(model(x).logits[0], x[0]) for x in (batch.tokens, later))
    for name in SEEN:
        torch.testing.assert_close(after[name][:11], before[name][:11])
        assert not torch.allclose(after[name][11:], before[name][11:])


def test_pairs_are_sampled_without_repetition():
    frame = routing_regret(tiny_model().eval(), [Batch(*tiny_batch(B=1, T=4))], per_sequence=100)
    assert len(frame) == 12 and not frame.duplicated(["position", "layer"]).any()


def test_nothing_scored_is_refused():
    tokens, _ = tiny_batch(B=1, T=4)
    with pytest.raises(ValueError, match="text: expected at least one scored token"):
        routing_regret(tiny_model().eval(), [Batch(tokens, torch.full_like(tokens, -100))])


def test_reliability_of_known_probabilities():
    stated, right = np.array([0.25, 0.25, 0.95, 0.95, 1]), np.array([1, 0, 1, 1, 0], dtype=bool)
    table = reliability(stated, right)
    assert table["bin"].tolist() == [2, 9] and table["count"].tolist() == [2, 3]
    assert table["observed"].tolist() == pytest.approx([0.5, 2 / 3])
    error = expected_calibration_error(stated, right)
    assert error == pytest.approx((0.25 * 2 + (2.9 - 2)) / 5)
    apart = (table["stated"] - table["observed"]).abs() * table["count"]
    assert error == pytest.approx(apart.sum() / 5)


def simulated(
    temperature: float, rows: int = 8000, seed: int = 0
) -> tuple[pd.DataFrame, np.ndarray]:
    """Stated probabilities, and choices that are right as often as the tempered ones say."""
    random = np.random.default_rng(seed)
    stated = random.dirichlet([0.6, 0.6, 0.6], rows)
    choice = stated.argmax(1)
    right = random.random(rows) < at_temperature(stated, temperature)[np.arange(rows), choice]
    frame = pd.DataFrame(stated, columns=["largest_a", "largest_b", "largest_c"])
    frame["choice"] = np.array(["a", "b", "c"])[choice]
    frame["regret"] = np.where(right, 0.0, 1.0)
    frame["sequence"] = np.arange(rows) // 20
    frame["entropy_of_mean"] = -stated.max(1)
    return frame, choice


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_the_planted_temperature_is_found(temperature):
    frame, choice = simulated(temperature)
    stated = frame[["largest_a", "largest_b", "largest_c"]].to_numpy()
    assert fit_temperature(stated, choice, (frame["regret"] == 0).to_numpy()) == pytest.approx(
        temperature, rel=0.15
    )


def test_calibration_is_mended_on_sequences_it_was_not_fitted_on():
    result = calibrate(simulated(4.0)[0], ["a", "b", "c"])
    assert result.ece > 0.2 and result.ece_tempered < 0.05 and result.before["count"].sum() == 4000
    bad, _ = calibration_verdicts(simulated(4.0)[0], result)
    assert bad.severity is Severity.WARNING and "tempered" in bad.advice
    fine = calibrate(simulated(1.0)[0], ["a", "b", "c"])
    assert (
        fine.ece < 0.05
        and calibration_verdicts(simulated(1.0)[0], fine)[0].severity is Severity.GOOD
    )


def test_the_temperature_is_that_of_the_sequences_it_is_not_judged_by():
    """Even sequences want a temperature of 4, odd ones none.

    What is fitted is the one, what is judged the other.
    """
    (even, _), (odd, _) = simulated(4.0), simulated(1.0, seed=1)
    mixed = pd.concat([even[even["sequence"] % 2 == 0], odd[odd["sequence"] % 2 == 1]])
    result = calibrate(mixed, ["a", "b", "c"])
    assert result.temperature == pytest.approx(4.0, rel=0.2)
    assert result.ece < 0.05 and result.ece_tempered > 0.15  # it makes the odd ones worse


def test_tolerance_makes_a_near_miss_right():
    frame, _ = simulated(1.0, 400)
    frame["regret"] = 0.005
    assert calibrate(frame, ["a", "b", "c"]).right == 1.0
    assert calibrate(frame, ["a", "b", "c"], CalibrationThresholds(tolerance=0.001)).right == 0.0
    with pytest.raises(ValueError, match="regret: expected at least four sequences"):
        calibrate(frame.assign(sequence=0), ["a", "b", "c"])


def test_tempering_keeps_a_distribution_and_goes_flat():
    p = np.array([[0.7, 0.2, 0.1], [1.0, 0.0, 0.0]])
    assert at_temperature(p, 1.0)[0] == pytest.approx(p[0])
    assert at_temperature(p, 3.0).sum(1) == pytest.approx(1)
    assert at_temperature(p, 1e6) == pytest.approx(1 / 3, abs=1e-3)


def test_rank_correlation():
    x = np.array([0.1, 0.5, 0.2, 0.9])
    assert rank_correlation(x, np.exp(x)) == pytest.approx(1) and rank_correlation(
        x, -x
    ) == pytest.approx(-1)
    assert np.isnan(rank_correlation(x, np.zeros(4)))


def test_auroc():
    assert (
        auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1
        and auroc(np.array([1.0]), np.array([1.0, 1.0])) == 0.5
    )
    assert auroc(np.array([1.0, 3.0]), np.array([2.0])) == 0.5
    random = np.random.default_rng(0)
    # Phi(1 / sqrt 2)
    assert auroc(random.normal(1, 1, 4000), random.normal(0, 1, 4000)) == pytest.approx(
        0.760, abs=0.02
    )
    with pytest.raises(ValueError, match="auroc: expected scores on both sides"):
        auroc(np.array([]), np.array([1.0]))


def test_stability_without_noise_and_of_a_router_that_reads_nothing():
    model, batches = tiny_model().eval(), [Batch(*tiny_batch())]
    assert (stability(model, iter(batches), noise=0.0)["flips"] == 0).all()
    noisy = stability(model, iter(batches), noise=0.5)
    assert (noisy["flips"] > 0.02).all()
    assert noisy["auroc"].mean() > 0.6  # what the posterior is unsure of flips first
    assert not model.network.embed._forward_hooks
    for controller in model.controller.layers:
        nn.init.zeros_(controller.out.weight)
    assert (stability(model, iter(batches), noise=0.5)["flips"] == 0).all()


@pytest.mark.parametrize("size", [1.0, 30.0])
def test_noise_is_a_share_of_the_size_of_the_embeddings(size):
    model, seen = tiny_model().eval(), []
    with torch.no_grad():
        model.network.embed.weight.mul_(size)
    model.network.blocks[0].attention_norm.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].detach())
    )
    stability(model, iter([Batch(*tiny_batch())]), noise=0.3)
    clean, noisy = seen
    unit = model.config.d_model**0.5  # of the stream, over that of the embeddings
    assert float((noisy - clean).std() / unit / model.network.embed.weight.std()) == pytest.approx(
        0.3, rel=0.1
    )


class Planted(nn.Module):
    """Sure of tokens below 128, unsure of the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))
        self.policy, self.config = Argmax(), SimpleNamespace(experts=("a", "b"))

    def forward(self, tokens, mode):
        sure = torch.tensor([50.0, 0.1]) * (1 + 0.01 * (tokens % 7).unsqueeze(-1))
        concentration = torch.where((tokens < 128).unsqueeze(-1), sure, torch.tensor([0.5, 0.4]))[
            None, :, :, None
        ]  # [1, B, T, 1, 2]
        return RoutingOutput(
            torch.zeros(*tokens.shape, 256), concentration, concentration.argmax(-1)
        )


def test_a_planted_difference_is_told_apart_and_no_difference_is_not():
    random = torch.Generator().manual_seed(0)
    own, same = (torch.randint(0, 128, (2000,), generator=random) for _ in range(2))
    other = torch.randint(128, 256, (2000,), generator=random)
    table = tell_apart(
        Planted(), own, {"same": same, "other": other}, torch.tensor([1.0, 0.2])
    ).set_index("text")
    for measure in ("entropy_of_mean", "probability_right", "mutual_information"):
        assert table.loc["other", measure] == 1.0 and 0.2 < table.loc["same", measure] < 0.8
    verdict = other_text_verdict(table.reset_index())
    assert verdict.severity is Severity.NOTE and "tells apart other from" in verdict.text
    with pytest.raises(ValueError, match="text: expected at least 65 tokens"):
        passage_scores(Planted(), own[:10], torch.tensor([1.0, 0.2]))


def test_other_texts_are_other():
    own = torch.tensor(list(b"To be or not to be " * 100))
    texts = other_texts(own, ByteTokeniser())
    assert sorted(texts["shuffled"].tolist()) == sorted(own.tolist()) and not torch.equal(
        texts["shuffled"], own
    )
    assert (
        "def " in bytes(texts["code"].tolist()).decode()
        and "Uhrmacher" in bytes(texts["German"].tolist()).decode()
    )
