"""The command line: parse, call, and end every wrong input in one line and exit status 2."""

import os
import sys
from collections.abc import Sequence
from typing import Optional

from jsonargparse import ArgumentError

from bayes_router import __version__
from bayes_router.checks import one_line
from bayes_router.commands import bench, calibrate, evaluate, fit, generate, inspect, report
from bayes_router.commands.options import Parser
from bayes_router.training.fit import TrainingDiverged

COMMANDS = {
    "fit": fit,
    "evaluate": evaluate,
    "generate": generate,
    "calibrate": calibrate,
    "inspect": inspect,
    "report": report,
    "bench": bench,
}


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; the exit status is 0, or 2 after one line that says what was wrong.

    130 where it was interrupted, 141 where nobody reads its output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        parsed = build_parser(arguments).parse_args(arguments)
        COMMANDS[parsed.command].run(parsed[parsed.command])
        sys.stdout.flush()
    except (ValueError, ArgumentError, TrainingDiverged) as error:
        print(f"bayes-router: {one_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("bayes-router: interrupted; `fit --resume` continues from the last checkpoint", file=sys.stderr)
        return 130
    except BrokenPipeError:  # who read the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    return 0


def build_parser(arguments: Sequence[str]) -> Parser:
    """The parser of all commands; the defaults of `fit` are those of the preset, configuration or run in `arguments`."""
    parser = Parser(
        prog="bayes-router",
        description="Transformers in which every token chooses its attention, by Bayesian inference with Pyro.",
        version=__version__,
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        commands.add_subcommand(name, command.parser(arguments), help=command.HELP)
    return parser
