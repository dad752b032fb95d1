"""Steps of a patch's fit replayed from a CUDA graph, against the same steps without one."""

import pytest
import torch

from bayes_router.config import PriorConfig, ScheduleConfig
from bayes_router.integrations.huggingface.fit_settings import FitSettings, final_state
from bayes_router.integrations.huggingface.pressure import Asked
from bayes_router.integrations.huggingface.svi_step import SviStep
from tests.integrations.tiny_models import VOCAB, patched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_replayed_steps_are_the_steps() -> None:
    """Draws are a function of the seed; batch, price and dial move between replays."""
    prior = PriorConfig(cost="flops", price=30.0, total_concentration=2.0, map="uniform")
    model, router = patched("llama", window=8, experts=("full", "local"), prior=prior, context=64)
    model.cuda()
    start = final_state(router, ScheduleConfig(straight_through_from=0.0))
    plain, replayed = (
        SviStep(router, FitSettings(budget=(0.4, 0.9), graph=graph), start)
        for graph in (False, True)
    )
    random = torch.Generator().manual_seed(0)
    for seed, dial in enumerate((0.5, -1.0, 2.0)):
        text = torch.randint(3, VOCAB, (2, 65), generator=random).cuda()
        asked = Asked(10.0 * (seed + 1), dial)
        state = final_state(router, ScheduleConfig(straight_through_from=0.0))
        rows, gradients = [], []
        for step in (plain, replayed):
            torch.manual_seed(seed)
            with router.only_this():
                rows.append(step(text[:, :-1], text[:, 1:], state, asked, seed))
            gradients.append([p.grad.clone() for p in router.controller.parameters()])
        assert rows[1] == pytest.approx(rows[0], rel=1e-4)
        for ours, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)
