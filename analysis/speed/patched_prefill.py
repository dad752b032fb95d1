"""Texts read by a patched model and by the model that it patches, for `analysis.speed.patched`."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import LlamaForCausalLM

from analysis.speed.patched_model import (
    SHAPES,
    VOCABULARY,
    biases,
    executing,
    read_routes,
    routed,
    send,
    stand,
)
from analysis.speed.patched_turns import Models, Timed, Turns, nothing, only, replayed, whole
from bayes_router.integrations.calls.fused_router import FULL_UP_TO
from bayes_router.integrations.huggingface.graphs import Graphs, without_mask

SHORT_TURNS = 25
"""Of what the host decides."""
LONG = 65_536
"""Tokens from which flash attention, slower than cuDNN's at every length, is not read."""


def read(what: Any, tokens: Tensor, backend: SDPBackend | None = None) -> object:
    """A text, from launch to launch."""
    with only(backend):
        return what(tokens, use_cache=True, logits_to_keep=1)


def read_causal(what: Any, model: LlamaForCausalLM, tokens: Tensor) -> object:
    """A text by a compiled model: transformers writes a mask out where it is traced."""
    with without_mask(model):
        return what(tokens, use_cache=True, logits_to_keep=1)


def text(bench: Turns, facts: dict[str, Any]) -> Tensor:
    """Tokens at random, the same for all."""
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCABULARY, (1, facts["context"]), generator=generator)
    return tokens.to(bench.device)


def ways(
    model: LlamaForCausalLM, tokens: Tensor, name: str, on_full: float,
    prepare: Callable[[], object] = nothing, called: bool = True,
) -> dict[str, Timed]:  # fmt: skip
    """A model replayed from a graph and, where that is asked, as it is `called`."""
    length = tokens.shape[1]
    graphs = Graphs(model, length, bucket=length)  # reads biases where they are
    found = {name: Timed(on_full, partial(read, model, tokens), prepare)} if called else {}
    return found | {f"{name}, graph": Timed(on_full, partial(graphs.prefill, tokens), prepare)}


def prefill(bench: Turns, models: Models, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """One text of one length, every share of tokens on full."""
    (plain, model), unit, length = models, facts["unit"], facts["context"]
    router, tokens = routed(model, unit), text(bench, facts)
    contenders = ways(plain, tokens, "unpatched", 1.0)
    if length < LONG:
        flash = partial(read, plain, tokens, SDPBackend.FLASH_ATTENTION)
        contenders["unpatched, flash"] = Timed(1.0, flash)
    for share in args.shares if unit == args.units[0] else args.shares[1:2]:
        executed = send(router, share, partial(read, model, tokens))
        prepare = partial(stand, router, [bias.clone() for bias in biases(router)], 0)
        called = share == args.shares[:2][-1]
        contenders |= ways(model, tokens, f"routed {share:g}", executed, prepare, called)
    if length <= FULL_UP_TO:
        kept = [bias.clone() for bias in biases(router)]
        prepare = partial(stand, router, kept, FULL_UP_TO)
        contenders |= ways(model, tokens, "as shipped", 1.0, prepare)
    routes = fitted_routes(args.routes, facts["shape"], unit, length)
    if routes is not None:
        router.full_up_to = 0
        graphs = Graphs(model, length, bucket=length)
        with executing(router, routes.to(bench.device)) as choices:
            graphs.prefill(tokens)
        contenders["routed as fitted, graph"] = Timed(
            float(routes.float().mean()), partial(holding, choices, graphs, tokens)
        )
    bench.group(facts, contenders)
    router.unpatch()


def compiled(bench: Turns, models: Models, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """Both models by torch.compile, as they are called and captured in a graph by hand."""
    (plain, model), tokens = models, text(bench, facts)
    router = routed(model, facts["unit"])
    executed = send(router, 0.1, partial(read, model, tokens))
    contenders = {}
    for one, name, on_full in ((plain, "unpatched", 1.0), (model, "routed 0.1", executed)):
        call = partial(read_causal, whole(one), one, tokens)
        graphs = Graphs(one, tokens.shape[1], bucket=tokens.shape[1])
        contenders[f"{name}, graph"] = Timed(on_full, partial(graphs.prefill, tokens))
        contenders[f"{name}, compiled"] = Timed(on_full, call)
        contenders[f"{name}, compiled, graph"] = Timed(on_full, replayed(call))
    bench.group(facts, contenders)
    router.unpatch()


def setting(bench: Turns, models: Models, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """The model called as ever, with `graphs` on."""
    (plain, model), tokens = models, text(bench, facts)
    router = routed(model, facts["unit"])
    executed = send(router, 0.1, partial(read, model, tokens))
    router.graphs = True
    graphs = Graphs(plain, tokens.shape[1], bucket=tokens.shape[1])
    contenders = {
        "unpatched": Timed(1.0, partial(read, plain, tokens)),
        "unpatched, graph": Timed(1.0, partial(graphs.prefill, tokens)),
        "routed 0.1, graphs=True": Timed(executed, partial(read, model, tokens)),
    }
    bench.group(facts, contenders, turns=SHORT_TURNS)
    assert router.last.replayed, router.last.as_called
    router.unpatch()


def called(bench: Turns, models: Models, facts: dict[str, Any], args: argparse.Namespace) -> None:
    """A text that a patch leaves to `full`, as both models are called."""
    (plain, model), tokens = models, text(bench, facts)
    router = routed(model, facts["unit"])
    router.full_up_to = FULL_UP_TO
    contenders = {
        "unpatched": Timed(1.0, partial(read, plain, tokens)),
        "as shipped": Timed(1.0, partial(read, model, tokens)),
    }
    bench.group(facts, contenders, turns=SHORT_TURNS)
    router.unpatch()


def holding(read: Tensor, graphs: Graphs, tokens: Tensor) -> object:
    """A replay of a graph that reads a tensor of nobody else's."""
    return graphs.prefill(tokens)


def fitted_routes(path: Path, shape: str, unit: str, length: int) -> Tensor | None:
    """Those of a fitted patch, if the file has some of this shape: bool [L, T, R]."""
    if unit != "head" or not path.exists():
        return None
    routes, (_, _, depth, heads, _) = read_routes(path), SHAPES[shape]
    return routes if routes.shape == (depth, length, heads) else None
