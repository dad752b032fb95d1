"""The command line: parse, call, and end every wrong input in one line and exit status 2."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from typing import Optional

from jsonargparse import ArgumentError

from bayes_router import __version__
from bayes_router.checks import get_extra, one_line, unknown
from bayes_router.commands.options import Parser
from bayes_router.commands.parsers import COMMANDS
from bayes_router.wording import plain

COMPLETION = "--print_completion"
SHELLS = ("bash", "zsh", "tcsh")
RENAMED = {"calibrate": "sweep"}
"""Commands by the name that they had before: what is calibrated are probabilities."""


def main(argv: Optional[Sequence[str]] = None) -> int:
    """Run a command; the exit status is 0, or 2 after one line that says what was wrong.

    130 where it was interrupted, 141 where nobody reads its output any more.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    _show_what_can_be_shown()
    for name in arguments[:1]:
        if name in RENAMED:
            print(f"bayes-router: `{name}` is called `{RENAMED[name]}` now", file=sys.stderr)
            arguments[0] = RENAMED[name]
    try:
        if arguments[:1] == [COMPLETION]:
            print(completion(arguments[1:]))
            return 0
        parsed = build_parser(arguments).parse_args(arguments)
        options = parsed[parsed.command]
        COMMANDS[parsed.command].begin(options)
        import_module(f"bayes_router.commands.{parsed.command}").run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # who read the output has stopped, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 141
    except UnicodeEncodeError as error:
        return _refuse(
            f"expected text in UTF-8; got {error.object!r}; correct the argument or the name of "
            f"the file"
        )
    except OSError as error:
        what = (
            f"{error.filename}: {error.strerror}"
            if error.filename and error.strerror
            else one_line(error)
        )
        return _refuse(f"{what}; free or name another path")
    except (ValueError, ArgumentError) as error:
        return _refuse(plain(one_line(error)))
    except KeyboardInterrupt:
        again = (
            "; `fit --resume` continues from the last checkpoint"
            if arguments[:1] == ["fit"]
            else ""
        )
        print(f"bayes-router: interrupted{again}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        from bayes_router.training.faults import TrainingDiverged  # torch is there by now

        if not isinstance(error, TrainingDiverged):
            raise
        return _refuse(one_line(error))
    return 0


def completion(arguments: Sequence[str]) -> str:
    """The script by which a shell completes commands and options.

    Raises:
        ValueError: a shell that has none, or the package that writes it is not installed.
    """
    shell = " ".join(arguments)
    if shell not in SHELLS:
        raise unknown(COMPLETION, shell, SHELLS)
    if not find_spec("shtab"):
        raise ValueError(f"{COMPLETION}: expected the package shtab; {get_extra('completion')}")
    return str(build_parser([]).get_completion_script(f"shtab-{shell}"))


def build_parser(arguments: Sequence[str]) -> Parser:
    """The parser of all commands.

    The defaults of `fit` are those of the preset, configuration or run in `arguments`.
    """
    parser = Parser(
        prog="bayes-router",
        description=(
            "Transformers in which every token chooses its attention, by Bayesian "
            "inference with Pyro."
        ),
        version=__version__,
    )
    parser.add_argument(
        COMPLETION,
        metavar="SHELL",
        type=Optional[str],
        default=None,
        help=f"print what completes this command in {', '.join(SHELLS)}, and end",
    )
    commands = parser.add_subcommands(required=True, dest="command")
    for name, command in COMMANDS.items():
        made = command.parser(arguments)
        commands.add_subcommand(name, made, help=command.help)
        made.options = tuple(made._option_string_actions)
        if name in arguments[:1]:
            parser.options = made.options
    return parser


def _refuse(what: str) -> int:
    print(f"bayes-router: {what}", file=sys.stderr)
    return 2


def _show_what_can_be_shown() -> None:
    """An output that is not UTF-8 gets a question mark for what it cannot show.

    An error in the middle of a text is worse.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")
