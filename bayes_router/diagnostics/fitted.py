"""A fit, put together again.

The model, its prior at the end of training, and the Pyro pair of program and guide.

Of a run folder (`load_fitted`) or of a patched pretrained model (`fitted_patch`): diagnostics read
both alike.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from bayes_router.checks import require
from bayes_router.config import Config, DataConfig, TrainConfig
from bayes_router.data.tokenisers import Tokeniser, load_tokeniser
from bayes_router.data.tokens import TokenSource
from bayes_router.files import WEIGHTS, require_file
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.routing.schedule import Schedule
from bayes_router.training.checkpoint import load_run
from bayes_router.transformer.build import build_prior
from bayes_router.transformer.model import RoutedLanguageModel

PATCH_TOKENS = 8192  # of held-out text that diagnostics of a patched model read


@dataclass(frozen=True)
class FittedRun:
    """What diagnostics of a run read."""

    path: Path
    config: Config
    model: RoutedLanguageModel
    prior: ComputeAwarePrior
    program: RoutingModel  # under the prior of the last step
    guide: RoutingGuide
    kl_weight: float = 1.0  # of the objective of the last step
    own_tokeniser: Tokeniser | None = None  # of a patched model
    held_out: TokenSource | None = None  # of a patched model: what diagnostics read
    patched: bool = False
    causal: bool = True  # predicts next tokens; an encoder predicts hidden ones, in their place

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    @property
    def experts(self) -> list[str]:
        """Names, in the order of the routing latent."""
        return list(self.config.model.experts)

    @property
    def tokeniser(self) -> Tokeniser | None:
        """The tokeniser, None where the tokens are no text (recall).

        It is None too where a patched model came without one.
        """
        if self.patched:
            return self.own_tokeniser
        return (
            None
            if self.config.data.corpus == "recall"
            else load_tokeniser(self.config.data.tokeniser)
        )


def load_fitted(run: Path | str, device: str = "cpu") -> FittedRun:
    """Read a run folder.

    Raises:
        ValueError: a file is missing or damaged, or the weights hold no controller: there is no
            posterior to look at.
    """
    run = Path(run)
    weights = require_file(run, WEIGHTS)
    try:
        with safe_open(weights, framework="pt") as file:
            guided = any(name.startswith("controller.") for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{weights}: expected the weights of a run; the file is damaged: {error}"
        ) from error
    require(
        guided,
        "run",
        f"a fitted guide (weights controller.* in {WEIGHTS})",
        str(run),
        "fit it with `bayes-router fit`",
    )
    config, model = load_run(run, device)
    program, guide, prior, kl_weight = build_program(config, model)
    return FittedRun(run, config, model, prior, program, guide, kl_weight)


def build_program(
    config: Config, model: RoutedLanguageModel
) -> tuple[RoutingModel, RoutingGuide, ComputeAwarePrior, float]:
    """Program and guide under the prior of the last training step.

    With the compute-aware prior and the KL weight there.
    """
    prior = build_prior(config.prior, config.model, config.model.num_layers, config.data.context)
    schedule = Schedule(
        config.schedule, prior, config.train.steps, config.model.experts, config.prior.price
    )
    end = schedule.at(config.train.steps - 1)
    charged = prior.charged.to(next(model.parameters()).device)
    program = RoutingModel(model.network, end.concentration, charged, end.price)
    program.straight_through = end.straight_through
    return program, RoutingGuide(program, model.controller), prior, end.kl_weight


def fitted_patch(
    router: Any,
    held_out: TokenSource,
    *,
    context: int,
    tokeniser: Tokeniser | None = None,
    path: Path | str = "",
    name: str = "the fit",
    tokens: int = PATCH_TOKENS,
) -> FittedRun:
    """A patched language model as diagnostics read it.

    Args:
        router: what `bayes_router.patch` or `load_patch` returned, of a model with a
            language-modelling head, a masked one for an encoder.
        held_out: text that `fit` did not read; for an encoder with tokens hidden, as `fit` holds it
            out.
        context: tokens of a window of it.
        tokeniser: the model's; without one, token ids are shown and diagnostics that need text are
            left out.
        path: folder of the patch, for the heading.
        name: of the text, for the heading.
        tokens: read at most.

    Raises:
        ValueError: a model that does not predict tokens, or text for an encoder with none hidden.
    """
    require(
        getattr(router, "predicts", False),
        "model",
        "a patched language model with its head: diagnostics read how routes change the tokens "
        "that it predicts",
        type(router.model).__name__,
        "of torch modules and models without a head read statistics() and kl() after a pass",
    )
    require(
        router.causal or hasattr(held_out, "mask_token"),
        "held_out",
        "text with hidden tokens (MaskedStream, what fit() of an encoder holds out)",
        type(held_out).__name__,
    )
    program, guide = router.program()
    config = Config(
        model=router.config,
        prior=router.settings.prior,
        data=DataConfig(corpus=name, context=context, eval_tokens=tokens),
        train=TrainConfig(batch_size=1),
    )
    return FittedRun(
        Path(path),
        config,
        router,
        router.prior,
        program,
        guide,
        router.kl_weight,
        own_tokeniser=tokeniser,
        held_out=held_out,
        patched=True,
        causal=router.causal,
    )
