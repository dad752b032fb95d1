"""Is a patched model faster than the model that it patches, on a GPU?

Against the best that torch offers.

    python -m analysis.speed.patched --device cuda

Random weights, bfloat16, window 1024, 4 sinks, experts full and local: Llama's 1B shape with 8
layers, and SmolLM2-135M's with 30. Controllers have random weights, and biases that send a share of
the tokens to `full`; the share executed is a column. Before anything is timed, routed passes and
steps are compared with the same model on the CPU in float32; nothing is reported if one differs.

Contenders take turns; `ms` is a median, from an idle device to an idle device, launches included;
`ratio` is over the fastest unpatched contender's: torch's own choice of kernel, flash attention,
and its choice replayed from a CUDA graph. A step of decoding is read behind so many keys of random
numbers; unpatched with flash attention on exactly these keys, which are not copied, and with a
static cache replayed from a graph.
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
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from bayes_router.benchmark.rows import Rows
from bayes_router.integrations.huggingface.graphs import Graphs
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import patch
from bayes_router.routing.controller import LayerController
from bayes_router.timing import isolated_ms

RESULTS = Path(__file__).parents[1] / "results" / "patched_cuda.csv"
WINDOW, SINKS, VOCABULARY = 1024, 4, 1024
SHAPES = {
    "llama-1b, 8 layers": (2048, 8192, 8, 32, 8),
    "smollm2-135m, 30 layers": (576, 1536, 30, 9, 3),
}
TURNS = 5


def build(shape: str, layers: int | None = None) -> LlamaForCausalLM:
    """Random weights, on the CPU, float32."""
    width, inner, depth, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=131_072,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


def routed(model: LlamaForCausalLM, unit: str) -> RoutedPretrained:
    """The model patched, with controllers of random weights; nothing is left to `full_up_to`."""
    router: RoutedPretrained = patch(
        model, window=WINDOW, sinks=SINKS, experts=("full", "local"), route_by=unit, context=32_768
    )
    router.full_up_to = 0
    torch.manual_seed(1)
    for layer in router.controller.layers:
        assert isinstance(layer, LayerController)
        layer.out.weight.data.normal_(std=0.5)
        layer.out.bias.data.zero_()
    return router


@torch.no_grad()
def send(router: RoutedPretrained, share: float, run: Callable[[], object]) -> float:
    """Move the biases until `share` of the tokens of `run()` take full, in every layer and unit.

    The share then executed.
    """
    for _ in range(2 if 0 < share < 1 else 1):
        run()
        for index, concentration in router.last.concentration.items():
            raw = (concentration - router.controller.floor).clamp_min(1e-6).expm1().log()
            lead = (raw[..., 0] - raw[..., 1]).flatten(0, 1)  # [N, R]
            N, layers = len(lead), len(router.layers)
            # where there is one token
            of_layers = float(share > 0 and index < max(round(share * layers), 1))
            count = round((of_layers if N == 1 else share) * N)
            if count in (0, N):
                cut = torch.full_like(lead[0], 1e3 if not count else -1e3)
            else:
                order = lead.sort(0, descending=True).values
                cut = (order[count - 1] + order[count]) / 2
            layer = router.controller.layers[index]
            assert isinstance(layer, LayerController)
            layer.out.bias.view(-1, 2)[:, 0].sub_(cut)
    run()
    return statistics.mean(float((x == 0).float().mean()) for x in router.last.executed.values())


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


def prefill(
    bench: Turns, shape: str, units: list[str], lengths: list[int], shares: list[float]
) -> None:
    """Texts of each length, one at a time."""
    device = bench.device
    plain, model = build(shape).to(device, torch.bfloat16), build(shape).to(device, torch.bfloat16)
    text = torch.randint(
        VOCABULARY, (1, max(lengths)), generator=torch.Generator().manual_seed(2)
    ).to(device)

    def run(what: LlamaForCausalLM, tokens: Tensor, backend: SDPBackend | None = None) -> object:
        with only(backend):
            return what(tokens, use_cache=True, logits_to_keep=1)

    for unit in units:
        router = routed(model, unit)
        for length in lengths:
            tokens = text[:, :length]
            contenders = {
                "unpatched": Timed(1.0, partial(run, plain, tokens)),
                "unpatched, flash": Timed(
                    1.0, partial(run, plain, tokens, SDPBackend.FLASH_ATTENTION)
                ),
                "unpatched, graph": Timed(
                    1.0, partial(Graphs(plain, length, bucket=length).prefill, tokens)
                ),
            }
            for share in shares:
                router.full_up_to = 0
                executed = send(router, share, partial(run, model, tokens))
                prepare = partial(stand, router, [bias.clone() for bias in biases(router)], 0)
                graphs = Graphs(model, length, bucket=length)  # reads the biases where they are
                contenders[f"routed {share:g}"] = Timed(
                    executed, partial(run, model, tokens), prepare
                )
                contenders[f"routed {share:g}, graph"] = Timed(
                    executed, partial(graphs.prefill, tokens), prepare
                )
            if length <= type(router).full_up_to:
                prepare = partial(
                    stand,
                    router,
                    [bias.clone() for bias in biases(router)],
                    type(router).full_up_to,
                )
                graphs = Graphs(model, length, bucket=length)
                contenders["as shipped"] = Timed(1.0, partial(run, model, tokens), prepare)
                contenders["as shipped, graph"] = Timed(
                    1.0, partial(graphs.prefill, tokens), prepare
                )
            bench.group(
                {"what": "prefill", "shape": shape, "unit": unit, "context": length, "batch": 1},
                contenders,
            )
            del contenders, graphs
            torch.cuda.empty_cache()
        router.unpatch()


def biases(router: RoutedPretrained) -> list[Tensor]:
    """Of the controllers: what says how many tokens take full."""
    return [layer.get_parameter("out.bias").data for layer in router.controller.layers]


def stand(router: RoutedPretrained, state: list[Tensor], full_up_to: int) -> None:
    """Copy biases in place, and leave short texts to full or not."""
    router.full_up_to = full_up_to
    for bias, value in zip(biases(router), state, strict=True):
        bias.copy_(value)


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
    contenders = {
        "unpatched, flash": Timed(1.0, partial(eager, plain, SDPBackend.FLASH_ATTENTION)),
        "unpatched, static cache, graph": Timed(1.0, partial(again, rivals)),
        f"routed {share:g}": Timed(executed, partial(eager, model)),
        f"routed {share:g}, static cache, graph": Timed(executed, partial(again, ours)),
    }
    bench.group(
        {"what": "decode", "shape": shape, "unit": unit, "context": context, "batch": batch},
        contenders,
    )


@torch.no_grad()
def disagreements(device: torch.device, units: list[str]) -> list[str]:
    """What differs from the same model on the CPU in float32: routed passes, replayed ones, steps
    behind a static cache.
    """
    wrong = []
    tokens = torch.randint(VOCABULARY, (1, 2500), generator=torch.Generator().manual_seed(3))
    for unit in units:
        reference, model = (
            build("smollm2-135m, 30 layers", 2),
            build("smollm2-135m, 30 layers", 2).to(device),
        )
        ours, theirs = routed(model, unit), routed(reference, unit)
        executed = send(theirs, 0.3, lambda: reference(tokens))  # noqa: B023 (called here)
        assert 0.2 < executed < 0.4, executed
        ours.controller.load_state_dict(theirs.controller.state_dict())
        expected = reference(tokens).logits
        routes = [theirs.last.executed[index] for index in range(2)]
        model(tokens.to(device), use_cache=False)
        same = [
            float((ours.last.executed[i].cpu() == route).float().mean())
            for i, route in enumerate(routes)
        ]
        ours.force(torch.stack(routes).to(device))  # a near tie may fall to the other side
        found = model(tokens.to(device), use_cache=False).logits.cpu()
        ours.force(None)
        graphs = Graphs(model, 2600, bucket=64)
        first = graphs.prefill(tokens[:, :2400].to(device)).cpu()
        steps = [graphs.step(tokens[:, t, None].to(device)).cpu() for t in range(2400, 2404)]
        compared = {"pass": (found, expected), "replayed pass": (first, expected[:, 2399])}
        compared |= {f"step {i}": (step, expected[:, 2400 + i]) for i, step in enumerate(steps)}
        scale = float(expected.std())
        for name, (a, b) in compared.items():
            error = float((a - b).abs().max()) / scale
            print(
                f"check: {unit:8} {name:14} error {error:.1e} of the logits' spread, routes equal "
                f"{min(same):.5f}",
                flush=True,
            )
            if not error < 2e-2 or min(same) < 0.999:
                wrong.append(f"{unit}, {name}: {error:.1e}")
    return wrong


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
    parser.add_argument(
        "--units", nargs="+", default=["layer"], choices=["layer", "kv_head", "head"]
    )
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
            prefill(bench, shape, args.units, args.lengths, args.shares)
        if "decode" in args.what and shape == args.shapes[0]:
            for batch in args.batches:
                for context in (8192, 32768) if batch == 1 else (32768,):
                    for unit in args.units:
                        decode(bench, shape, unit, context, batch, 0.1)
                        torch.cuda.empty_cache()
    bench.rows.finish()


if __name__ == "__main__":
    main()
