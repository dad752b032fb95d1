"""Prepared corpora: the tokens that memory would hold, written once, mapped after.

Refused when damaged; and data sets.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from bayes_router import progress
from bayes_router.config import with_changes
from bayes_router.data import prepared as prepared_module
from bayes_router.data.load import text_data
from bayes_router.data.prepared import BLOCK, MappedTokens, _blocks, prepared_data
from bayes_router.data.tokenisers import ByteTokeniser
from bayes_router.files import CAN_HOLD
from bayes_router.training.fit import Trainer, fit, load_data
from bayes_router.training.fitted_text import FITTED_TEXT
from tests.tiny import fit_config


def assert_equal_batches(name: str, folder: Path, tokeniser: str = "bytes") -> None:
    want, got = text_data(name, tokeniser), text_data(name, tokeniser, prepared=str(folder))
    assert got.sha256 == want.sha256
    for a, b in ((got.train, want.train), (got.valid, want.valid)):
        assert isinstance(a, MappedTokens)
        assert len(a) == len(b)
        for step in range(3):
            assert all(
                torch.equal(x, y)
                for x, y in zip(a.batch(step, 4, 16, 0), b.batch(step, 4, 16, 0), strict=True)
            )
        whole = zip(a.windows(16, 7), b.windows(16, 7), strict=True)
        assert all(
            torch.equal(x.tokens, y.tokens) and torch.equal(x.targets, y.targets) for x, y in whole
        )


def test_a_folder_gives_the_tokens_and_the_split_of_memory(corpus: str, tmp_path: Path) -> None:
    assert_equal_batches(f"text:{corpus}", tmp_path)


def test_preparing_says_how_far_it_is_where_there_is_no_terminal(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS", 0.03)
    monkeypatch.setattr(prepared_module, "MEGABYTE", 100)
    usual = ByteTokeniser.encode

    def slowly(self: ByteTokeniser, text: bytes) -> Any:
        time.sleep(0.05)
        return usual(self, text)

    monkeypatch.setattr(ByteTokeniser, "encode", slowly)
    prepared_data(f"text:{corpus}", "bytes", 0.1, 0, str(tmp_path))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("tokenising")]
    size = sum(path.stat().st_size for path in Path(corpus).rglob("*") if path.is_file())
    assert lines and all(f" of {-(-size // 100)} megabytes, " in line for line in lines)
    done = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert done == sorted(done) and done[-1] > 0


@pytest.mark.parametrize("block", [64, 1000, BLOCK])
def test_one_file_gives_the_tokens_and_the_cut_of_memory(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_module, "BLOCK", block)
    text = "\n\n".join(f"Absatz {i}: größer, 漢字, " + "wort " * (i % 17) for i in range(200))
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    assert_equal_batches(f"text:{tmp_path / 'one.txt'}", tmp_path / "prepared")


def test_copies_and_blank_files_are_treated_alike(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(12):
        (tmp_path / "text" / f"{i}.txt").write_text(
            f"document {i // 3} " * 20 if i % 4 else "\n \n"
        )
    assert_equal_batches(f"text:{tmp_path / 'text'}", tmp_path / "prepared")


@pytest.mark.parametrize("block", [2, 3, 5, 64])
def test_blocks_add_up_and_end_with_characters(
    tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepared_module, "BLOCK", block)
    content = ("ü漢🙂a" * 40 + " zwei\ndrei " + "x" * 90).encode()
    (tmp_path / "f").write_bytes(content)
    assert b"".join(_blocks(tmp_path / "f")) == content
    assert b"".join(_blocks(tmp_path / "f", 4, 300)) == content[4:300]
    if block >= 5:
        for part in _blocks(tmp_path / "f"):
            part.decode("utf-8")


def test_it_is_written_once(corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared_data(f"text:{corpus}", "bytes", 0.1, 0, str(tmp_path))
    (home,) = tmp_path.iterdir()
    assert {path.name for path in home.iterdir()} == {"train.bin", "valid.bin", "prepared.json"}
    monkeypatch.setattr(prepared_module, "_write", None)
    prepared_data(f"text:{corpus}", "bytes", 0.1, 0, str(tmp_path))
    with pytest.raises(TypeError):  # another share is another corpus
        prepared_data(f"text:{corpus}", "bytes", 0.2, 0, str(tmp_path))
    assert list(tmp_path.iterdir()) == [home]  # and what failed has left nothing


@pytest.mark.skipif(not CAN_HOLD, reason="without locks nobody knows who still writes")
def test_what_a_killed_process_left_is_removed_and_what_is_being_written_is_not(
    corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(folder: Path, *_: object) -> None:
        (folder / "train.bin").write_bytes(b"half")
        time.sleep(60)

    def child(fraction: float) -> tuple[int, Path]:
        """A process that is in the middle of writing, and its folder."""
        before = set(tmp_path.iterdir())
        pid = os.fork()
        if pid == 0:
            monkeypatch.setattr(prepared_module, "_write", stuck)
            prepared_data(f"text:{corpus}", "bytes", fraction, 0, str(tmp_path))
            os._exit(0)
        for _ in range(2000):
            new = [
                path
                for path in tmp_path.iterdir()
                if path not in before and (path / "train.bin").exists()
            ]
            if new:
                return pid, new[0]
            time.sleep(0.01)
        raise AssertionError("nothing was written")

    (killed, left), (alive, held) = child(0.1), child(0.2)
    try:
        os.kill(killed, signal.SIGKILL)
        os.waitpid(killed, 0)
        assert left.is_dir()
        prepared_data(f"text:{corpus}", "bytes", 0.3, 0, str(tmp_path))
        assert not left.exists() and held.is_dir()
    finally:
        os.kill(alive, signal.SIGKILL)
        os.waitpid(alive, 0)
    prepared_data(f"text:{corpus}", "bytes", 0.2, 0, str(tmp_path))
    assert not list(tmp_path.glob(".*")) and len(list(tmp_path.iterdir())) == 2


def test_a_changed_file_is_prepared_again(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("one two three\n" * 50)
    before = text_data(f"text:{tmp_path / 'f.txt'}", prepared=str(tmp_path / "p"))
    (tmp_path / "f.txt").write_text("four five six\n" * 60)
    after = text_data(f"text:{tmp_path / 'f.txt'}", prepared=str(tmp_path / "p"))
    assert before.sha256 != after.sha256


@pytest.mark.parametrize("damage", ["short", "gone", "table", "no number"])
def test_damage_is_named(corpus: str, tmp_path: Path, damage: str) -> None:
    name = f"text:{corpus}"
    prepared_data(name, "bytes", 0.1, 0, str(tmp_path))
    (home,) = tmp_path.iterdir()
    if damage == "short":
        (home / "train.bin").write_bytes(b"abc")
    elif damage == "gone":
        (home / "valid.bin").unlink()
    elif damage == "table":
        (home / "prepared.json").write_text("{")
    else:
        (home / "prepared.json").write_text(json.dumps({"sha256": "", "train": "many", "valid": 1}))
    with pytest.raises(ValueError, match=f"{home}.*expected"):
        prepared_data(name, "bytes", 0.1, 0, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe", "invalid UTF-8 at byte 0"), (b"a\0b", "a NUL byte"), (b" \n", "without any")],
)
def test_what_is_no_text_is_refused_as_in_memory(
    tmp_path: Path, content: bytes, message: str
) -> None:
    (tmp_path / "f").write_bytes(content)
    for folder in ("", str(tmp_path / "p")):
        with pytest.raises(ValueError, match=message):
            text_data(f"text:{tmp_path / 'f'}", prepared=folder)
    assert not list((tmp_path / "p").glob("*")) if (tmp_path / "p").exists() else True


def test_a_fit_on_prepared_text_is_the_same_fit(
    corpus: str, finished_run: Path, tmp_path: Path
) -> None:
    config = with_changes(fit_config(corpus), {"data.prepared": str(tmp_path / "prepared")})
    fit(config, tmp_path / "run", progress=False)
    for file in ("model.safetensors", FITTED_TEXT):
        assert (tmp_path / "run" / file).read_bytes() == (finished_run / file).read_bytes()


def test_resident_memory_stays_flat_while_a_corpus_streams(tmp_path: Path) -> None:
    """200 MB of tokens, of which batches touch every part: the process grows by far less."""
    size = 200_000_000
    with open(tmp_path / "train.bin", "wb") as file:
        for _ in range(20):
            file.write(torch.randint(97, 123, (size // 20,), dtype=torch.uint8).numpy().tobytes())
    tokens = MappedTokens(tmp_path / "train.bin", size, ByteTokeniser(), "big")
    process = psutil.Process()
    tokens.batch(0, 64, 512, 0)
    before = process.memory_info().rss
    for step in range(400):
        tokens.batch(step, 64, 512, 0)
    assert process.memory_info().rss - before < 20_000_000


# Data sets of Hugging Face


def test_a_data_set_without_the_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        ValueError, match=r"corpus 'hf:x': expected the package datasets.*pip install -e '.\[hf\]'"
    ):
        text_data("hf:x", prepared=str(tmp_path))


ROWS = [f"row {i} of the data set, " + "words " * (i % 9) for i in range(60)]


@pytest.mark.parametrize("splits", [("train",), ("train", "validation"), ("train", "test")])
@pytest.mark.parametrize("form", ["saved", "jsonl"])
def test_a_local_data_set_is_a_corpus(
    tmp_path: Path, splits: tuple[str, ...], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    made = datasets.DatasetDict(
        {
            split: datasets.Dataset.from_dict({"id": list(range(60)), "text": ROWS})
            for split in splits
        }
    )
    if form == "saved":
        made.save_to_disk(str(tmp_path / "set"))
    else:
        (tmp_path / "set").mkdir()
        for split in splits:
            made[split].to_json(str(tmp_path / "set" / f"{split}.jsonl"))
    data = text_data(f"hf:{tmp_path / 'set'}", prepared=str(tmp_path / "prepared"))
    whole = len("\n\n".join(ROWS))
    assert (
        len(data.valid) == whole
        if len(splits) == 2
        else 0.05 * whole < len(data.valid) < 0.2 * whole
    )
    text = data.tokeniser.decode(next(iter(data.train.windows(len(data.train) - 1, 1))).tokens[0])
    assert ("row 7 of" in text or len(splits) == 1) and "\n\n" in text
    config = with_changes(
        fit_config("x"),
        {"data.corpus": f"hf:{tmp_path / 'set'}", "data.prepared": str(tmp_path / "prepared")},
    )
    config, loaded = load_data(with_changes(config, {"data.context": 16, "data.eval_tokens": 16}))
    Trainer(config, loaded, torch.device("cpu")).step(0)


def test_no_such_data_set_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="corpus 'hf:.*empty': expected a data set") as error:
        text_data(f"hf:{tmp_path / 'empty'}", prepared=str(tmp_path))
    assert "\n" not in str(error.value)
