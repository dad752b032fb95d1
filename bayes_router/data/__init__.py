"""Data: corpora, tokenisers and token streams, and associative recall with a known best route."""

from bayes_router.data.load import text_data
from bayes_router.data.recall import RecallBatch, RecallData
from bayes_router.data.text import Corpus, load_corpus, split_documents
from bayes_router.data.tokenisers import ByteTokeniser, GPT2Tokeniser, Tokeniser, load_tokeniser
from bayes_router.data.tokens import Batch, TextData, TokenDataset, TokenSource

__all__ = [
    "Batch",
    "ByteTokeniser",
    "Corpus",
    "GPT2Tokeniser",
    "RecallBatch",
    "RecallData",
    "TextData",
    "TokenDataset",
    "TokenSource",
    "Tokeniser",
    "load_corpus",
    "load_tokeniser",
    "split_documents",
    "text_data",
]
