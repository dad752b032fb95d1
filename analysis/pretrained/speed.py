"""Does routing a pretrained model save time?

Prefill and decoding of a patched model against the same model unpatched.

    # a fitted patch of analysis.patch_smollm at its budgets
    python -m analysis.pretrained.speed MODEL TOKENS.npz PATCH
    # four layers of that size, random weights, random routes
    python -m analysis.pretrained.speed

The contenders take turns: `unpatched`; `all on full`, which shows what a patch costs before it
saves; and the routes executed. `ms` are medians over the turns, `ratio` the median of a turn's
ratio to unpatched, `cost` the keys that were read over those that full attention reads. A turn of
prefill reads a text of that many tokens and fills a cache; a turn of decoding appends one token to
a cache of that many and grows it. float32 on a CPU, bfloat16 on a GPU. Rows are written as they
come.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from analysis.pretrained.contenders import executed_cost
from analysis.pretrained.loading import load_model, load_streams
from bayes_router.benchmark.rows import Rows
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.routing.policy import Policy
from bayes_router.timing import device_name, isolated_ms
from bayes_router.training.distributed import pick_device

RESULTS = Path(__file__).parents[1] / "results"
BATCHES = {
    "cpu": {"prefill": [1], "decode": [1, 4]},
    "cuda": {"prefill": [1, 8], "decode": [1, 32]},
}
SHORTER = 192  # tokens that the longest cache of decoding is shorter than the longest text
# steps of decoding that are not counted; and steps counted, for a turn of prefill
WARM_UP, STEPS = 4, 4


@dataclass
class Watched:
    """A policy that keeps the routes it chose."""

    policy: Policy
    taken: list[Tensor] = field(default_factory=list)

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        self.taken.append(self.policy(concentration))
        return self.taken[-1]


@dataclass(frozen=True)
class AtRandom:
    """The first expert (`full`) for a share of the tokens, else the second.

    Whatever the posterior says.
    """

    share: float

    def __call__(self, concentration: Tensor) -> Tensor:
        """See `Policy`."""
        return (
            torch.rand(concentration.shape[:-1], device=concentration.device) >= self.share
        ).long()


@dataclass
class TimedModel:
    """A way to run the model; `policy` None: no router at all, or every token on full."""

    name: str
    model: Any
    router: RoutedPretrained | None = None
    policy: Watched | None = None

    def __call__(self, tokens: Tensor, cache: Any = None) -> Any:
        """One pass: the cache after it."""
        if self.router is not None:
            self.router.force("full" if self.policy is None else None)
            self.router.policy = self.policy or self.router.policy
        return self.model(
            tokens, past_key_values=cache, use_cache=True, logits_to_keep=1
        ).past_key_values

    def routes(self) -> Tensor | None:
        """[passes, L, B, T] since the last question; None where nothing is chosen."""
        if self.router is None or self.policy is None:
            return None
        taken, self.policy.taken = torch.stack(self.policy.taken), []
        return taken.view(-1, len(self.router.layers), *taken.shape[1:])


@dataclass
class Bench:
    """What is measured, and the rows that are known."""

    contenders: list[TimedModel]
    texts: Tensor  # [batch, tokens]
    device: torch.device
    turns: int
    now: Callable[[], float]
    rows: Rows

    @property
    def name(self) -> str:
        """Of the device, and of the clock where it is not the one on the wall."""
        return device_name(self.device) + (", CPU time" if self.now is time.thread_time else "")

    def add(
        self, what: str, context: int, batch: int, turns: list[dict[str, float]], costs: list[float]
    ) -> None:
        """The rows of one group, written and printed."""
        for contender, cost in zip(self.contenders, costs, strict=True):
            name = contender.name
            ratio = statistics.median(turn[name] / turn["unpatched"] for turn in turns)
            row = {"what": what, "context": context, "batch": batch, "contender": name}
            row |= {
                "ms": statistics.median(turn[name] for turn in turns),
                "ratio": ratio,
                "cost": cost,
            }
            self.rows.add(row | {"turns": len(turns), "device": self.name})
            numbers = f"{row['ms']:10.1f} ms  ratio {ratio:.3f}  cost {cost:.3f}"
            print(f"{what:8}{context:6}{batch:4}  {name:14}{numbers}", flush=True)

    def turn(self, tokens: Tensor, caches: dict[str, Any]) -> dict[str, float]:
        """Milliseconds of each contender, behind its cache if there is one."""
        return {
            c.name: isolated_ms(partial(c, tokens, caches.get(c.name)), self.device, self.now)[1]
            for c in self.contenders
        }

    def prefill(self, context: int, batch: int) -> None:
        """The first turn warms up."""
        turns = [self.turn(self.texts[:batch, :context], {}) for _ in range(self.turns + 1)][1:]
        self.add("prefill", context, batch, turns, [prefill_cost(c) for c in self.contenders])

    def decode(self, contexts: list[int], batch: int) -> None:
        """The longest context first: its cache is cut to the others."""
        caches: dict[str, Any] = {}
        # without routes a cache holds what the original's does, bit for bit
        for c in self.contenders:
            chooses = c.policy is not None or not caches
            caches[c.name] = (
                c(self.texts[:batch, : max(contexts)])
                if chooses
                else copy.deepcopy(caches["unpatched"])
            )
        for context in sorted(contexts, reverse=True):
            for contender in self.contenders:
                caches[contender.name].crop(context - caches[contender.name].get_seq_length())
                if contender.policy is not None:
                    contender.policy.taken.clear()
            steps = [
                (context + step) % self.texts.shape[1]
                for step in range(WARM_UP + STEPS * self.turns)
            ]
            turns = [self.turn(self.texts[:batch, step, None], caches) for step in steps]
            self.add(
                "decode",
                context,
                batch,
                turns[WARM_UP:],
                [step_cost(c, context) for c in self.contenders],
            )


def prefill_cost(contender: TimedModel) -> float:
    """Keys read by the last pass over those that full attention reads."""
    routes, router = contender.routes(), contender.router
    if routes is None or router is None:
        return 1.0
    return executed_cost(router, routes[-1].flatten(0, 1))


def step_cost(contender: TimedModel, held: int) -> float:
    """Keys read by steps behind `held` tokens and on, over those that full attention reads."""
    routes, router = contender.routes(), contender.router
    if routes is None or router is None:
        return 1.0
    return executed_cost(router, routes.flatten(1)[None], held)


def fitted(args: argparse.Namespace) -> tuple[list[TimedModel], Tensor]:
    """The contenders of a fitted patch, at each budget on the training text.

    And another text, [N].
    """
    model = load_model(args.model, args.device)
    streams = load_streams(args.tokens, model.config.vocab_size)
    plain = copy.deepcopy(model)
    router: RoutedPretrained = load_patch(model, args.patch)
    router.full_up_to = 0  # routes are read at every length
    contenders = [TimedModel("unpatched", plain), TimedModel("all on full", model, router)]
    longest = max(args.lengths)
    for budget in args.budgets:
        executed = router.set_budget(
            budget, streams["train"].tokens[-longest - 1 :].long(), context=longest, limit=longest
        )
        print(f"budget {budget}: {executed:.3f} on training text, {router.policy}", flush=True)
        contenders.append(TimedModel(f"routed {budget:g}", model, router, Watched(router.policy)))
    return contenders, streams["novels"].tokens.long()


def random(args: argparse.Namespace) -> tuple[list[TimedModel], Tensor]:
    """The same for a Llama of SmolLM2-135M's width and few layers.

    Time does not hang on weights.
    """
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=65_536,
    )
    torch.manual_seed(0)
    dtype = torch.bfloat16 if args.device.type == "cuda" else torch.float32
    model = LlamaForCausalLM(config).to(args.device, dtype).eval()
    plain = copy.deepcopy(model)
    router = patch(
        model, window=1024, sinks=4, experts=("full", "local"), context=max(args.lengths)
    )
    router.full_up_to = 0  # routes are read at every length
    contenders = [TimedModel("unpatched", plain), TimedModel("all on full", model, router)]
    contenders += [
        TimedModel(f"random {share:g}", model, router, Watched(AtRandom(share)))
        for share in args.budgets
    ]
    return contenders, torch.randint(1024, (300_000,))


def groups(args: argparse.Namespace, bench: Bench) -> Iterator[tuple[str, Callable[[], None]]]:
    """(name, measurement) of every group of rows."""
    batches, longest = BATCHES[args.device.type], max(args.lengths) - SHORTER
    if "prefill" in args.what:
        for batch, length in product(batches["prefill"], args.lengths):
            yield f"prefill {length} x {batch}", partial(bench.prefill, length, batch)
    if "decode" in args.what:
        for batch in batches["decode"]:
            yield (
                f"decode x {batch}",
                partial(bench.decode, [min(length, longest) for length in args.lengths], batch),
            )


@torch.no_grad()
def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name in ("model", "tokens", "patch"):
        parser.add_argument(name, type=Path, nargs="?")
    parser.add_argument("--device", type=pick_device, default="auto")
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096, 8192])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument(
        "--turns", type=int, default=5, help=f"of prefill; {STEPS} times as many of decoding"
    )
    parser.add_argument(
        "--what", nargs="+", default=["prefill", "decode"], choices=["prefill", "decode"]
    )
    parser.add_argument("--results", type=Path)
    parser.add_argument(
        "--cpu-time", action="store_true", help="of one thread: for a CPU that others use too"
    )
    args = parser.parse_args()
    if args.cpu_time:
        torch.set_num_threads(1)
    contenders, text = random(args) if args.patch is None else fitted(args)
    most = max(max(sizes) for sizes in BATCHES[args.device.type].values())
    texts = text[: len(text) // most * most].view(most, -1)[:, : max(args.lengths)].to(args.device)
    if texts.shape[1] < max(args.lengths):
        parser.error(
            f"--lengths: {most} texts of {max(args.lengths)} tokens are needed; TOKENS has "
            f"{len(text)} tokens"
        )
    path = args.results or RESULTS / f"patch_speed_{args.device.type}.csv"
    now = time.thread_time if args.cpu_time else time.perf_counter
    bench = Bench(contenders, texts, args.device, args.turns, now, Rows(path))
    for what, measure in groups(args, bench):
        try:
            measure()
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
            print(f"{what}: skipped, out of memory", flush=True)
    bench.rows.finish()


if __name__ == "__main__":
    main()
