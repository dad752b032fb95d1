"""Checks of what a caller gives.

Every refusal names the field, what was expected, what came and the fix.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import fields
from difflib import get_close_matches
from enum import Enum
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints


def require(ok: bool, name: str, expected: str, got: object, fix: str = "") -> None:
    """Raise a ValueError unless `ok`.

    It names the field, what was expected, what came and the fix.
    """
    if not ok:
        raise ValueError(f"{name}: expected {expected}; got {got!r}" + (f"; {fix}" if fix else ""))


def positive(name: str, value: object, fix: str = "", expected: str = "a positive number") -> float:
    """`value` as a float; a ValueError unless it is a finite number above 0."""
    number = _number(value)
    require(0 < number < math.inf, name, expected, value, fix)
    return number


def not_negative(name: str, value: object, expected: str = "0 or more", fix: str = "") -> float:
    """`value` as a float; a ValueError unless it is a finite number of 0 or more."""
    number = _number(value)
    require(0 <= number < math.inf, name, expected, value, fix)
    return number


def between(name: str, value: object, expected: str, low: float = 0.0, high: float = 1.0) -> float:
    """`value` as a float; a ValueError unless it is a number between these, both excluded."""
    number = math.nan if isinstance(value, bool) else _number(value)
    require(low < number < high, name, expected, value)
    return number


def whole(name: str, value: object, least: int = 1) -> int:
    """`value` as an int; a ValueError unless it is a whole number of at least `least`."""
    number = isinstance(value, Integral) and not isinstance(value, bool)
    require(number and int(value) >= least, name, f"a whole number, {least} or more", value)  # type: ignore[call-overload]
    return int(value)  # type: ignore[call-overload]


def _number(value: object) -> float:
    """`value` as a float, also of a tensor of one element; NaN where it is no number."""
    try:
        return math.nan if isinstance(value, str) else float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        return math.nan


NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}


def check_kinds(settings: Any, section: str = "") -> None:
    """Refuse fields of a dataclass of settings that are of another kind than they are declared.

    Those of numbers, names, yes or no, and tuples of them; `section` stands before their names.
    """
    hints = get_type_hints(type(settings))
    for name in (field.name for field in fields(settings)):
        value, hint = getattr(settings, name), hints[name]
        require(_is_of(value, hint), f"{section}{name}", _kind(hint), value)


def _is_of(value: object, hint: Any) -> bool:
    """Whether a value is of an annotation; of one that is none of `check_kinds`, anything is."""
    arguments = get_args(hint)
    if get_origin(hint) in (Union, UnionType):
        return any(_is_of(value, one) for one in arguments)
    if get_origin(hint) is tuple:
        if not isinstance(value, tuple | list):
            return False
        return all(_is_of(one, arguments[0]) for one in value)  # how many, its own check says
    if hint in (int, float):
        number = isinstance(value, Integral if hint is int else Real) or hasattr(value, "item")
        return number and not isinstance(value, bool)
    return isinstance(value, hint) if hint in (str, bool, NoneType) else True


def _kind(hint: Any) -> str:
    """An annotation in words."""
    arguments = [one for one in get_args(hint) if one not in (NoneType, ...)]
    if get_origin(hint) in (Union, UnionType):
        return " or ".join(map(_kind, arguments))
    if get_origin(hint) is tuple:
        return f"a tuple, each {_kind(arguments[0])}"
    return NAMES.get(hint, getattr(hint, "__name__", str(hint)))


def broadcasts(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether a tensor of one shape broadcasts to another, which stays as it is."""
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(have in (1, want) for have, want in pairs)


def one_line(error: BaseException | str) -> str:
    """A message, also that of an error, on one line."""
    return " ".join(str(error).split())


def get_extra(extra: str) -> str:
    """How to get the packages of an extra of this package, which is on no index.

    From its checkout.
    """
    return f"run pip install -e '.[{extra}]' in the checkout of bayes-router"


Choice = TypeVar("Choice", bound=Enum)


def choose(field: str, value: object, options: type[Choice]) -> Choice:
    """The member of the enum `options` that `value` names.

    A ValueError that lists the valid ones otherwise.
    """
    if isinstance(value, options):
        return value
    for member in options:
        if member.value == value:
            return member
    raise unknown(field, value, (member.value for member in options))


def unknown(field: str, value: object, options: Iterable[object]) -> ValueError:
    """The error for a name that is not among `options`, with the nearest of them."""
    names = sorted(map(str, options))
    return ValueError(
        f"{field}: expected one of {', '.join(names)}; got {value!r}{nearest(value, names)}"
    )


def nearest(value: object, options: Iterable[object], alike: float = 0.6) -> str:
    """The option that was probably meant, as the end of a message; empty where none is near.

    At least `alike`: 1 is the same, 0 has no letter in common.
    """
    found = get_close_matches(str(value), [str(option) for option in options], 1, alike)
    return f"; did you mean {found[0]}?" if found else ""
