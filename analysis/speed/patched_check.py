"""Whether patched models compute on a GPU what they compute on the CPU, before any is timed."""

import torch
from torch import Tensor

from analysis.speed.patched_model import VOCABULARY, build, routed, send
from bayes_router.integrations.huggingface.graphs import Graphs

MARGIN = 1e-4
"""Between the logarithms of two concentrations: some fifty times what float32 rounds them by."""


def chosen_clearly(concentration: Tensor) -> Tensor:
    """Which choices between two experts [B, T, R] do not hang on rounding.

    A share of the tokens is sent by a cut at the score of one of them, and a word that stands there
    again scores the same: float32 on a CPU puts some of them on the other side than float64.
    """
    log = concentration.log()
    return (log[..., 0] - log[..., 1]).abs() > MARGIN


@torch.no_grad()
def disagreements(device: torch.device, units: list[str]) -> list[str]:
    """What differs from the same model on the CPU in float32: routed passes, replayed ones, steps
    behind a static cache.
    """
    wrong = []
    tokens = torch.randint(VOCABULARY, (1, 2500), generator=torch.Generator().manual_seed(3))
    for unit in units:
        reference, model = (
            build("smollm2-135m, 30 layers", 2),
            build("smollm2-135m, 30 layers", 2).to(device),
        )
        ours, theirs = routed(model, unit), routed(reference, unit)
        executed = send(theirs, 0.3, lambda: reference(tokens))  # noqa: B023 (called here)
        assert 0.2 < executed < 0.4, executed
        ours.controller.load_state_dict(theirs.controller.state_dict())
        expected = reference(tokens).logits
        routes = [theirs.last.executed[index] for index in range(2)]
        clear = [chosen_clearly(theirs.last.concentration[index]) for index in range(2)]
        assert all(float(x.float().mean()) > 0.99 for x in clear), "most choices are compared"
        model(tokens.to(device), use_cache=False)
        same = [
            float((ours.last.executed[i].cpu() == route)[clear[i]].float().mean())
            for i, route in enumerate(routes)
        ]
        ours.force(torch.stack(routes).to(device))  # a near tie may fall to the other side
        found = model(tokens.to(device), use_cache=False).logits.cpu()
        ours.force(None)
        graphs = Graphs(model, 2600, bucket=64)
        first = graphs.prefill(tokens[:, :2400].to(device)).cpu()
        steps = [graphs.step(tokens[:, t, None].to(device)).cpu() for t in range(2400, 2404)]
        compared = {"pass": (found, expected), "replayed pass": (first, expected[:, 2399])}
        compared |= {f"step {i}": (step, expected[:, 2400 + i]) for i, step in enumerate(steps)}
        scale = float(expected.std())
        for name, (a, b) in compared.items():
            error = float((a - b).abs().max()) / scale
            print(
                f"check: {unit:8} {name:14} error {error:.1e} of the logits' spread, routes equal "
                f"{min(same):.5f}",
                flush=True,
            )
            if not error < 2e-2 or min(same) < 0.999:
                wrong.append(f"{unit}, {name}: {error:.1e}")
    return wrong
