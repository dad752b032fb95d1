"""docs/pyro.md names a test for each idiom: they exist, and its arguments are those of the code."""

import inspect
import re
from pathlib import Path

from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel

HERE = Path(__file__).parent
PAGE = (HERE.parents[1] / "docs" / "pyro.md").read_text(encoding="utf-8")


def test_the_tests_that_it_names_exist() -> None:
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    defined = set(
        re.findall(
            r"^def (test_\w+)",
            "\n".join(p.read_text("utf-8") for p in HERE.glob("test_*.py")),
            re.M,
        )
    )
    assert len(named) > 20 and named <= defined


def test_every_test_of_an_idiom_is_in_the_table() -> None:
    # of what is said elsewhere on the page
    inner = {"tempering", "terms", "scores", "conditioned", "tempered", "weight"}
    defined = re.findall(r"^def (test_\w+)", (HERE / "test_idioms.py").read_text("utf-8"), re.M)
    missing = [
        name for name in defined if f"`{name}`" not in PAGE and not inner & set(name.split("_"))
    ]
    assert not missing


def test_the_arguments_that_it_names_are_those_of_the_code() -> None:
    for argument in ("network", "prior", "cost_ratio", "price", "likelihood", "name"):
        assert argument in inspect.signature(RoutingModel).parameters and argument in PAGE
    assert {"controller", "rest", "name"} < set(inspect.signature(RoutingGuide).parameters)
