"""The layout in which gradients reach torch's fused attention.

On a GPU, with cuDNN: tests/gpu/test_routed_attention.py.
"""

import torch

from bayes_router.attention.kernels.eager.fused import _KeepLayout


def test_a_gradient_comes_in_the_layout_of_the_output() -> None:
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    seen: list[torch.Tensor] = []
    probe = x * 1
    probe.register_hook(seen.append)
    for grad in (
        torch.randn(2, 3, 5, 4),
        torch.randn(2, 3, 5, 1).expand(-1, -1, -1, 4),
        torch.randn_like(x),
    ):
        (found,) = torch.autograd.grad(_KeepLayout.apply(probe), x, grad, retain_graph=True)
        assert seen[-1].stride() == x.stride()
        torch.testing.assert_close(found, grad, rtol=0, atol=0)


def test_it_compiles_without_a_break() -> None:
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    grad = torch.randn(2, 3, 5, 4)
    compiled = torch.compile(
        lambda y: _KeepLayout.apply(y * 2), backend="aot_eager", fullgraph=True
    )
    (found,) = torch.autograd.grad(compiled(x), x, grad)
    torch.testing.assert_close(found, 2 * grad, rtol=0, atol=0)
