"""Is a patched model faster than the model that it patches, on a GPU?

Against the best that torch offers.

    python -m analysis.speed.patched --device cuda

Random weights, bfloat16, window 1024, 4 sinks, experts full and local: Llama's 1B shape with 8
layers, and SmolLM2-135M's with 30. Controllers have random weights, and biases that send a share of
the tokens to `full`; the share executed is a column. Before anything is timed, routed passes and
steps are compared with the same model on the CPU in float32; nothing is reported if one differs.

Contenders take turns; `ms` is a median, from an idle device to an idle device, launches included;
`ratio` is over the fastest unpatched contender's: torch's own choice of kernel, flash attention,
its choice replayed from a CUDA graph, and, at some lengths, compiled. A step of decoding is read
behind so many keys of random numbers; unpatched with flash attention on exactly these keys, which
are not copied, the same from a graph of this one length (nobody decodes so, it is the floor), and
with a static cache replayed from a graph. `routed as fitted` executes the routes that the patch of
`smollm2-135m` took on a text (`analysis.speed.recorded_routes`) at the cost of its router.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

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
from bayes_router.benchmark.rows import Rows
from bayes_router.integrations.huggingface.graphs import Graphs, without_mask
from bayes_router.timing import isolated_ms

RESULTS = Path(__file__).parents[1] / "results" / "patched_cuda.csv"
ROUTES = Path(__file__).parents[1] / "results" / "routes_smollm2_8192.npz"
SOME = (8192, 32_768)
"""Lengths that are read for every unit."""
TURNS = 5


@contextmanager
def only(backend: SDPBackend | None) -> Iterator[None]:
    """Torch's own choice, or one backend."""
    with ExitStack() as stack:
        if backend is not None:
            stack.enter_context(sdpa_kernel([backend]))
        yield


