"""`bayes-router inspect`.

A text in the terminal, coloured by route, the uncertain tokens marked.
"""

import io
import os
import re
import sys
from collections.abc import Sequence
from itertools import groupby
from string import ascii_lowercase
from typing import TextIO

import numpy as np
import torch
from jsonargparse import Namespace
from rich.console import CONSOLE_SVG_FORMAT, Console
from rich.text import Text

from bayes_router.checks import require, unknown
from bayes_router.commands.fitted import open_fitted, read_text
from bayes_router.config import SURE_ENOUGH
from bayes_router.data.load import load_data
from bayes_router.diagnostics.fitted import FittedRun
from bayes_router.diagnostics.measures.uncertainty import probability_right, token_frame
from bayes_router.diagnostics.shading import HEADS, Scale, scale
from bayes_router.diagnostics.shown import ShownText, route_text
from bayes_router.files import write_text

# of the 256 of a terminal: dark blue, orange, pale green, purple, pale yellow, apart in greyscale
COLOURS = (25, 172, 151, 133, 229)
REDS = (231, 224, 217, 167, 124)
WHEN = ("auto", "always", "never")
WIDTH = 80
SVG_WIDTH = 100


def run(options: Namespace) -> None:
    """Print the text, a legend, and how many tokens are uncertain."""
    if options.colour not in WHEN:
        raise unknown("colour", options.colour, WHEN)
    layer, unit, threshold = options.layer or 0, options.unit or 0, options.threshold
    threshold = SURE_ENOUGH if threshold is None else threshold
    require(0 <= threshold <= 1, "threshold", "a probability", threshold)
    if options.by != "route":
        scale(options.by)
    text = read_text(options.text)
    fitted = open_fitted(options, text)
    layers = fitted.config.model.num_layers
    require(
        0 <= layer < layers,
        "layer",
        f"0 to {layers - 1}",
        layer,
        f"there are {layers} layers",
    )
    source = None if text is not None else fitted.held_out or load_data(fitted.config)[1].valid
    shown = route_text(fitted, text, options.tokens, source, unit)
    terminal = options.colour == "auto" and sys.stdout.isatty() and "NO_COLOR" not in os.environ
    colour = options.colour == "always" or terminal

    def page_of(colour: bool) -> Text:
        if options.by == "route":
            return render(fitted, shown, layer, threshold, colour, unit)
        return _shaded_by(fitted, shown, options.by, layer, colour)

    page = page_of(colour)
    if colour:
        painter(sys.stdout).print(page, soft_wrap=True)
    else:
        print(page.plain)
    if options.svg is not None:
        write_text(options.svg, picture(page_of(True), str(options.run)))
    if options.table is not None:
        frame = token_frame(shown.concentration, fitted.experts, fitted.prior.cost_ratio)
        frame.insert(2, "piece", np.tile(shown.pieces, layers))
        write_text(options.table, frame.to_csv(index=False, float_format="%.6g"))
    if fitted.patched and fitted.tokeniser is None:
        print("\nshown as token ids: the base model has no tokenizer beside it")


def _shaded_by(fitted: FittedRun, shown: ShownText, by: str, layer: int, colour: bool) -> Text:
    if by == HEADS.name:
        dearest = int(torch.as_tensor(fitted.prior.cost_ratio).argmax())
        shown = of_heads(shown, layer, dearest)
    return shaded(shown, scale(by), colour)


def of_heads(shown: ShownText, layer: int, dearest: int) -> ShownText:
    """With the share of the layer's units that each token sends to an expert."""
    assert shown.choice is not None
    share = (shown.choice[layer] == dearest).double().mean(0)  # of choices [R, N]
    return shown._replace(numbers={**shown.numbers, HEADS.name: share})


def painter(file: TextIO | None, record: bool = False) -> Console:
    """A console of 256 colours that prints text as it is.

    What was asked for, whatever the terminal claims.
    """
    return Console(
        file=file,
        record=record,
        width=SVG_WIDTH if record else None,
        force_terminal=True,
        color_system="256",
        no_color=False,
        highlight=False,
    )


def picture(page: Text, title: str) -> str:
    """The coloured text as an SVG that loads nothing from elsewhere."""
    console = painter(io.StringIO(), record=True)
    console.print(page)
    form = re.sub(r"@font-face \{\{.*?\}\}|<!--.*?-->", "", CONSOLE_SVG_FORMAT, flags=re.S)
    return console.export_svg(title=title, code_format=form, unique_id="routes")


