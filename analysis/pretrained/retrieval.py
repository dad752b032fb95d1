"""Texts that ask for what stands far back.

Needles among other text, chains of variables, common words; the last two once more in a form that
small models answer: one step, one word, behind solved ones.

Tasks of the kind that RULER (Hsieh et al. 2024, arXiv 2404.06654) made the standard for long
contexts, in words of this file's own. The answer stands at the end of each text and is scored
teacher-forced: an item counts where the model's first choice is right at each of its tokens. Where
several items may come in any order, the first token of any item not yet named is right.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_router.checks import require

Encode = Callable[[str], list[int]]

ADJECTIVES = "amber brisk calm dusty eager faint gentle hollow icy jolly keen lively mellow narrow"
ADJECTIVES += " odd pale quiet rapid silent tender upright vivid warm young"
NOUNS = "anchor bridge candle desert engine forest garden harbour island jacket kettle lantern"
NOUNS += " meadow needle orchard parcel quarry river saddle temple umbrella valley window yard"
LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
OFTEN, COMMON = 30, 10
"""How often a common word stands in the list, and how many words are common.

The others stand thrice.
"""


@dataclass(frozen=True)
class Haystack:
    """What a task is built in.

    Attributes:
        encode: text to ids, nothing added.
        ids: of running text, [N]: what stands around the needles.
        words: what lists of words are made of; far more than `COMMON`.
    """

    encode: Encode
    ids: Sequence[int]
    words: Sequence[str]


@dataclass(frozen=True)
class Question:
    """A text with its answer: `tokens`, the last of which are `items`, one after the other."""

    tokens: tuple[int, ...]
    items: tuple[tuple[int, ...], ...]

    @property
    def answer(self) -> int:
        """Tokens of the answer."""
        return sum(map(len, self.items))

    def right(self, said: Sequence[int]) -> float:
        """Share of the items that are right.

        `said` is the first choice before each answer token.
        """
        left, at, good = list(self.items), 0, 0
        for item in self.items:
            first = {other[0] for other in left}
            good += said[at] in first and tuple(said[at + 1 : at + len(item)]) == item[1:]
            left.remove(item)
            at += len(item)
        return good / len(self.items)


def _number(rng: Random, digits: int = 7) -> str:
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def _keys(rng: Random, count: int) -> list[str]:
    pairs = [f"{a}-{n}" for a in ADJECTIVES.split() for n in NOUNS.split()]
    return rng.sample(pairs, count)


def _assemble(
    hay: Haystack,
    pieces: Sequence[list[int]],
    ask: str,
    answer: Sequence[str],
    length: int,
    rng: Random,
) -> Question:
    """`pieces` in their order at random places of running text.

    Then come the question and the answer.
    """
    items = tuple(tuple(hay.encode(one)) for one in answer)
    end = hay.encode(ask)
    room = length - len(end) - sum(map(len, items)) - sum(map(len, pieces))
    if room < 0 or room >= len(hay.ids):
        raise ValueError(
            f"length: expected {length - room} or more tokens, and running text to fill them; got "
            f"{length} "
            f"and {len(hay.ids)} tokens of text; lengthen one or the other"
        )
    start = rng.randrange(len(hay.ids) - room)
    text, tokens, before = list(hay.ids[start : start + room]), list[int](), 0
    for place, piece in zip(sorted(rng.sample(range(room + 1), len(pieces))), pieces, strict=True):
        tokens += text[before:place] + piece
        before = place
    tokens += text[before:] + end
    return Question(tuple(tokens) + tuple(t for item in items for t in item), items)


def needle(hay: Haystack, length: int, rng: Random, keys: int = 1) -> Question:
    """`keys` numbers under names of their own in running text, one of them asked for."""
    names, numbers = _keys(rng, keys), [_number(rng) for _ in range(keys)]
    pieces = [
        hay.encode(f"\nThe secret number of the {n} is {v}.\n")
        for n, v in zip(names, numbers, strict=True)
    ]
    asked = rng.randrange(keys)
    return _assemble(
        hay,
        pieces,
        f"\nThe secret number of the {names[asked]} is",
        [f" {numbers[asked]}"],
        length,
        rng,
    )


def many_needles(hay: Haystack, length: int, rng: Random) -> Question:
    """Eight numbers, one asked for."""
    return needle(hay, length, rng, keys=8)


def variables(hay: Haystack, length: int, rng: Random, hops: int = 4) -> Question:
    """A number handed on from variable to variable, beside another such chain: who holds it?"""
    names = ["".join(rng.sample(LETTERS, 5)) for _ in range(2 * (hops + 1))]
    mine, other, value = names[: hops + 1], names[hops + 1 :], _number(rng, 5)
    chains = [
        [
            f"\nLet {chain[0]} = {number}.\n",
            *(f"\nLet {b} = {a}.\n" for a, b in zip(chain, chain[1:], strict=False)),
        ]
        for chain, number in ((mine, value), (other, _number(rng, 5)))
    ]
    mixed, left = list[str](), [list(reversed(c)) for c in chains]
    while any(left):
        mixed.append(rng.choice([c for c in left if c]).pop())
    ask = (
        f"\nFollow every assignment above. The {hops + 1} variables whose value is {value}, "
        f"from the first to the last:"
    )
    return _assemble(
        hay, [hay.encode(line) for line in mixed], ask, [f" {n}" for n in mine], length, rng
    )


def common_words(hay: Haystack, length: int, rng: Random) -> Question:
    """A long list in which ten words stand thirty times each and the others thrice: which ten?

    The list alone fills the text, so that its number of rare words follows from `length`.
    """
    words = rng.sample(list(hay.words), len(hay.words))
    common, rare = words[:COMMON], words[COMMON:]
    ask = hay.encode("\nThe ten words that stand most often in the list above are:")
    items = tuple(tuple(hay.encode(f" {w}")) for w in common)
    begin = hay.encode("A list of words, some of which stand in it more often than others:")
    room = length - len(ask) - len(begin) - sum(map(len, items))
    often = max(1, min(OFTEN, room // (3 * sum(map(len, items)))))
    listed = [list(hay.encode(f" {w}")) for w in common for _ in range(often)]
    used = sum(map(len, listed))
    for word in rare:
        ids = list(hay.encode(f" {word}"))
        if used + 3 * len(ids) > room:
            break
        listed += [ids] * min(3, often)
        used += min(3, often) * len(ids)
    if not 0 <= room - used < room // 2:
        raise ValueError(
            f"length: expected as many tokens as {len(hay.words)} words fill; got {length}; give "
            f"more words"
        )
    rng.shuffle(listed)
    tokens = [*begin, *(t for ids in listed for t in ids), *ask]
    return Question(tuple(tokens) + tuple(t for item in items for t in item), items)


def one_step(hay: Haystack, length: int, rng: Random) -> Question:
    """A number handed on once: what is the second variable's value? Behind a solved one."""

    def chain() -> tuple[list[str], str, str]:
        first, second = ("".join(rng.sample(LETTERS, 5)) for _ in range(2))
        value = _number(rng, 5)
        told = [f"\nLet {first} = {value}.\n", f"\nLet {second} = {first}.\n"]
        return told, f"\nFollow every assignment above. The value of {second} is", f" {value}"

    told, ask, value = chain()
    begin = tuple(hay.encode("".join(told) + ask + value + ".\n\n"))
    told, ask, value = chain()
    pieces = [hay.encode(line) for line in told]
    asked = _assemble(hay, pieces, ask, [value], length - len(begin), rng)
    return Question(begin + asked.tokens, asked.items)


