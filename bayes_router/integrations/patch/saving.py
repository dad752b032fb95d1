"""A patch on disk.

router.safetensors holds what was added; router.json the settings, the policy, the fit and the model
it belongs to.

base.safetensors has sums over that model's weights under random signs, which tell it from others in
another precision too and hold no weight. Where it was fitted, evidence.safetensors; where asked
for, held_out.safetensors: text that the fit did not read, as token ids.
"""

import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bayes_router.checks import nearest, require
from bayes_router.data.stream import MaskedStream, TokenStream
from bayes_router.files import write_json, write_whole
from bayes_router.hub import write_card
from bayes_router.integrations.patch.card import card
from bayes_router.integrations.patch.identity import Identity, Sums, as_saved, identity, read_kept
from bayes_router.integrations.patch.settings import SETTINGS, FitRecord, RouterConfig
from bayes_router.integrations.patch.shipped import shipped
from bayes_router.routing.evidence import Evidence
from bayes_router.routing.policy import Policy, policy_from_dict, policy_to_dict
from bayes_router.routing.risk import Risk
from bayes_router.routing.saving import save_evidence, save_risk
from bayes_router.transformer.frozen import Frozen, read_frozen

WEIGHTS, BASE, HELD_OUT = "router.safetensors", "base.safetensors", "held_out.safetensors"
FORMAT = 1
HELD_OUT_TOKENS = 32_768


class PatchRecord(NamedTuple):
    """What a patch is on disk, apart from the model that it belongs to."""

    model: nn.Module
    router: str  # class of what `patch` returned
    weights: dict[str, Tensor]
    settings: RouterConfig
    policy: Policy
    fitted: FitRecord | None
    made_for: Identity | None  # of the model as it was patched; None once the fit moved its weights
    held_out: TokenStream | None
    evidence: Evidence | None = None
    risk: Risk | None = None
    frozen: Frozen | None = None


def save_patch(record: PatchRecord, folder: Path | str) -> None:
    """Write the files of a patch; see `RoutedModel.save`.

    Raises:
        ValueError: the policy is not registered.
    """
    folder = Path(folder)
    policy = policy_to_dict(record.policy)
    require(not folder.is_file(), "folder", "a folder, or a new one", str(folder), "it is a file")
    folder.mkdir(parents=True, exist_ok=True)
    now, kind = identity(record.model), type(record.model).__name__
    base = str(getattr(record.model, "name_or_path", "") or "")
    moved = record.made_for is None or not now.same(record.made_for)
    if moved:
        warnings.warn(
            f"{kind}: its own weights moved since it was patched, and the patch fits them as they "
            f"are: "
            "save the model too (save_pretrained), or load_patch will find no model that the patch "
            "was made for",
            stacklevel=4,
        )
    weights = {key: value.detach().cpu().contiguous() for key, value in record.weights.items()}
    write_whole(folder / WEIGHTS, lambda path: save_file(weights, path))
    write_whole(folder / BASE, lambda path: save_file(as_saved(now.sums), path))
    write_json(
        folder / SETTINGS,
        {
            "format": FORMAT,
            "model": kind,
            "router": record.router,
            "fingerprint": now.fingerprint,
            "moved": moved,
            "settings": record.settings.to_dict(),
            "policy": policy,
            "fit": None if record.fitted is None else asdict(record.fitted),
            "base": base,
            "frozen": None if record.frozen is None else record.frozen.experts,
        },
    )
    page = card(
        base, kind, record.settings, record.fitted, repr(record.policy), moved, record.frozen
    )
    write_card(folder, page)
    save_evidence(folder, record.evidence)
    save_risk(folder, record.risk)
    text = record.held_out
    if text is not None:
        some = {"tokens": text.tokens[:HELD_OUT_TOKENS].contiguous()}
        if isinstance(text, MaskedStream):
            some["mask_token"] = torch.tensor(text.mask_token)
        write_whole(folder / HELD_OUT, lambda path: save_file(some, path))
    else:
        (folder / HELD_OUT).unlink(missing_ok=True)