def render(
    fitted: FittedRun, shown: ShownText, layer: int, threshold: float, colour: bool, unit: int = 0
) -> Text:
    """The text with a legend.

    Without colour, a letter for each expert stands under its token, in capitals if uncertain.
    """
    choice = shown.hard_choice[layer].tolist()
    doubt = (probability_right(shown.concentration[layer]) < threshold).tolist()
    load = torch.bincount(shown.hard_choice[layer], minlength=len(fitted.experts)) / len(choice)
    shares = [
        f"{name} {share:.1%}" for name, share in zip(fitted.experts, load.tolist(), strict=True)
    ]
    marked = (
        f"{sum(doubt)} of {len(doubt)} tokens marked: the probability that their weight is the "
        f"largest is below {threshold:g}"
    )
    if colour:
        legend = Text("  ").join(_paint(f" {share} ", e, False) for e, share in enumerate(shares))
        tokens = zip(map(printable, shown.pieces), choice, doubt, strict=True)
        runs = groupby(tokens, key=lambda token: token[1:])  # one style for neighbours of one kind
        body = Text().join(_paint("".join(piece for piece, *_ in run), *kind) for kind, run in runs)
    else:
        marks = letters(fitted.experts)
        legend = Text(
            "  ".join(f"{mark}: {share}" for mark, share in zip(marks, shares, strict=True))
        )
        letter = [marks[e].upper() if d else marks[e] for e, d in zip(choice, doubt, strict=True)]
        body = Text(_underlined(shown.pieces, letter))
    of = (
        f", {fitted.config.model.route_by.replace('_', ' ')} {unit}"
        if fitted.config.model.num_units > 1
        else ""
    )
    return Text.assemble(f"layer {layer}{of}: ", legend, f"\n{marked}\n\n", body)


def shaded(shown: ShownText, by: Scale, colour: bool) -> Text:
    """The text coloured by a number of each token.

    Without colour, the digit of its shade stands under it.

    Raises:
        ValueError: the fit cannot say that number.
    """
    fix = {
        "risk": (
            "fit_risk of a patch, then save; of a run: python -m analysis.posterior RUN "
            "--parts risk"
        ),
        "foreign": "fit_evidence of a patch, then save; of a run: fit it again",
    }
    known = by.name in shown.numbers
    require(
        known, "by", "route: the fit keeps no estimate of the other", by.name, fix.get(by.name, "")
    )
    shades = by.shades(shown.numbers[by.name])
    steps = [f"{digit}: {step}" for digit, step in enumerate(by.steps())]
    if colour:
        legend = Text("  ").join(_shade(f" {step} ", s) for s, step in enumerate(steps))
        runs = groupby(
            zip(map(printable, shown.pieces), shades, strict=True), key=lambda token: token[1]
        )
        body = Text().join(_shade("".join(piece for piece, _ in run), shade) for shade, run in runs)
    else:
        legend = Text("  ".join(steps))
        body = Text(_underlined(shown.pieces, list(map(str, shades))))
    mean = float(shown.numbers[by.name].mean())
    return Text.assemble(f"{by.name}, {by.meaning}; mean {mean:.4f}\n", legend, "\n\n", body)


def letters(experts: Sequence[str]) -> list[str]:
    """A small letter for each expert, all different.

    The first of its name that is free, else of the alphabet.
    """
    found: list[str] = []
    for name in experts:
        free = (
            c for c in (*name.lower(), *ascii_lowercase) if c in ascii_lowercase and c not in found
        )
        found.append(next(free, "?"))
    return found


def printable(piece: str) -> str:
    """The piece without control characters: a text must not steer the terminal."""
    return (
        "".join(
            c if c.isprintable() or c == "\n" else " " if c == "\t" else "\u00b7" for c in piece
        )
        or "\u00b7"
    )


def _paint(text: str, expert: int, doubt: bool) -> Text:
    """On the colour of its expert.

    Uncertain text is underlined, in that colour on the plain background.
    """
    colour = COLOURS[expert % len(COLOURS)]
    ink = 15 if expert == 0 else 16
    return Text(text, f"underline color({colour})" if doubt else f"color({ink}) on color({colour})")


def _shade(text: str, shade: int) -> Text:
    """On a deeper red the higher the shade."""
    return Text(text, f"color({16 if shade < 3 else 15}) on color({REDS[shade]})")


def _underlined(pieces: Sequence[str], marks: Sequence[str]) -> str:
    """Lines of at most 80 characters, each with its marks below."""
    lines: list[tuple[str, str]] = [("", "")]
    for piece, mark in zip(pieces, marks, strict=True):
        for part in printable(piece).splitlines(keepends=True):
            body = part.rstrip("\n")
            if len(lines[-1][0]) + len(body) > WIDTH:
                lines.append(("", ""))
            lines[-1] = (lines[-1][0] + body, lines[-1][1] + mark * len(body))
            if part.endswith("\n"):
                lines.append(("", ""))
    return "\n".join(f"{text}\n{marks}" for text, marks in lines if text)
