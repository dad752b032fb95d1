"""Corpora larger than memory: tokenised once into files, memory-mapped and streamed from then on.

A prepared corpus is a folder with train.bin, valid.bin (ids as they lie in memory) and
prepared.json, which is written last; the folder gets its name when all three are whole. Its tokens,
their split and the fingerprint are those that reading the corpus into memory gives (under `gpt2`,
ids may differ where a block of 4 MiB ends).
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from bayes_router.data.hub import HUB, hub_identity, hub_texts
from bayes_router.data.text import (
    SEPARATOR,
    TEXT,
    Texts,
    check_fraction,
    check_text,
    choose_valid,
    corpus_files,
    cut_document,
    document_rank,
    no_text,
)
from bayes_router.data.tokenisers import Tokeniser, load_tokeniser, token_dtype
from bayes_router.data.tokens import Batch, TextData, TokenDataset
from bayes_router.files import CAN_HOLD, held
from bayes_router.progress import Progress

BLOCK = 1 << 22
"""Bytes that are tokenised at a time."""
MEGABYTE = 1_000_000
TABLE = "prepared.json"
HALF_WRITTEN = re.compile(r"\.[0-9a-f]{16}\..+")
"""Names of folders that are not whole."""
HUB_FOLDER = Path("~/.cache/bayes-router")


class MappedTokens(TokenDataset):
    """Tokens in a file. The file is mapped for each batch anew.

    Pages that were read do not add up in resident memory.

    Raises:
        ValueError: the file is missing, or has another size than its table says.
    """

    def __init__(self, path: Path, length: int, tokeniser: Tokeniser, name: str):
        self.path, self.name, self.length = path, name, length
        self.vocab_size, self.dtype = tokeniser.vocab_size, token_dtype(tokeniser)
        size = path.stat().st_size if path.is_file() else 0
        if size != length * self.dtype.itemsize:
            raise ValueError(
                f"{path}: expected {length} tokens in {length * self.dtype.itemsize} bytes; got "
                f"{size} bytes; remove the "
                "folder to prepare the corpus again"
            )

    def __len__(self) -> int:
        """Number of tokens N."""
        return self.length

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]  # a file's are not assigned
        """The file as [N], mapped anew, to be read alone."""
        with warnings.catch_warnings():  # torch warns of what may not be written
            warnings.simplefilter("ignore", UserWarning)
            return torch.from_numpy(self._mapped())

    def _mapped(self) -> npt.NDArray[Any]:
        return np.memmap(self.path, self.dtype, mode="r", shape=(self.length,))

    def _windows_at(self, starts: Tensor, context: int) -> Batch:
        tokens = self._mapped()
        # [B, T + 1]
        window = np.stack([tokens[start : start + context + 1] for start in starts.tolist()])
        ids = torch.from_numpy(window.astype(np.int64))
        return Batch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous())


def prepared_data(
    name: str, tokeniser: str, valid_fraction: float, seed: int, folder: str
) -> TextData:
    """The corpus `name` from its prepared files below `folder`, made where there are none.

    Raises:
        ValueError: as `text_data`; prepared files that are damaged.
    """
    check_fraction(valid_fraction)
    encoder = load_tokeniser(tokeniser)
    root = Path(folder).expanduser() if folder else HUB_FOLDER.expanduser()
    identity = hub_identity(name) if name.startswith(HUB) else _file_identity(name)
    key = hashlib.sha256(
        json.dumps([1, name, tokeniser, valid_fraction, seed, identity]).encode()
    ).hexdigest()[:16]
    home = root / key
    if not (home / TABLE).is_file():
        with _new_folder(home) as made:
            pieces = (
                hub_texts(name, valid_fraction, seed)
                if name.startswith(HUB)
                else _file_texts(name, valid_fraction, seed)
            )
            _write(made, pieces, name, encoder)
    try:
        table = json.loads((home / TABLE).read_text(encoding="utf-8"))
        sha256, lengths = str(table["sha256"]), (int(table["train"]), int(table["valid"]))
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(
            f"{home / TABLE}: expected the table of a prepared corpus; it is damaged; remove {home}"
        ) from error
    train, valid = (
        MappedTokens(home / f"{part}.bin", n, encoder, f"{name} {part}")
        for part, n in zip(("train", "valid"), lengths, strict=True)
    )
    return TextData(train, valid, name, sha256, encoder)


def _file_identity(name: str) -> list[Any]:
    """What changes when a file of the corpus does: names, sizes and times; nothing is read."""
    root, paths = corpus_files(name)
    stats = [
        (path.relative_to(root).as_posix() if root.parts else path.name, path.stat())
        for path in paths
    ]
    return [[where, stat.st_size, stat.st_mtime_ns] for where, stat in stats]


def _file_texts(name: str, valid_fraction: float, seed: int) -> Texts:
    """Read every file once: check it, rank it for the split, and take the fingerprint.

    Then say where the parts lie.
    """
    root, paths = corpus_files(name)
    ranks: dict[Path, bytes] = {}
    sizes: dict[bytes, int] = {}
    fingerprint = hashlib.sha256()
    total = sum(path.stat().st_size for path in paths)
    with _megabytes("reading the corpus", total) as read:
        for path in paths:
            check_text(name, path, _blocks(path))
            if not any(TEXT.search(block) for block in _blocks(path)):
                continue
            if ranks:
                fingerprint.update(SEPARATOR)
            for block in _blocks(path):
                fingerprint.update(block)
                read(len(block))
            ranks[path] = document_rank(seed, _blocks(path))
            sizes[ranks[path]] = path.stat().st_size
    if not ranks:
        raise no_text(name, root, len(paths))
    if len(sizes) == 1:
        path = next(iter(ranks))
        cut = _cut(name, path, valid_fraction)
        return Texts([_blocks(path, 0, cut)], [_blocks(path, cut)], total, fingerprint.hexdigest())
    chosen = choose_valid(name, sizes, valid_fraction)
    train = (_blocks(path) for path, rank in ranks.items() if rank not in chosen)
    valid = (_blocks(path) for path, rank in ranks.items() if rank in chosen)
    return Texts(train, valid, total, fingerprint.hexdigest())


@contextmanager
def _megabytes(what: str, size: int | None) -> Iterator[Callable[[int], None]]:
    """Tells how far the work is, in whole megabytes: what it gives counts bytes."""
    total, bytes_done = None if size is None else -(-size // MEGABYTE), 0

    def count(more: int) -> None:
        nonlocal bytes_done
        bytes_done += more
        progress.step(bytes_done // MEGABYTE - progress.done)

    with Progress(what, total, unit="megabyte") as progress:
        yield count


def _cut(name: str, path: Path, valid_fraction: float) -> int:
    with open(path, "rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as document:
        return cut_document(name, document, valid_fraction)


def _blocks(path: Path, start: int = 0, stop: int | None = None) -> Iterator[bytes]:
    """The bytes of a file in blocks that end with a line, else a word, else a character."""
    rest = b""
    with open(path, "rb") as file:
        file.seek(start)
        left = (path.stat().st_size if stop is None else stop) - start
        while left > 0 and (block := file.read(min(BLOCK, left))):
            left -= len(block)
            whole = rest + block
            end = len(whole) if left <= 0 else _boundary(whole)
            yield whole[:end]
            rest = whole[end:]
    if rest:
        yield rest


def _boundary(block: bytes) -> int:
    for mark in (b"\n", b" "):
        end = block.rfind(mark) + 1
        if end > len(block) // 2:
            return end
    end = len(block)
    # inside a character of several bytes
    while end > len(block) - 4 and block[end - 1] & 0xC0 == 0x80:
        end -= 1
    return end - 1 if block[end - 1] >= 0xC0 else len(block)


def _write(folder: Path, texts: Texts, name: str, tokeniser: Tokeniser) -> None:
    """Tokenise both parts into `folder`."""
    dtype = token_dtype(tokeniser)
    separator = tokeniser.encode(SEPARATOR).astype(dtype)
    lengths = {}
    with _megabytes("tokenising the corpus", texts.size) as read:
        for part, documents in (("train", texts.train), ("valid", texts.valid)):
            lengths[part] = 0
            with open(folder / f"{part}.bin", "wb") as file:
                for document in documents:
                    if lengths[part]:
                        file.write(separator.tobytes())
                        lengths[part] += len(separator)
                    for block in document:
                        ids = tokeniser.encode(block).astype(dtype, copy=False)
                        file.write(ids.tobytes())
                        lengths[part] += len(ids)
                        read(len(block))
    table = {
        "corpus": name,
        "tokeniser": tokeniser.name,
        "dtype": dtype.name,
        "sha256": texts.sha256,
        **lengths,
    }
    (folder / TABLE).write_text(json.dumps(table, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _new_folder(home: Path) -> Iterator[Path]:
    """A folder that gets the name `home` once its content is whole.

    Another process that was faster wins.

    What a process that was killed left half-written is removed first: each folder is held for as
    long as it is written.

    Raises:
        ValueError: it cannot be written.
    """
    held_until_the_end = ExitStack()
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        # nobody takes a folder that is made, and not yet held, for one that was left
        with held(home.parent, wait=True):
            _remove_left(home.parent)
            made = Path(tempfile.mkdtemp(prefix=f".{home.name}.", dir=home.parent))
            held_until_the_end.enter_context(held(made))
    except OSError as error:
        raise ValueError(
            f"data.prepared: expected a folder that can be written; got {home.parent}: {error}"
        ) from error
    try:
        yield made
        if not (home / TABLE).is_file():
            shutil.rmtree(home, ignore_errors=True)
            os.replace(made, home)
    except OSError as error:
        raise ValueError(
            f"data.prepared: expected room for the prepared corpus; got {home.parent}: {error}"
        ) from error
    finally:
        shutil.rmtree(made, ignore_errors=True)
        held_until_the_end.close()


def _remove_left(root: Path) -> None:
    for folder in root.iterdir() if CAN_HOLD else ():
        if HALF_WRITTEN.fullmatch(folder.name):
            with held(folder) as mine:
                if mine:
                    shutil.rmtree(folder, ignore_errors=True)
