"""`bayes-router generate`: continue a prompt with a run's model."""

from collections.abc import Sequence

import torch
from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_run
from bayes_router.data.tokenisers import Tokeniser, load_tokeniser
from bayes_router.training.checkpoint import load_run
from bayes_router.training.fit import pick_device
from bayes_router.transformer.generate import Sampling, stream

HELP = "continue a prompt, every token by the expert that its route says"


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `generate`."""
    result = Parser(description="Continue a prompt, every token by the expert that its route says.")
    add_run(result)
    result.add_argument("--prompt", type=str, required=True, help="text to continue")
    result.add_argument("--tokens", type=int, default=200, help="tokens to add")
    result.add_argument("--temperature", type=float, default=0.8, help="0 is greedy")
    result.add_argument("--top_k", "--top-k", type=int, default=0, help="draw from the k likeliest tokens; 0 from all")
    result.add_argument("--top_p", "--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this mass")
    result.add_argument("--seed", type=int, default=0, help="of the draws")
    stop = "end behind any of these texts, each a single token of the run's tokeniser (bash: $'\\n' for the end of a line)"
    result.add_argument("--stop", type=str, nargs="+", default=[], help=stop)
    result.add_argument("--routes", action="store_true", help="print the load of each expert over the new tokens")
    return result


def run(options: Namespace) -> None:
    """Print the prompt and its continuation as it comes."""
    device = pick_device(options.device)
    config, model = load_run(options.run, str(device))
    if config.data.corpus == "recall":
        raise ValueError("run: expected a run on text; this one was fitted on recall, whose tokens are no text")
    tokeniser = load_tokeniser(config.data.tokeniser)
    ids = tokeniser.encode(options.prompt.encode())
    if len(ids) == 0:
        raise ValueError("prompt: expected at least one character; got an empty text")
    prompt = torch.from_numpy(ids.astype("int64"))[None].to(device)
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    stops = [_stop_token(tokeniser, text) for text in options.stop]
    steps = stream(model, prompt, options.tokens, sampling, stop_tokens=stops)
    print(options.prompt, end="", flush=True)
    pending: list[int] = []
    routes = []
    for token in steps:
        routes.append(token.route[:, 0])
        pending.append(int(token.tokens[0]))
        text = tokeniser.decode(pending)
        if not text.endswith("\ufffd") or len(pending) > 3:  # an unfinished character waits for its other bytes
            print(text, end="", flush=True)
            pending = []
    print(tokeniser.decode(pending))
    if options.routes:
        load = torch.nn.functional.one_hot(torch.stack(routes), len(config.model.experts)).double().mean((0, 1))
        print(", ".join(f"{name} {share:.1%}" for name, share in zip(config.model.experts, load.tolist(), strict=True)))


def _stop_token(tokeniser: Tokeniser, text: str) -> int:
    ids = tokeniser.encode(text.encode())
    if len(ids) != 1:
        raise ValueError(
            f"stop: expected texts of one token of the tokeniser {tokeniser.name!r}; got {text!r}, {len(ids)} tokens"
        )
    return int(ids[0])
