"""What each command takes, without what it needs to run.

`--help` and a wrong option are answered before torch is there.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from jsonargparse import Namespace

from bayes_router.commands.arguments import bench, evaluate, fit, generate, inspect, report, sweep
from bayes_router.commands.options import Parser


class Command(NamedTuple):
    """A command; `bayes_router.commands.NAME` has its `run(options)`."""

    help: str
    parser: Callable[[Sequence[str]], Parser]
    begin: Callable[[Namespace], None]
    """Refuses what can be refused at once, and prints the first line."""


COMMANDS = {
    "fit": Command(
        "fit a routed Transformer on a corpus and write a run folder", fit.parser, fit.begin
    ),
    "evaluate": Command(
        "read a run on held-out text: losses, costs, loads, information; at a budget",
        evaluate.parser,
        evaluate.begin,
    ),
    "generate": Command(
        "continue a prompt, every token by the expert that its route says",
        generate.parser,
        generate.begin,
    ),
    "sweep": Command(
        "solve for the prior that costs a target; with a run, sweep its settings",
        sweep.parser,
        sweep.begin,
    ),
    "inspect": Command(
        "print a text coloured by route, the uncertain tokens marked", inspect.parser, inspect.begin
    ),
    "report": Command(
        "write one HTML file: verdicts, figures, the text coloured by route",
        report.parser,
        report.begin,
    ),
    "bench": Command(
        "measure hard routing against the fastest full attention of this device",
        bench.parser,
        bench.begin,
    ),
}
"""In the order of the help."""
