"""`bayes-router report`: one HTML file that shows the posterior of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.fitted import add_fitted, open_fitted, read_text
from bayes_router.commands.options import Parser
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.report import SHOWN_TOKENS, write_report
from bayes_router.training.checkpoint import write_text

HELP = "write one HTML file: verdicts, figures, the text coloured by route"


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `report`."""
    result = Parser(description="Write one self-contained HTML file that shows the posterior of a run.")
    add_fitted(result)
    result.add_argument("--out", type=Optional[Path], default=None, help="file to write (default: RUN/report.html)")
    result.add_argument("--tokens", type=int, default=SHOWN_TOKENS, help="tokens of the text to show, at most")
    result.add_argument("--quick", action="store_true", help="leave out guide, calibration and other text (minutes)")
    return result


def run(options: Namespace) -> None:
    """Write the report and say where it is."""
    text, out = read_text(options.text), options.out or options.run / "report.html"
    fitted = open_fitted(options, text)
    if not out.parent.is_dir():
        raise ValueError(f"out: expected a file in an existing folder; {out.parent} does not exist; make it first")
    examined = Examination(fitted)
    html = write_report(examined, text, options.tokens, options.quick, "" if options.text is None else options.text.name)
    write_text(out, html)
    for verdict in examined.verdicts(options.quick):
        print(verdict)
    for reason in examined.left_out(options.quick):
        print(f"left out: {reason}")
    print(f"\nreport: {out}")
