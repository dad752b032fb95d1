"""A fit, put together again: the model, its prior at the end of training, and the Pyro pair of program and guide.

Of a run folder (`load_fitted`) or of a patched pretrained model (`fitted_patch`): diagnostics read both alike.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import functional as F

from bayes_router.checks import require
from bayes_router.config import Config, DataConfig, TrainConfig
from bayes_router.data.tokenisers import Tokeniser, load_tokeniser
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.inference.guide import RoutingGuide
from bayes_router.inference.model import RoutingModel
from bayes_router.routing.prior import ComputeAwarePrior
from bayes_router.routing.schedule import Schedule
from bayes_router.training.checkpoint import WEIGHTS, load_run, require_file
from bayes_router.transformer.layer import build_prior
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import IGNORED, RoutingMode

PATCH_TOKENS = 8192  # of held-out text that diagnostics of a patched model read


@dataclass(frozen=True)
class FittedRun:
    """What diagnostics of a run read."""

    path: Path
    config: Config
    model: RoutedLanguageModel
    prior: ComputeAwarePrior
    program: RoutingModel  # under the objective of the last step
    guide: RoutingGuide
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
        """None where the tokens are no text (recall), or a patched model came without its tokenizer."""
        if self.patched:
            return self.own_tokeniser
        return None if self.config.data.corpus == "recall" else load_tokeniser(self.config.data.tokeniser)


def load_fitted(run: Path | str, device: str = "cpu") -> FittedRun:
    """Read a run folder.

    Raises:
        ValueError: a file is missing or damaged, or the weights hold no controller: there is no posterior to look at.
    """
    run = Path(run)
    weights = require_file(run, WEIGHTS)
    try:
        with safe_open(weights, framework="pt") as file:
            guided = any(name.startswith("controller.") for name in file.keys())  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{weights}: expected the weights of a run; the file is damaged: {error}") from error
    require(guided, "run", f"a fitted guide (weights controller.* in {WEIGHTS})", str(run), "fit it with `bayes-router fit`")
    config, model = load_run(run, device)
    program, guide, prior = build_program(config, model)
    return FittedRun(run, config, model, prior, program, guide)


def build_program(config: Config, model: RoutedLanguageModel) -> tuple[RoutingModel, RoutingGuide, ComputeAwarePrior]:
    """Program and guide of a model, under the prior and KL weight of the last training step."""
    prior = build_prior(config.prior, config.model, config.model.num_layers, config.data.context)
    schedule = Schedule(config.schedule, prior, config.train.steps, config.model.experts, config.prior.price)
    end = schedule.at(config.train.steps - 1)
    cost_ratio = prior.cost_ratio.to(next(model.parameters()).device)
    program = RoutingModel(model.network, end.concentration, cost_ratio, end.kl_weight, end.price)
    program.straight_through = end.straight_through
    return program, RoutingGuide(program, model.controller), prior


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
        router: what `bayes_router.patch` or `load_patch` returned, of a model with a language-modelling head, a masked one
            for an encoder.
        held_out: text that `fit` did not read; for an encoder with tokens hidden, as `fit` holds it out.
        context: tokens of a window of it.
        tokeniser: the model's; without one, token ids are shown and diagnostics that need text are left out.
        path: folder of the patch, for the heading.
        name: of the text, for the heading.
        tokens: read at most.

    Raises:
        ValueError: a model that does not predict tokens, or text for an encoder with none hidden.
    """
    require(
        getattr(router, "predicts", False),
        "model",
        "a patched language model with its head: diagnostics read how routes change the tokens that it predicts",
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
    return FittedRun(Path(path), config, router, router.prior, program, guide, tokeniser, held_out, True, router.causal)


class Reading(NamedTuple):
    """A batch of windows as a model read them."""

    tokens: Tensor  # int64 [B, T]
    targets: Tensor  # int64 [B, T], -100 is not scored
    nll: Tensor  # [B, T], nats of the targets; 0 where not scored
    concentration: Tensor  # float32 [L, B, T, E]
    hard_choice: Tensor  # int64 [L, B, T], what the model's policy takes given that path

    def own_nll(self, causal: bool = True) -> Tensor:
        """[B, T], nats of each token itself, nan where it was not predicted: said a token before, or where it was hidden."""
        nll = self.nll.masked_fill(self.targets == IGNORED, torch.nan)
        return torch.cat([torch.full_like(nll[:, :1], torch.nan), nll[:, :-1]], 1) if causal else nll


@torch.no_grad()
def read(model: RoutedLanguageModel, batches: Iterator[Batch], mode: RoutingMode = RoutingMode.HARD) -> Iterator[Reading]:
    """Run `model` over batches one at a time; nothing is kept between them.

    The posterior of a layer depends on the routes executed below it, so `mode` says along which path it is read: HARD is
    what is deployed.
    """
    device = next(model.parameters()).device
    for batch in batches:
        tokens, targets = (x.to(device) for x in batch)
        out = model(tokens, mode)
        nll = F.cross_entropy(out.logits.transpose(1, 2).float(), targets, reduction="none", ignore_index=IGNORED)
        choice = out.route if mode is RoutingMode.HARD else model.policy(out.concentration)
        yield Reading(tokens, targets, nll, out.concentration, choice)


def windows(source: TokenSource, config: Config, limit: int | None = None) -> Iterator[Batch]:
    """Windows of the run's context and batch size, at least one and at most `limit` tokens (the run's eval_tokens)."""
    context = config.data.context
    return source.windows(context, config.train.batch_size, max(limit or config.data.eval_tokens, context))


def text_windows(
    text: bytes, tokeniser: Tokeniser, context: int, limit: int | None = None, causal: bool = True
) -> Iterator[Batch]:
    """All of a text, window by window, the last one as short as it comes; every token is in exactly one.

    The last token of all has nothing to predict, so its target is not scored; for an encoder, from which nothing is hidden
    here, none is.

    Raises:
        ValueError: an empty text, or one that is not UTF-8.
    """
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: expected UTF-8; got an invalid byte at {error.start}; convert the file") from error
    ids = torch.from_numpy(tokeniser.encode(text).astype("int64"))[:limit]
    require(len(ids) > 0, "text", "at least one token", "an empty text", "name a file with text in it")
    targets = torch.cat([ids[1:], ids.new_tensor([IGNORED])]) if causal else torch.full_like(ids, IGNORED)
    pairs = zip(ids.split(context), targets.split(context), strict=True)
    return (Batch(part[None], target[None]) for part, target in pairs)


def pieces(ids: list[int], tokeniser: Tokeniser | None) -> list[str]:
    """What each token shows. A character that spans tokens is shown at its last; the tokens before it show nothing."""
    if tokeniser is None:
        return [f"{token} " for token in ids]
    shown, pending = [], []
    for token in ids:
        pending.append(token)
        text = tokeniser.decode(pending)
        whole = not text.endswith("\ufffd") or len(pending) > 3  # no character has more than 4 bytes
        shown.append(text if whole else "")
        pending = [] if whole else pending
    if pending:
        shown[-1] = tokeniser.decode(pending)
    return shown