def read_settings(model: nn.Module, folder: Path | str) -> tuple[RouterConfig, Policy]:
    """Settings and policy of a saved patch, once it is sure that it belongs to `model`.

    Raises:
        ValueError: a file is missing or damaged, or the patch was made for another model.
    """
    path = Path(folder) / SETTINGS
    for one in (path, Path(folder) / WEIGHTS):
        require(
            one.is_file(),
            "folder",
            f"a saved patch with {SETTINGS} and {WEIGHTS}",
            str(folder),
            f"{one.name} is missing{nearest(folder, shipped())}",
        )
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        made = RouterConfig.from_saved(saved["settings"])
        chosen = policy_from_dict(saved["policy"])
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected the settings of a patch; damaged or of another version: {error!r}"
        ) from error
    moved = "its own weights had moved when it was saved: load the model that was saved with it"
    require(
        identity(model).same(Identity(str(saved.get("fingerprint")), _sums(Path(folder) / BASE))),
        "model",
        f"the {saved.get('model')} that {folder} was made for",
        type(model).__name__,
        moved
        if saved.get("moved")
        else (
            "weights or architecture differ: load the model that was patched, or patch and fit "
            "this one"
        ),
    )
    return made, chosen


def _sums(path: Path) -> dict[str, Sums]:
    """See `Identity`; none where the patch was saved before they were."""
    try:
        return read_kept(load_file(path)) if path.is_file() else {}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{path}: expected sums over the patched model's weights; damaged: {error}"
        ) from error


def is_patch(folder: Path | str) -> bool:
    """Whether a folder looks like a saved patch (and not like a run)."""
    return (Path(folder) / SETTINGS).is_file()


class Origin(NamedTuple):
    """What a patch was made for, as its folder names it; empty where it does not."""

    model: str  # class
    base: str  # name or path
    router: str  # class of what `patch` returned


def read_origin(folder: Path | str) -> Origin:
    """The model that a patch was made for.

    Raises:
        ValueError: router.json is damaged.
    """
    path = Path(folder) / SETTINGS
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        return Origin(*(str(saved.get(name) or "") for name in Origin._fields))
    except (json.JSONDecodeError, AttributeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: expected the settings of a patch; damaged or of another version: {error!r}"
        ) from error


def read_fit(folder: Path | str, vocab_size: int) -> tuple[FitRecord | None, TokenStream | None]:
    """How the patch was fitted, and the text that was held out, where the folder has them.

    Raises:
        ValueError: a file is damaged.
    """
    path, text = Path(folder) / SETTINGS, Path(folder) / HELD_OUT
    try:
        fit = json.loads(path.read_text(encoding="utf-8")).get("fit")
        fitted = None if fit is None else FitRecord(**fit)
    except TypeError as error:
        raise ValueError(
            f"{path}: expected how the patch was fitted; damaged or of another version: {error!r}"
        ) from error
    if not text.is_file():
        return fitted, None
    try:
        held = load_file(text)
        tokens, mask_token = held["tokens"].long(), held.get("mask_token")
    except (SafetensorError, KeyError, OSError) as error:
        raise ValueError(
            f"{text}: expected token ids of held-out text; damaged: {error}; delete it to go "
            f"without"
        ) from error
    if mask_token is None:
        return fitted, TokenStream(tokens, vocab_size, "held out")
    return fitted, MaskedStream(tokens, vocab_size, int(mask_token), "held out")


def saved_frozen(folder: Path | str, layers: int, units: int, experts: int) -> Frozen | None:
    """The units that were frozen when the patch was saved.

    Raises:
        ValueError: they do not fit the patch.
    """
    path = Path(folder) / SETTINGS
    try:
        return read_frozen(
            json.loads(path.read_text(encoding="utf-8")).get("frozen"), layers, units, experts
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def load_weights(router: nn.Module, folder: Path | str) -> None:
    """Fill a fresh patch from router.safetensors.

    Raises:
        ValueError: the file is damaged or does not fit.
    """
    path = Path(folder) / WEIGHTS
    try:
        router.load_state_dict(load_file(path))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ValueError(
            f"{path}: expected the weights of the patch in {SETTINGS}; damaged or another's: "
            f"{reason}"
        ) from error
