"""A fitted model end to end.

Prefill and decoding on real text by its own hard routes, against every token on full attention.

The model is the same, the variants take turns. Variants:

    routed          the model as it is deployed: HARD, its controllers included
    force full      the same call with force="full": controllers and the states of other experts
                    are still computed
    full ...        the network alone, every token on full, no controller, nothing kept for other
                    experts: the leanest rival
    graph ...       a prefill or a decoding step replayed from a CUDA graph

Costs in the rows are those of the routes that were executed, each token at its own position:
`cost_flops` and `cost_bytes` of attention, `model_flops` and `model_bytes` of the whole model, over
the leanest rival's; `model_mflops`, `model_mbytes` a token.

Prefill is one pass over the prompt, logits of the last token. Decoding reads STEPS real tokens
after it, one at a time.
"""

import multiprocessing
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_router.attention.cost import Mode, cost_ratios, executed_attention
from bayes_router.benchmark import memory
from bayes_router.benchmark.cases import baselines
from bayes_router.benchmark.clock import Clock, Thunk, captured
from bayes_router.benchmark.decoder import STEPS, Decoder, lean_network, only_expert
from bayes_router.checks import require
from bayes_router.config import Config
from bayes_router.data.tokens import TokenSource
from bayes_router.timing import Timing
from bayes_router.transformer.cost import executed_model, model_experts
from bayes_router.transformer.model import RoutedLanguageModel
from bayes_router.types import CostModel, RoutingMode

