"""Reading a fitted model on held-out text: every mode executed, every figure per layer."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_router.attention.cost import Mode, cost_ratios, executed_attention
from bayes_router.checks import require
from bayes_router.data.tokens import Batch, TokenSource
from bayes_router.routing.information import ByToken
from bayes_router.routing.policy import Policy
from bayes_router.routing.posterior import categorical_entropy, expected_entropy, posterior_mean
from bayes_router.routing.tilt import tilted_kl, tilted_moments
from bayes_router.transformer.cost import executed_model
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.transformer.nll import token_nll
from bayes_router.types import IGNORED, CostModel, RoutingMode

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Evaluation:
    """What a fitted model does on held-out text.

    Losses, entropies and information in nats; lists are per layer.

    `executed_cost` weighs the ratios of single experts by their load, whatever the cost model;
    studies compare by it. `executed` counts the FLOPs and bytes of the same routes, every token on
    full = 1: each token at its own position, every token entering every linear state. Its keys:
    `attention_prefill`, of a causal pass; `attention_decode`, of a step with this load that
    completes the context; `model_prefill` and `model_decode`, of the whole model, with `mflops` and
    `mbytes`, 10^6 a token.
    """

    tokens: int  # scored
    experts: list[str]
    nll: dict[str, float]  # mean, sample, hard: nats per scored token, the route executed
    accuracy: float  # share of scored tokens that HARD predicts
    # nats per token, as the objective's: the nll of SAMPLE spread over all tokens, and the KL at
    # weight 1
    elbo: float
    gap: float  # nll hard - nll mean
    # of the routes executed under HARD, by cost model: load times each expert's own ratio
    executed_cost: dict[str, float]
    executed: dict[str, dict[str, float]]  # the same routes counted, see the class
    load_per_layer: list[list[float]]  # HARD; this and the next are means over units
    kl_per_layer: list[float]  # summed over units
    route_information_per_layer: list[float]
    entropy_of_mean_per_layer: list[float]
    expected_entropy_per_layer: list[float]
    total_concentration_per_layer: list[float]
    load_per_unit: list[list[list[float]]] = field(default_factory=list)  # [L][R][E], HARD
    route_information_per_unit: list[list[float]] = field(default_factory=list)  # [L][R]
    # what of the route information the token at hand does not tell, see `routing.information`
    context_information_per_layer: list[float] = field(default_factory=list)
    context_information_per_unit: list[list[float]] = field(default_factory=list)  # [L][R]

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def layers(self) -> "pd.DataFrame":
        """One row a layer."""
        import pandas as pd

        frame = pd.DataFrame(self.load_per_layer, columns=[f"load {name}" for name in self.experts])
        frame["route information"] = self.route_information_per_layer
        if self.context_information_per_layer:
            frame["of context"] = self.context_information_per_layer
        frame["entropy of mean"] = self.entropy_of_mean_per_layer
        frame["expected entropy"] = self.expected_entropy_per_layer
        frame["KL"] = self.kl_per_layer
        frame["total concentration"] = self.total_concentration_per_layer
        frame.index.name = "layer"
        return frame

    def table(self) -> str:
        """The whole evaluation as text."""
        nll, cost = self.nll, self.executed_cost
        costs = ", ".join(f"{name} {value:.3f}" for name, value in cost.items())
        return (
            f"held-out nll, nats per token ({self.tokens:,} tokens): "
            f"MEAN {nll['mean']:.4f}  SAMPLE {nll['sample']:.4f}  HARD {nll['hard']:.4f}  (gap "
            f"{self.gap:+.4f})\n"
            f"ELBO {self.elbo:.4f}   attention cost of the executed route, full = 1: {costs}\n"
            f"{self._counted()}\n"
            f"{self.layers().to_string(float_format=lambda x: f'{x:.3f}')}"
        )

    def _counted(self) -> str:
        """`executed` as a line."""
        words = []
        for what in ("attention", "model"):
            if f"{what}_prefill" in self.executed:
                whole, step = self.executed[f"{what}_prefill"], self.executed[f"{what}_decode"]
                amount = f" ({whole['mflops']:.3g} MFLOP a token)" if "mflops" in whole else ""
                words.append(
                    f"{what} FLOPs {whole['flops']:.3f}{amount}, decoding {step['flops']:.3f}, "
                    f"bytes {step['bytes']:.3f}"
                )
        return f"counted with every state, full = 1: {'; '.join(words)}"


class _Prior:
    """What KL is measured from, in float64.

    Dirichlet([L, E] or [L, R, E]), tilted by [E], [L, E] or [L, R, E] nats per unit of weight if at
    all.
    """

    def __init__(self, concentration: Tensor, tilt: Tensor | None):
        concentration = concentration if concentration.dim() == 3 else concentration[:, None]
        self.concentration = concentration.to("cpu", torch.float64)  # [L, R or 1, E]
        self.tilt = torch.zeros(self.concentration.shape[-1]) if tilt is None else tilt.cpu()
        tilt = self.tilt.double()
        self.tilt = tilt[:, None] if tilt.dim() == 2 else tilt  # [E], or [L, R or 1, E]
        # [L, R or 1]
        self.log_normaliser = tilted_moments(self.concentration, self.tilt).log_normaliser

    def to(self, device: torch.device) -> "_Prior":
        """Moved there."""
        self.concentration, self.tilt = self.concentration.to(device), self.tilt.to(device)
        self.log_normaliser = self.log_normaliser.to(device)
        return self

    def kl(self, concentration: Tensor) -> Tensor:
        """KL(Dirichlet(concentration [L, N, R, E]) || prior), [L, N], summed over units."""
        return tilted_kl(
            concentration,
            self.concentration[:, None],
            self.tilt[:, None] if self.tilt.dim() == 3 else self.tilt,
            self.log_normaliser[:, None],
        ).sum(-1)


@dataclass
class _Sums:
    """Sums over tokens; everything is divided once, at the end."""

    scored: int = 0
    seen: int = 0
    correct: int = 0
    nll: dict[str, float] = field(default_factory=lambda: {mode.value: 0.0 for mode in RoutingMode})
    taken: Tensor | float = 0.0  # [L, T, R, E], tokens at each position
    read: Tensor | float = 0.0  # [E], key heads by the most that one of their query heads reads
    mean: Tensor | float = 0.0  # [L, R, E]
    entropy_of_mean: Tensor | float = 0.0  # [L, R]
    expected_entropy: Tensor | float = 0.0  # [L, R]
    total: Tensor | float = 0.0  # [L, R]
    kl: Tensor | float = 0.0  # [L]
    by_token: ByToken = field(default_factory=ByToken)

    def add_routes(
        self,
        tokens: Tensor,
        concentration: Tensor,
        hard_choice: Tensor,
        keys_read: Tensor,
        sharing: int,
    ) -> None:
        """Tokens [B, T], concentration [L, B, T, R, E], the choices executed [L, B, T, R].

        `keys_read` [E] by a decoding step; `sharing` neighbouring units read the same key heads.
        """
        flat = concentration.flatten(1, 2).double()  # [L, N, R, E]
        mean = posterior_mean(flat)
        self.taken = self.taken + F.one_hot(hard_choice, flat.shape[-1]).double().sum(1)
        # [L, B, T, units that read apart, sharing]
        shared = hard_choice.unflatten(-1, (-1, sharing))
        most = shared.gather(-1, keys_read[shared].argmax(-1, keepdim=True))
        self.read = self.read + F.one_hot(most.flatten(), flat.shape[-1]).double().sum(0)
        self.mean = self.mean + mean.sum(1)
        self.by_token.add(tokens, mean.movedim(1, -2))
        self.entropy_of_mean = self.entropy_of_mean + categorical_entropy(mean).sum(1)
        self.expected_entropy = self.expected_entropy + expected_entropy(flat).sum(1)
        self.total = self.total + flat.sum((1, 3))
        self.seen += flat.shape[1]


@torch.no_grad()
def evaluate(
    model: RoutedLanguageModel,
    source: TokenSource,
    prior_concentration: Tensor,
    *,
    context: int,
    batch_size: int,
    limit: int | None = None,
    prior_tilt: Tensor | None = None,
    policy: Policy | None = None,
    costs: Sequence[CostModel] = (CostModel.PAPER, CostModel.FLOPS),
    seed: int = 0,
    prior_price: Tensor | None = None,
) -> Evaluation:
    """Read `model` on windows of `context` tokens under MEAN, SAMPLE and HARD.

    Its mode (train, eval) is kept.

    Args:
        model: the fitted model.
        source: held-out data.
        prior_concentration: [L, E] or [L, R, E], of the prior that KL is measured from.
        prior_tilt: [E], [L, E] or [L, R, E], nats per unit of weight by which it is tilted (price x
            cost ratio); none by default.
        context: tokens of a window; the first tokens of each have little to go by.
        batch_size: windows at a time.
        limit: read at most this many tokens.
        policy: of HARD; the model's by default.
        costs: the cost models to report.
        seed: of the draws of SAMPLE; the generator of the caller is left as it was.
        prior_price: the name of `prior_tilt` before; it is served with a FutureWarning.
    """
    if prior_price is not None:
        said = "evaluate(prior_price=...): the argument is called prior_tilt now"
        warnings.warn(said, FutureWarning, stacklevel=2)
        prior_tilt = prior_price
    kind, fix = type(source).__name__, "load_data(config)[1].valid is one"
    require(hasattr(source, "windows"), "source", "tokens with `windows`", kind, fix)
    device = next(model.parameters()).device
    prior = _Prior(prior_concentration, prior_tilt).to(device)
    sums, was_training, usual = _Sums(), model.training, model.policy
    model.eval()
    model.policy = policy or usual
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            for batch in source.windows(context, batch_size, limit):
                _read(model, Batch(*(x.to(device) for x in batch)), prior, sums, context)
    finally:
        model.train(was_training)
        model.policy = usual
    return _finish(model, sums, context, costs)


def _read(
    model: RoutedLanguageModel, batch: Batch, prior: "_Prior", sums: _Sums, context: int
) -> None:
    scored = batch.targets != IGNORED
    for mode in RoutingMode:
        out = model(batch.tokens, mode)
        sums.nll[mode.value] += float(token_nll(out.logits, batch.targets).double().sum())
        if mode is RoutingMode.SAMPLE:
            sums.kl = sums.kl + prior.kl(out.concentration.flatten(1, 2).double()).sum(1)
        if mode is RoutingMode.HARD:
            keys = torch.tensor(
                [expert.keys_read(context) for expert in model.counted_experts],
                device=out.route.device,
            )
            sharing = max(model.config.num_units // model.config.kv_heads, 1)
            sums.add_routes(batch.tokens, out.concentration, out.route, keys, sharing)
            sums.correct += int(((out.logits.argmax(-1) == batch.targets) & scored).sum())
    sums.scored += int(scored.sum())


def _finish(
    model: RoutedLanguageModel, sums: _Sums, context: int, costs: Sequence[CostModel]
) -> Evaluation:
    n = sums.seen
    assert (
        isinstance(sums.taken, Tensor)
        and isinstance(sums.mean, Tensor)
        and isinstance(sums.kl, Tensor)
    )
    assert isinstance(sums.entropy_of_mean, Tensor)
    experts = model.counted_experts
    of_units, mean, kl = (x.cpu() / n for x in (sums.taken.sum(1), sums.mean, sums.kl))
    information = categorical_entropy(mean) - sums.entropy_of_mean.cpu() / n  # [L, R]
    of_context = (sums.by_token.entropy() - sums.entropy_of_mean.cpu() / n).clamp_min(0.0)
    load = of_units.mean(1)
    nll = {mode: total / sums.scored for mode, total in sums.nll.items()}
    return Evaluation(
        tokens=sums.scored,
        experts=list(model.config.experts),
        nll=nll,
        accuracy=sums.correct / sums.scored,
        elbo=-(sums.nll["sample"] / n + float(kl.sum())),
        gap=nll["hard"] - nll["mean"],
        executed_cost={
            c.value: float((load @ cost_ratios(experts, c, context).double()).mean()) for c in costs
        },
        executed=_executed(model, sums.taken.sum((0, 2)).cpu(), sums.read.cpu()),  # type: ignore[union-attr]
        load_per_layer=load.tolist(),
        kl_per_layer=kl.tolist(),
        route_information_per_layer=information.mean(1).tolist(),
        entropy_of_mean_per_layer=(sums.entropy_of_mean / n).mean(1).tolist(),
        expected_entropy_per_layer=(sums.expected_entropy / n).mean(1).tolist(),  # type: ignore[union-attr]
        total_concentration_per_layer=(sums.total / n).mean(1).tolist(),  # type: ignore[union-attr]
        load_per_unit=of_units.tolist(),
        route_information_per_unit=information.tolist(),
        context_information_per_layer=of_context.mean(1).tolist(),
        context_information_per_unit=of_context.tolist(),
    )


def _executed(
    model: RoutedLanguageModel, taken: Tensor, read: Tensor
) -> dict[str, dict[str, float]]:
    """Of hard routes, [T, E] units of all layers at each position on each expert.

    See `Evaluation.executed`.

    `read` [E] counts key heads by the most that one of their query heads reads.
    """
    experts, heads, size = (
        model.counted_experts,
        model.config.kv_heads,
        next(model.parameters()).element_size(),
    )
    step = taken.sum(0, keepdim=True)
    found = {}
    for mode, routes, start in ((Mode.PREFILL, taken, 0), (Mode.DECODE, step, len(taken) - 1)):
        found[f"attention_{mode.value}"] = executed_attention(
            experts, routes, heads, size, mode, start, read=read
        )
        if isinstance(model, RoutedLanguageModel):  # of a patched model only the attention is known
            found[f"model_{mode.value}"] = executed_model(
                model, routes, mode, start=start, read=read
            )
    return found
