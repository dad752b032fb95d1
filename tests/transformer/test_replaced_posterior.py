"""Where the router is one kernel, a posterior that was replaced is executed all the same."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Dirichlet

from analysis.routes.contenders import SoftmaxModel, StaticModel
from bayes_router.config import ModelConfig
from bayes_router.integrations.calls import fused_router
from bayes_router.routing.controller import MetaController
from bayes_router.routing.policy import Argmax
from bayes_router.transformer import fused
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import RoutingMode

CONFIG = ModelConfig(vocab_size=20, d_model=16, num_heads=2, num_layers=2, window=4)
TOKENS = torch.arange(20)[None]


@pytest.fixture
def on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel takes all that it is given, and sends every token to the second expert."""

    def kernel(hidden: Tensor, controller: Any, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        shape = (*hidden.shape[:2], controller.num_units)
        experts = controller.out.out_features // controller.num_units
        return torch.ones(*shape, experts), torch.ones(shape, dtype=torch.int64)

    for module in (fused, fused_router):
        monkeypatch.setattr(module, "available", lambda hidden, controller: True)
        monkeypatch.setattr(module, "fused", kernel)


def third(layer: int, hidden: Tensor, units: Tensor | None = None) -> Dirichlet:
    return Dirichlet(torch.tensor([0.1, 0.1, 5.0]).expand(*hidden.shape[:2], 1, 3))


class Third(MetaController):
    def posterior(self, layer: int, hidden: Tensor, units: Tensor | None = None) -> Dirichlet:
        return third(layer, hidden)


@pytest.mark.usefixtures("on_a_card")
def test_a_model_executes_it() -> None:
    model = RoutedLanguageModel(CONFIG)
    assert model(TOKENS, "hard").route.unique().tolist() == [1]  # the kernel's
    model.controller.posterior = third  # type: ignore[method-assign]
    assert model(TOKENS, "hard").route.unique().tolist() == [2]
    model.controller = Third(16, 2, 3)
    assert model(TOKENS, "hard").route.unique().tolist() == [2]


@pytest.mark.usefixtures("on_a_card")
def test_a_patch_executes_it() -> None:
    hidden = torch.randn(1, 5, 16)

    def choices(meta: MetaController) -> list[int]:
        arguments: Any = (hidden, RoutingMode.HARD, Argmax(), lambda *_: None)
        route = fused_router.infer(
            meta.posterior, meta, 0, *arguments, lambda q, mode, read: q.mean.argmax(-1)
        )[1]
        return route.unique().tolist()

    meta = MetaController(16, 2, 3)
    assert choices(meta) == [1]
    meta.posterior = third  # type: ignore[method-assign]
    assert choices(meta) == [2]
    assert choices(Third(16, 2, 3)) == [2]


@pytest.mark.usefixtures("on_a_card")
def test_contenders_of_the_study_execute_their_own() -> None:
    static = StaticModel(CONFIG, ("local", "full"))
    assert static(TOKENS, "hard").route.flatten(1).unique(dim=1).flatten().tolist() == [2, 0]
    softmax = SoftmaxModel(CONFIG)
    for layer in softmax.controller.layers:
        torch.nn.init.constant_(layer.out.bias[2:], 3.0)  # type: ignore[index]
    assert softmax(TOKENS, "hard").route.unique().tolist() == [2]
