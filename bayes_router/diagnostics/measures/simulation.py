"""Simulation-based calibration.

Does what infers find what the prior has drawn, as often as it should?

Talts, Betancourt, Simpson, Vehtari and Gelman (2018), arXiv 1804.06788. Draw routes from the prior
and targets given them; draw from the posterior given the targets; count how many posterior draws
lie below the prior's. If what infers is right, that rank is uniform on 0 .. S: heaped at both ends
it is too sure, heaped in the middle not sure enough, sloping it is off.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyro
import torch
from pyro import poutine
from pyro.infer import MCMC, NUTS, Predictive
from scipy.stats import chisquare
from torch import Tensor

from bayes_router.checks import require
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.inference.sites import is_route_site

Draws = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""(tokens [B, T], targets) -> posterior draws of each route site, [S, B, T, E], nearly
independent."""


def guide_draws(program: RoutingModel, guide: RoutingGuide, draws: int) -> Draws:
    """Posterior draws of a guide, which never sees the targets."""

    def draw(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        found: dict[str, Tensor] = Predictive(program, guide=guide, num_samples=draws)(tokens)
        return {name: value for name, value in found.items() if is_route_site(name)}

    return draw


def sampler_draws(
    program: RoutingModel, draws: int, warmup: int = 100, thin: int = 3, depth: int = 6
) -> Draws:
    """Posterior draws of NUTS, every `thin`-th; `depth` bounds its trees."""

    def draw(tokens: Tensor, targets: Tensor) -> dict[str, Tensor]:
        kernel = NUTS(program, max_tree_depth=depth)
        sampler = MCMC(kernel, num_samples=draws * thin, warmup_steps=warmup, disable_progbar=True)
        sampler.run(tokens, targets)
        return {
            name: value[::thin]
            for name, value in sampler.get_samples().items()
            if is_route_site(name)
        }

    return draw


def rank_statistics(
    program: RoutingModel, posterior: Draws, tokens: Tensor, seed: int = 0
) -> pd.DataFrame:
    """The rank of each simulated route among its posterior draws.

    Args:
        program: what simulates; its prior has to be proper, its likelihood able to sample.
        posterior: what infers, see `guide_draws`, `sampler_draws`.
        tokens: int64 [B, T], a simulation a row.
        seed: of everything; the caller's generator is left as it was.

    Returns:
        One row a site, row, token and expert: `rank` in 0 .. `draws`. Only rows are independent:
        ranks of one row share its targets, and experts their sum.
    """
    with (
        torch.random.fork_rng(devices=[]),
        pyro.settings.context(module_local_params=True),
        torch.no_grad(),
    ):
        pyro.set_rng_seed(seed)
        trace = poutine.trace(program).get_trace(tokens)
        truth = {name: site["value"] for name, site in trace.nodes.items() if is_route_site(name)}
        with torch.enable_grad():
            drawn = posterior(tokens, trace.nodes["targets"]["value"])
    frames = []
    for name, value in truth.items():
        require(name in drawn, "posterior", f"draws of {name}", sorted(drawn))
        samples = drawn[name]
        require(
            samples.shape[1:] == value.shape,
            "posterior",
            f"draws of shape {tuple(value.shape)}",
            tuple(samples.shape[1:]),
        )
        rank = (samples < value).sum(0)
        row, token, expert = (index.ravel() for index in np.indices(value.shape[-3:]))
        columns = {"site": name, "row": row, "token": token, "expert": expert}
        frames.append(
            pd.DataFrame({**columns, "rank": rank.flatten().numpy(), "draws": len(samples)})
        )
    return pd.concat(frames, ignore_index=True)


def rank_counts(ranks: pd.Series, draws: int, bins: int = 8) -> npt.NDArray[np.int64]:
    """How many ranks lie in each of `bins` equal parts of 0 .. draws.

    Raises:
        ValueError: `bins` does not divide the draws + 1 possible ranks, so that no uniform law
            gives equal counts.
    """
    require((draws + 1) % bins == 0, "bins", f"a divisor of draws + 1 = {draws + 1}", bins)
    counted: npt.NDArray[np.int64] = np.bincount(
        ranks.to_numpy() * bins // (draws + 1), minlength=bins
    )
    return counted


def uniform_p_value(counts: npt.NDArray[np.int64]) -> float:
    """The p-value of a chi-square test that ranks, which have to be independent, are uniform."""
    return float(chisquare(counts).pvalue)
