"""Settings that nobody meant to write.

Refused with the file and the field named, or valid settings; never a traceback.
"""

import random
from dataclasses import asdict
from pathlib import Path

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bayes_router.cli import main
from bayes_router.config import Config, config_from_dict, load_config
from tests.fuzz.damage import ALL, Damage

FIELDS = [(section, name) for section, table in asdict(Config()).items() for name in table]
NUMBERS = {
    (section, name)
    for section, table in asdict(Config()).items()
    for name, value in table.items()
    if isinstance(value, (int, float)) and not isinstance(value, bool)
}


def refused(path: Path) -> str:
    with pytest.raises(ValueError, match="[Ee]xpected") as error:
        load_config(path)
    text = str(error.value)
    assert str(path) in text and "Traceback" not in text
    return text


@pytest.mark.parametrize(("section", "name"), FIELDS, ids=[".".join(field) for field in FIELDS])
def test_wrong_types_are_refused_by_name(tmp_path: Path, section: str, name: str) -> None:
    """A table, a nested list and a date fit no field; text fits no number.

    No number may be infinite or NaN.
    """
    path = tmp_path / "settings.toml"
    lines = [
        "{ a = 1 }",
        "[[[1]]]",
        "[{ class_path = 'os.system', init_args = { command = 'ls' } }]",
    ]
    if (section, name) in NUMBERS:
        lines += ["'many'", "nan", "-inf"]
    for line in lines:
        path.write_text(f"[{section}]\n{name} = {line}\n")
        assert name in refused(path)


def test_enough_wrong_types_were_tried() -> None:
    assert 3 * len(FIELDS) + 3 * len(NUMBERS) >= 200


@pytest.mark.parametrize("damage", ALL)
def test_damaged_settings_are_refused_or_are_settings(tmp_path: Path, damage: Damage) -> None:
    whole, rng, bad = Config().to_toml().encode(), random.Random(damage.__name__), 0
    path = tmp_path / "settings.toml"
    for _ in range(12):
        path.write_bytes(damage(whole, rng))
        try:
            assert isinstance(load_config(path), Config)
        except ValueError as error:
            assert str(path) in str(error)
            bad += 1
    assert bad >= (0 if damage.__name__ in ("truncated", "cut_out", "bit_flipped") else 3)


@pytest.mark.parametrize(
    "text",
    [
        "x = " + "[" * 5000,
        "[model]\nclass_path = 'os.system'\n",
        "[train]\nclass_path = 'subprocess.Popen'\ninit_args = { args = 'ls' }\n",
        "train = 3",
        "train = [1]",
        "[[train]]\nsteps = 1",
        "[train.steps]\na = 1",
        "[extra]\na = 1",
        "[train]\nsteps = 1\nsteps = 2",
        "[train]\nno_such = 1",
        "[model]\nexperts = []",
        "[model]\nexperts = ['full', 'full']",
        "[model]\nexperts = [1, 2]",
        "[prior]\nlayer_mean = [[0.5]]\nlayer_temperature = [1.0]",
        "[prior]\ncost_ratio = [1.0]",
        "[train]\nsteps = 99999999999999999999999999",
        "[train]\naccumulate = 3",
        "[train]\nprecision = 'float8'",
        "[train]\ndraws = 'token'",
    ],
)
def test_other_contents_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    if "99999" in text:
        assert load_config(path).train.steps > 10**20  # a long run, not a wrong one
        return
    refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
@given(
    st.dictionaries(
        st.sampled_from([*asdict(Config()), "other"]),
        st.dictionaries(st.sampled_from(sorted({name for _, name in FIELDS})), JSON, max_size=3)
        | JSON,
        max_size=3,
    )
)
def test_any_values_give_settings_or_a_value_error(values: dict[str, object]) -> None:
    try:
        config = config_from_dict(values)  # type: ignore[arg-type]
    except ValueError as error:
        assert str(error)
    else:
        assert config_from_dict(config.to_dict()) == config
        assert tomli_w.dumps(config.to_dict())


def test_the_command_line_names_the_file_and_ends_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, text in enumerate(
        [
            "\0",
            "[train",
            "train = 1",
            "[train]\nsteps = 'x'",
            "[train]\nlr = nan",
            "x = " + "[" * 3000,
        ]
    ):
        Path("bad.toml").write_text(text)
        assert main(["fit", "--config", "bad.toml", "--out", "run"]) == 2, number
        error = capsys.readouterr().err
        assert "bad.toml" in error and error.count("\n") == 1
    assert not Path("run").exists()
