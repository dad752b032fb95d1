"""Draws of a guide for ArviZ."""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyro
import torch
from pyro import poutine
from pyro.infer import Predictive
from torch import Tensor

from bayes_router.checks import require
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.sites import TARGETS, is_route_site

Arrays = dict[str, npt.NDArray[Any]]


@torch.no_grad()
def draw_groups(
    program: RoutingModel,
    guide: RoutingGuide,
    tokens: Tensor,
    targets: Tensor,
    draws: int = 100,
    seed: int = 0,
) -> dict[str, Arrays]:
    """What an InferenceData holds, as arrays with leading dimensions (chain, draw).

    Args:
        program: the generative program.
        guide: the posterior.
        tokens: int64 [B, T].
        targets: int64 [B, T], all scored.
        draws: of the routes.
        seed: of the draws; the caller's generator is left as it was.

    Returns:
        posterior and prior: route_<layer> [1, S, (R,) B, T, E]; log_likelihood: targets [1, S, B,
            T], nats, not scaled;
        posterior_predictive: targets drawn [1, S, B, T]; observed_data: targets [B, T].
    """
    require(draws >= 1, "draws", "at least 1", draws)
    with torch.random.fork_rng(devices=[]), pyro.settings.context(module_local_params=True):
        pyro.set_rng_seed(seed)
        sampled = Predictive(program, guide=guide, num_samples=draws)(tokens)
        prior = Predictive(program, num_samples=draws)(tokens)
        sites = [name for name in sampled if is_route_site(name)]
        density = torch.stack(
            [_log_likelihood(program, tokens, targets, sampled, draw) for draw in range(draws)]
        )
    numpy = {name: value[None].cpu().numpy() for name, value in sampled.items()}
    return {
        "posterior": {name: numpy[name] for name in sites},
        "prior": {name: prior[name][None].cpu().numpy() for name in sites},
        "log_likelihood": {"targets": density[None].cpu().numpy()},
        "posterior_predictive": {"targets": numpy["targets"]},
        "observed_data": {"targets": targets.cpu().numpy()},
    }


def _log_likelihood(
    program: RoutingModel, tokens: Tensor, targets: Tensor, sampled: dict[str, Tensor], draw: int
) -> Tensor:
    """[B, T] given one draw of all latents."""
    latents = {name: value[draw] for name, value in sampled.items() if name != TARGETS}
    trace = poutine.trace(poutine.condition(program, latents)).get_trace(tokens, targets)
    density: Tensor = trace.nodes[TARGETS]["fn"].log_prob(targets)
    return density


def to_inference_data(
    program: RoutingModel,
    guide: RoutingGuide,
    tokens: Tensor,
    targets: Tensor,
    experts: list[str],
    draws: int = 100,
    seed: int = 0,
) -> Any:
    """`draw_groups` as ArviZ reads it.

    A DataTree with arviz 1.x (Python 3.12), an InferenceData with arviz 0.x.

    Raises:
        ValueError: arviz is not installed.
    """
    try:
        import arviz  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise ValueError(
            "to_inference_data: expected the package arviz; got none; run: pip install arviz"
        ) from error
    groups = draw_groups(program, guide, tokens, targets, draws, seed)
    sites = groups["posterior"]
    unit = ["unit"] if program.num_units > 1 else []
    dims = {name: [*unit, "sequence", "position", "expert"] for name in sites} | {
        "targets": ["sequence", "position"]
    }
    coords = {"expert": np.array(experts)}
    make: Any = arviz.from_dict  # its signature changed with 1.0
    if int(arviz.__version__.split(".")[0]) >= 1:
        return make(groups, dims=dims, coords=coords)
    return make(**groups, dims=dims, coords=coords)
