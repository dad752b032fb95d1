"""The card of a saved patch, README.md: what it belongs to, how it was fitted, what to mind."""

from collections.abc import Mapping, Sequence

from bayes_router.hub import LIBRARY
from bayes_router.integrations.patch.settings import FitRecord, RouterConfig
from bayes_router.routing.cost import CostBy
from bayes_router.transformer.frozen import Frozen


def card(
    base: str,
    kind: str,
    settings: RouterConfig,
    fitted: FitRecord | None,
    policy: str,
    moved: bool,
    frozen: Frozen | None = None,
) -> str:
    """Markdown with the metadata that the hub reads.

    Args:
        base: name or folder of the model that was patched; empty where it has none.
        kind: its class.
        settings: of the patch.
        fitted: how; None before.
        policy: of HARD, as text.
        moved: whether the model's own weights moved since.
        frozen: its units whose route is static.
    """
    head = ["---", LIBRARY, "tags: [bayes-router, attention, routing]"]
    head += [f"base_model: {base}"] if base and not base.startswith((".", "/")) else []
    what = {
        "model": f"`{base or kind}` ({kind}), which is not in this folder",
        "experts": ", ".join(settings.experts),
        "a route is chosen by": settings.route_by,
        "window and sinks": f"{settings.window} and {settings.sinks} tokens",
        "policy": f"`{policy}`",
    }
    if frozen is not None:
        what["frozen units, whose route is static"] = f"{frozen.number} of {frozen.total}"
    if fitted is not None:
        asked = "none, the prior's own price" if fitted.budget is None else fitted.budget
        what |= {
            "fitted on": f"{fitted.tokens:,} tokens, {fitted.context} a sequence",
            "tokenizer": fitted.tokenizer or "token ids were given",
            "likelihood": _observed(fitted.likelihood),
            f"budget ({PAID[fitted.by]}, full attention = 1)": str(asked),
            "KL weight and price at the end": f"{fitted.kl_weight:.4g} and {fitted.price:.4g}",
        }
        paid = {
            f"paid{name}": fitted.kl_weight * fitted.read[f"kl{name}"]
            for name in ("", "_se")
            if f"kl{name}" in fitted.read
        }
        what |= _figures({**fitted.read, **paid}, PAID[fitted.by])
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in what.items())]
    use = [
        "```python",
        "from bayes_router import Router",
        "",
        'router = Router.from_pretrained(model, "THIS FOLDER")',
        "```",
    ]
    notes = [f"- {note}" for note in _notes(fitted, moved)]
    parts = ["# A router", *table, "", *use, "", "## To mind", "", *notes]
    return "\n".join([*head, "---", "", *parts, ""])


def _observed(likelihood: str | float) -> str:
    """In words."""
    return likelihood if isinstance(likelihood, str) else f"{likelihood:g} text, the rest model"


PAID = {
    CostBy.FLOPS.value: "executed cost in FLOPs of attention",
    CostBy.BYTES.value: "executed cost in bytes of the cache that a decoding step reads",
}


def _figures(read: Mapping[str, float], paid: str) -> dict[str, str]:
    """What the end of the fit read, on its own text: loss and cost."""
    names = {
        "nll": "loss, nats per token",
        "divergence": "KL from the unpatched model, nats per token",
        "paid": "KL to the prior at its weight and price, nats per token",
        "cost": f"{paid}, full attention = 1",
    }
    steps = f"the last {read.get('steps', 0):.0f} steps of the fit, on its own text"
    return {
        f"{words} ({steps})": f"{read[name]:.4f}"
        + (f" +- {read[f'{name}_se']:.4f}" if f"{name}_se" in read else "")
        for name, words in names.items()
        if name in read
    }


def _notes(fitted: FitRecord | None, moved: bool) -> Sequence[str]:
    notes = ["A budget is met on the text that it was set on: other text costs more or less."]
    if fitted is None:
        notes.insert(0, "Not fitted: every token takes full attention, nothing is saved.")
    else:
        notes.append(
            f"Texts much longer or shorter than {fitted.context} tokens were not seen by the fit."
        )
    if moved:
        notes.append(
            "The model's own weights moved: it works with the model that was saved beside it alone."
        )
    return notes
