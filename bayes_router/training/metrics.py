"""What a run tells while it goes on.

metrics.csv, TensorBoard, a progress bar or one line an evaluation; and its summary.
"""

from pathlib import Path
from typing import Any

from bayes_router.checks import get_extra
from bayes_router.config import Config
from bayes_router.data.load import Data
from bayes_router.files import METRICS, write_whole
from bayes_router.progress import Progress
from bayes_router.training.evaluate import Evaluation

EVENTS = "tensorboard"


class MetricsLog:
    """metrics.csv: one row a logged step; rows after the step that a run resumes from are dropped.

    Raises:
        ValueError: the file of the run to resume is damaged.
    """

    def __init__(self, out: Path, step: int):
        self.path = out / METRICS
        self.rows: list[dict[str, float]] = []
        if step and self.path.exists():
            try:
                import pandas as pd

                frame = pd.read_csv(self.path).astype(float)
                kept = frame[frame["step"] <= step].to_dict("records")
                self.rows = [
                    {**{str(name): value for name, value in row.items()}, "step": int(row["step"])}
                    for row in kept
                ]
            except (ValueError, KeyError, OSError, OverflowError) as error:
                raise ValueError(
                    f"{self.path}: expected the metrics of this run; it is damaged: "
                    f"{type(error).__name__}; remove it to "
                    "resume without the earlier rows"
                ) from error

    def add(self, step: int, row: dict[str, float]) -> None:
        """Keep a row."""
        self.rows.append({"step": step, **row})

    def write(self) -> None:
        """Write all rows."""
        import pandas as pd

        frame = pd.DataFrame(self.rows)
        write_whole(self.path, lambda p: frame.to_csv(p, index=False))


def tensorboard_writer(out: Path, step: int) -> Any:
    """A writer of event files into the run folder; those after `step` are hidden.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError(
            f"train.tensorboard: expected the package tensorboard; got: {error}; "
            f"{get_extra('tensorboard')}"
        ) from None
    return SummaryWriter(str(out / EVENTS), purge_step=step + 1 if step else None)


class Reporter:
    """Says how a run goes, or nothing.

    A bar on a terminal, elsewhere a line an evaluation and one every few seconds.
    """

    def __init__(self, steps: int, done: int, shown: bool, events: Any = None):
        self.steps, self.events = steps, events
        self.evaluation: Evaluation | None = None
        self.progress = Progress("fit", steps, done=done, shown=shown)

    def __enter__(self) -> "Reporter":
        self.progress.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.progress.__exit__(*error)
        if self.events is not None:
            self.events.close()

    def report(self, step: int, row: dict[str, float], evaluation: Evaluation | None) -> None:
        """A logged row, and the evaluation made at its step if there was one."""
        self.evaluation = evaluation or self.evaluation
        words = f"nll {row['nll']:.3f} kl {row['kl']:.2f}"
        if self.evaluation is not None:
            words += (
                f" hard {self.evaluation.nll['hard']:.3f} at cost "
                f"{self.evaluation.executed_cost['paper']:.3f}"
            )
        self.progress.say(words)
        if evaluation is not None:
            self.progress.line(f"step {step}/{self.steps}: {words}")
        if self.events is not None:
            for name, value in row.items():
                self.events.add_scalar(name, value, step)

    def step(self) -> None:
        """One step is done."""
        self.progress.step()


def evaluation_row(evaluation: Evaluation) -> dict[str, float]:
    """An evaluation as flat columns."""
    row = {f"valid_nll_{mode}": value for mode, value in evaluation.nll.items()} | {
        "valid_elbo": evaluation.elbo
    }
    row |= {f"cost_{name}": value for name, value in evaluation.executed_cost.items()}
    for layer, load in enumerate(evaluation.load_per_layer):
        row |= {
            f"load_{layer}_{name}": share
            for name, share in zip(evaluation.experts, load, strict=True)
        }
        row[f"route_information_{layer}"] = evaluation.route_information_per_layer[layer]
        row[f"context_information_{layer}"] = evaluation.context_information_per_layer[layer]
        row[f"kl_{layer}"] = evaluation.kl_per_layer[layer]
        row[f"total_concentration_{layer}"] = evaluation.total_concentration_per_layer[layer]
    return row


def summarise(
    config: Config, data: Data, evaluation: Evaluation, run: dict[str, Any]
) -> dict[str, Any]:
    """The content of summary.json; `run` holds what the settings and the evaluation do not know."""
    return {
        "corpus": {"name": data.name, "sha256": data.sha256, "tokens": data.tokens},
        "seed": config.train.seed,
        "steps": config.train.steps,
        "tokens_seen": config.train.steps * config.train.batch_size * config.data.context,
        **run,
        **evaluation.to_dict(),
    }
