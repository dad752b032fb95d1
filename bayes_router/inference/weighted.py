"""Programs written when the model carried the weight of the KL: `RoutingModel(..., kl_weight=w)`.

The weight belongs to the objective now, see `inference/elbo.py`; a FutureWarning says so. Such a
program goes on to give every estimator of the ELBO the objective per token,
(nll + w KL) / (B T), and now whichever guide it is given: none has to repeat the scale.
"""

import warnings
from typing import Any, TypeVar

from pyro.poutine.messenger import Messenger, block_messengers
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.trace_struct import Trace
from pyro.poutine.util import site_is_subsample

from bayes_router.checks import positive, require

SCALED = "_bayes_router_scaled"
M = TypeVar("M", bound=Messenger)


def warn_of_weight(kl_weight: float) -> None:
    """Say where the weight belongs.

    Raises:
        ValueError: a weight that is not positive.
    """
    positive("kl_weight", kl_weight)
    warnings.warn(
        f"RoutingModel(kl_weight={kl_weight}): the weight belongs to the objective, "
        "RoutingELBO(kl_weight=...) or tempered(model, ...). This program serves estimators of the "
        "ELBO, in nats per token, and samplers; importance weights need tempered(...)",
        FutureWarning,
        stacklevel=3,
    )


class Literal(Messenger):
    """Around a model whose objective weighs the KL itself: the model is the joint.

    Args:
        kl_weight: of the objective.
    """

    def __init__(self, kl_weight: float):
        super().__init__()
        self.kl_weight = kl_weight


def around(kind: type[M]) -> list[M]:
    """The handlers of a kind that stand around this line, from the outermost inwards."""
    with block_messengers(lambda handler: isinstance(handler, kind)) as found:
        return list(found)


class PerToken(Messenger):
    """(nll + kl_weight KL) / tokens for the estimator that replays a guide against this model.

    What is observed is scaled by 1 / tokens, what is latent by kl_weight / tokens, in the model and
    in the trace of the guide that it is replayed with. Where none is replayed, as under a sampler,
    the program is p(z) p(y | z)^(1 / kl_weight), as of `tempered`.

    Raises:
        ValueError: an objective that weighs the KL itself, by another number.
    """

    def __init__(self, kl_weight: float, tokens: int):
        super().__init__()
        self.kl_weight, self.tokens = kl_weight, tokens
        self.guide: Trace | None = None
        self.literal = False

    def __enter__(self) -> Any:
        traces = [h.trace for h in around(ReplayMessenger) if h.trace is not None]
        self.guide = traces[-1] if traces else None
        for one in around(Literal):
            self.literal = True
            require(
                one.kl_weight == self.kl_weight,
                "kl_weight of the model",
                f"that of the objective, {one.kl_weight}, or none",
                self.kl_weight,
                "RoutingModel(...) without kl_weight",
            )
        return super().__enter__()

    def _pyro_sample(self, msg: dict[str, Any]) -> None:
        if self.literal or site_is_subsample(msg):
            return
        if self.guide is None:
            msg["scale"] = msg["scale"] * (1 / self.kl_weight if msg["is_observed"] else 1)
            return
        share = (1 if msg["is_observed"] else self.kl_weight) / self.tokens
        msg["scale"] = msg["scale"] * share
        drawn = self.guide.nodes.get(msg["name"])
        if drawn is not None and not msg["is_observed"] and not drawn.get(SCALED):
            drawn["scale"], drawn[SCALED] = drawn["scale"] * share, True
