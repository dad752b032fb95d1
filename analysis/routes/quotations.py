"""Text that quotes itself: where far keys are worth reading, and most of it not.

    python -m analysis.routes.quotations SOURCE OUT [--limit 10000000]

SOURCE is a folder of text, or `stdlib`: the modules of Python's standard library. OUT gets the same
documents with quotations: after every 200 to 400 characters stand, between `[[` and `]]`, 64 to
128 characters that stood 150 to 500 characters of the text before (`--back`). What is quoted lies
beyond a window of 32, and is known, after its first few characters, to whoever looks that far:
inside of the marks full attention pays, elsewhere hardly. About one character in four is quoted.
The corpora of the study from scratch, `text:OUT` of `analysis.routes.tiny_lm --size quoting`.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

from analysis.pretrained.texts import stdlib
from bayes_router.files import write_text

APART, LONG, BACK = (200, 400), (64, 128), (150, 500)
OPEN, CLOSE = "[[", "]]"


def quoting(text: str, random: Random, back: tuple[int, int] = BACK) -> str:
    """`text` with quotations of itself, from `back` characters before."""
    out, at = list[str](), 0
    while at < len(text):
        piece = text[at : at + random.randint(*APART)]
        at += len(piece)
        out.append(piece)
        if at > back[1]:
            start = at - random.randint(*back)
            out.append(OPEN + text[start : start + random.randint(*LONG)] + CLOSE)
    return "".join(out)


def documents(source: str, limit: int) -> Iterator[tuple[str, str]]:
    """(name, text) of the documents of `source`, until there are `limit` characters."""
    paths = stdlib() if source == "stdlib" else sorted(Path(source).rglob("*.txt"))
    for number, path in enumerate(paths):
        text = path.read_text(encoding="utf-8", errors="ignore")
        limit -= len(text)
        if limit < 0:
            return
        yield f"{number:05d}.txt", text


def main() -> None:
    """Write the documents."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="a folder of text, or stdlib")
    parser.add_argument("out", type=Path)
    parser.add_argument("--limit", type=int, default=10_000_000, help="characters that are read")
    parser.add_argument(
        "--back", type=int, nargs=2, default=BACK, help="how far back a quotation is"
    )
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    for name, text in documents(args.source, args.limit):
        write_text(args.out / name, quoting(text, Random(name), tuple(args.back)))


if __name__ == "__main__":
    sys.exit(main())
