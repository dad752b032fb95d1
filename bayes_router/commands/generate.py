"""`bayes-router generate`: continue a prompt with a run's model."""

from collections.abc import Iterator
from itertools import chain

import torch
from jsonargparse import Namespace

from bayes_router.config import Config
from bayes_router.data.tokenisers import Tokeniser, load_tokeniser
from bayes_router.training.checkpoint import load_run
from bayes_router.training.distributed import pick_device
from bayes_router.transformer.generate import GeneratedToken, Sampling, stream


def run(options: Namespace) -> None:
    """Print the continuation as it comes; the prompt stands there already."""
    try:
        config, tokeniser, steps = _begin(options)
        first = next(steps)
    except ValueError:
        print()  # behind the prompt
        raise
    pending: list[int] = []
    routes = []
    for token in chain([first], steps):
        routes.append(token.route[:, 0])
        pending.append(int(token.tokens[0]))
        text = tokeniser.decode(pending)
        # an unfinished character waits for its other bytes
        if not text.endswith("\ufffd") or len(pending) > 3:
            print(text, end="", flush=True)
            pending = []
    print(tokeniser.decode(pending))
    if options.routes:
        load = (
            torch.nn.functional.one_hot(torch.stack(routes), len(config.model.experts))
            .double()
            .mean((0, 1, 2))
        )
        print(
            ", ".join(
                f"{name} {share:.1%}"
                for name, share in zip(config.model.experts, load.tolist(), strict=True)
            )
        )


def _begin(options: Namespace) -> tuple[Config, Tokeniser, Iterator[GeneratedToken]]:
    device = pick_device(options.device)
    config, model = load_run(options.run, str(device))
    if config.data.corpus == "recall":
        raise ValueError(
            "run: expected a run on text; this one was fitted on recall, whose tokens are no text"
        )
    tokeniser = load_tokeniser(config.data.tokeniser)
    prompt = torch.from_numpy(tokeniser.encode(options.prompt.encode()).astype("int64"))[None].to(
        device
    )
    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    stops = [_stop_token(tokeniser, text) for text in options.stop]
    return (
        config,
        tokeniser,
        iter(stream(model, prompt, options.tokens, sampling, stop_tokens=stops)),
    )


def _stop_token(tokeniser: Tokeniser, text: str) -> int:
    ids = tokeniser.encode(text.encode())
    if len(ids) != 1:
        raise ValueError(
            f"stop: expected texts of one token of the tokeniser {tokeniser.name!r}; got {text!r}, "
            f"{len(ids)} tokens"
        )
    return int(ids[0])
