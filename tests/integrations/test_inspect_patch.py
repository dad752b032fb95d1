"""`inspect`, `report` and the diagnostics read a saved patch.

From end to end on a tiny Llama and GPT-2.
"""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bayes_router.cli import main
from bayes_router.data.stream import MaskedStream, TokenStream
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.fitted import fitted_patch
from bayes_router.diagnostics.reading import read, windows
from bayes_router.diagnostics.report import write_report
from bayes_router.integrations.patch.saving import HELD_OUT, SETTINGS
from bayes_router.integrations.patching import load_patch, patch
from bayes_router.transformer.frozen import Frozen
from bayes_router.types import IGNORED
from tests.integrations.tiny_models import GENERAL, VOCAB, scatter_routes, tiny, transformers

TEXT = torch.randint(3, VOCAB, (400,), generator=torch.Generator().manual_seed(0)).repeat(4)
EFFORT = Effort(None, 4, 2, 1, 100, (1, 4), 1, 8, 2, 1)
WORDS = [
    "the",
    "a",
    "of",
    "to",
    "and",
    "in",
    "river",
    "stone",
    "light",
    "house",
    "morning",
    "road",
    "wind",
    "old",
    "new",
    "one",
    "two",
    "said",
    "went",
    "came",
    "over",
    "under",
]


def tokenizer() -> Any:
    """Words and spaces, as a fast Hugging Face tokenizer."""
    tokenizers = pytest.importorskip("tokenizers")
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", eos_token="</s>", bos_token="<s>"
    )


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folders(request: Any, tmp_path_factory: Any) -> tuple[Path, Path, Path]:
    """(base without a tokenizer, base with one, patch) on disk."""
    model, root = tiny(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(root / "base")
    model.save_pretrained(root / "worded")
    tokenizer().save_pretrained(root / "worded")
    router = patch(model, window=6, sinks=2, experts=("full", "local"))
    router.fit(TEXT, steps=2, context=24, batch_size=2, budget=0.6)
    scatter_routes(router)
    router.save(root / "patch", held_out=True)
    return root / "base", root / "worded", root / "patch"


def options(folders: tuple[Path, Path, Path], worded: bool = False) -> list[str]:
    return [str(folders[2]), "--base", str(folders[1] if worded else folders[0]), "--device", "cpu"]


def test_inspect_shows_held_out_ids_or_a_text(folders: Any, tmp_path: Path, capsys: Any) -> None:
    assert (
        main(["inspect", *options(folders), "--layer", "1", "--tokens", "40", "--colour", "never"])
        == 0
    )
    shown = capsys.readouterr().out
    assert "\nlayer 1: f:" in shown and "local" in shown and "no tokenizer" in shown
    held_out = load_patch(
        tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2]
    ).held_out
    assert f"{int(held_out.tokens[0])} {int(held_out.tokens[1])} " in shown
    text = tmp_path / "text.txt"
    text.write_text(
        "the river came over the old stone house and the wind went under the road " * 60
    )
    assert main(["inspect", *options(folders, True), "--text", str(text), "--colour", "never"]) == 0
    assert "river" in capsys.readouterr().out
    assert (
        main(["inspect", *options(folders, True), "--corpus", f"text:{text}", "--colour", "never"])
        == 0
    )
    assert "house" in capsys.readouterr().out
    out = tmp_path / "worded.html"
    assert (
        main(["report", *options(folders, True), "--text", str(text), "--out", str(out), "--quick"])
        == 0
    )
    assert (
        "Uncertainty by kind of token" in out.read_text()
        and "kinds of token" not in capsys.readouterr().out
    )


def test_report_is_written_and_names_what_it_leaves_out(folders: Any, capsys: Any) -> None:
    assert main(["report", *options(folders), "--quick", "--tokens", "60", "--context", "20"]) == 0
    out, html = capsys.readouterr().out, (folders[2] / "report.html").read_text()
    for reason in ("over training", "posteriors on the simplex", "kinds of token"):
        assert f"left out: {reason}" in out and reason in html.split("<h2>Figures")[0]
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert (
        len(data["pieces"]) == 60
        and len(data["layers"]) == 2
        and data["experts"] == ["full", "local"]
    )


