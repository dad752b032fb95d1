"""What a run reads: the source that the settings name, checked before anything is written."""

from dataclasses import dataclass

from bayes_router.checks import require
from bayes_router.config import Config, with_changes
from bayes_router.data.prepared import prepared_data
from bayes_router.data.recall import RecallData
from bayes_router.data.text import CORPORA, load_corpus, split_documents, unknown_corpus
from bayes_router.data.tokenisers import load_tokeniser
from bayes_router.data.tokens import TextData, TokenDataset, TokenSource


def text_data(
    name: str,
    tokeniser: str = "bytes",
    valid_fraction: float = 0.1,
    seed: int = 0,
    prepared: str = "",
) -> TextData:
    """Load the corpus `name`, split it by document, and encode both parts.

    Errors as in the functions that do each.

    With `prepared`, a folder, or for a corpus `hf:NAME`, the tokens are kept in files and mapped,
    see `data.prepared`.
    """
    if prepared or name.startswith("hf:"):
        return prepared_data(name, tokeniser, valid_fraction, seed, prepared)
    corpus, encoder = load_corpus(name), load_tokeniser(tokeniser)
    train, valid = split_documents(corpus, valid_fraction, seed)
    return TextData(
        train=TokenDataset(train, encoder, f"{name} train"),
        valid=TokenDataset(valid, encoder, f"{name} valid"),
        corpus=name,
        sha256=corpus.sha256,
        tokeniser=encoder,
    )


@dataclass(frozen=True)
class Data:
    """What a run reads, and what identifies it."""

    train: TokenSource
    valid: TokenSource
    name: str
    sha256: str
    tokens: int  # of training text; 0 for a generator, which has no end


def load_data(config: Config) -> tuple[Config, Data]:
    """The data of a configuration, and the configuration with the vocabulary of the data."""
    if config.data.corpus == "recall":
        recall = RecallData()
        require(
            config.data.context >= recall.min_context,
            "data.context",
            f"at least {recall.min_context} for corpus recall",
            config.data.context,
        )
        return with_changes(config, {"model.vocab_size": recall.vocab_size}), Data(
            recall, recall, "recall", "", 0
        )
    settings = config.data
    if settings.corpus not in CORPORA and not settings.corpus.startswith(("text:", "hf:")):
        raise unknown_corpus(settings.corpus, "recall")
    text = text_data(
        settings.corpus, settings.tokeniser, settings.valid_fraction, prepared=settings.prepared
    )
    data = Data(text.train, text.valid, text.corpus, text.sha256, len(text.train))
    # the shortest window that both parts can give is checked before anything is written
    next(iter(text.valid.windows(settings.context, 1, max(settings.eval_tokens, settings.context))))
    text.train.batch(0, 1, settings.context, config.train.seed)
    return with_changes(config, {"model.vocab_size": text.tokeniser.vocab_size}), data
