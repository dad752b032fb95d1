"""What a backend of hard routing is, and the registry by which a call names one.

A backend computes a checked `RoutedProblem`, or says why it cannot. Each is one object in a file of
its own beside this one; `hard.auto` imports those of the library and chooses among them.
"""

from typing import Protocol, TypeVar, runtime_checkable

from torch import Tensor

from bayes_router.attention.hard.problem import RoutedProblem
from bayes_router.checks import unknown


@runtime_checkable
class Backend(Protocol):
    """Who computes a routed attention.

    Attributes:
        name: what `routed_attention(..., backend=name)` calls it.
    """

    name: str

    def refuses(self, problem: RoutedProblem) -> str | None:
        """Why this backend cannot compute this problem; None where it can.

        Nothing waits for the device.
        """
        ...

    def attend(self, problem: RoutedProblem) -> Tensor:
        """[B, H, Tq, Dh] of a checked problem that it does not refuse.

        Rows of padding and of experts `elsewhere` are zero. On CUDA, where nobody has read the
        routes, it asserts on the device that those of real tokens are in range
        (`RoutedProblem.assert_route`).
        """
        ...


_REGISTRY: dict[str, Backend] = {}
BackendType = TypeVar("BackendType", bound=Backend)


def register_backend(backend: BackendType) -> BackendType:
    """Calls may name this backend from now on: `register_backend(Mine())`.

    Raises:
        TypeError: it is no backend.
        ValueError: the name is taken by another class.
    """
    if not isinstance(backend, Backend) or isinstance(backend, type):
        raise TypeError(
            f"register_backend: expected an object with name, refuses and attend; got {backend!r}"
        )
    known = _REGISTRY.get(backend.name)
    if known is not None and type(known).__qualname__ != type(backend).__qualname__:
        raise ValueError(
            f"register_backend: {backend.name!r} is already a "
            f"{type(known).__module__}.{type(known).__qualname__}; "
            "take another name"
        )
    _REGISTRY[backend.name] = backend
    return backend


def backend_of(backend: Backend | str) -> Backend:
    """The backend registered under a name; an object is taken as it is.

    Raises:
        ValueError: no such backend; the message lists those there are.
    """
    if isinstance(backend, str):
        if backend in _REGISTRY:
            return _REGISTRY[backend]
    # who is known needs no look at its parts, which takes as long as a launch
    elif any(backend is known for known in _REGISTRY.values()) or isinstance(backend, Backend):
        return backend
    raise unknown("backend", backend, _REGISTRY)


def backends() -> tuple[Backend, ...]:
    """Every registered backend, in the order of registration."""
    return tuple(_REGISTRY.values())


def able(backend: Backend, problem: RoutedProblem) -> Backend:
    """The backend, if it computes this problem.

    Raises:
        RuntimeError: it cannot, with its reason.
    """
    reason = backend.refuses(problem)
    if reason:
        raise RuntimeError(
            f"backend {backend.name!r} cannot run here: {reason}; backend='auto' picks one that can"
        )
    return backend


def run(backend: Backend, problem: RoutedProblem) -> Tensor:
    """[B, H, Tq, Dh] of a checked problem, or the RuntimeError of `able`."""
    return able(backend, problem).attend(problem)
