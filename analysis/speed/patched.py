"""Is a patched model faster than the model that it patches, on a GPU?

Against the best that torch offers.

    python -m analysis.speed.patched --device cuda

Random weights, bfloat16, window 1024, 4 sinks, experts full and local: Llama's 1B shape with 8
layers, and SmolLM2-135M's with 30. Controllers have random weights, and biases that send a share of
the tokens to `full`; the share executed is a column. Before anything is timed, routed passes and
steps are compared with the same model on the CPU in float32; nothing is reported if one differs.

Contenders take turns; `ms` is a median, from an idle device to an idle device, launches included;
`ratio` is over the fastest unpatched contender's: torch's own choice of kernel, flash attention,
its choice replayed from a CUDA graph, and, at the lengths of --compiled, by torch.compile without a
mask written out. `graphs=True` is the model called as ever, under the setting of that name. A step
of decoding is read behind so many keys of random numbers; unpatched with flash attention on exactly
these keys, which are not copied, the same from a graph of this one length (nobody decodes so: it is
the floor, `floor` in the table, and no rival), and with a static cache replayed from a graph.
`routed as fitted` executes the routes that the patch of `smollm2-135m` took on a text
(`analysis.speed.recorded_routes`) at the cost of its router.

Options pick rows; --seconds begins no group of rows after so many, and names those left out.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend
from transformers import LlamaForCausalLM

from analysis.speed import patched_decode
from analysis.speed.patched_check import disagreements
from analysis.speed.patched_model import (
    SHAPES,
    VOCABULARY,
    biases,
    build,
    executing,
    read_routes,
    routed,
    send,
    stand,
)
from analysis.speed.patched_turns import Models, Timed, Turns, nothing, only
from bayes_router.integrations.huggingface.graphs import Graphs, without_mask
from bayes_router.integrations.huggingface.model import RoutedPretrained

RESULTS = Path(__file__).parents[1] / "results" / "patched_cuda.csv"
ROUTES = Path(__file__).parents[1] / "results" / "routes_smollm2_8192.npz"
SOME = (8192, 32_768)
"""Lengths that are read for every unit."""
TURNS = 5


def read(what: Any, tokens: Tensor, backend: SDPBackend | None = None) -> object:
    """A text, from launch to launch."""
    with only(backend):
        return what(tokens, use_cache=True, logits_to_keep=1)


def read_causal(what: Any, model: LlamaForCausalLM, tokens: Tensor) -> object:
    """A text by a compiled model: transformers writes a mask out where it is traced."""
    with without_mask(model):
        return what(tokens, use_cache=True, logits_to_keep=1)


def ways(
    model: LlamaForCausalLM, tokens: Tensor, name: str, on_full: float, compiled: Any = None,
    prepare: Callable[[], object] = nothing,
) -> dict[str, Timed]:  # fmt: skip
    """A model as it is called, replayed from a graph, and compiled if there is such a form."""
    length = tokens.shape[1]
    graphs = Graphs(model, length, bucket=length)  # reads biases where they are
    found = {
        name: Timed(on_full, partial(read, model, tokens), prepare),
        f"{name}, graph": Timed(on_full, partial(graphs.prefill, tokens), prepare),
    }
    if compiled is not None:
        call = partial(read_causal, compiled, model, tokens)
        found[f"{name}, compiled"] = Timed(on_full, call, prepare)
    return found


def whole(model: LlamaForCausalLM) -> Any:
    """By torch.compile, without a break in its graph."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, fullgraph=True, dynamic=False)