class Store(DynamicLayer):
    """Keys and values that a step writes into and does not copy.

    Every step is the one behind the first `length`.
    """

    def __init__(self, keys: Tensor, values: Tensor, length: int):
        super().__init__()
        self.keys, self.values, self.length = keys, values, length
        self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See `DynamicLayer`."""
        stop = self.length + 1
        self.keys[:, :, self.length : stop], self.values[:, :, self.length : stop] = (
            key_states,
            value_states,
        )
        return self.keys[:, :, :stop], self.values[:, :, :stop]

    def get_seq_length(self) -> int:
        """See `DynamicLayer`."""
        return self.length


def nothing() -> None:
    """No preparation."""


class Timed(NamedTuple):
    """The share of its tokens on full, what is timed, and what is done before, which is not."""

    on_full: float
    call: Callable[[], object]
    prepare: Callable[[], object] = nothing


class Turns:
    """Contenders that take turns, and the table."""

    def __init__(self, path: Path | None, turns: int, device: torch.device):
        facts = {"device": torch.cuda.get_device_name(device), "torch": torch.__version__}
        self.rows, self.turns, self.device = Rows(path, facts), turns, device

    def group(self, facts: dict[str, Any], contenders: dict[str, Timed]) -> None:
        """Time the contenders; a name that begins with `unpatched` is a rival."""
        able: dict[str, Callable[[], object]] = {}
        for name, contender in contenders.items():
            try:
                for _ in range(2):
                    contender.prepare()
                    contender.call()
                able[name] = contender.call
            except (torch.cuda.OutOfMemoryError, RuntimeError) as error:
                torch.cuda.empty_cache()
                print(f"{facts} {name}: left out, {str(error).splitlines()[0]}", flush=True)
        turns: list[dict[str, float]] = [{} for _ in range(self.turns)]
        for turn in turns:
            for name, call in able.items():
                contenders[name].prepare()
                turn[name] = isolated_ms(call, self.device)[1]
        ms = {name: statistics.median(turn[name] for turn in turns) for name in able}
        best = min((name for name in ms if name.startswith("unpatched")), key=ms.__getitem__)
        for name, value in ms.items():
            ratio = statistics.median(turn[name] / turn[best] for turn in turns)
            row = {
                **facts,
                "contender": name,
                "on_full": contenders[name].on_full,
                "ms": value,
                "ratio": ratio,
                "best": best,
            }
            self.rows.add(row)
            words = "  ".join(str(x) for x in facts.values())
            print(
                f"{words:58} {name:34} {row['on_full']:.2f} {value:9.2f} ms  {ratio:.3f}",
                flush=True,
            )


def read(what: Any, tokens: Tensor, backend: SDPBackend | None = None) -> object:
    """A text, from launch to launch."""
    with only(backend):
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
        found[f"{name}, compiled"] = Timed(on_full, partial(read, compiled, tokens), prepare)
    return found


def whole(model: LlamaForCausalLM) -> Any:
    """By torch.compile, without a break in its graph."""
    torch._dynamo.config.recompile_limit = 64
    return torch.compile(model, fullgraph=True, dynamic=False)


def prefill(bench: Turns, shape: str, args: argparse.Namespace) -> None:
    """Texts of each length, one at a time."""
    device, first = bench.device, args.units[0]
    plain, model = (build(shape).to(device, torch.bfloat16) for _ in range(2))
    generator = torch.Generator().manual_seed(2)
    text = torch.randint(VOCABULARY, (1, max(args.lengths)), generator=generator).to(device)
    for unit in args.units:
        router = routed(model, unit)
        for length in args.lengths:
            if unit != first and length not in SOME:
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
                with executing(router, routes.to(device)):
                    graphs.prefill(tokens)
                contenders["routed as fitted, graph"] = Timed(
                    float(routes.float().mean()), partial(graphs.prefill, tokens)
                )
            facts = {"what": "prefill", "shape": shape, "unit": unit}
            bench.group({**facts, "context": length, "batch": 1}, contenders)
            del contenders
            torch.cuda.empty_cache()
        router.unpatch()


def fitted_routes(path: Path, shape: str, unit: str, length: int) -> Tensor | None:
    """Those of a fitted patch, if the file has some of this shape: bool [L, T, R]."""
    if unit != "head" or not path.exists():
        return None
    routes, (_, _, depth, heads, _) = read_routes(path), SHAPES[shape]
    return routes if routes.shape == (depth, length, heads) else None


def decode(bench: Turns, shape: str, unit: str, context: int, batch: int, share: float) -> None:
    """One token for each of `batch` texts behind `context` keys."""
    device, room = bench.device, 64
    plain, model = build(shape).to(device, torch.bfloat16), build(shape).to(device, torch.bfloat16)
    router = routed(model, unit)
    ours = Graphs(model, context + room, batch)
    config = model.config
    like = torch.empty(
        batch,
        config.num_key_value_heads,
        1,
        config.hidden_size // config.num_attention_heads,
        device=device,
        dtype=torch.bfloat16,
    )
    rivals = Graphs(plain, context + room, batch)
    rivals.cache = ours.cache  # the same keys, and the same memory
    store = DynamicCache()
    for layer in ours.cache.layers:
        layer.lazy_initialization(like, like)
        layer.keys.normal_()
        layer.values.normal_()
        store.layers.append(Store(layer.keys, layer.values, context))
    token = torch.randint(VOCABULARY, (batch, 1), device=device)

    def again(graphs: Graphs) -> object:
        for layer in ours.cache.layers:
            layer.cumulative_length.fill_(context)
        graphs.length = context
        return graphs.step(token)

    def eager(what: LlamaForCausalLM, backend: SDPBackend | None = None) -> object:
        with only(backend):
            return what(token, past_key_values=store, use_cache=True)

    executed = send(router, share, partial(eager, model))
    with without_mask(plain):
        exactly = replayed(partial(eager, plain, SDPBackend.FLASH_ATTENTION))
    contenders = {
        "unpatched, flash, graph": Timed(1.0, exactly),
        "unpatched, flash": Timed(1.0, partial(eager, plain, SDPBackend.FLASH_ATTENTION)),
        "unpatched, static cache, graph": Timed(1.0, partial(again, rivals)),
        f"routed {share:g}": Timed(executed, partial(eager, model)),
        f"routed {share:g}, static cache, graph": Timed(executed, partial(again, ours)),
    }
    bench.group(
        {"what": "decode", "shape": shape, "unit": unit, "context": context, "batch": batch},
        contenders,
    )


def replayed(call: Callable[[], object]) -> Callable[[], object]:
    """The same from a CUDA graph: of a step, one that serves this number of keys alone."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


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
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    wrong = disagreements(args.device, args.units)
    if wrong:
        sys.exit("nothing is reported, these differ: " + "; ".join(wrong))
    bench = Turns(args.results, args.turns, args.device)
    for shape in args.shapes:
        if "prefill" in args.what:
            prefill(bench, shape, args)
        if "decode" in args.what and shape == args.shapes[0]:
            for batch in args.batches:
                for context in (8192, 32768) if batch == 1 else (32768,):
                    for unit in (args.units[0], args.units[-1]):
                        decode(bench, shape, unit, context, batch, 0.1)
                        torch.cuda.empty_cache()
    bench.rows.finish()


if __name__ == "__main__":
    main()
