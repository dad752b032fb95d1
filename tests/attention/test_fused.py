"""The layout in which gradients reach torch's fused attention. On a GPU, with cuDNN: tests/gpu/test_routed_attention.py."""

import torch

from bayes_router.attention.fused import _KeepLayout


def test_a_gradient_comes_in_the_layout_of_the_output() -> None:
    x = torch.randn(2, 5, 3, 4).transpose(1, 2).requires_grad_()
    seen: list[torch.Tensor] = []
    probe = x * 1
    probe.register_hook(seen.append)
    for grad in (torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 1).expand(-1, -1, -1, 4), torch.randn_like(x)):
        (found,) = torch.autograd.grad(_KeepLayout.apply(probe), x, grad, retain_graph=True)
        assert seen[-1].stride() == x.stride()
        torch.testing.assert_close(found, grad, rtol=0, atol=0)