def prefill(bench: Turns, shape: str, models: Models, args: argparse.Namespace) -> None:
    """Texts of each length, one at a time."""
    device, first, (plain, model) = bench.device, args.units[0], models
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(VOCABULARY, (1, max(args.lengths)), generator=generator).to(device)
    for unit in args.units:
        router = routed(model, unit)
        for length in args.lengths:
            facts = {"what": "prefill", "shape": shape, "unit": unit, "context": length}
            if (unit != first and length not in SOME) or not bench.fits(**facts):
                continue
            tokens = text[:, :length]
            forms = [None, None]
            if unit == first and length in args.compiled and shape == args.shapes[0]:
                forms = [whole(plain), whole(model)]
            contenders = ways(plain, tokens, "unpatched", 1.0, forms[0])
            contenders["unpatched, flash"] = Timed(
                1.0, partial(read, plain, tokens, SDPBackend.FLASH_ATTENTION)
            )
            for share in args.shares if unit == first else args.shares[1:2]:
                router.full_up_to = 0
                executed = send(router, share, partial(read, model, tokens))
                prepare = partial(stand, router, [bias.clone() for bias in biases(router)], 0)
                contenders |= ways(model, tokens, f"routed {share:g}", executed, forms[1], prepare)
            if length <= type(router).full_up_to:
                kept = [bias.clone() for bias in biases(router)]
                prepare = partial(stand, router, kept, type(router).full_up_to)
                contenders |= ways(model, tokens, "as shipped", 1.0, forms[1], prepare)
            routes = fitted_routes(args.routes, shape, unit, length)
            if routes is not None:
                router.full_up_to = 0
                graphs = Graphs(model, length, bucket=length)
                with executing(router, routes.to(device)) as choices:
                    graphs.prefill(tokens)
                contenders["routed as fitted, graph"] = Timed(
                    float(routes.float().mean()), partial(holding, choices, graphs, tokens)
                )
            bench.group({**facts, "batch": 1}, contenders)
            del contenders
            torch.cuda.empty_cache()
            if length in SOME and 0.1 in args.shares:
                by_setting(bench, facts, models, router, tokens)
        router.unpatch()


def by_setting(
    bench: Turns, facts: dict[str, Any], models: Models, router: RoutedPretrained, tokens: Tensor
) -> None:
    """The model called as ever, with `graphs` on."""
    (plain, model), length = models, tokens.shape[1]
    router.full_up_to = 0
    executed = send(router, 0.1, partial(read, model, tokens))
    router.graphs = True
    contenders = {
        "unpatched": Timed(1.0, partial(read, plain, tokens)),
        "unpatched, graph": Timed(
            1.0, partial(Graphs(plain, length, bucket=length).prefill, tokens)
        ),
        "routed 0.1, graphs=True": Timed(executed, partial(read, model, tokens)),
    }
    bench.group({**facts, "batch": 1}, contenders)
    assert router.last.replayed, router.last.as_called
    router.graphs = False
    torch.cuda.empty_cache()


def holding(read: Tensor, graphs: Graphs, tokens: Tensor) -> object:
    """A replay of a graph that reads a tensor of nobody else's."""
    return graphs.prefill(tokens)


def fitted_routes(path: Path, shape: str, unit: str, length: int) -> Tensor | None:
    """Those of a fitted patch, if the file has some of this shape: bool [L, T, R]."""
    if unit != "head" or not path.exists():
        return None
    routes, (_, _, depth, heads, _) = read_routes(path), SHAPES[shape]
    return routes if routes.shape == (depth, length, heads) else None


@torch.no_grad()
def main() -> None:
    """Check, measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384, 32768, 65536]
    )
    parser.add_argument("--shares", type=float, nargs="+", default=[0.3, 0.1, 0.0])
    units = ["layer", "kv_head", "head"]
    parser.add_argument("--units", nargs="+", default=units, choices=units)
    parser.add_argument("--compiled", type=int, nargs="*", default=[8192])
    parser.add_argument("--routes", type=Path, default=ROUTES)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=list(SHAPES))
    parser.add_argument(
        "--what", nargs="+", default=["prefill", "decode"], choices=["prefill", "decode"]
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    wrong = disagreements(args.device, args.units)
    if wrong:
        sys.exit("nothing is reported, these differ: " + "; ".join(wrong))
    bench = Turns(args.results, args.turns, args.device, args.seconds)
    for shape in args.shapes:
        models = Models(*(build(shape, None, args.device, torch.bfloat16) for _ in range(2)))
        if "prefill" in args.what:
            prefill(bench, shape, models, args)
        if "decode" in args.what and shape == args.shapes[0]:
            for batch, unit in product(args.batches, args.units):
                for context in patched_decode.LENGTHS.get(batch, patched_decode.LONGEST):
                    facts = {"what": "decode", "shape": shape, "unit": unit}
                    facts |= {"context": context, "batch": batch}
                    if bench.fits(**facts):
                        patched_decode.decode(bench, models, facts, 0.1)
                    torch.cuda.empty_cache()
    bench.rows.finish()
    print(*(f"left out: {group}" for group in bench.left_out), sep="\n")


if __name__ == "__main__":
    main()