def test_a_report_tells_the_price_apart_from_the_distance_to_the_prior(
    folders: Any, tmp_path: Path
) -> None:
    router = load_patch(tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2])
    price, weight = 5000.0, router.fitted.kl_weight  # where a fit for a range of budgets may end
    router.fitted = replace(router.fitted, price=price)
    router.save(tmp_path, held_out=True)
    layers = Examination(fitted_patch(router, router.held_out, context=20)).collapse.layers()
    router.unpatch()
    arguments = [str(tmp_path), *options(folders)[1:], "--quick", "--tokens", "60"]
    assert main(["report", *arguments, "--context", "20"]) == 0
    html, sums = (tmp_path / "report.html").read_text(), layers.sum()
    assert sums["kl"] > 50 * sums["kl_untilted"]
    apart = f"{sums['kl_untilted']:.4f} nats per token, {sums['kl_untilted'] / 2:.4f} a unit"
    assert f"{apart}, without the prior&#39;s tilt (with the tilt, by a price of 5,000," in html
    assert f"{sums['kl']:,.1f}); " in html
    assert f"weight, {weight:.3g}, it pays {weight * sums['kl']:.4f}" in html
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert data["price"] == price and max(data["layers"][0]["kl"]) < sums["kl"] / 4
    assert "kl untilted" in html and ">kl<" not in html
    paid = weight * router.fitted.read["kl"]
    card = (tmp_path / "README.md").read_text()
    assert re.search(rf"KL to the prior at its weight and price, .*\| {paid:.4f} ", card)


def test_a_report_of_frozen_units_says_that_it_reads_what_they_would_choose(
    folders: Any, tmp_path: Path, capsys: Any
) -> None:
    """A static unit has no posterior: its certainty would stand in every figure."""
    router = load_patch(tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2])
    router.frozen = Frozen(((1,), (-1,)))
    router.save(tmp_path, held_out=True)
    card = (tmp_path / "README.md").read_text()
    assert "| frozen units, whose route is static | 1 of 2 |" in card
    with pytest.raises(ValueError, match="run: expected a fit whose units all choose; got '1 froz"):
        Examination(fitted_patch(router, router.held_out, context=24))
    router.unpatch()
    arguments = [str(tmp_path), *options(folders)[1:], "--quick", "--tokens", "60"]
    assert main(["report", *arguments, "--context", "20"]) == 0
    out, html = capsys.readouterr().out, (tmp_path / "report.html").read_text()
    assert "left out: static routes: 1 of 2 units are frozen; read is what all of them" in out
    assert "1 of 2 units are frozen" in html and "10000.0" not in html


@pytest.mark.parametrize("folders", ["llama"], indirect=True)  # the page of gpt2 is read above
def test_every_diagnostic_reads_a_patched_model(folders: Any) -> None:
    router = load_patch(tiny("llama"), folders[2])
    assert router.fitted is not None and router.fitted.context == 24 and router.fitted.budget == 0.6
    run = fitted_patch(router, router.held_out, context=24)
    assert run.program.price == router.fitted.price and run.program.straight_through
    examined = Examination(run, effort=EFFORT)
    assert len(examined.uncertainty.layers()) == 2 and len(examined.collapse.layers()) == 2
    assert examined.figures().drop("rank correlation of entropy and regret").notna().any()
    topics = {verdict.topic for verdict in examined.verdicts()}
    assert {"guide", "amortisation", "calibration"} <= topics
    assert sum(verdict.topic == "amortisation" for verdict in examined.verdicts()) == 1
    reason = "amortisation under the ELBO: the price of a patch is one at its fit's KL weight"
    assert any(one.startswith(reason) for one in examined.left_out())
    assert "Reliability" in write_report(examined, limit=48)


