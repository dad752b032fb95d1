"""Reads a patch that comes with the package again: the figures of its card, on a CPU.

    python -m analysis.pretrained.card MODEL TOKENS.npz NAME [--texts novels]

MODEL is the folder of SmolLM2-135M-Instruct, TOKENS.npz is written by `analysis.pretrained.texts`.
Prints perplexity lost against the unpatched model, exp(mean of the paired differences in nats) - 1,
and the executed cost of each text under the policy that the patch was saved with.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch

from analysis.pretrained.loading import load_model
from analysis.pretrained.reading import TEXTS, Reader, Setting
from analysis.pretrained.table import lines, percent, standard_error
from analysis.pretrained.texts import load
from bayes_router.data.stream import TokenStream
from bayes_router.integrations.huggingface.model import RoutedPretrained
from bayes_router.integrations.patching import load_patch
from bayes_router.routing.policy import Budget


def figures(
    router: RoutedPretrained, texts: dict[str, TokenStream], context: int, pieces: int
) -> pd.DataFrame:
    """A row a text."""
    policy, reader, rows = router.policy, Reader(router), []
    assert isinstance(policy, Budget)
    for name, stream in texts.items():
        found = pd.DataFrame(
            reader.lost(name, stream, context, pieces, Setting(router, policy.price))
        )
        lost, error = percent(found["lost"].mean()), 100 * standard_error(found["lost"])
        rows.append({"text": name, "pieces": len(found), "cost": round(found["cost"].mean(), 3)})
        rows[-1] |= {"lost, %": round(lost, 3), "SE": round(error, 3)}
    return pd.DataFrame(rows)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("patch", help="a name, or the folder of a patch with a budget")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--pieces", type=int, default=8, help="of each text")
    parser.add_argument("--texts", nargs="*", default=TEXTS, help="kinds of text that are read")
    args = parser.parse_args(argv)
    model = load_model(args.model, torch.device("cpu"))
    _, held = load(args.tokens, model.config.vocab_size)
    texts = {name: held[name] for name in args.texts}
    router = load_patch(model, args.patch)
    print("\n".join(lines(figures(router, texts, args.context, args.pieces))))


if __name__ == "__main__":
    sys.exit(main())
