"""Is a patched model faster than the model that it patches, on a GPU?

Against the best that torch offers.

    python -m analysis.speed.patched --device cuda

Random weights, bfloat16, window 1024, 4 sinks, experts full and local: Llama's 1B shape with 8
layers, and SmolLM2-135M's with 30. Controllers have random weights, and biases that send a share of
the tokens to `full`; the share executed is a column. Before anything is timed, routed passes and
steps are compared with the same model on the CPU in float32; nothing is reported if one differs.

Contenders take turns, long texts fewer; `ms` is a median, from an idle device to an idle device,
launches included; `ratio` is the median of turns over the fastest unpatched contender's, `low` and
`high` its quartiles: torch's own choice of kernel, flash attention, its choice replayed from a CUDA
graph. `called` is both models as they are called, without graphs, of texts that a patch leaves to
`full`. At the lengths of --compiled both models
also go through torch.compile, without a mask written out, as called and captured in a graph.
`graphs=True` is the model called as ever, under the setting of that name. A step of decoding is
read behind so many keys of random numbers; unpatched with flash attention on exactly these keys,
which are not copied, the same from a graph of this one length (nobody decodes so: it is the floor,
`floor` in the table, and no rival), and with a static cache replayed from a graph; of the most
texts, by the last unit, also with both models compiled. `bound` is computed: what of weights, keys
and values has to be read, at the rate of the card's memory.
`routed as fitted` executes the routes that the patch of `smollm2-135m-teacher` took on a text
(`analysis.speed.recorded_routes`) at the cost of its router.

--jobs N divides the groups of rows over N processes, each on a card of its own (`card`); a group is
read on one card, and a card reads one group at a time. Options pick rows, which are read in the
order of their worth; --seconds begins no group after so many, and names those left out. Where it is
told to terminate, it writes what was read by then.
"""

import argparse
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from analysis.speed.patched_check import disagreements
from analysis.speed.patched_decode import LENGTHS, LONGEST, decode
from analysis.speed.patched_jobs import Jobs, merge, refuse, run, stoppable
from analysis.speed.patched_model import SHAPES, build
from analysis.speed.patched_prefill import called, compiled, prefill, setting
from analysis.speed.patched_turns import Models, Turns
from bayes_router.benchmark.rows import Rows
from bayes_router.integrations.calls.fused_router import FULL_UP_TO
from bayes_router.timing import device_name

RESULTS = Path(__file__).parents[1] / "results" / "patched_cuda.csv"
ROUTES = Path(__file__).parents[1] / "results" / "routes_smollm2_8192.npz"
SOME = (8192, 32_768)
"""Lengths that are read for every unit, and under the setting `graphs`."""
READ = {
    "prefill": prefill,
    "compiled": compiled,
    "setting": setting,
    "called": called,
    "decode": decode,
}
TURNS = 7


class RowGroup(NamedTuple):
    """Contenders that take turns."""

    what: str
    shape: str
    unit: str
    context: int
    batch: int


def groups(args: argparse.Namespace) -> Iterator[RowGroup]:
    """All that the options ask for, in the order of the table."""
    for shape, unit, length in product(args.shapes, args.units, args.lengths):
        if unit == args.units[0] or length in SOME:
            if "prefill" in args.what:
                yield RowGroup("prefill", shape, unit, length, 1)
            if "compiled" in args.what and shape == args.shapes[0] and length in args.compiled:
                yield RowGroup("compiled", shape, unit, length, 1)
            if "setting" in args.what and length in SOME:
                yield RowGroup("setting", shape, unit, length, 1)
        if "called" in args.what and unit == args.units[0] and length <= FULL_UP_TO:
            yield RowGroup("called", shape, unit, length, 1)
    for batch, unit in product(args.batches, args.units):
        for length in LENGTHS.get(batch, LONGEST):
            if "decode" in args.what:
                yield RowGroup("decode", args.shapes[0], unit, length, batch)


def worth(group: RowGroup, args: argparse.Namespace) -> tuple[int, int]:
    """Where a group stands in the order of reading: what the table of aims has, and among that
    what takes longest, first.
    """
    first = group.shape == args.shapes[0]
    by_layer, short = group.unit == args.units[0], group.context <= min(SOME)
    if group.what in ("compiled", "called"):  # while torch.compile runs, the host is a slow one
        rank = 0 if group.what == "compiled" else 1
    elif group.what == "decode":
        compiles = (group.unit, group.batch) == (args.units[-1], max(args.batches))
        rank = 0 if compiles else 1 if group.unit != "kv_head" else 2
    elif group.what == "setting":
        rank = 1 if short and first else 2 if short else 3
    else:
        rank = 1 if first and (by_layer or short) or group.context == min(SOME) else 2
    long = {"compiled": 50, "called": 0, "setting": 0, "decode": group.batch // 8}.get(
        group.what, group.context // 4096
    )
    return rank + (rank == 2 and not first and not short), -long


@torch.no_grad()
def work(args: argparse.Namespace, end: float, jobs: Jobs) -> None:
    """Check a part, and read the groups that nobody took, each as soon as the last is done.

    What fails ends this job: the device may be out of order, and others go on.
    """
    wrong = disagreements(args.device, jobs.mine(args.units))
    jobs.checked(wrong)
    if wrong:
        sys.exit("nothing is reported, these differ: " + "; ".join(wrong))
    facts = {"device": device_name(args.device), "torch": torch.__version__, "card": jobs.number}
    rows = Rows(jobs.table(), facts, resume=True)  # what is read stays, whatever happens
    bench, models = Turns(rows, args.turns, args.device), dict[str, Models]()
    for group in sorted(groups(args), key=lambda group: worth(group, args)):
        if time.monotonic() > end or not jobs.take("-".join(map(str, group)).replace(" ", "")):
            continue
        try:
            if group.shape not in models:
                pair = (build(group.shape, None, args.device, torch.bfloat16) for _ in range(2))
                models[group.shape] = Models(*pair)
            READ[group.what](bench, models[group.shape], group._asdict(), args)
        except Exception:
            print(f"card {jobs.number} stops at {group}:\n{traceback.format_exc()}", flush=True)
            return
        if args.device.type == "cuda":
            torch.cuda.empty_cache()


def options() -> argparse.ArgumentParser:
    """Of the command line."""
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
    parser.add_argument("--what", nargs="+", default=list(READ), choices=list(READ))
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser


def main() -> None:
    """Check, measure, write, print."""
    args = options().parse_args()
    end, order = time.monotonic() + args.seconds, list(groups(args))
    torch.backends.cuda.matmul.allow_tf32 = False
    args.results.parent.mkdir(parents=True, exist_ok=True)
    rows = Rows(args.results)
    with tempfile.TemporaryDirectory(prefix="patched.", dir=args.results.parent) as name:
        folder, mine = Path(name), partial(work, args, end)
        with stoppable():
            if args.jobs == 1:
                mine(Jobs(folder, 0, 1))
            else:
                run(folder, args.jobs, mine)
        refuse(folder, args.jobs, ended=True)
        for group, found in merge(folder, args.jobs, order):
            for row in found:
                rows.add(row)
            if not found:
                print(f"left out: {group}")
    table = rows.finish()
    print(table.to_string(index=False) if len(table) else "no group was read")


if __name__ == "__main__":
    main()
