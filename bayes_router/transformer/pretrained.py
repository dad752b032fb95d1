"""A model's own folder, as Hugging Face's models have one: `save_pretrained`, `from_pretrained`.

config.json says what it is, model.safetensors holds its weights; evidence, risk, the summary of its
run and a card lie beside them where there are some. A run folder of `fit` is one too.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
from torch import nn

from bayes_router import __version__
from bayes_router.checks import require
from bayes_router.config import ModelConfig, config_from_dict, load_config
from bayes_router.files import CONFIG, PRETRAINED, SUMMARY, WEIGHTS, write_json
from bayes_router.hub import LIBRARY, write_card
from bayes_router.routing.policy import Policy, policy_from_dict, policy_to_dict
from bayes_router.routing.saving import load_evidence, load_risk, save_evidence, save_risk
from bayes_router.transformer.frozen import Frozen, read_frozen
from bayes_router.transformer.saving import fill, read_weights, save_weights

MODEL_TYPE = "bayes_router"
ARCHITECTURE = "RoutedForCausalLM"


def config_json(
    config: ModelConfig, policy: Policy, frozen: Frozen | None = None
) -> dict[str, Any]:
    """What config.json holds: the settings of the model, its policy, what opens it.

    And the units that are frozen, if some are.

    Raises:
        ValueError: the policy is not registered.
    """
    about = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "bayes_router_version": __version__,
        "model": asdict(config),
        "policy": policy_to_dict(policy),
    }
    return about if frozen is None else about | {"frozen": frozen.experts}


def from_config_json(values: Mapping[str, Any]) -> tuple[ModelConfig, Policy]:
    """What `config_json` described.

    Raises:
        ValueError: it is another program's, or damaged; the field is named.
    """
    kind = values.get("model_type")
    require(kind == MODEL_TYPE, "model_type", repr(MODEL_TYPE), kind, "load it with transformers")
    config = config_from_dict({"model": values.get("model")}).model
    saved = values.get("policy")
    require(isinstance(saved, dict) and "name" in saved, "policy", "a name and fields", saved)
    try:
        return config, policy_from_dict(dict(saved))  # type: ignore[arg-type]
    except TypeError as error:
        raise ValueError(f"policy: expected the fields of {saved}; got: {error}") from error


def save_model(model: Any, folder: Path) -> None:
    """Write the folder; see `RoutedLanguageModel.save_pretrained`."""
    about = config_json(model.config, model.policy, model.frozen)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {name: value for name, value in asdict(model.config).items() if value is not None}
    write_json(folder / PRETRAINED, about)
    save_weights(folder, model, tomli_w.dumps({"model": settings}))
    save_evidence(folder, model.controller.evidence)
    save_risk(folder, model.controller.risk)
    if model.summary is not None:
        write_json(folder / SUMMARY, model.summary)
    write_card(folder, card(model.config, repr(model.policy), model.summary))


def load_model(folder: Path, build: Callable[[ModelConfig, Policy | None], nn.Module]) -> Any:
    """The model of a folder that `save_model` or `fit` wrote, in evaluation mode.

    Raises:
        ValueError: a file is missing or damaged, or the weights say that they were made with other
            settings.
    """
    path = folder / PRETRAINED if (folder / PRETRAINED).is_file() else folder / CONFIG
    require(
        path.is_file() and (folder / WEIGHTS).is_file(),
        "folder_or_name",
        f"a folder with {PRETRAINED} (or a run's {CONFIG}) and {WEIGHTS}",
        str(folder),
        "make one with save_pretrained, or with `bayes-router fit`",
    )
    policy: Policy | None = None
    frozen: object = None
    if path.name == CONFIG:  # a run of before
        config = load_config(path).model
    else:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            config, policy = from_config_json(values)
            sizes = config.num_layers, config.num_units, len(config.experts)
            frozen = read_frozen(values.get("frozen"), *sizes)
        except (ValueError, AttributeError) as error:  # JSON's and Unicode's errors are ValueErrors
            raise ValueError(f"{path}: {error}") from error
    weights, stored = read_weights(folder / WEIGHTS)
    if stored is not None:
        now, then = asdict(config), asdict(stored.model)
        other = [f"model.{k} is {now[k]!r}, was {then[k]!r}" for k in now if now[k] != then[k]]
        require(
            not other,
            str(path),
            "the settings that the weights were made with",
            ", ".join(other),
            "put back what it was",
        )
    model = fill(lambda settings: build(settings, policy), config, weights, folder / WEIGHTS)
    model.controller.evidence = load_evidence(folder, config.num_layers, config.d_model)
    model.controller.risk = load_risk(folder)
    model.summary, model.frozen = read_summary(folder), frozen
    return model.eval()


def read_summary(folder: Path) -> dict[str, Any] | None:
    """What summary.json says of the run; None where there is none."""
    try:
        found = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def card(config: ModelConfig, policy: str, summary: Mapping[str, Any] | None) -> str:
    """The card of a saved model, Markdown with the metadata that the hub reads."""
    what = {
        "experts": ", ".join(config.experts),
        "a route is chosen by": config.route_by,
        "layers, width, heads": f"{config.num_layers}, {config.d_model}, {config.num_heads}",
        "window": f"{config.window} tokens",
        "policy": f"`{policy}`",
    }
    notes = ["It reads the token ids of its own tokeniser; no tokenizer lies in this folder."]
    if summary is None:
        notes.append("How it was fitted is not known: no summary of a run came with it.")
    else:
        corpus, nll, cost = (summary.get(key, {}) for key in ("corpus", "nll", "executed_cost"))
        what |= {
            "fitted on": f"{corpus.get('name')}, {summary.get('tokens_seen', 0):,} tokens read",
            "held-out loss, nats per token": ", ".join(f"{k} {v:.4f}" for k, v in nll.items()),
            "executed cost (full attention = 1)": ", ".join(
                f"{v:.3f} in {k}" for k, v in cost.items()
            ),
            "seed": str(summary.get("seed")),
        }
        notes.append("Losses and costs are those of its own held-out text, one seed.")
    lines = ["---", LIBRARY, "tags: [bayes-router, attention, routing]"]
    lines += ["---", "", "# A routed language model", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in what.items()]
    use = 'model = RoutedLanguageModel.from_pretrained("THIS FOLDER")'
    lines += ["", "```python", "from bayes_router import RoutedLanguageModel", "", use, "```"]
    return "\n".join([*lines, "", "## To mind", "", *(f"- {note}" for note in notes), ""])
