"""A fitted model end to end against every token on full attention.

`python -m analysis.speed.speed_model RUN_OR_PRESET`.

Prefill time and decoding rate by the model's own HARD routes on held-out text, peak memory, load,
cost executed. A preset gives an untrained model, whose routes mean nothing: it serves to see that
the command works. Nothing is timed before every backend agrees with the reference on this device.
Writes one CSV, row by row (.partial.csv until all are there), and one figure.
"""

import argparse
from pathlib import Path

import torch

from bayes_router.benchmark.facts import command_line, versions
from bayes_router.benchmark.model import Subject, measure, note_on_context
from bayes_router.benchmark.model_figure import draw
from bayes_router.benchmark.rows import Rows
from bayes_router.benchmark.verify import verify_model
from bayes_router.presets import PRESETS, preset
from bayes_router.timing import device_name
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fit import load_data, pick_device
from bayes_router.transformer.model import RoutedLanguageModel

RESULTS = Path(__file__).parents[1] / "results"
LENGTHS = [4096, 16384, 32768]


def load(source: str, device: torch.device) -> Subject:
    """A run folder's model or an untrained one of a preset, with held-out text.

    In bfloat16 on CUDA.
    """
    if Path(source).is_dir() or source not in PRESETS:
        config, model = load_run(source, str(device))
        data, name = load_data(config)[1], source
    else:
        config, data = load_data(preset(source))
        model, name = (
            RoutedLanguageModel.from_config(config).to(device).eval(),
            f"preset {source}, not fitted",
        )
    if device.type == "cuda":
        model = model.to(torch.bfloat16)
    return Subject(name, config, model, data.valid)


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", metavar="RUN_OR_PRESET", help=f"run folder, or one of {', '.join(PRESETS)}"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=LENGTHS, help="tokens T (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for speed_model_DEVICE.csv and .png"
    )
    options = parser.parse_args()
    device = pick_device(options.device)
    torch.manual_seed(0)
    subject, lengths = load(options.source, device), options.lengths
    verify_model(device, subject.config.model)
    facts = {"model": subject.name, "trained_at": subject.config.data.context}
    facts |= {
        "device": device_name(device),
        "versions": versions(device),
        "command": command_line(),
    }
    path = options.out / f"speed_model_{device.type}.csv"
    rows = Rows(path, facts)
    for row in measure(subject, lengths):
        rows.add(row)
        print(
            f"{row['what']} {row['variant']}, batch {row['B']}, {row['T']} tokens: {row['ms']:.4g} "
            f"ms",
            flush=True,
        )
    table = rows.finish()
    draw(table, path.with_suffix(".png"))
    left_out = ("model", "trained_at", "device", "versions", "command", "problem")
    shown = table.drop(columns=[c for c in left_out if c in table]).dropna(axis=1, how="all")
    print(shown.to_string(index=False, float_format="{:.3g}".format, na_rep=""))
    for _, row in table[table["problem"].notna()].iterrows() if "problem" in table else ():
        print(
            f"{row['what']} {row['variant']}, batch {row['B']}, {row['T']} tokens: not captured in "
            f"a CUDA graph: {row['problem']}"
        )
    print(note_on_context(subject, lengths))
    print(
        f"{subject.name}; {table['device'].iloc[0]}; {table['versions'].iloc[0]}; written to "
        f"{path} and .png"
    )


if __name__ == "__main__":
    main()
