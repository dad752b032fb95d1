"""Parameters of plain modules in Pyro's global store.

A name for each program, and a loaded store that is used.
"""

import re
import weakref
from typing import Any

import pyro
from torch import Tensor, nn

from bayes_router.checks import require

_owners: "weakref.WeakValueDictionary[str, Named]" = weakref.WeakValueDictionary()
_shown: dict[str, "weakref.ref[Tensor]"] = {}
"""What was last put into the store, by its name there: a tensor that is another one was loaded."""


class Named(nn.Module):
    """A module that shows its parameters to Pyro under a name of its own.

    Pyro's store is global: two models under one name would share their weights in silence. So the
    first that is run takes its name, `name` or that of the class, a second one that lives beside it
    the same with a number. The name of one that is gone is free again, and what it left in the
    store is dropped. Parameters that were *loaded* into the store under the name
    (`pyro.get_param_store().load(...)`) replace those of the module, as plain Pyro does with
    `update_module_params=True`.

    Under `pyro.settings.context(module_local_params=True)` nothing is registered.

    Args:
        name: in the store; give one where several models are saved together, so that no order of
            construction counts.
    """

    def __init__(self, name: str | None = None) -> None:
        super().__init__()
        wanted = type(self).__name__ if name is None else name
        require(
            re.fullmatch(r"\w+", wanted) is not None,
            "name",
            "letters, digits and underscores",
            name,
        )
        self._wanted, self._given = wanted, name is not None

    def show_parameters(self, module: nn.Module) -> None:
        """Show the trainable parameters of `module` to Pyro.

        Raises:
            ValueError: the store holds a parameter of this name and another shape, or the name
                belongs to another model.
        """
        if pyro.settings.get("module_local_params"):
            return
        name, store = self.pyro_name, pyro.get_param_store()
        trainable = {
            f"{name}$$${inner}": p for inner, p in module.named_parameters() if p.requires_grad
        }
        for full, parameter in trainable.items():
            if full in store:
                require(
                    store[full].shape == parameter.shape,
                    f"parameter store, {full}",
                    f"the shape of the model's parameter, {tuple(parameter.shape)}",
                    tuple(store[full].shape),
                    "load the store of the same architecture, or pyro.clear_param_store()",
                )
        pyro.module(name, module, update_module_params=True)
        for full in trainable:
            _shown[full] = weakref.ref(store[full])

    @property
    def pyro_name(self) -> str:
        """In the store; taken at the first call."""
        known = self.__dict__.get("_name")
        if known is not None and _owners.get(known) is self:
            return str(known)
        number, name = 0, self._wanted
        while _owners.get(name) not in (None, self):
            require(
                not self._given,
                "name",
                "one that no other model has",
                name,
                "models alive at the same time need names of their own in Pyro's store",
            )
            number += 1
            name = f"{self._wanted}_{number}"
        self.__dict__["_name"] = name
        _owners[name] = self
        _drop_left_behind(name)
        return name

    def __getstate__(self) -> dict[str, Any]:
        """A copy takes a name of its own."""
        return {**self.__dict__, "_given": False}


def _drop_left_behind(name: str) -> None:
    """Take out of the store what a model that is gone has put there under `name`.

    What was loaded stays.
    """
    store = pyro.get_param_store()
    for full in [key for key in store if key.startswith(f"{name}$$$")]:
        put = _shown.get(full)
        if put is not None and put() is store[full]:
            del store[full]
