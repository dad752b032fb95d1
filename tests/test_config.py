"""Settings: TOML round trip, types, clear refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_router.config import Config, config_from_dict, load_config, with_changes
from bayes_router.presets import PRESETS, preset
from bayes_router.transformer.build import build_prior


@pytest.mark.parametrize("name", PRESETS)
def test_toml_round_trip(name: str, tmp_path: Path) -> None:
    config = with_changes(
        preset(name),
        {
            "prior.layer_temperature": tuple(
                0.1 * (i + 1) for i in range(preset(name).model.num_layers)
            )
        },
    )
    (tmp_path / "config.toml").write_text(config.to_toml())
    assert load_config(tmp_path / "config.toml") == config


def test_a_file_changes_only_what_it_names(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        "[train]\nsteps = 7\n[model]\nexperts = ['full', 'gated', 'local', 'linear']\n"
    )
    config = load_config(tmp_path / "c.toml", preset("base"))
    assert config.train.steps == 7
    assert config.model.experts == ("full", "gated", "local", "linear")
    assert config.model.d_model == 512


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"d_model": 130}}, "model.d_model: expected a multiple of 2 x num_heads = 8"),
        ({"model": {"d_model": "wide"}}, "model.d_model: expected an integer; got 'wide'"),
        ({"model": {"dmodel": 128}}, "expected one of .*d_model.*; got 'dmodel'"),
        (
            {"modle": {"d_model": 128}},
            "section: expected one of data, model, prior, schedule, train; got 'modle'",
        ),
        ({"model": 3}, "model: expected a table of settings; got 3"),
        ({"model": {"window": 0}}, "model.window: expected at least 1; got 0"),
        ({"model": {"experts": []}}, "model.experts: expected at least one"),
        ({"model": {"experts": ["full", "full"]}}, "model.experts: expected no name twice"),
        ({"model": {"num_kv_heads": 3}}, "model.num_kv_heads: expected a divisor of num_heads 4"),
        (
            {"prior": {"total_concentration": 0.0}},
            "prior.total_concentration: expected a positive number; got 0.0",
        ),
        ({"prior": {"temperature": -1.0}}, "prior.temperature: expected a positive number"),
        (
            {"prior": {"cost": "money"}},
            "prior.cost: expected one of flops, latency, paper; got 'money'",
        ),
        (
            {"prior": {"cost_ratio": [1.0, 0.5]}},
            "prior.cost_ratio: expected one number for each of the experts",
        ),
        ({"prior": {"layer_temperature": [1.0]}}, "prior.layer_temperature: expected 4 numbers"),
        ({"schedule": {"kl_weight": 0.0}}, "schedule.kl_weight: expected a positive number"),
        (
            {"schedule": {"start_experts": ["linear"]}},
            "schedule.start_experts: expected one of .*got 'linear'",
        ),
        (
            {"schedule": {"start_experts": ["full,local"]}, "model": {"route_by": "head"}},
            "schedule.start_experts: expected one expert for a layer, or one for each of its 4",
        ),
        ({"train": {"steps": 0}}, "train.steps: expected at least 1"),
        ({"train": {"lr": 0.0}}, "train.lr: expected a positive number"),
        ({"train": {"precision": "int4"}}, "train.precision: expected float32 or bfloat16"),
        ({"data": {"valid_fraction": 1.0}}, "data.valid_fraction: expected between 0 and 1"),
    ],
)
def test_bad_settings_are_refused_on_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        config_from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[model\n", "\x00\xff", "model = 3", "[train]\nsteps = 'many'\n"])
def test_a_bad_file_is_named(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=str(path)):
        load_config(path)


def test_an_unknown_preset_lists_the_presets() -> None:
    with pytest.raises(ValueError, match="preset: expected one of base, small, tiny; got 'nope'"):
        preset("nope")


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Config().train.steps = 3  # type: ignore[misc]


BY_UNIT = {
    "layer_mean": [[[0.2, 0.3, 0.5], [0.6, 0.2, 0.2]]] * 4,
    "layer_temperature": [[0.1, 0.2]] * 4,
    "layer_total_concentration": [[1.0, 2.0]] * 4,
    "layer_cost_ratio": [[[1.0, 0.2, 0.3], [0.5, 0.2, 0.3]]] * 4,
    "layer_price_ratio": [[1.0, 2.0]] * 4,
}


def test_priors_by_unit_are_settings(tmp_path: Path) -> None:
    units = {"num_heads": 4, "num_kv_heads": 2, "route_by": "kv_head"}
    config = config_from_dict({"model": units, "prior": BY_UNIT})
    path = tmp_path / "config.toml"
    path.write_text(config.to_toml())
    assert load_config(path) == config
    prior = build_prior(config.prior, config.model, 4, 256)
    torch.testing.assert_close(prior.concentration[0, 1], 2.0 * torch.tensor([0.6, 0.2, 0.2]))
    torch.testing.assert_close(prior.charged[3, 1], torch.tensor([1.0, 0.4, 0.6]))
    for name, value in BY_UNIT.items():
        with pytest.raises(ValueError, match=rf"prior.{name}: expected 4 .* by layer and unit: "):
            config_from_dict({"prior": {name: value}})  # a network of one unit a layer
        with pytest.raises(ValueError, match=f"prior.{name}: expected positive numbers"):
            config_from_dict({"model": units, "prior": {name: _negated(value)}})


def _negated(values: Any) -> Any:
    return [_negated(v) for v in values] if isinstance(values, list) else -values