def commonest(hay: Haystack, length: int, rng: Random) -> Question:
    """A list of which every fifth word, or so, is the same: which? Behind four solved ones."""
    words = list(hay.words)

    def listed(number: int) -> tuple[list[int], tuple[int, ...]]:
        word, often = rng.choice(words), max(number // 5, 1)
        given = [word] * often + rng.choices(words, k=number - often)
        rng.shuffle(given)
        ask = hay.encode("List: " + " ".join(given) + "\nMost frequent word:")
        return ask, tuple(hay.encode(f" {word}"))

    tokens = list[int]()
    for _ in range(4):
        asked, answer = listed(20)
        tokens += [*asked, *answer, *hay.encode("\n\n")]
    number = length - len(tokens) - 12  # words of a token each, most of them
    while True:
        require(number > 0, "length", f"more than {len(tokens) + 12} tokens", length, "lengthen it")
        asked, answer = listed(number)
        if len(tokens) + len(asked) + len(answer) <= length:
            return Question((*tokens, *asked, *answer), (answer,))
        number -= 8


TASKS: dict[str, Callable[[Haystack, int, Random], Question]] = {
    "needle": needle,
    "many needles": many_needles,
    "variables": variables,
    "common words": common_words,
    "variables, one step": one_step,
    "commonest word": commonest,
}


def prompts(task: str, hay: Haystack, length: int, count: int, seed: int = 0) -> list[Question]:
    """`count` texts of at most `length` tokens, answer included; the same for the same seed."""
    return [TASKS[task](hay, length, Random(f"{task} {length} {seed} {i}")) for i in range(count)]


class Answered(NamedTuple):
    """What a model says of the answer of a prompt."""

    right: float  # share of the items
    # per token of the answer, teacher-forced: tells models apart where all are right, or none
    nats: float
    cost: float = math.nan  # executed, keys read over those of full attention


@torch.no_grad()
def score(
    last: Callable[[Tensor, int], Tensor], asked: Sequence[Question], device: torch.device
) -> list[Answered]:
    """The score of each prompt.

    `last(tokens [1, T], n)` gives the logits [1, n, V] of the last n positions.
    """
    found = []
    for prompt in asked:
        tokens = torch.tensor(prompt.tokens, device=device)
        logits = last(tokens[None, :-1], prompt.answer)[0].float()
        nats = torch.nn.functional.cross_entropy(logits, tokens[-prompt.answer :])
        found.append(Answered(prompt.right(logits.argmax(-1).tolist()), float(nats)))
    return found
