"""What a diagnostic is, and the registry that an examination and a report go through."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from bayes_router.diagnostics.measures.verdict import Verdict

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Plot(NamedTuple):
    """A figure of a report."""

    title: str
    caption: str
    draw: "Callable[[], Axes]"


def _nothing(*_: Any) -> Any:
    return ()


@dataclass(frozen=True)
class Diagnostic:
    """Something that is asked of a fit, over and above one reading of held-out text.

    Every function is given the `Examination`, whose `run`, `rows`, `effort` and `thresholds` say
    of what and how much; all but `read` are also given what `read` found.

    Attributes:
        name: `examination.NAME` is what was found; a Python name.
        title: what progress and the list of what was left out call it.
        read: computes it, once.
        verdicts: findings in words.
        numbers: figures to quote, by their label.
        plots: figures of the report.
    """

    name: str
    title: str
    read: Callable[[Any], Any]
    verdicts: Callable[[Any, Any], Sequence[Verdict]] = _nothing
    numbers: Callable[[Any, Any], dict[str, float]] = lambda examined, found: {}
    plots: Callable[[Any, Any], Sequence[Plot]] = _nothing


_REGISTRY: dict[str, Diagnostic] = {}


def register_diagnostic(diagnostic: Diagnostic) -> Diagnostic:
    """Examinations and reports have this diagnostic from now on, after those there are.

    Raises:
        ValueError: the name is taken by another diagnostic, or is no Python name.
    """
    name = diagnostic.name
    if not name.isidentifier():
        raise ValueError(f"register_diagnostic: expected a Python name; got {name!r}")
    known = _REGISTRY.get(name)
    if known is not None and known.read.__qualname__ != diagnostic.read.__qualname__:
        raise ValueError(f"register_diagnostic: {name!r} is already {known.title!r}; take another")
    _REGISTRY[name] = diagnostic
    return diagnostic


def diagnostics() -> dict[str, Diagnostic]:
    """Every registered diagnostic by name, in the order of registration."""
    return dict(_REGISTRY)
