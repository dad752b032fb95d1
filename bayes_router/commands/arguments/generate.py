"""The options of continuing a prompt."""

from collections.abc import Sequence

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_run
from bayes_router.commands.refused import check_tokens
from bayes_router.files import CONFIG, require_file


def parser(arguments: Sequence[str]) -> Parser:
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


def begin(options: Namespace) -> None:
    """Refuse what can be refused at once, and print the prompt, with which the text begins."""
    require_file(options.run, CONFIG)
    check_tokens(options)
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
