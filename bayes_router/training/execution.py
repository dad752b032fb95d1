"""How a training step executes the blocks of the network.

As they are, compiled, or computed again backwards.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bayes_router.transformer.network import Block, RoutedTransformer


class Execution:
    """Inside `with execution:` the attention and MLP of every block run in the form asked for.

    Outside, as usual.

    Both are plain functions of tensors: the route is asked for between them, so Pyro's handlers are
    neither compiled nor run twice, and a draw is the same in every form.

    Args:
        network: whose blocks are executed.
        compile: by torch.compile. The shapes of training are fixed, so it happens in the first step
            and not again.
        recompute: activations inside are dropped and computed again in the backward pass
            (activation checkpointing).
        backend: of torch.compile.
    """

    def __init__(
        self, network: RoutedTransformer, compile: bool, recompute: bool, backend: str = "inductor"
    ):  # noqa: A002
        self.forms: list[tuple[nn.Module, str, Callable[..., Any]]] = []
        if not (compile or recompute):
            return
        for block in network.blocks:
            assert isinstance(block, Block)
            for owner, name in ((block.attention, "forward"), (block, "mlp")):
                form = getattr(owner, name)
                if compile:
                    form = torch.compile(form, backend=backend, dynamic=False)
                if recompute:
                    # nothing inside draws random numbers, so no state of the generator is kept
                    form = partial(checkpoint, form, use_reentrant=False, preserve_rng_state=False)
                self.forms.append((owner, name, form))

    def __enter__(self) -> None:
        for owner, name, form in self.forms:
            # in front of the method of the class, on this instance alone
            object.__setattr__(owner, name, form)

    def __exit__(self, *_: object) -> None:
        for owner, name, _form in self.forms:
            object.__delattr__(owner, name)