REFUSED = {
    "no base": (
        [],
        "base: expected the (Llama|GPT2).* that the patch .* was made for; got None; give --base",
    ),
    "no such base": (["--base", "nowhere/at all"], "base: expected the folder or the name"),
    "another model": (["--base", "OTHER"], "was made for"),
    "text without a tokenizer": (
        ["--base", "BASE", "--corpus", "stdlib"],
        "corpus: expected a base model with a tokenizer",
    ),
    "long context": (
        ["--base", "BASE", "--context", "5000"],
        "context: expected at most the 256 positions",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_missing_is_named_with_the_fix(
    case: str, folders: Any, tmp_path: Path, capsys: Any
) -> None:
    tiny("llama", seed=5).save_pretrained(tmp_path / "other")
    given, message = REFUSED[case]
    given = [
        {"BASE": str(folders[0]), "OTHER": str(tmp_path / "other")}.get(word, word)
        for word in given
    ]
    assert main(["inspect", str(folders[2]), "--device", "cpu", *given]) == 2
    assert re.search(message, capsys.readouterr().err)


def test_a_patch_without_text_asks_for_one(folders: Any, tmp_path: Path, capsys: Any) -> None:
    router = load_patch(tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2])
    router.save(tmp_path)
    assert not (tmp_path / HELD_OUT).exists() and (tmp_path / SETTINGS).exists()
    assert main(["inspect", str(tmp_path), "--base", str(folders[0]), "--device", "cpu"]) == 2
    assert "give --corpus NAME or --text FILE" in capsys.readouterr().err


def test_a_run_takes_no_base(finished_run: Path, capsys: Any) -> None:
    assert main(["inspect", str(finished_run), "--base", "somewhere", "--device", "cpu"]) == 2
    assert "base: expected none for a run" in capsys.readouterr().err


class Masks:
    """As much of a tokenizer as a fit on ids asks for."""

    mask_token_id = 3


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: Any) -> tuple[Path, Path]:
    """(base with a tokenizer, patch) of a tiny BERT on disk."""
    model, root = tiny("bert"), tmp_path_factory.mktemp("bert")
    model.save_pretrained(root / "base")
    words = tokenizer()
    words.mask_token = "the"
    words.save_pretrained(root / "base")
    router = patch(model, window=6)
    router.fit(TEXT, tokenizer=Masks(), steps=2, context=24, batch_size=2, distil_steps=2)
    scatter_routes(router)
    router.save(root / "patch", held_out=True)
    return root / "base", root / "patch"


def test_encoders_are_inspected_and_reported(
    encoder: tuple[Path, Path], tmp_path: Path, capsys: Any
) -> None:
    base, saved = encoder
    given = [str(saved), "--base", str(base), "--device", "cpu"]
    assert main(["inspect", *given, "--layer", "1", "--tokens", "48", "--colour", "never"]) == 0
    shown = capsys.readouterr().out
    assert "\nlayer 1: f:" in shown and "mapped" in shown
    text = tmp_path / "text.txt"
    text.write_text(
        "the river came over the old stone house and the wind went under the road " * 60
    )
    assert main(["inspect", *given, "--text", str(text), "--colour", "never"]) == 0
    assert "river" in capsys.readouterr().out
    assert main(["inspect", *given, "--corpus", f"text:{text}", "--colour", "never"]) == 0
    assert (
        main(
            ["report", *given, "--quick", "--tokens", "60", "--out", str(tmp_path / "report.html")]
        )
        == 0
    )
    assert "Load by layer" in (tmp_path / "report.html").read_text()


