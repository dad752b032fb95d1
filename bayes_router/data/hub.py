"""Text of a Hugging Face data set (extra `hf`), by name or from a folder.

`hf:NAME`, `hf:NAME:CONFIGURATION`, `hf:PATH`.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from bayes_router.checks import get_extra, unknown
from bayes_router.data.text import Texts

HUB = "hf:"
HELD_OUT = ("validation", "test")
"""Splits that serve as validation text, if the data set has one."""


def hub_identity(name: str) -> list[str]:
    """What changes when the data set does."""
    parts = _load(name)
    return [
        f"{part} {getattr(data, '_fingerprint', '')} {len(data)}"
        for part, data in sorted(parts.items())
    ]


def hub_texts(name: str, valid_fraction: float, seed: int) -> Texts:
    """The rows of the data set, each a document.

    Its own split if it has one, else a random share of the rows.
    """
    parts = _load(name)
    held_out = next((part for part in HELD_OUT if part in parts), None)
    train = parts["train"]
    if held_out is not None:
        valid = parts[held_out]
    else:
        if len(train) < 2:
            raise ValueError(
                f"corpus {name!r}: expected a validation split or two rows at least; got "
                f"{len(train)}"
            )
        split = train.train_test_split(test_size=valid_fraction, seed=seed)
        train, valid = split["train"], split["test"]
    column = _text_column(name, train)
    sha256 = "; ".join(hub_identity(name))
    return Texts(_rows(train, column), _rows(valid, column), None, sha256)


def _load(name: str) -> dict[str, Any]:
    """The splits of a data set, `train` among them.

    Raises:
        ValueError: the package is not installed; no such data set; no split called train.
    """
    try:
        import datasets
    except ImportError as error:
        raise ValueError(
            f"corpus {name!r}: expected the package datasets; got: {error}; {get_extra('hf')}"
        ) from None
    where = name.removeprefix(HUB)
    folder = Path(where).expanduser()
    try:
        if (folder / "dataset_dict.json").exists() or (folder / "state.json").exists():
            loaded = datasets.load_from_disk(str(folder))
        else:
            path, _, configuration = (
                (str(folder), "", "") if folder.exists() else where.partition(":")
            )
            loaded = datasets.load_dataset(path, configuration or None)
    except Exception as error:  # the library raises many kinds, also those of its network client
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"corpus {name!r}: expected a data set by name (online) or a folder of one; got "
            f"{type(error).__name__}: {reason}"
        ) from error
    parts = dict(loaded) if isinstance(loaded, dict) else {"train": loaded}
    if "train" not in parts:
        raise unknown(f"corpus {name!r}: split", "train", parts)
    return parts


def _text_column(name: str, data: Any) -> str:
    strings = [
        column
        for column, feature in data.features.items()
        if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if not strings:
        raise ValueError(
            f"corpus {name!r}: expected a column of strings; got columns "
            f"{', '.join(data.column_names)}"
        )
    return "text" if "text" in strings else strings[0]


def _rows(data: Any, column: str) -> Iterator[Iterable[bytes]]:
    """Rows that are not blank, as UTF-8."""
    return (
        [text.encode()]
        for row in data.select_columns([column])
        if (text := row[column] or "").strip()
    )
