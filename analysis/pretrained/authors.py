"""Are novels by an author whom evidence does not know a false alarm? Every author is left out once.

Two authors say little of that: what one author is from others, evidence sees among those that it
knows, too. So the authors of the fit's novels are dealt into folds; a density of the others' text
reads windows of the authors left out, and windows of the others that it did not read. The figure is
the mean over authors of the AUROC by token, its interval over authors.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.diagnostics.measures.bootstrap import Estimate, clustered
from bayes_router.diagnostics.measures.calibration import auroc
from bayes_router.diagnostics.measures.evidence import token_scores

FOLDS = 5
EACH = 2  # windows of an author
SCORES = ("recent", "token")


def halves(ids: Tensor, author: Tensor, context: int) -> tuple[list[Tensor], Tensor]:
    """(text [N] of each author to fit on, windows [A, EACH, context] to read): turn by turn.

    Raises:
        ValueError: an author has too little text.
    """
    fitted, read = [], []
    for one in range(int(author.max()) + 1):
        own = ids[author == one]
        whole = len(own) // (2 * context)
        require(whole >= EACH, "author novels", f"{2 * EACH * context} tokens each", len(own))
        pieces = own[: whole * 2 * context].view(whole, 2, context)
        fitted.append(pieces[:, 0].flatten())
        read.append(pieces[torch.linspace(0, whole - 1, EACH).long(), 1])
    return fitted, torch.stack(read)


def author_scores(
    router: Any, ids: Tensor, author: Tensor, context: int, batch: int, tokens: int, stride: int
) -> dict[str, np.ndarray]:
    """Of each fold, how foreign each author's windows are to it: SCORES, [FOLDS, A, EACH * T]."""
    fitted, read = halves(ids, author, context)
    flat = torch.cat([read.flatten(), read.flatten()[:1]])
    found: dict[str, list[np.ndarray]] = {name: [] for name in SCORES}
    for fold in range(FOLDS):
        known = torch.cat([x for i, x in enumerate(fitted) if i % FOLDS != fold])
        router.fit_evidence(known, context=context, batch_size=batch, tokens=tokens)
        scores = token_scores(router, flat, context)
        for name in SCORES:
            found[name].append(scores[name][:, ::stride].reshape(len(read), -1))
    return {name: np.stack(parts) for name, parts in found.items()}


def told_apart(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(AUROC [A] of each author, unknown, against the known ones; of each, known, against the rest
    of them) of scores [FOLDS, A, N].
    """
    folds, authors = len(scores), range(scores.shape[1])
    unknown, known = np.empty(len(authors)), np.empty(len(authors))
    for one in authors:
        of = []
        for fold in range(folds):
            others = [a for a in authors if a % folds != fold and a != one]
            of.append(auroc(scores[fold, one], scores[fold, others].ravel()))
        unknown[one] = of.pop(one % folds)
        known[one] = np.mean(of)
    return unknown, known


def author_rows(found: Mapping[str, np.ndarray], draws: int) -> list[dict[str, object]]:
    """Rows of the table of evidence."""
    rows: list[dict[str, object]] = []
    for score in SCORES:
        scores = found[score].astype(np.float64)
        n, windows = scores[0].size, scores.shape[1] * EACH
        for kind, each in zip(("unknown", "known"), told_apart(scores), strict=True):
            mean, sd = (over_authors(each, of, draws) for of in (np.mean, np.std))
            about = {"against": "the known authors", "score": score}
            for text, told in ((f"an author, {kind}", mean), (f"sd of {kind} authors", sd)):
                row = {"text": text} | about | told._replace(n=n)._asdict()
                rows.append(row | {"windows": windows})
    return rows


def over_authors(each: np.ndarray, of: Any, draws: int) -> Estimate:
    """A figure of a number an author, with its interval."""
    return clustered(lambda i: float(of(each[i])), np.arange(len(each)), draws=draws)
