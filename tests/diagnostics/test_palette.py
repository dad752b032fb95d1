"""The experts' colours stay apart in greyscale."""

import itertools

from bayes_router.commands.inspect import COLOURS
from bayes_router.diagnostics.figures.run import PALETTE, expert_palette


def lightness(colour: str) -> float:
    """CIE L*, 0 to 100: what is left of a colour in greyscale."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    y = sum(w * x for w, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
    return float(116 * y ** (1 / 3) - 16)


def test_any_two_experts_differ_in_lightness():
    first = [lightness(one) for one in expert_palette(["full", "gated", "local"]).values()]
    assert min(abs(a - b) for a, b in itertools.combinations(first, 2)) > 20
    every = [lightness(one) for one in PALETTE]
    assert min(abs(a - b) for a, b in itertools.combinations(every, 2)) > 8


def test_so_do_those_of_the_terminal() -> None:
    steps = (0, 95, 135, 175, 215, 255)  # of the cube of 6 x 6 x 6 colours after the first 16

    def of(code: int) -> float:
        red, rest = divmod(code - 16, 36)
        return lightness("#" + "".join(f"{steps[i]:02x}" for i in (red, *divmod(rest, 6))))

    apart = [abs(a - b) for a, b in itertools.combinations(map(of, COLOURS[:3]), 2)]
    assert min(apart) > 18
    assert min(abs(a - b) for a, b in itertools.combinations(map(of, COLOURS), 2)) > 10
