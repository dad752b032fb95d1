"""Sweeps of the prior: what they move, what they leave, what they refuse."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from bayes_router.config import Config, with_changes
from bayes_router.routing.tilt import tilted_moments
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fit import fit, load_data
from bayes_router.training.prior_sweep import (
    KNOBS,
    Refit,
    knobs,
    one_at_a_time,
    posterior_row,
    refit_model,
    sweep_prior,
)
from bayes_router.transformer.model import RoutedLanguageModel
from tests.tiny import fit_config

Fitted = tuple[Config, RoutedLanguageModel]


@pytest.fixture(scope="module")
def fitted(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    run = Path(tmp_path_factory.mktemp("sweep")) / "run"
    fit(fit_config(corpus), run, progress=False)
    return load_run(run)


@pytest.fixture(scope="module")
def frame(fitted: Fitted) -> pd.DataFrame:
    config, model = fitted
    grid = {"schedule.kl_weight": [0.003, 10.0], "prior.temperature": [0.1, 1.0]}
    return sweep_prior(config, grid, 12, (0, 1), model=model, eval_tokens=256)


def test_rows_and_columns(frame: pd.DataFrame) -> None:
    assert len(frame) == 8
    assert set(KNOBS) <= set(frame)
    measured = [
        "prior_cost",
        "posterior_cost",
        "cost_paper",
        "cost_flops",
        "nll_mean",
        "nll_hard",
        "route_information",
        "kl",
    ]
    assert frame[measured].notna().all(axis=None)
    assert not frame.duplicated([*KNOBS, "seed"]).any()
    loads = frame[["load full", "load gated", "load local"]]
    assert loads.sum(axis=1).tolist() == pytest.approx([1.0] * 8)
    assert (frame["kl"] > 0).all()


def test_a_heavy_kl_pulls_the_posterior_to_the_prior(frame: pd.DataFrame) -> None:
    mean = frame.groupby("schedule.kl_weight").mean(numeric_only=True)
    assert mean.loc[10.0, "kl"] < mean.loc[0.003, "kl"]
    heavy = (
        frame[frame["schedule.kl_weight"] == 10.0]
        .groupby("prior.temperature")
        .mean(numeric_only=True)
    )
    assert heavy.loc[0.1, "prior_cost"] < heavy.loc[1.0, "prior_cost"]
    assert heavy.loc[0.1, "posterior_cost"] < heavy.loc[1.0, "posterior_cost"]


def test_the_same_sweep_again_and_the_model_unchanged(fitted: Fitted, frame: pd.DataFrame) -> None:
    config, model = fitted
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    setting = {"schedule.kl_weight": 10.0, "prior.temperature": 0.1}
    again = sweep_prior(config, [setting], 12, (1,), model=model, eval_tokens=256)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    rows = frame[
        (frame["schedule.kl_weight"] == 10.0)
        & (frame["prior.temperature"] == 0.1)
        & (frame["seed"] == 1)
    ]
    pd.testing.assert_frame_equal(again[list(frame)], rows.reset_index(drop=True))


@pytest.mark.parametrize("refit", list(Refit))
def test_a_refit_moves_the_controllers_and_the_network_only_if_asked(
    fitted: Fitted, refit: Refit
) -> None:
    config, model = fitted
    config, data = load_data(with_changes(config, {"train.steps": 3, "train.warmup": 0}))
    trainer = refit_model(config, data, model, refit)
    moved = {
        name.partition(".")[0]
        for name, value in trainer.model.state_dict().items()
        if not torch.equal(value, model.state_dict()[name])
    }
    assert moved == ({"controller"} if refit is Refit.CONTROLLERS else {"controller", "network"})


def test_kl_is_from_the_prior_with_its_price(fitted: Fitted) -> None:
    config, model = fitted
    config, data = load_data(
        with_changes(config, {"train.steps": 1, "data.eval_tokens": 256, "prior.price": 4.0})
    )
    trainer = refit_model(config, data, model, Refit.CONTROLLERS)
    prior, result = trainer.prior, trainer.evaluate()
    row = posterior_row(trainer)
    assert row["kl"] == pytest.approx(-result.elbo - result.nll["sample"], rel=1e-6)
    # and by hand: KL(q || Dirichlet) + price E_q[cost] + log Z, layer by layer
    tokens = next(
        iter(data.valid.windows(config.data.context, config.train.batch_size, 256))
    ).tokens
    torch.manual_seed(0)
    q = trainer.model(tokens, "sample").concentration.detach().double()
    p = prior.concentration.double()[:, None, None, None].expand_as(q)
    tilted = torch.distributions.kl_divergence(
        torch.distributions.Dirichlet(q), torch.distributions.Dirichlet(p)
    )
    tilted = tilted + 4.0 * (q / q.sum(-1, keepdim=True)) @ prior.cost_ratio.double()
    log_z = tilted_moments(prior.concentration, 4.0 * prior.cost_ratio).log_normaliser.sum()
    # one batch of all that was read
    assert row["kl"] == pytest.approx(float(tilted.mean((1, 2, 3)).sum() + log_z), rel=0.05)


def test_one_at_a_time(fitted: Fitted) -> None:
    config, _ = fitted
    centre = knobs(config)
    settings = one_at_a_time(
        config,
        {"prior.temperature": [0.1, centre["prior.temperature"]], "schedule.kl_weight": [1.0]},
    )
    names = ("prior.temperature", "schedule.kl_weight")
    assert [tuple(s[n] for n in names) for s in settings] == [
        (0.3, 0.003),
        (0.1, 0.003),
        (0.3, 1.0),
    ]


def test_without_a_model_it_fits_from_scratch(fitted: Fitted) -> None:
    config, _ = fitted
    row = sweep_prior(config, {"prior.total_concentration": [2.0]}, 2, eval_tokens=64).iloc[0]
    assert row["prior.total_concentration"] == 2.0 and row["steps"] == 2


def test_refusals(fitted: Fitted) -> None:
    config, model = fitted
    layered = with_changes(config, {"prior.layer_temperature": (0.2, 0.4)})
    for settings, grid, changes, message in (
        (config, {"model.window": [4]}, {}, r"prior\.FIELD or schedule\.FIELD"),
        (config, {"prior.heat": [1.0]}, {}, "heat"),
        (config, {"prior.temperature": [-1.0]}, {}, "positive"),
        (layered, {"prior.temperature": [1.0]}, {}, r"without prior\.layer_temperature"),
        (config, {"prior.temperature": []}, {}, "at least one setting"),
        (config, {"prior.temperature": [1.0]}, {"steps": 0}, "steps: expected at least 1"),
        (config, {"prior.temperature": [1.0]}, {"seeds": ()}, "seeds: expected at least one"),
        (config, {"prior.temperature": [1.0]}, {"refit": "all"}, "controllers, everything"),
    ):
        with pytest.raises(ValueError, match=message):
            sweep_prior(settings, grid, **{"model": model, **changes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected fitted weights"):
        sweep_prior(config, {"prior.temperature": [1.0]}, refit="controllers")
