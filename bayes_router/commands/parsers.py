"""What each command takes, without what it needs to run.

`--help` and a wrong option are answered before torch is there.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_fitted, add_run
from bayes_router.config import SURE_ENOUGH, Config, load_config
from bayes_router.files import CONFIG, check_file_for, check_folder_for, require_file
from bayes_router.presets import PRESETS, preset


class Command(NamedTuple):
    """A command; `bayes_router.commands.NAME` has its `run(options)`."""

    help: str
    parser: Callable[[Sequence[str]], Parser]
    begin: Callable[[Namespace], None]
    """Refuses what can be refused at once, and prints the first line."""


def fit(arguments: Sequence[str]) -> Parser:
    """The usual options, and every field of the configuration as `--section.field`."""
    result = Parser(description="Fit a routed Transformer by SVI and write a run folder.")
    result.add_argument(
        "--preset", type=str, default="tiny", help=f"settings to start from: {', '.join(PRESETS)}"
    )
    result.add_argument(
        "--config", type=Optional[Path], default=None, help="TOML file of settings, over the preset"
    )
    result.add_argument(
        "--out",
        type=Optional[Path],
        default=None,
        help="run folder to write (default: runs/PRESET)",
    )
    result.add_argument(
        "--corpus",
        type=Optional[str],
        default=None,
        help="sotu, text:PATH, stdlib, recall, hf:NAME (data.corpus)",
    )
    result.add_argument(
        "--steps", type=Optional[int], default=None, help="optimiser steps (train.steps)"
    )
    result.add_argument(
        "--seed",
        type=Optional[int],
        default=None,
        help="of weights, batches and draws (train.seed)",
    )
    result.add_argument(
        "--device", type=Optional[str], default=None, help="auto, cpu, cuda (train.device)"
    )
    result.add_argument("--overwrite", action="store_true", help="replace an existing run")
    result.add_argument(
        "--resume", action="store_true", help="continue an existing run from its last checkpoint"
    )
    result.add_argument(
        "--quiet", action="store_true", help="no progress bar, no line an evaluation"
    )
    result.add_class_arguments(Config, None)
    result.set_defaults(_flat(starting_config(arguments)))
    return result


class _Quiet(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def starting_config(arguments: Sequence[str]) -> Config:
    """The settings before command-line overrides.

    A resumed run's own, else the preset and then the TOML file.
    """
    first = _Quiet(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="tiny")
    for option in ("--config", "--out"):
        first.add_argument(option, type=Path)
    first.add_argument("--resume", action="store_true")
    if not arguments or arguments[0] != "fit":
        return Config()
    known = first.parse_known_args(arguments[1:])[0]
    if known.resume and known.config is None:
        return load_config(require_file(known.out or Path("runs") / known.preset, CONFIG))
    config = preset(known.preset)
    return config if known.config is None else load_config(known.config, config)


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{section}.{key}": value
        for section, table in asdict(config).items()
        for key, value in table.items()
    }


def _begin_fit(options: Namespace) -> None:
    out = options.out or Path("runs") / options.preset
    if not options.resume and not out.exists():
        check_folder_for(out)
    if not options.quiet:
        _say(f"fit: {options.corpus or options.data.corpus}, to {out}")


def evaluate(arguments: Sequence[str]) -> Parser:
    """Options of `evaluate`."""
    result = Parser(description="Read a fitted run on held-out text, its routes executed.")
    add_run(result)
    result.add_argument(
        "--corpus", type=Optional[str], default=None, help="another corpus than the run's"
    )
    result.add_argument(
        "--tokens", type=Optional[int], default=None, help="read at most this many tokens"
    )
    result.add_argument(
        "--policy",
        type=str,
        default="argmax",
        help="of hard routes: argmax, conservative or another registered",
    )
    result.add_argument(
        "--threshold",
        type=Optional[float],
        default=None,
        help=(
            f"conservative: tokens less sure than this which weight is the largest take a "
            f"stronger expert ({SURE_ENOUGH})"
        ),
    )
    result.add_argument(
        "--budget",
        type=Optional[float],
        default=None,
        help=(
            "attention cost to spend, full = 1: the price is set so that executed routes meet "
            "it within 0.005"
        ),
    )
    result.add_argument(
        "--quality",
        type=Optional[float],
        default=None,
        help=(
            "share of perplexity over the best single expert that may be lost: the cheapest "
            "policy that keeps to it"
        ),
    )
    result.add_argument(
        "--confidence",
        type=float,
        default=0.95,
        help="with which --quality is kept on text of this kind",
    )
    result.add_argument(
        "--cost", type=str, default="paper", help="unit of the budget: paper, flops or latency"
    )
    result.add_argument(
        "--curve_tokens",
        "--curve-tokens",
        type=int,
        default=16_384,
        help="tokens of each pass of the table of nll against budget",
    )
    result.add_argument(
        "--out", type=Optional[Path], default=None, help="folder for evaluation.json and dial.csv"
    )
    return result


def _begin_evaluate(options: Namespace) -> None:
    require_file(options.run, CONFIG)
    _check_folder(options)
    _say(f"evaluate: {options.run}")


def generate(arguments: Sequence[str]) -> Parser:
    """Options of `generate`."""
    result = Parser(description="Continue a prompt, every token by the expert that its route says.")
    add_run(result)
    result.add_argument("--prompt", type=str, required=True, help="text to continue")
    result.add_argument("--tokens", type=int, default=200, help="tokens to add")
    result.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    result.add_argument(
        "--top_k",
        "--top-k",
        type=int,
        default=0,
        help="draw from the k likeliest tokens; 0 from all",
    )
    result.add_argument(
        "--top_p",
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens of this mass",
    )
    result.add_argument("--seed", type=int, default=0, help="of the draws")
    stop = (
        "end behind any of these texts, each a single token of the run's tokeniser (bash: "
        "$'\\n' for the end of a line)"
    )
    result.add_argument("--stop", type=str, nargs="+", default=[], help=stop)
    result.add_argument(
        "--routes", action="store_true", help="print the load of each expert over the new tokens"
    )
    return result


def _begin_generate(options: Namespace) -> None:
    """The text begins with the prompt."""
    require_file(options.run, CONFIG)
    _check_tokens(options)
    for name, texts in (("prompt", [options.prompt]), ("stop", options.stop)):
        for text in texts:
            _check_utf8(name, text)
    if not options.prompt:
        raise ValueError("prompt: expected at least one character; got an empty text")
    print(options.prompt, end="", flush=True)


def _check_utf8(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        got = text.encode(errors="surrogateescape")
        raise ValueError(
            f"{name}: expected text in UTF-8; got the bytes {got!r}; set the terminal to UTF-8"
        ) from None


def sweep(arguments: Sequence[str]) -> Parser:
    """Options of `sweep`."""
    result = Parser(
        description=(
            "Print the settings of a prior whose routes cost a target on average, as "
            "TOML for `fit --config`."
        )
    )
    result.add_argument(
        "run",
        type=Optional[Path],
        nargs="?",
        default=None,
        help="run folder to sweep the prior's settings on",
    )
    result.add_argument(
        "--target_cost",
        "--target-cost",
        type=Optional[float],
        default=None,
        help="mean cost, full = 1",
    )
    result.add_argument(
        "--target_entropy",
        "--target-entropy",
        type=Optional[float],
        default=None,
        help="expected entropy of a route, nats",
    )
    result.add_argument(
        "--preset",
        type=str,
        default="tiny",
        help=f"experts and sizes without a run: {', '.join(PRESETS)}",
    )
    result.add_argument(
        "--cost", type=Optional[str], default=None, help="unit of cost: paper, flops or latency"
    )
    result.add_argument(
        "--context",
        type=Optional[int],
        default=None,
        help="tokens at which flops and latency are counted",
    )
    result.add_argument(
        "--map",
        type=Optional[str],
        default=None,
        help="from cost to mean: boltzmann, inverse, uniform",
    )
    result.add_argument(
        "--total_concentration",
        "--total-concentration",
        type=Optional[float],
        default=None,
        help="kept unless solved for",
    )
    result.add_argument(
        "--price",
        type=Optional[float],
        default=None,
        help="tilt of the solved prior, nats per unit of cost; 0 by default",
    )
    result.add_argument("--samples", type=int, default=20_000, help="draws that check the solution")
    result.add_argument(
        "--out",
        type=Optional[Path],
        default=None,
        help="folder for prior.toml, the figures and sweep.csv",
    )
    result.add_argument(
        "--steps", type=int, default=100, help="of each refit of the sweep; 0 for no sweep"
    )
    result.add_argument("--seeds", type=int, default=1, help="refits of each setting")
    result.add_argument(
        "--refit",
        type=str,
        default="controllers",
        help="weights that a refit moves: controllers or everything",
    )
    result.add_argument(
        "--tokens", type=int, default=16_384, help="held-out tokens that each refit is read on"
    )
    result.add_argument("--device", type=str, default="auto", help="of the sweep: auto, cpu, cuda")
    return result


def _begin_sweep(options: Namespace) -> None:
    """As a comment of TOML: all that the command prints is a file that `fit --config` reads."""
    if options.run is not None:
        require_file(options.run, CONFIG)
    _check_folder(options)
    _say(f"# sweep: a prior for {options.run or f'the preset {options.preset}'}")


def inspect(arguments: Sequence[str]) -> Parser:
    """Options of `inspect`."""
    result = Parser(
        description="Print a text in the terminal, coloured by route, the uncertain tokens marked."
    )
    add_fitted(result)
    result.add_argument("--layer", type=int, default=0, help="layer whose routes are shown")
    result.add_argument(
        "--unit",
        type=int,
        default=0,
        help="routing unit of it that is shown: 0, or a key head or query head",
    )
    result.add_argument("--tokens", type=int, default=800, help="tokens to show, at most")
    result.add_argument(
        "--threshold",
        type=float,
        default=SURE_ENOUGH,
        help="a token that is right less probably is marked",
    )
    result.add_argument(
        "--by", type=str, default="route", help="what colours a token: route, risk, foreign"
    )
    result.add_argument(
        "--colour",
        type=str,
        default="auto",
        help="auto, always, never (then letters under the text)",
    )
    result.add_argument(
        "--svg",
        type=Optional[Path],
        default=None,
        help="file to write the coloured text to, as a picture",
    )
    result.add_argument(
        "--table",
        type=Optional[Path],
        default=None,
        help="CSV file to write what is known of each token in each layer: choice, mean and "
        "credible interval of each expert, entropies, cost",
    )
    return result


def _begin_inspect(options: Namespace) -> None:
    _check_fitted(options)
    for name in ("svg", "table"):
        if options[name] is not None:
            check_file_for(options[name], name)
    _say(f"inspect: {options.run}")


def report(arguments: Sequence[str]) -> Parser:
    """Options of `report`."""
    result = Parser(
        description="Write one self-contained HTML file that shows the posterior of a run, or of "
        "two side by side."
    )
    add_fitted(result)
    result.add_argument(
        "other", type=Optional[Path], nargs="?", default=None, help="second run folder, beside it"
    )
    result.add_argument(
        "--out", type=Optional[Path], default=None, help="file to write (default: RUN/report.html)"
    )
    result.add_argument(
        "--tokens", type=int, default=4000, help="tokens of the text to show, at most"
    )
    result.add_argument(
        "--quick", action="store_true", help="leave out guide, calibration and other text (minutes)"
    )
    return result


def _begin_report(options: Namespace) -> None:
    _check_fitted(options)
    out = options.out or options.run / "report.html"
    if options.other is not None:
        if not options.other.is_dir():
            require_file(options.other, CONFIG)
        if options.out is None:
            raise ValueError("out: expected a file for two runs; got none; give --out both.html")
    check_file_for(out)
    beside = "" if options.other is None else f" beside {options.other}"
    _say(f"report: {options.run}{beside}, to {out}")


def bench(arguments: Sequence[str]) -> Parser:
    """Options of `bench`."""
    result = Parser(
        description="Measure routed attention against the fastest full attention of a device, "
        "in turn, planning included: forward, forward and backward, decoding, memory. Nothing is "
        "timed before "
        "every backend agrees with the reference."
    )
    result.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda")
    result.add_argument("--quick", action="store_true", help="short texts and one mix only")
    result.add_argument(
        "--out", type=Path, default=Path("runs/bench"), help="folder for speed_DEVICE.csv and .png"
    )
    result.add_argument(
        "--lengths",
        type=int,
        nargs="+",
        default=None,
        help="tokens T (default: 512 to 32768, 65536 on a GPU)",
    )
    result.add_argument(
        "--mixes",
        type=str,
        nargs="+",
        default=None,
        help="percentages full/linear/local, as 10/60/30",
    )
    result.add_argument(
        "--shapes",
        type=str,
        nargs="+",
        default=None,
        help="BxHxTxDh, as 1x16x32768x64, instead of the usual ones",
    )
    result.add_argument(
        "--seconds",
        type=Optional[float],
        default=None,
        help="time for all (140 on a GPU, 1800 on a CPU); what does not fit is named",
    )
    result.add_argument(
        "--cpu_time",
        "--cpu-time",
        action="store_true",
        help="processor time of one thread, on a machine that is shared",
    )
    return result


def _begin_bench(options: Namespace) -> None:
    check_folder_for(options.out)
    options.began = time.perf_counter()  # the import of torch counts
    _say(f"bench: to {options.out}; every backend is first held against the reference")


def _say(line: str) -> None:
    print(line, flush=True)


def _check_folder(options: Namespace) -> None:
    if options.out is not None:
        check_folder_for(options.out)


def _check_fitted(options: Namespace) -> None:
    if not options.run.is_dir():
        require_file(options.run, CONFIG)
    _check_tokens(options)
    if options.text is None:
        return
    if not options.text.is_file():
        what = "is a folder" if options.text.is_dir() else "does not exist"
        raise ValueError(f"text: expected a file; {options.text} {what}; correct the path")
    try:
        options.text.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: expected UTF-8; got an invalid byte at {error.start}; convert the file"
        ) from error


def _check_tokens(options: Namespace) -> None:
    if options.tokens < 1:
        raise ValueError(f"tokens: expected at least 1; got {options.tokens}")


COMMANDS = {
    "fit": Command("fit a routed Transformer on a corpus and write a run folder", fit, _begin_fit),
    "evaluate": Command(
        "read a run on held-out text: losses, costs, loads, information; at a budget",
        evaluate,
        _begin_evaluate,
    ),
    "generate": Command(
        "continue a prompt, every token by the expert that its route says",
        generate,
        _begin_generate,
    ),
    "sweep": Command(
        "solve for the prior that costs a target; with a run, sweep its settings",
        sweep,
        _begin_sweep,
    ),
    "inspect": Command(
        "print a text coloured by route, the uncertain tokens marked", inspect, _begin_inspect
    ),
    "report": Command(
        "write one HTML file: verdicts, figures, the text coloured by route", report, _begin_report
    ),
    "bench": Command(
        "measure hard routing against the fastest full attention of this device",
        bench,
        _begin_bench,
    ),
}
"""In the order of the help."""
