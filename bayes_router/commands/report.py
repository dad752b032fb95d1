"""`bayes-router report`: one HTML file that shows the posterior of a run, or of two."""

import tempfile
from pathlib import Path

from jsonargparse import Namespace

from bayes_router.commands.fitted import open_fitted, read_text
from bayes_router.diagnostics.beside import Page, write_beside
from bayes_router.diagnostics.diagnostic import diagnostics
from bayes_router.diagnostics.examine import Examination
from bayes_router.diagnostics.report import write_report
from bayes_router.files import write_text
from bayes_router.progress import Progress

THAWED = "read is what all of them would choose"


def run(options: Namespace) -> None:
    """Read, print what was found, write the report and say where it is."""
    page = _page(options)
    html = page.html
    if options.other is not None:
        html = write_beside(page, _page(Namespace({**vars(options), "run": options.other})))
    print(f"\nreport: {write_somewhere(options.out, html)}")


def _page(options: Namespace) -> Page:
    """The report of one fit."""
    text = read_text(options.text)
    fitted = open_fitted(options, text)
    frozen, fitted.model.frozen = fitted.model.frozen, None
    examined = Examination(fitted)
    if frozen is not None:
        reason = f"{frozen.number} of {frozen.total} units are frozen; {THAWED}"
        examined.leave_out("static routes", reason)
    with Progress(
        "report", 1 if options.quick else 1 + len(diagnostics()), unit="part"
    ) as progress:
        examined.read(options.quick, progress)
        progress.say("drawing")
        html = write_report(
            examined,
            text,
            options.tokens,
            options.quick,
            "" if options.text is None else options.text.name,
        )
    if options.other is not None:
        print(f"{options.run}:")
    for verdict in examined.verdicts(options.quick):
        print(verdict)
    for reason in examined.left_out(options.quick):
        print(f"left out: {reason}")
    return Page(str(options.run), examined, html)


def write_somewhere(out: Path, html: str) -> str:
    """Write the file, or where that cannot be done any more one in the folder for temporary files.

    Where it is, in words.
    """
    try:
        write_text(out, html)
        return str(out)
    except OSError as error:
        with tempfile.NamedTemporaryFile(
            "w", suffix=".html", delete=False, encoding="utf-8"
        ) as file:
            file.write(html)
        return f"{file.name}, for {out} could not be written: {error.strerror or error}"
