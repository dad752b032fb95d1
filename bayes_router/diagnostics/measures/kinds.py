"""What a token is, as a reader sees it."""

import unicodedata
from enum import Enum

import torch
from torch import Tensor

from bayes_router.data.tokenisers import Tokeniser


class TokenKind(Enum):
    """What a token is, as a reader sees it."""

    LETTER = "letter"
    CAPITAL = "capital"
    WORD = "word"  # of several letters
    DIGIT = "digit"
    SPACE = "space"
    NEWLINE = "newline"
    PUNCTUATION = "punctuation"
    OTHER = "other"


def token_kind(piece: str) -> TokenKind:
    """The kind of what a token shows; a leading space does not count."""
    core = piece.strip(" ")
    if not core:
        return TokenKind.SPACE if piece else TokenKind.OTHER
    if "\n" in core:
        return TokenKind.NEWLINE
    if core.isalpha():
        return (
            TokenKind.WORD
            if len(core) > 1
            else TokenKind.CAPITAL
            if core.isupper()
            else TokenKind.LETTER
        )
    if core.isdigit():
        return TokenKind.DIGIT
    return (
        TokenKind.PUNCTUATION
        if all(unicodedata.category(c)[0] in "PS" for c in core)
        else TokenKind.OTHER
    )


def kinds_of_vocabulary(tokeniser: Tokeniser) -> Tensor:
    """Index into `TokenKind` of every token id, int64 [V]."""
    order = {kind: index for index, kind in enumerate(TokenKind)}
    shown = (tokeniser.decode([token]) for token in range(tokeniser.vocab_size))
    return torch.tensor(
        [order[TokenKind.OTHER if text == "\ufffd" else token_kind(text)] for text in shown]
    )
