"""`bayes-router report`: one HTML file that shows the posterior of a run."""

from jsonargparse import Namespace

from bayes_router.commands.fitted import open_fitted, read_text
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.report import write_report
from bayes_router.files import write_text


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
