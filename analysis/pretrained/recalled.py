"""Running text that asks again for what stood far back, to fit on.

Facts are dropped into running text and asked for hundreds to thousands of tokens later, each once.
Their wording, names and kinds of value are others than those of `analysis.pretrained.retrieval`,
which reads what a patch still finds: what is read there was not fitted on.
"""

import heapq
import math
from collections.abc import Callable, Sequence
from random import Random

PEOPLE = "Agnes Boris Clara Dmitri Edith Felix Greta Hugo Ines Jonas Klara Leon Mina Nils Olga"
PEOPLE += " Pavel Quentin Rosa Stefan Tilda Ugo Vera Walter Xenia Yusuf Zelda"
THINGS = "safe cabin locker gate drawer archive cellar studio trunk hangar office pantry workshop"
THINGS += " chapel garage depot vault attic mailbox warehouse"
PLACES = "Arnhem Bilbao Cracow Dover Essen Faro Ghent Hobart Izmir Jena Kyoto Lyon Malmo Nantes"
PLACES += " Oslo Porto Quito Riga Siena Turin Utrecht Varna Wexford York Zagreb"
WORDS = "copper violin winter paper orange silver music marble thunder pepper cotton rabbit"
WORDS += " planet ticket mirror velvet ginger walnut signal button coffee dragon falcon ladder"
FORMS = (  # (what is said, what is asked, the answer), of a person, a thing, a place and a value
    ("\n{who} opens the {what} in {where} with {value}.\n",
     "\nWith what does {who} open the {what} in {where}? With", " {value}.\n"),
    ("\nRegister, {where}, {what} of {who}: {value}\n",
     "\nRegister, {where}, {what} of {who}:", " {value}\n"),
    ("\n\"Keep this in mind,\" said {who}, \"the {what} at {where} has {value}.\"\n",
     "\n\"You told me once, {who}, that the {what} at {where} has", " {value}.\"\n"),
    ("\n# {what}_{where}_{who} = {value}\n", "\nassert {what}_{where}_{who} ==", " {value}\n"),
    ("\nTo: {who}\nThe {what}, {where}: code {value}\n",
     "\nFrom: {who}\nThe {what}, {where}: code", " {value}\n"),
)  # fmt: skip
NEAREST, FARTHEST = 300, 7000
GAP = 110
"""Tokens of running text between two facts or questions, on average."""


def _value(rng: Random) -> str:
    """A number of 4 to 8 digits, a pair of words, or letters and digits."""
    kind = rng.random()
    if kind < 0.5:
        return str(rng.randrange(10**3, 10 ** rng.randint(4, 8)))
    if kind < 0.75:
        return " ".join(rng.sample(WORDS.split(), 2))
    return "".join(rng.choice("BCDFGHKLMNPRSTVWXZ23456789") for _ in range(6))


def recalled(
    encode: Callable[[str], list[int]], running: Sequence[int], length: int, rng: Random
) -> list[int]:
    """`length` tokens.

    Args:
        encode: text to ids, nothing added.
        running: ids of the text around, [N].
        length: tokens in all.
        rng: what is drawn is drawn of this.
    """
    ids, at = list[int](), rng.randrange(len(running))
    due: list[tuple[int, list[int]]] = []  # (where in the text a question is due, its ids)
    used: set[tuple[str, str, str]] = set()
    people, things, places = PEOPLE.split(), THINGS.split(), PLACES.split()
    while len(ids) < length:
        for _ in range(1 + int(rng.expovariate(1 / GAP))):
            ids.append(int(running[at % len(running)]))
            at += 1
        if due and due[0][0] <= len(ids):
            ids += heapq.heappop(due)[1]
            continue
        names = (rng.choice(people), rng.choice(things), rng.choice(places))
        if names in used:
            continue
        used.add(names)
        who, what, where = names
        filled = {"who": who, "what": what, "where": where, "value": _value(rng)}
        said, ask, answer = (part.format(**filled) for part in rng.choice(FORMS))
        ids += encode(said)
        later = math.exp(rng.uniform(math.log(NEAREST), math.log(FARTHEST)))
        heapq.heappush(due, (len(ids) + int(later), encode(ask) + encode(answer)))
    return ids[:length]
