"""Checks of what a caller gives: every refusal names the field, what was expected, what came and the fix."""

from collections.abc import Iterable
from enum import Enum
from typing import TypeVar


def require(ok: bool, name: str, expected: str, got: object, fix: str = "") -> None:
    """Raise a ValueError that names the field, what was expected, what came and the fix, unless `ok`."""
    if not ok:
        raise ValueError(f"{name}: expected {expected}; got {got!r}" + (f"; {fix}" if fix else ""))


def one_line(error: BaseException) -> str:
    """The parser's message for a wrong value, on one line."""
    return " ".join(str(error).replace("Parser key ", "").split())


def get_extra(extra: str) -> str:
    """How to get the packages of an extra of this package, which is on no index: from its checkout."""
    return f"run pip install -e '.[{extra}]' in the checkout of bayes-router"


Choice = TypeVar("Choice", bound=Enum)


def choose(field: str, value: object, options: type[Choice]) -> Choice:
    """The member of the enum `options` that `value` names; a ValueError that lists the valid ones otherwise."""
    if isinstance(value, options):
        return value
    for member in options:
        if member.value == value:
            return member
    raise unknown(field, value, (member.value for member in options))


def unknown(field: str, value: object, options: Iterable[object]) -> ValueError:
    """The error for a name that is not among `options`."""
    return ValueError(f"{field}: expected one of {', '.join(sorted(map(str, options)))}; got {value!r}")
