"""Kernels are launched before the one before them has ended: each waits for it first."""

import ast
from pathlib import Path

from bayes_router import attention

FILES = sorted(Path(attention.__file__).parent.rglob("*.py"))


def _name(node: ast.expr) -> str:
    return ast.unparse(node).rpartition(".")[2]


def _body(function: ast.FunctionDef) -> list[str]:
    """Its statements, without docstring and compile-time assertions."""
    said = [ast.unparse(statement) for statement in function.body]
    return [x for x in said[1:] if "static_assert" not in x]


def test_every_launched_kernel_waits_before_all_else() -> None:
    """One that read or wrote before it waited would race with the kernels before it."""
    trees = [tree for path in FILES for tree in ast.walk(ast.parse(path.read_text()))]
    launched = {
        _name(node.args[0])
        for node in trees
        if isinstance(node, ast.Call) and _name(node.func) == "launch" and len(node.args) > 1
    }
    kernels = [
        node
        for node in trees
        if isinstance(node, ast.FunctionDef)
        and any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        and node.name in launched
    ]
    assert {node.name for node in kernels} == launched
    assert len(launched) > 20
    hasty = [node.name for node in kernels if _body(node)[0] != "follow()"]
    assert not hasty, f"launched, but do not wait first: {hasty}"
    elsewhere = [node.name for node in trees if _follows(node) and node not in kernels]
    assert not elsewhere, f"wait, but are not launched: {elsewhere}"


def _follows(node: ast.AST) -> bool:
    return isinstance(node, ast.FunctionDef) and "follow()" in map(ast.unparse, node.body)
