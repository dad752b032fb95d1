"""Does uncertainty tell other text from the training text?

Code, another language, the text itself shuffled.
"""

import ast
import inspect
import textwrap
from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from bayes_router.checks import require
from bayes_router.data.tokenisers import Tokeniser
from bayes_router.data.tokens import Batch
from bayes_router.diagnostics.measures.calibration import CalibrationThresholds, auroc
from bayes_router.diagnostics.measures.evidence import auroc_of
from bayes_router.diagnostics.measures.uncertainty import Measure, measures
from bayes_router.diagnostics.measures.verdict import Severity, Verdict
from bayes_router.diagnostics.reading import read
from bayes_router.transformer.model import RoutedLanguageModel

PASSAGE = 64  # tokens
PASSAGES = 48  # of each text, at most
GERMAN = """
Als der Winter zu Ende ging, kam der alte Uhrmacher jeden Morgen an den Fluss und zählte die Eisschollen, die langsam an
der Brücke vorbeizogen. Er trug einen grauen Mantel, der ihm zu groß geworden war, und hielt in der linken Hand ein Heft,
in das er mit spitzem Bleistift Striche machte. Die Kinder aus dem Dorf fragten ihn oft, wozu er das tue, doch er lächelte
nur und sagte, man müsse wissen, wie viel Zeit noch übrig sei. Am dritten Sonntag im März waren es nur noch sieben Schollen,
und am Abend desselben Tages hörte man zum ersten Mal wieder die Frösche.

Seine Tochter führte unterdessen die Werkstatt weiter. Sie hatte geschickte Finger und ein gutes Gehör; schon am Schlagen
des Pendels erkannte sie, ob ein Zahnrad verschlissen oder nur verschmutzt war. Wer ihr eine Uhr brachte, bekam sie nach
wenigen Tagen zurück, gereinigt, geölt und so genau gestellt, dass selbst der Bahnhofsvorsteher sich nach ihr richtete. Nur
die große Standuhr des Vaters rührte sie nicht an. Sie ging seit Jahren elf Minuten vor, und niemand durfte daran etwas
ändern, denn in diesen elf Minuten, so hieß es im Haus, sei noch immer Sommer.

Im April endlich, als das Wasser wieder offen lag und die ersten Boote hinausfuhren, legte der Alte sein Heft in die
Schublade unter dem Fenster. Auf der letzten Seite stand keine Zahl mehr, sondern ein einziger Satz: Es genügt, wenn einer
hinsieht.
"""  # noqa: E501


def other_texts(tokens: Tensor, tokeniser: Tokeniser, seed: int = 0) -> dict[str, Tensor]:
    """Token ids [N] of three texts unlike the run's own.

    Args:
        tokens: int64 [N], of the run's own text.
        tokeniser: of the run.
        seed: of the shuffle.

    Returns:
        "code" (Python modules that come with the interpreter), "German", and "shuffled" (the own
        tokens in random order: the same unigrams, no structure).
    """
    code = b"\n".join(inspect.getsource(module).encode() for module in (ast, textwrap))
    shuffled = tokens[torch.from_numpy(np.random.default_rng(seed).permutation(len(tokens)))]
    encoded = {
        name: torch.from_numpy(tokeniser.encode(text).astype("int64"))
        for name, text in _texts(code)
    }
    return encoded | {"shuffled": shuffled}


def _texts(code: bytes) -> list[tuple[str, bytes]]:
    return [("code", code), ("German", " ".join(GERMAN.split("\n")).encode())]


class Score:
    """Names of the columns by which a text is told apart."""

    ROUTING = (
        Measure.ENTROPY_OF_MEAN,
        Measure.MUTUAL_INFORMATION,
        Measure.EXPECTED_ENTROPY,
        Measure.PROBABILITY_RIGHT,
    )
    NLL = "nll"


def passage_scores(
    model: RoutedLanguageModel, tokens: Tensor, cost_ratio: Tensor, length: int = PASSAGE
) -> pd.DataFrame:
    """Means over layers and tokens of each of the first passages of a text.

    The routing measures and the nll (nats).
    """
    count = min((len(tokens) - 1) // length, PASSAGES)
    require(count >= 1, "text", f"at least {length + 1} tokens", len(tokens), "give a longer text")
    start = torch.arange(count)[:, None] * length + torch.arange(length)
    batches = (Batch(tokens[part], tokens[part + 1]) for part in start.split(16))
    rows = []
    for reading in read(model, batches):
        measured = measures(reading.concentration, cost_ratio).mean((0, 2, 3))  # [B, M]
        frame = pd.DataFrame(measured.numpy(), columns=[m.value for m in Measure])
        frame[Score.NLL] = reading.nll.mean(1).double().cpu().numpy()
        rows.append(frame)
    return pd.concat(rows, ignore_index=True)


def tell_apart(
    model: RoutedLanguageModel,
    own: Tensor,
    others: Mapping[str, Tensor],
    cost_ratio: Tensor,
    length: int = PASSAGE,
) -> pd.DataFrame:
    """AUROC with which the mean of each measure over a passage tells other texts from the own one.

    Above 0.5 the other text has more of it (for probability_right: less), 0.5 is chance, below 0.5
    the router is surer of the foreign text. `nll` is what the language model itself says, the
    figure to beat.

    Args:
        model: the fitted model.
        own: token ids [N] of held-out text of the run's corpus.
        others: token ids of other texts by name.
        cost_ratio: [E].
        length: tokens of a passage.

    Returns:
        One row a text, one column a measure, `passages`, and `low`, the lower end of the interval
        of entropy_of_mean over them.
    """
    base, rows = passage_scores(model, own, cost_ratio, length), []
    for name, tokens in others.items():
        scores = passage_scores(model, tokens, cost_ratio, length)
        row: dict[str, object] = {"text": name, "passages": len(scores)}
        for measure in Score.ROUTING:
            sign = -1 if measure is Measure.PROBABILITY_RIGHT else 1
            row[measure.value] = auroc(
                sign * scores[measure.value].to_numpy(), sign * base[measure.value].to_numpy()
            )
        entropy = Measure.ENTROPY_OF_MEAN.value
        told = auroc_of(scores[[entropy]].to_numpy(), base[[entropy]].to_numpy())
        row["low"], row["high"] = told.low, told.high
        row[Score.NLL] = auroc(scores[Score.NLL].to_numpy(), base[Score.NLL].to_numpy())
        rows.append(row)
    return pd.DataFrame(rows)


def other_text_verdict(
    table: pd.DataFrame, thresholds: CalibrationThresholds | None = None
) -> Verdict:
    """Whether the entropy of the mean route tells other text apart."""
    t, column = thresholds or CalibrationThresholds(), Measure.ENTROPY_OF_MEAN.value
    told = [row["text"] for _, row in table.iterrows() if row["low"] >= t.auroc]
    figures = ", ".join(
        f"{row['text']} {row[column]:.2f} ({row['low']:.2f} to {row['high']:.2f}; nll "
        f"{row[Score.NLL]:.2f}, n = {row['passages']})"
        for _, row in table.iterrows()
    )
    everything = len(told) == len(table)
    which = "all of them" if everything else ", ".join(told) or "none of them"
    return Verdict(
        "other text",
        Severity.GOOD if everything else Severity.NOTE,
        f"routing entropy tells apart {which} from the training text (AUROC by "
        f"passages, threshold {t.auroc:g} for the lower end of its interval): {figures}.",
        ""
        if everything
        else (
            "the nll where other text must be recognised: uncertainty about a route is not "
            "that about the text."
        ),
    )
