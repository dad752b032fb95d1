"""`bayes-router evaluate`: read a run on held-out text."""

from collections.abc import Sequence
from typing import Optional

from jsonargparse import Namespace

from bayes_router.commands.options import Parser, add_run
from bayes_router.config import config_from_dict
from bayes_router.training.checkpoint import load_run
from bayes_router.training.evaluate import evaluate
from bayes_router.training.fit import load_data, pick_device
from bayes_router.transformer.layer import build_prior

HELP = "read a run on held-out text: losses, costs, loads, information"


def parser(arguments: Sequence[str]) -> Parser:
    """Options of `evaluate`."""
    result = Parser(description="Read a fitted run on held-out text, its routes executed.")
    add_run(result)
    result.add_argument("--corpus", type=Optional[str], default=None, help="another corpus than the run's")
    result.add_argument("--tokens", type=Optional[int], default=None, help="read at most this many tokens")
    return result


def run(options: Namespace) -> None:
    """Print the table of a run."""
    config, model = load_run(options.run, str(pick_device(options.device)))
    if options.corpus is not None:
        config = config_from_dict({"data": {"corpus": options.corpus}}, config)
    needed, data = load_data(config)
    if needed.model.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"corpus: expected one of the run's vocabulary, {config.model.vocab_size} ids; "
            f"{config.data.corpus} has {needed.model.vocab_size}"
        )
    prior = build_prior(config.prior, config.model, config.model.num_layers, config.data.context)
    result = evaluate(
        model,
        data.valid,
        prior.concentration,
        context=config.data.context,
        batch_size=config.train.batch_size,
        limit=max(options.tokens or config.data.eval_tokens, config.data.context),
    )
    print(result.table())
