"""What people hand over by mistake to the public names: refused in one line that names it."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bayes_router import (
    Argmax,
    Budget,
    Config,
    Conservative,
    ModelConfig,
    PriorConfig,
    RoutedAttention,
    RoutedLanguageModel,
    evaluate,
    fit,
)
from bayes_router.data.stream import stream_of
from bayes_router.files import check_file_for, write_text
from bayes_router.integrations.huggingface.fit_settings import FitSettings
from bayes_router.integrations.patch.settings import RouterConfig
from bayes_router.settings.fit import DataConfig, TrainConfig
from bayes_router.settings.prior import ScheduleConfig
from bayes_router.training.guarantee import check_promise

ANY: Any = None  # what no type checker would let through
IDS = torch.randint(64, (2, 12))


@pytest.fixture(scope="module")
def lm() -> RoutedLanguageModel:
    config = ModelConfig(vocab_size=64, d_model=16, num_layers=2, num_heads=2, window=8)
    return RoutedLanguageModel(config).eval()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: ModelConfig(d_model="64"), "model.d_model: expected a whole number; got '64'"),
        (lambda: ModelConfig(num_layers=True), "model.num_layers: expected a whole number"),
        (lambda: ModelConfig(d_model=64.0), "model.d_model: expected a whole number; got 64.0"),
        (lambda: ModelConfig(experts="full"), "model.experts: expected a tuple, each a name"),
        (lambda: ModelConfig(experts=(1, 2)), "model.experts: expected a tuple, each a name"),
        (lambda: ModelConfig(num_kv_heads="2"), "model.num_kv_heads: expected a whole number;"),
        (lambda: PriorConfig(temperature="0.3"), "prior.temperature: expected a number"),
        (lambda: PriorConfig(layer_temperature=0.3), "prior.layer_temperature: expected a tuple"),
        (lambda: ScheduleConfig(anneal_to=None), "schedule.anneal_to: expected a number"),
        (lambda: DataConfig(corpus=3), "data.corpus: expected a name; got 3"),
        (lambda: TrainConfig(compile="no"), "train.compile: expected true or false; got 'no'"),
        (lambda: TrainConfig(steps=1.5), "train.steps: expected a whole number; got 1.5"),
        (lambda: RouterConfig(window="big"), "window: expected a whole number; got 'big'"),
        (lambda: RouterConfig(experts="full"), "experts: expected a tuple, each a name; got"),
        (lambda: FitSettings(steps=1.5), "steps: expected a whole number; got 1.5"),
        (lambda: FitSettings(lr="fast"), "lr: expected a number; got 'fast'"),
        (lambda: FitSettings(budget="half"), "budget: expected a number or a tuple, each a number"),
        (lambda: FitSettings(context=64.0), "context: expected a whole number or a tuple, each a"),
        (lambda: Budget("full"), "policy.cost_ratio: expected a number an expert; got 'full'"),
        (lambda: Budget(()), "policy.cost_ratio: expected a number an expert; got ()"),
        (lambda: Budget((1.0, 0.5), np.nan), "policy.price: expected a finite number; got nan"),
        (lambda: Conservative((1.0, None)), "policy.cost_ratio: expected a number an expert"),
        (lambda: Budget((1.0, 0.5))(torch.rand(2, 3)), "policy.cost_ratio: expected 3, one an"),
        (lambda: RoutedLanguageModel(ANY), "config: expected a ModelConfig; got 'NoneType'"),
        (lambda: RoutedAttention(16), "config: expected a ModelConfig; got 'int'"),
        (lambda: fit({"model": {}}, "nowhere"), "config: expected a Config; got 'dict'"),
        (lambda: check_promise("0.5%", 0.95), "quality: expected a share of perplexity above 0"),
        (lambda: check_promise(np.inf, 0.95), "quality: expected a share of perplexity above 0"),
    ],
)
def test_settings_of_another_kind(make: Callable[[], object], says: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        make()


def test_numbers_of_numpy_and_lists_are_settings_too() -> None:
    made = ModelConfig(d_model=np.int64(64), mlp_ratio=np.float32(2), experts=["full", "local"])
    assert made.d_model == 64 and PriorConfig(price=3).price == 3


@pytest.mark.parametrize(
    ("use", "says"),
    [
        (lambda lm: lm(IDS[:, :0]), "tokens: expected at least one row and one token; got (2, 0)"),
        (lambda lm: lm(IDS[:0]), "tokens: expected at least one row and one token; got (0, 12)"),
        (lambda lm: lm(IDS, force=1), "force: expected an expert's name, or choices [L, B, T, R]"),
        (lambda lm: evaluate(lm, None, torch.ones(2, 3), context=8, batch_size=1), "source: exp"),
    ],
)
def test_a_model_is_told_what_it_cannot_read(
    lm: RoutedLanguageModel, use: Callable[[RoutedLanguageModel], object], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(says)}"):
        use(lm)


@pytest.mark.parametrize(
    ("policy", "says"),
    [
        ("argmax", "a policy: concentration -> choices; got 'argmax'; set one, such as Argmax()"),
        (None, "a policy: concentration -> choices; got None"),
        (Argmax, "a policy: concentration -> choices; got <class"),
        (lambda c: c.argmax(-1).float(), "choices int64, one a token and unit; got torch.float32"),
        (lambda c: c.argmax(-1)[:1], "choices (2, 12, 1); got (1, 12, 1)"),
    ],
)
def test_what_is_no_policy(lm: RoutedLanguageModel, policy: Any, says: str) -> None:
    lm.policy = policy
    try:
        with pytest.raises(ValueError, match=f"^policy: expected {re.escape(says)}"):
            lm(IDS, mode="hard")
    finally:
        lm.policy = Argmax()


@pytest.mark.parametrize(
    ("texts", "says"),
    [
        (torch.rand(100), "token ids, whole numbers; got torch.float32"),
        (torch.ones(100, dtype=torch.bool), "token ids, whole numbers; got torch.bool"),
        ([1, 2, 3], "text, texts or ids as a tensor [N]; got 'list'"),
        (None, "text, texts or ids as a tensor [N]; got 'NoneType'"),
    ],
)
def test_what_is_no_text(texts: Any, says: str) -> None:
    with pytest.raises(ValueError, match=f"^texts: expected {re.escape(says)}"):
        stream_of(texts, None, 64, causal=True)


def test_ids_of_any_width_are_text() -> None:
    ids = np.arange(20, dtype=np.int32)
    streams = [stream_of(one, None, 64, causal=True) for one in (ids, torch.from_numpy(ids))]
    assert all(one.tokens.tolist() == ids.tolist() for one in streams)


def test_a_pipe_is_written_into_and_a_link_leads_to_its_file(tmp_path: Path) -> None:
    """A file that is renamed would take their place, a device's too."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    check_file_for(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "read")
    assert os.read(reader, 10) == b"read" and pipe.is_fifo()
    os.close(reader)
    (tmp_path / "file").write_text("old", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new"
    if Path("/dev/full").is_char_device():
        with pytest.raises(OSError, match="No space left"):
            write_text(Path("/dev/full"), "x" * 100_000)
        assert Path("/dev/full").is_char_device()


def test_a_run_is_either_resumed_or_overwritten_and_takes_no_file_s_place(tmp_path: Path) -> None:
    file = tmp_path / "thesis.txt"
    file.write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match="out: expected a folder; .*thesis.txt is a file"):
        fit(Config(), file, overwrite=True, progress=False)
    assert file.read_text(encoding="utf-8") == "mine"
    with pytest.raises(ValueError, match="overwrite: expected it without resume; got both"):
        fit(Config(), tmp_path / "run", overwrite=True, resume=True, progress=False)
