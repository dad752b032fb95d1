"""Operators are called as plain functions where nobody needs to see them."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bayes_router.attention.kernels.operator import Operator, operator
from tests.operators import Operators


class Marked(Tensor):
    """A tensor of another class."""


@pytest.fixture(scope="module")
def cube() -> Iterator[Operator]:
    @operator("bayes_router_tests::cube")
    def found(x: Tensor) -> Tensor:
        return torch.from_numpy(np.asarray(x.detach().numpy() ** 3))

    @found.register_fake
    def _(x: Tensor) -> Tensor:
        return torch.empty_like(x)

    def differentiate(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient

    found.register_autograd(
        differentiate, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
    )
    yield found


def through(call: Operator, x: Tensor) -> bool:
    """Whether the call is one of an operator."""
    with Operators() as seen:
        call(x)
    return any("bayes_router_tests" in name for name in seen.names)


@pytest.mark.parametrize("make", [torch.ones, lambda n: nn.Parameter(torch.ones(n), False)])
def test_what_nobody_follows_is_called_as_it_is(cube: Operator, make: Any) -> None:
    assert cube(2 * make(2)).tolist() == [8.0, 8.0]
    assert not through(cube, make(2))


def test_gradients_are_those_of_the_operator(cube: Operator) -> None:
    x = torch.tensor([2.0], requires_grad=True)
    assert through(cube, x)
    assert torch.autograd.grad(cube(x), x)[0].item() == 12.0
    with torch.no_grad():
        assert not through(cube, x)


def test_another_class_of_tensors_goes_through_the_dispatcher(cube: Operator) -> None:
    assert through(cube, torch.ones(2).as_subclass(Marked))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_of_torch_func_go_through_the_dispatcher(cube: Operator) -> None:
    assert torch.func.vmap(cube)(torch.tensor([1.0, 2.0])).tolist() == [1.0, 8.0]


def test_a_compiler_sees_one_operator(cube: Operator) -> None:
    graphs = []

    def look(module: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in module.graph.nodes])
        return module.forward

    compiled = torch.compile(lambda x: cube(x) + 1, backend=look, fullgraph=True)
    assert compiled(torch.tensor([2.0])).item() == 9.0
    assert [name for name in graphs[0] if "cube" in name] == ["bayes_router_tests.cube.default"]