TURNS, SECONDS = 5, 6.0  # of decoding: turns at most, and seconds after which no further one begins
BATCHES = {"cpu": (1, 4), "cuda": (1, 16)}  # of decoding
Row = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured: a model in evaluation mode on its device, its settings, and text."""

    name: str
    config: Config
    model: RoutedLanguageModel
    text: TokenSource

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def tokens(self, batch: int, length: int) -> Tensor:
        """Real text, int64 [batch, length], always the same.

        Raises:
            ValueError: the text is shorter.
        """
        return self.text.batch(0, batch, length, seed=0).tokens.to(self.device)


@torch.no_grad()
def measure(subject: Subject, lengths: Sequence[int]) -> Iterator[Row]:
    """Rows of prefill and decoding at each length."""
    experts = list(subject.config.model.experts)
    require(
        "full" in experts,
        "run",
        "a model with the expert full",
        experts,
        "there is nothing to compare with",
    )
    for length in lengths:
        require(length >= 1, "lengths", "at least 1 token", length)
        yield from _prefill(subject, length)
        for batch in BATCHES["cuda" if subject.device.type == "cuda" else "cpu"]:
            yield from _decode(subject, batch, length)


def note_on_context(subject: Subject, lengths: Sequence[int]) -> str:
    """What a reader must know about lengths beyond those of training; empty if there are none."""
    context = subject.config.data.context
    beyond = [length for length in lengths if length > context]
    if not beyond:
        return ""
    return (
        f"{subject.name} was made for {context} tokens: at {', '.join(map(str, beyond))} its "
        f"rotary positions work, but its "
        "routes and losses there are beyond what it was trained on; times are those of the routes "
        "that it takes"
    )


def _prefill(subject: Subject, length: int) -> Iterator[Row]:
    model, tokens, device = subject.model, subject.tokens(1, length), subject.device
    calls, problems = prefills(model, tokens), {}
    if device.type == "cuda":
        for name in [name for name in calls if name != "force full"]:
            try:
                calls[f"graph {name}"] = captured(calls[name])
            except RuntimeError as error:
                problems[name] = str(error).splitlines()[0]
    times = Clock(device, 2.0 if device.type == "cuda" else 4.0)(calls)
    facts = _routes(subject, model(tokens, RoutingMode.HARD, last_only=True).route, Mode.PREFILL)
    for row in _compared(times, what="prefill", B=1, T=length, tokens=length):
        known = memory.measurable(device) and not row["variant"].startswith("graph")
        row["peak_mib"] = _peak(subject, tokens, row["variant"]) / 2**20 if known else None
        yield {
            **row,
            **(facts if row["variant"] == "routed" else {}),
            "problem": problems.get(row["variant"]),
        }


def prefills(model: RoutedLanguageModel, tokens: Tensor) -> dict[str, Thunk]:
    """One pass over tokens [B, T] by each variant: logits [B, 1, V]."""
    lean = lean_network(model)

    def alone(kernel: SDPBackend | None) -> Tensor:
        with sdpa_kernel(kernel) if kernel else nullcontext():
            logits: Tensor = lean(tokens, only_expert, last_only=True)
        return logits

    calls: dict[str, Thunk] = {
        "routed": partial(model, tokens, RoutingMode.HARD, last_only=True),
        "force full": partial(model, tokens, RoutingMode.HARD, force="full", last_only=True),
    }
    calls |= {name: partial(alone, kernel) for name, kernel in baselines(tokens.device).items()}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


def _peak(subject: Subject, tokens: Tensor, variant: str) -> int:
    """Peak bytes of a prefill beyond the model's.

    On a CPU in a process of its own, code loaded by a short pass.
    """
    if subject.device.type == "cuda":
        return memory.peak_of(prefills(subject.model, tokens)[variant], subject.device)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_peak_alone, subject.model, tokens, variant).result()


def _peak_alone(model: RoutedLanguageModel, tokens: Tensor, variant: str) -> int:
    prefills(model, tokens[:, : memory.WARM])[variant]()
    return memory.peak_of(prefills(model, tokens)[variant], tokens.device)


def _decode(subject: Subject, batch: int, length: int) -> Iterator[Row]:
    text = subject.tokens(batch, length + STEPS)
    prompt, following = text[:, :length], text[:, length:]
    decoders = {"routed": Decoder(subject.model, prompt, following, None)}
    decoders["force full"] = Decoder(subject.model, prompt, following, "full")
    decoders["full"] = Decoder(subject.model, prompt, following, "alone")
    problems = {}
    if subject.device.type == "cuda":
        for name in ("routed", "full"):
            try:
                decoders[f"graph {name}"] = decoders[name].as_graph()
            except (RuntimeError, ValueError) as error:
                problems[name] = str(error).splitlines()[0]
    turns = _turns(decoders, subject.device)
    times = {
        name: Timing(*(2 * [statistics.median(turn[name] for turn in turns)])) for name in decoders
    }
    facts = _routes(subject, decoders["routed"].routes(), Mode.DECODE, length)
    for row in _compared(times, what="decode", B=batch, T=length, tokens=STEPS * batch):
        decoder = decoders[row["variant"]]
        row["cache_mib"] = decoder.cache.bytes / 2**20
        yield {
            **row,
            **(facts if row["variant"] == "routed" else {}),
            "problem": problems.get(row["variant"]),
        }


def _turns(decoders: dict[str, "Decoder"], device: torch.device) -> list[dict[str, float]]:
    """Milliseconds of each decoder in every turn but the first, which loads and compiles."""
    for decoder in decoders.values():
        decoder.turn(device)
    turns: list[dict[str, float]] = []
    start = time.perf_counter()
    while not turns or (len(turns) < TURNS and time.perf_counter() - start < SECONDS):
        turns.append({name: decoder.turn(device) for name, decoder in decoders.items()})
    return turns


def _routes(subject: Subject, route: Tensor, mode: Mode, start: int = 0) -> Row:
    """Load of each expert and costs executed, means over layers and tokens.

    route [L, B, T, R] of positions start and on.
    """
    model, experts = subject.model, model_experts(subject.model)
    names, (heads, size) = (
        model.config.experts,
        (model.config.kv_heads, model.network.embed.weight.element_size()),
    )
    taken = F.one_hot(route.cpu(), len(names)).sum((0, 1, 3))  # [T, E]
    keys = torch.tensor([expert.keys_read(start + route.shape[2]) for expert in experts])
    # units that read the same key heads
    shared = route.cpu().unflatten(-1, (-1, max(route.shape[3] // heads, 1)))
    most = shared.gather(-1, keys[shared].argmax(-1, keepdim=True))
    read = F.one_hot(most.flatten(), len(names)).sum(0)
    load = taken.sum(0).double() / taken.sum()
    facts: Row = {f"load_{name}": float(share) for name, share in zip(names, load, strict=True)}
    facts["cost_paper"] = float(load @ cost_ratios(experts, CostModel.PAPER, 1).double())
    attention = executed_attention(experts, taken, heads, size, mode, start, read=read)
    whole = executed_model(
        model, taken, mode, start=start, batch=route.shape[1], last_only=True, read=read
    )
    return (
        facts
        | {f"cost_{key}": x for key, x in attention.items()}
        | {f"model_{key}": x for key, x in whole.items()}
    )


def _compared(times: dict[str, Timing], tokens: int, **facts: Any) -> Iterator[Row]:
    """One row a variant, with its speed-up over the fastest rival of its kind.

    Graphs over graphs.
    """
    for name, (ms, wall_ms) in times.items():
        graph = name.startswith("graph")
        rivals = [
            t
            for other, t in times.items()
            if other.startswith("graph") == graph and "full" in other
        ]
        speedup = min(t.ms for t in rivals) / ms if rivals else None
        yield {
            **facts,
            "variant": name,
            "ms": ms,
            "wall_ms": wall_ms,
            "tokens_per_s": 1e3 * tokens / ms,
            "speedup": speedup,
        }
