"""CONTRIBUTING.md: each recipe runs from outside the package, and what it adds is used.

Its commands and files exist.
"""

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import bayes_router
from bayes_router import ExpertShape, ModelConfig, RoutedAttention, expert_names, routed_attention
from bayes_router.attention.decoding.cache import LayerCache
from bayes_router.attention.experts import contract
from bayes_router.attention.experts.contract import Kernel, expert_class
from bayes_router.attention.hard import backend
from bayes_router.cli import main
from bayes_router.diagnostics import diagnostic
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.routing import policy
from bayes_router.routing.policy import policy_from_dict, policy_to_dict
from tests.attention.expert_contract import draw, relative_error

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
REGISTRIES: tuple[dict[str, Any], ...] = (
    contract._REGISTRY,
    policy._REGISTRY,
    backend._REGISTRY,
    diagnostic._REGISTRY,
)


@pytest.fixture(scope="module")
def recipes() -> Iterator[dict[str, Any]]:
    """What the Python blocks define, in order; their names are forgotten afterwards."""
    names: dict[str, Any] = {"__name__": "recipes"}
    exec(
        compile(
            "\n".join(re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)),
            "CONTRIBUTING.md",
            "exec",
        ),
        names,
    )
    yield names
    for registry in REGISTRIES:
        for name in [name for name in registry if name.startswith("toy_")]:
            del registry[name]


@pytest.mark.usefixtures("recipes")
@pytest.mark.parametrize("name", ["toy_mean", "toy_squared"])
def test_an_expert_is_routed_to_decoded_and_charged(name: str) -> None:
    assert name in expert_names()
    config = ModelConfig(d_model=32, num_heads=4, experts=("full", name, "local"), window=5)
    result = RoutedAttention(config)(torch.randn(2, 30, 32))
    assert result.output.isfinite().all() and result.kl > 0
    expert = expert_class(name)(ExpertShape(4, 16, 5))
    q, k, v = draw(2, 4, 2, 40)
    route = torch.arange(80).view(2, 40) % 2
    outs = [
        routed_attention(q, k, v, route, window=5, experts=("full", expert), backend=b)
        for b in ("torch", "dense", "reference")
    ]
    assert all(relative_error(out, outs[-1].double()) < 1e-5 for out in outs)
    cache = LayerCache([expert_class("full")(ExpertShape(4, 16, 5)), expert], 2, 40, 2)
    cut = [slice(0, 25), *(slice(t, t + 1) for t in range(25, 40))]
    steps = [cache.attend(q[:, :, s], k[:, :, s], v[:, :, s], route[:, s]) for s in cut]
    assert relative_error(torch.cat(steps, 2), outs[-1].double()) < 1e-5
    assert (expert.kernel is Kernel.GATED) == (name == "toy_squared")


@pytest.mark.usefixtures("recipes")
def test_a_policy_is_evaluated_and_saved(
    finished_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(finished_run), "--policy", "toy_thrifty", "--tokens", "64"]) == 0
    assert "HARD" in capsys.readouterr().out
    made = policy.at_price("toy_thrifty", (1.0, 0.2))(1.5)
    concentration = torch.tensor([[30.0, 1.0], [3.0, 1.0]])
    assert made(concentration).tolist() == [0, 1] and policy_from_dict(policy_to_dict(made)) == made


@pytest.mark.usefixtures("recipes")
def test_a_backend_is_called_by_name_and_says_what_it_refuses() -> None:
    q, k, v = draw(2, 4, 2, 30)
    route, lengths = torch.arange(60).view(2, 30) % 3, torch.tensor([30, 17])
    got = routed_attention(q, k, v, route, window=9, backend="toy_each", lengths=lengths)
    want = routed_attention(q, k, v, route, window=9, backend="reference", lengths=lengths)
    assert relative_error(got, want.double()) < 1e-5
    with pytest.raises(RuntimeError, match="'toy_each' cannot run here: it reads no starts"):
        routed_attention(q, k, v, route, window=9, backend="toy_each", starts=torch.tensor([0, 0]))


def test_a_diagnostic_is_read_once_and_quoted(finished_run: Path, recipes: dict[str, Any]) -> None:
    examined = Examination(load_fitted(finished_run))
    assert examined.toy_run >= 1
    assert list(diagnostic.diagnostics())[-1] == "toy_run"  # after the library's own
    for name in set(diagnostic.diagnostics()) - {"toy_run"}:
        examined.leave_out(name, ValueError("not asked for"))
    assert examined.figures().to_dict() == {"longest run": examined.toy_run}
    assert recipes["longest_run"](examined) == examined.toy_run


def test_a_setting_is_one_field(tmp_path: Path) -> None:
    """In a copy of the package.

    The field, its meaning and its check, and the command line and the files know it.
    """
    shutil.copytree(
        Path(bayes_router.__file__).parent,
        tmp_path / "bayes_router",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    config = tmp_path / "bayes_router" / "settings" / "fit.py"
    source = config.read_text(encoding="utf-8")
    field, meaning = (
        "    seed: int = 0\n",
        "        seed: of initialisation, batches and posterior draws.\n",
    )
    assert source.count(field) == 1 and source.count(meaning) == 1
    source = source.replace(field, field + "    patience: int = 7\n")
    source = source.replace(
        meaning, meaning + "        patience: evaluations without a better one that are borne.\n"
    )
    config.write_text(source, encoding="utf-8")
    code = (
        "import sys; from bayes_router.cli import main; from bayes_router import Config\n"
        "from bayes_router.config import config_from_dict\n"
        "print(config_from_dict({'train': {'patience': 3}}).train.patience, "
        "Config().train.patience)\n"
        "main(['fit', '--help'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("3 7\n") and "--train.patience" in done.stdout
    assert "evaluations without a better one that are borne" in " ".join(done.stdout.split())


def test_its_commands_and_files_exist() -> None:
    targets = re.findall(r"^make (\w+)", TEXT, flags=re.M)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert targets and all(re.search(rf"^{target}:", makefile, flags=re.M) for target in targets)
    named = set(re.findall(r"`((?:bayes_router|tests)/[\w/]+\.py)`", TEXT)) - {
        "bayes_router/attention/experts/NAME.py"
    }
    named -= {"bayes_router/attention/hard/NAME.py"}
    assert {"bayes_router/settings/fit.py", "tests/test_contributing.py"} <= named
    assert all((ROOT / name).is_file() for name in named)