def test_diagnostics_of_an_encoder_read_hidden_tokens(encoder: tuple[Path, Path]) -> None:
    router = load_patch(tiny("bert"), encoder[1])
    assert isinstance(router.held_out, MaskedStream) and router.held_out.mask_token == 3
    run = fitted_patch(router, router.held_out, context=24)
    assert not run.causal
    reading = next(read(run.model, windows(run.held_out, run.config)))
    hidden = reading.targets != IGNORED
    assert 0 < hidden.float().mean() < 0.2 and (reading.tokens[hidden] == 3).all()
    own = reading.own_nll(run.causal)
    assert torch.equal(own.isnan(), ~hidden) and torch.equal(own[hidden], reading.nll[hidden])
    examined = Examination(run, effort=EFFORT)
    assert len(examined.uncertainty.layers()) == 2 and len(examined.collapse.layers()) == 2
    assert len(examined.verdicts(quick=True))
    with pytest.raises(ValueError, match="held_out: expected text with hidden tokens"):
        fitted_patch(router, TokenStream(TEXT, VOCAB), context=24)


def test_the_whole_report_of_an_encoder(encoder: tuple[Path, Path], tmp_path: Path) -> None:
    router = load_patch(tiny("bert"), encoder[1])
    run = fitted_patch(router, router.held_out, context=24)
    examined = Examination(run, effort=EFFORT)
    assert {verdict.topic for verdict in examined.verdicts()} >= {
        "guide",
        "amortisation",
        "calibration",
    }
    # no weight belongs to a prefix of what is read from both sides
    assert set(examined.k_hat["length"]) == {24}
    row = examined.regret.iloc[0]
    batch = list(run.held_out.windows(24, 1))[int(row["sequence"])]
    with torch.no_grad():
        out = router(batch.tokens)
    nll = torch.nn.functional.cross_entropy(
        out.logits[0], batch.targets[0], ignore_index=IGNORED, reduction="none"
    )
    # all of the text was read
    assert row[f"loss_{row['choice']}"] == pytest.approx(float(nll[int(row["position"])]), abs=1e-4)
    html = write_report(examined, limit=48)
    data = json.loads(html.split('id="data">')[1].split("</script>")[0])
    assert [value is None for value in data["nll"]] == [
        position % 24 % 7 != 3 for position in range(48)
    ]
    assert "an encoder reads both sides" in html and "Reliability" in html


def test_own_nll_of_a_decoder_is_said_a_token_before(folders: Any) -> None:
    router = load_patch(tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2])
    run = fitted_patch(router, router.held_out, context=24)
    reading = next(read(run.model, windows(run.held_out, run.config)))
    own = reading.own_nll()
    assert own[:, 0].isnan().all() and torch.equal(own[:, 1:], reading.nll[:, :-1])
    assert torch.equal(reading.hard_choice, run.model.policy(reading.concentration))


def test_torch_modules_state_the_limit(tmp_path: Path, capsys: Any) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 4, 48, batch_first=True)
    router = patch(torch.nn.TransformerEncoder(layer, 1), window=6)
    with pytest.raises(
        ValueError, match=r"model: expected a patched language model.*statistics\(\) and kl\(\)"
    ):
        fitted_patch(router, None, context=8)  # type: ignore[arg-type]
    router.save(tmp_path)
    assert main(["inspect", str(tmp_path), "--device", "cpu"]) == 2
    assert "run: expected the patch of a language model" in capsys.readouterr().err


def test_a_model_without_a_head_states_the_limit() -> None:
    model = transformers.BertModel(transformers.BertConfig(**GENERAL)).eval()
    with pytest.raises(ValueError, match="with its head"):
        fitted_patch(patch(model, window=6), MaskedStream(TEXT, VOCAB, 3), context=8)


def test_held_out_text_is_written_only_where_asked_for(folders: Any, tmp_path: Path) -> None:
    router = load_patch(tiny("llama" if "llama" in str(folders[0]) else "gpt2"), folders[2])
    router.save(tmp_path)
    assert router.held_out is not None and not (tmp_path / HELD_OUT).exists()
    router.save(tmp_path, held_out=True)
    assert (tmp_path / HELD_OUT).is_file()
    router.save(tmp_path)
    assert not (tmp_path / HELD_OUT).exists()  # nor is what was there left behind
