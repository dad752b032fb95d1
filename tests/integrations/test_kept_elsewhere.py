"""Models as people hold them.

In another precision, offloaded by accelerate, with added tokens, inside a wrapper.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from bayes_router.integrations.patch.identity import FEWEST, SIGNED, identity, sums_of
from bayes_router.integrations.patch.offload import weights
from bayes_router.integrations.patch.saving import BASE
from bayes_router.integrations.patching import load_patch, patch
from tests.integrations.tiny_models import VOCAB, patched, scatter_routes, tiny, tokens

TEXT = torch.randint(3, VOCAB, (500,), generator=torch.Generator().manual_seed(1))
SMALL: dict[str, Any] = {"steps": 1, "distil_steps": 1, "context": 20, "batch_size": 2}
KINDS = {
    "float": torch.float32,
    "double": torch.float64,
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
}


def checkpoint(kind: str, seed: int = 0, shift: float = 0.0) -> Any:
    """One checkpoint of float32 weights, large, small and too small for float16, in a precision."""
    model = tiny("llama", seed)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(torch.logspace(-7, 0, p.numel()).view_as(p) * 3).add_(shift * p.abs())
    return getattr(model, kind)()


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("now", KINDS)
@pytest.mark.parametrize("saved", KINDS)
def test_a_patch_knows_its_model_in_every_precision(saved: str, now: str, tmp_path: Path) -> None:
    model = checkpoint(saved)
    patch(model, window=6).save(tmp_path)
    load_patch(checkpoint(now), tmp_path)
    getattr(model, now)()
    again = tmp_path / "again"  # no warning that the weights moved
    patch(model, window=6).save(again)
    load_patch(checkpoint(saved), again)
    if {saved, now} == {"float", "double"}:
        return
    for other in ({"seed": 1}, {"shift": 0.03}):
        with pytest.raises(ValueError, match="weights or architecture differ"):
            load_patch(checkpoint(now, **other), tmp_path)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["float", "bfloat16", "half"])
def test_a_patch_of_a_lightly_changed_model_is_refused(kind: str, tmp_path: Path) -> None:
    patch(tiny("llama"), window=6).save(tmp_path)
    load_patch(getattr(tiny("llama"), kind)(), tmp_path)
    model = tiny("llama")
    torch.manual_seed(1)
    for p in model.parameters():  # as a short fine-tune would
        p += 0.02 * p.std() * torch.randn_like(p)
    with pytest.raises(ValueError, match="weights or architecture differ"):
        load_patch(getattr(model, kind)(), tmp_path)


@torch.no_grad()
@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("kind", ["float", "bfloat16"])
def test_a_patch_is_taken_by_its_model_with_added_tokens(kind: str, tmp_path: Path) -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    router.save(tmp_path)
    model.resize_token_embeddings(VOCAB + 5)
    router.save(tmp_path / "again")  # no warning that the weights moved
    router.unpatch()
    load_patch(getattr(model, kind)(), tmp_path).unpatch()
    load_patch(getattr(tiny("llama"), kind)(), tmp_path / "again")
    for number, p in enumerate(model.parameters()):
        if number == 3:  # one matrix of one layer
            p += 0.1 * p.std() * torch.randn_like(p)
    with pytest.raises(ValueError, match="weights or architecture differ"):
        load_patch(model, tmp_path)


@torch.no_grad()
def test_a_saved_patch_holds_no_weight_of_its_model(tmp_path: Path) -> None:
    model = tiny("llama")
    patch(model, window=6).save(tmp_path)
    held = load_file(tmp_path / BASE)
    numbers = torch.cat([x.double() for x in held.values()])
    weights = torch.cat([p.double().flatten() for p in model.parameters()]).unique()
    weights = weights[weights != 0]  # an embedding's row of padding
    assert len(held) > 10 and not torch.isin(numbers, weights).any()
    # of a tensor's 64 numbers 5 are kept
    assert all(x.shape == (SIGNED + 1,) for x in held.values()) and SIGNED + 1 < FEWEST


def test_sums_are_the_same_for_ever() -> None:
    # patches that were saved rest on the signs: they may never change
    found = sums_of(torch.arange(64.0)).values
    assert found[:-1].tolist() == [22.0, -12.0, -158.0, 36.0]


def test_a_patch_saved_with_numbers_of_the_base_is_still_loaded(tmp_path: Path) -> None:
    model = tiny("llama")
    patch(model, window=6).save(tmp_path)
    save_file(dict(numbers_of(model)), tmp_path / BASE)  # as patches of before have them
    for kind in ("float", "half", "bfloat16"):
        load_patch(getattr(tiny("llama"), kind)(), tmp_path)
    with pytest.raises(ValueError, match="weights or architecture differ"):
        load_patch(tiny("llama", 1).half(), tmp_path)


def numbers_of(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """64 numbers of each parameter, by its name and shape."""
    for name, p in model.named_parameters():
        flat = p.detach().flatten()
        index = torch.linspace(0, len(flat) - 1, min(64, len(flat)), dtype=torch.float64)
        yield f"{name}{tuple(p.shape)}", flat[index.long()]


def test_a_patch_saved_without_numbers_of_the_base_is_loaded_by_its_fingerprint(
    tmp_path: Path,
) -> None:
    patch(tiny("llama"), window=6).save(tmp_path)
    (tmp_path / BASE).unlink()
    load_patch(tiny("llama").bfloat16(), tmp_path)
    with pytest.raises(ValueError, match="weights or architecture differ"):
        load_patch(tiny("llama").half(), tmp_path)
    (tmp_path / BASE).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="base.safetensors"):
        load_patch(tiny("llama"), tmp_path)


def offload(model: Any, where: str, folder: Path) -> None:
    """By accelerate: all weights in memory or on disk.

    Or, as a device map has it, some layers here and some there.
    """
    import accelerate

    if where == "memory":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    elif where == "disk":
        accelerate.disk_offload(model, str(folder), execution_device=torch.device("cpu"))
    else:
        parts = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
        parts |= dict.fromkeys(
            ("model.layers.2", "model.norm", "model.rotary_emb", "lm_head"), "disk"
        )
        known = {name for name, _ in model.named_modules()}
        parts = {name: device for name, device in parts.items() if name in known}
        accelerate.dispatch_model(
            model, parts, main_device="cpu", offload_dir=str(folder), force_hooks=True
        )


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "where"),
    [(n, "memory") for n in ("llama", "gpt2", "falcon")]
    + [("llama", "disk"), ("gpt2", "disk"), ("llama", "device map")],
)
def test_offloaded_weights_are_routed_fitted_saved_and_loaded(
    name: str, where: str, when: str, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate")
    plain, router = tiny(name), patched(name, experts=("full", "mapped", "local"))[1]
    router.save(tmp_path)
    expected, kl = router(tokens()), float(router.kl())
    model = tiny(name)
    if when == "before":
        offload(model, where, tmp_path / "weights")
    again = load_patch(model, tmp_path)
    if when == "after":
        offload(model, where, tmp_path / "weights")
    assert (all if where != "device map" else any)(p.is_meta for p in model.parameters())
    assert again.device == torch.device("cpu")
    out = again(tokens())
    assert torch.equal(out.logits, expected.logits) and float(again.kl()) == pytest.approx(kl)
    again.save(tmp_path / "again")
    load_patch(tiny(name), tmp_path / "again")
    assert load_patch(model, tmp_path) is again
    before = [p.clone() for p in again.parameters()]
    again.fit(TEXT, **SMALL)
    assert any(not torch.equal(p, q) for p, q in zip(again.parameters(), before, strict=True))
    assert again.set_budget(1.0, TEXT, context=20, tolerance=1.0) <= 1.0
    with pytest.raises(ValueError, match="weights_lr.*offloaded"):
        again.fit(TEXT, weights_lr=1e-3, **SMALL)
    again.unpatch()
    assert torch.equal(model(tokens()).logits, plain(tokens()).logits)


def test_added_tokens_are_taken() -> None:
    model = tiny("llama")
    router = patch(model, window=6)
    with pytest.raises(ValueError, match=f"{VOCAB - 1}"):
        router.fit(TEXT + 5, **SMALL)
    model.resize_token_embeddings(VOCAB + 5)
    assert router.config.vocab_size == VOCAB + 5
    router.fit(TEXT + 5, **SMALL)
    assert router.held_out.vocab_size == VOCAB + 5


class Wrapper(nn.Module):
    """As PEFT, DistributedDataParallel and models of one's own are."""

    def __init__(self, **models: nn.Module):
        super().__init__()
        for name, model in models.items():
            setattr(self, name, model)

    def forward(self, ids: Any) -> Any:
        return next(self.children())(ids)


