"""Functions that launch kernels, as operators of torch where somebody has to see an operator."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter


class Operator:
    """`torch.library.custom_op(name, function)`, which a compiler takes whole and autograd knows.

    Of what nobody follows the function is called as it is: to go through torch's dispatcher takes
    longer on the host than the launches inside.
    """

    def __init__(self, name: str, function: Callable[..., Any]):
        self.function = function
        self.op = torch.library.custom_op(name, function, mutates_args=())
        self.register_fake = self.op.register_fake
        self.register_autograd = self.op.register_autograd

    def __call__(self, *args: Any) -> Any:
        """What `function` computes."""
        if torch.compiler.is_compiling() or _followed(args):
            return self.op(*args)
        return self.function(*args)


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """Decorates a function that becomes the `Operator` of this name."""
    return lambda function: Operator(name, function)


def _followed(args: tuple[Any, ...]) -> bool:
    """Whether anything but the values matters: a gradient, a tensor of another class (a fake, a
    distributed one), a transform of torch.func.
    """
    tensors = [x for x in args if isinstance(x, Tensor)]
    if any(type(x) is not Tensor and type(x) is not Parameter for x in tensors):
        return True
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    return grad or torch._C._functorch.maybe_current_level() is not None
