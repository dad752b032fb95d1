"""Text that is fitted on asks for what it said, and is none of what retrieval reads."""

import re
from random import Random

from analysis.pretrained.recalled import FARTHEST, FORMS, NEAREST, PEOPLE, PLACES, THINGS, recalled
from analysis.pretrained.retrieval import ADJECTIVES, NOUNS, TASKS, Haystack, prompts


def encode(text: str) -> list[int]:
    return list(text.encode())


RUNNING = encode("It was a bright cold day and the clocks were striking. " * 40)


def test_what_is_asked_was_said_and_lies_far_back() -> None:
    ids = recalled(encode, RUNNING, 60_000, Random(0))
    text = bytes(ids).decode()
    assert len(ids) == 60_000 and ids == recalled(encode, RUNNING, 60_000, Random(0))
    asked = 0
    named = {"who": r"(?P<who>\w+?)", "what": r"(?P<what>\w+?)", "where": r"(?P<where>\w+?)"}
    for said, ask, answer in FORMS:
        escaped = re.escape(ask + answer).replace(r"\{", "{").replace(r"\}", "}")
        question = re.sub(r"{(\w+)}", lambda m: named.get(m[1], "(?P<value>[\\w ]+?)"), escaped)
        for found in re.finditer(question, text):
            back = found.start() - text.find(said.format(**found.groupdict()))
            if back:  # else what was said, where it is asked for in the same words
                assert text.count(ask.format(**found.groupdict())) == 1 + (said == ask + answer)
                assert NEAREST <= back < FARTHEST + 3000
                asked += 1
    assert asked > 100


def test_no_word_of_it_is_read() -> None:
    mine = {*PEOPLE.split(), *THINGS.split(), *PLACES.split()}
    assert not mine & {*ADJECTIVES.split(), *NOUNS.split()}
    hay = Haystack(encode, encode("The. " * 2000), ["some", "words"] + [f"w{i}" for i in range(99)])
    ((read, *_), *_) = [prompts(task, hay, 3000, 1) for task in TASKS if "needle" in task]
    said = bytes(read.tokens).decode()
    parts = {part for form in FORMS for one in form for part in re.split(r"{\w+}", one)}
    assert not [part for part in parts if len(part) > 5 and part in said]