@pytest.mark.parametrize(
    "how", ["own", "twice", "parallel", pytest.param("compiled", marks=pytest.mark.slow)]
)
@torch.no_grad()
def test_the_model_inside_a_wrapper_is_routed(how: str, tmp_path: Path) -> None:
    model = tiny("llama")
    wrapper: Any = {
        "own": lambda: Wrapper(base_model=model),
        "twice": lambda: Wrapper(base_model=Wrapper(model=model, head=nn.Linear(2, 2))),
        "parallel": lambda: nn.DataParallel(model),
        "compiled": lambda: torch.compile(model, backend="eager"),
    }[how]()
    plain = wrapper(tokens()).logits
    router = patch(wrapper, window=6)
    scatter_routes(router)
    assert router.model is model and patch(wrapper, window=6) is router
    routed = wrapper(tokens()).logits
    assert torch.equal(routed, router(tokens()).logits) and not torch.allclose(
        routed, plain, atol=1e-3
    )
    router.save(tmp_path)
    router.unpatch()
    assert torch.equal(wrapper(tokens()).logits, plain)
    load_patch(wrapper, tmp_path)
    assert torch.equal(wrapper(tokens()).logits, routed)


def test_several_models_in_a_wrapper_are_named() -> None:
    with pytest.raises(ValueError, match="several, one, other.*each by itself"):
        patch(Wrapper(one=tiny("llama"), other=tiny("gpt2")))


