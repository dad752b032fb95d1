"""`bayes-router report`: one HTML file that shows the posterior of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_run
from bayes_router.diagnostics.examine import Effort, Examination
from bayes_router.diagnostics.fitted import load_fitted
from bayes_router.diagnostics.report import SHOWN_TOKENS, write_report
from bayes_router.training.checkpoint import write_text
from bayes_router.training.fit import pick_device

HELP = "write one HTML file: verdicts, figures, the text coloured by route"


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `report`."""
    result = Parser(description="Write one self-contained HTML file that shows the posterior of a run.")
    add_run(result)
    result.add_argument("--text", type=Optional[Path], default=None, help="UTF-8 file to show (default: held-out text)")
    result.add_argument("--out", type=Optional[Path], default=None, help="file to write (default: RUN/report.html)")
    result.add_argument("--tokens", type=int, default=SHOWN_TOKENS, help="tokens of the text to show, at most")
    result.add_argument("--quick", action="store_true", help="leave out guide, calibration and other text (minutes)")
    return result


def read_text(path: Optional[Path]) -> Optional[bytes]:
    """The bytes of a file; ValueError where there is none."""
    if path is None:
        return None
    if not path.is_file():
        raise ValueError(f"text: expected a file; {path} does not exist; correct the path")
    return path.read_bytes()


def run(options: Namespace) -> None:
    """Write the report and say where it is."""
    text, out = read_text(options.text), options.out or options.run / "report.html"
    fitted = load_fitted(options.run, str(pick_device(options.device)))
    if not out.parent.is_dir():
        raise ValueError(f"out: expected a file in an existing folder; {out.parent} does not exist; make it first")
    examined = Examination(fitted, effort=Effort())
    html = write_report(examined, text, options.tokens, options.quick, "" if options.text is None else options.text.name)
    write_text(out, html)
    for verdict in examined.verdicts(options.quick):
        print(verdict)
    print(f"\nreport: {out}")
