"""Up to how many keys is which backend the faster?

`python -m analysis.speed.break_even [--device cuda] [--lengths 64 128 ...]`.

For each length, with gradients and without: full attention, the backend that `auto` takes for short
texts and the one for long texts, over two mixes and two shapes, in turn; on a CPU the processor
time of one thread. `attention.hard.auto.BREAK_EVEN` holds the lengths that it prints last.
"""

import argparse
import math
from functools import partial

import torch

from bayes_router.attention.hard.auto import BREAK_EVEN
from bayes_router.attention.hard.dispatch import routed_attention
from bayes_router.benchmark.cases import (
    WINDOW,
    Shape,
    baselines,
    draw_inputs,
    draw_route,
    full_attention,
)
from bayes_router.benchmark.clock import Clock, Thunk
from bayes_router.timing import device_name

MIXES = ("10/60/30", "50/30/20")
SHAPES = ((1, 8, 64), (8, 4, 32))  # B, H, Dh
LENGTHS = (16, 32, 64, 96, 128, 192, 256, 512, 1024, 2048)


def measure(
    clock: Clock, device: torch.device, shape: Shape, mix: str, gradients: bool
) -> dict[str, float]:
    """Milliseconds of the fastest full attention, and of both backends."""
    inputs, route = (
        draw_inputs(shape, device, gradients),
        draw_route(mix, shape.B, shape.T).to(device),
    )
    given, choice = torch.randn_like(inputs[0]), BREAK_EVEN[device.type == "cuda", gradients]

    def whole(call: Thunk) -> Thunk:
        return (
            (lambda: torch.autograd.grad(call(), inputs, given))
            if gradients
            else torch.no_grad()(call)
        )

    calls = {
        f"full {name}": whole(partial(full_attention, *inputs, backend))
        for name, backend in baselines(device).items()
    }
    for name, backend in (("short", choice.short), ("long", choice.long)):
        calls[name] = whole(
            partial(routed_attention, *inputs, route, window=WINDOW, backend=backend)
        )
    times = {name: timing.ms for name, timing in clock(calls).items()}
    return {
        "full": min(ms for name, ms in times.items() if name.startswith("full")),
        "short": times["short"],
        "long": times["long"],
    }


def main() -> None:
    """Print every measurement, then the break-even points."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--seconds", type=float, default=2.0, help="for each group of calls")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = Clock(device, options.seconds, cpu_time=True)
    print(
        f"{device_name(device)}, torch {torch.__version__}; window {WINDOW}; milliseconds, and "
        f"times those of full attention"
    )
    for gradients in (False, True):
        choice, won = BREAK_EVEN[device.type == "cuda", gradients], {}
        print(
            (
                f"\n{'with' if gradients else 'no'} gradients\n{'T':>6} {'B':>3} {'mix':>9} "
                f"{'full':>9}"
            ),
            end="",
        )
        print(f" {choice.short.name:>9} {choice.long.name:>9}")
        # the largest first: memory is then as in a model that has run
        for T in sorted(options.lengths, reverse=True):
            ratios = []
            for (B, H, Dh), mix in ((shape, mix) for shape in SHAPES for mix in MIXES):
                ms = measure(clock, device, Shape(B, H, T, Dh), mix, gradients)
                own = [f"{ms[name] / ms['full']:8.2f}x" for name in ("short", "long")]
                print(f"{T:6} {B:3} {mix:>9} {ms['full']:9.3f}", *own, flush=True)
                ratios.append(math.log(ms["short"] / ms["long"]))
            won[T] = sum(ratios) <= 0
        keys = max((T for T in won if won[T]), default=0)
        print(f"{choice.short.name} up to {keys} keys, then {choice.long.name}")


if __name__ == "__main__":
    main()