@torch.no_grad()
def test_replicas_of_data_parallel_are_refused() -> None:
    model, _ = patched("llama")
    model.model.layers[0].self_attn._is_replica = True
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        model(tokens())


def test_a_model_that_is_nowhere_is_refused() -> None:
    model = tiny("llama").to("meta")
    with pytest.raises(ValueError, match="weights in memory; got .*meta device.*load them first"):
        patch(model, window=6)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_offloading_changes_no_name_and_no_number_that_a_model_is_known_by(
    where: str, tmp_path: Path
) -> None:
    """It takes the tied weights of GPT-2 apart."""
    pytest.importorskip("accelerate")
    model, plain = tiny("gpt2"), tiny("gpt2")
    offload(model, where, tmp_path)
    assert len(list(model.named_parameters())) > len(list(plain.named_parameters()))
    assert [name for name, _ in weights(model)] == [name for name, _ in weights(plain)]
    assert identity(model).fingerprint == identity(plain).fingerprint


def test_a_weight_is_read_by_the_hook_that_places_all_below_it() -> None:
    """As accelerate's AlignDevicesHook does with place_submodules."""
    pytest.importorskip("accelerate")
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.Linear(2, 3)))
    here = {name: p.detach().clone() for name, p in model[0].named_parameters()}
    add_hook_to_module(
        model[0],
        AlignDevicesHook("cpu", offload=True, weights_map=here, place_submodules=True),
    )
    assert all(p.is_meta for p in model.parameters())
    for name, found in weights(model):
        assert torch.equal(found, here[name.removeprefix("0.")])
