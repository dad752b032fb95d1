"""`bayes-router fit`: fit a routed Transformer on a corpus and write a run folder."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from bayes_router.config import Config, config_from_dict
from bayes_router.training.evaluate import Evaluation
from bayes_router.training.fit import fit

SHORT = {
    "corpus": "data.corpus",
    "steps": "train.steps",
    "seed": "train.seed",
    "device": "train.device",
}


def run(options: Namespace) -> None:
    """Fit, draw, print the table and where the run is."""
    values = {section: vars(options[section]) for section in asdict(Config())}
    for short, dotted in SHORT.items():
        if options[short] is not None:
            section, key = dotted.split(".")
            values[section][key] = options[short]
    config = config_from_dict(values)
    out = options.out or Path("runs") / options.preset
    _, summary = fit(
        config, out, overwrite=options.overwrite, resume=options.resume, progress=not options.quiet
    )
    if not summary:  # another rank than 0
        return
    # seaborn, now that there is something to draw
    from bayes_router.diagnostics.figures.run import draw_run

    draw_run(out)
    print_summary(summary)
    print(f"\nrun folder: {out}")


def print_summary(summary: dict[str, Any]) -> None:
    """The table of a finished fit."""
    fields = {key: summary[key] for key in Evaluation.__dataclass_fields__}
    print(
        f"{summary['parameters']:,} parameters, {summary['steps']} steps, "
        f"{summary['tokens_seen']:,} tokens of "
        f"{summary['corpus']['name']} in {summary['seconds']:.0f} s on {summary['device']}"
    )
    print(Evaluation(**fields).table())
    for rank, held in enumerate(summary.get("held_bytes_per_rank", [])):
        print(f"rank {rank} holds {held / 1e6:.3f} MB of weights, gradients and moments")
