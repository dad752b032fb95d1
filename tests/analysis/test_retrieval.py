"""Retrieval tasks: what is asked stands in the text, the score is of the answer.

A model that cannot see fails.
"""

import math
from collections import Counter

import pytest
import torch

from analysis.pretrained.retrieval import COMMON, TASKS, Haystack, Question, prompts, score

WORDS = [a + b + c for a in "bdfgklmnprstv" for b in "aeiou" for c in "dgklmnprst"]


def encode(text):
    return list(text.encode())


HAY = Haystack(
    encode, encode("It was a bright cold day and the clocks were striking. " * 200), WORDS
)


def text_of(prompt):
    return bytes(prompt.tokens).decode()


@pytest.mark.parametrize("task", TASKS)
def test_the_answer_ends_the_text_and_can_be_found_in_it(task):
    for prompt in prompts(task, HAY, 2000, 3):
        assert 1000 < len(prompt.tokens) <= 2000
        text, answer = text_of(prompt), text_of(prompt)[-prompt.answer :]
        assert answer.encode() == b"".join(map(bytes, prompt.items))
        for item in prompt.items:
            assert bytes(item).decode().strip() in text[: -prompt.answer]


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_names_its_texts_and_texts_differ(task):
    first, again, other = (
        prompts(task, HAY, 2000, 3),
        prompts(task, HAY, 2000, 3),
        prompts(task, HAY, 2000, 3, seed=1),
    )
    assert first == again
    assert not {p.tokens for p in first} & {p.tokens for p in other}
    assert len({p.tokens for p in first}) == 3


def test_the_common_words_are_the_most_common():
    for prompt in prompts("common words", HAY, 4000, 3):
        listed = text_of(prompt)[: -prompt.answer].split(":")[1].split("\n")[0].split()
        assert {w for w, _ in Counter(listed).most_common(COMMON)} == {
            bytes(i).decode().strip() for i in prompt.items
        }


def test_the_chain_of_variables_hands_the_number_on_in_order():
    for prompt in prompts("variables", HAY, 2000, 5):
        held, named = {}, []
        lines = [
            line
            for line in text_of(prompt)[: -prompt.answer].split("\n")
            if line.startswith("Let ")
        ]
        for line in lines:
            name, value = line[4:-1].split(" = ")
            held[name] = held.get(value, value)
            named.append(name)
        asked = text_of(prompt).split("whose value is ")[1][:5]
        assert [bytes(i).decode().strip() for i in prompt.items] == [
            n for n in named if held[n] == asked
        ]
        assert len(lines) == 10


def test_one_step_hands_a_number_on_once_behind_a_solved_one():
    for prompt in prompts("variables, one step", HAY, 2000, 5):
        text = text_of(prompt)[: -prompt.answer]
        lines = [line[4:-1].split(" = ") for line in text.split("\n") if line.startswith("Let ")]
        (first, one), (second, via), (third, two), (fourth, other) = lines
        assert (via, other) == (first, third) and len({first, second, third, fourth}) == 4
        assert f"The value of {second} is {one}." in text
        assert text.endswith(f"The value of {fourth} is") and text.index(f"Let {third}") > 100
        assert bytes(prompt.items[0]).decode() == f" {two}"


def test_the_commonest_word_stands_most_often_in_each_list():
    for prompt in prompts("commonest word", HAY, 2000, 3):
        *solved, last = bytes(prompt.tokens).decode().split("List: ")[1:]
        assert len(solved) == 4
        for one in (*solved, last):
            given, answer = one.strip().split("\nMost frequent word: ")
            ((word, often), (_, next_often)) = Counter(given.split()).most_common(2)
            assert word == answer and often > next_often
            assert 0.15 < often / len(given.split()) < 0.3
        assert len(last) > 1000


def test_needles_stand_at_every_depth():
    depths = [
        text_of(p).index("The secret number") / 2000 for p in prompts("needle", HAY, 2000, 40)
    ]
    assert min(depths) < 0.15 and max(depths) > 0.8


def oracle(asked):
    """Logits that name the answer of each prompt in turn."""
    waiting = iter(asked)

    def last(tokens, count):
        prompt = next(waiting)
        assert tokens[0].tolist() == list(prompt.tokens[:-1])
        return torch.nn.functional.one_hot(torch.tensor([prompt.tokens[-count:]]), 256).float()

    return last


def test_an_oracle_gets_all_and_one_that_repeats_the_last_token_nothing():
    asked = [p for task in TASKS for p in prompts(task, HAY, 1500, 2)]
    found = score(oracle(asked), asked, torch.device("cpu"))
    assert [f.right for f in found] == [1.0] * len(asked)
    assert [f.nats for f in found] == pytest.approx(
        [math.log(1 + 255 * math.exp(-1))] * len(asked), rel=1e-4
    )
    blind = score(
        lambda tokens, n: torch.nn.functional.one_hot(tokens[:, -n:], 256),
        asked,
        torch.device("cpu"),
    )
    assert max(f.right for f in blind) < 0.2


def test_items_may_come_in_any_order_but_whole():
    prompt = Question((1, 2, 3, 4, 5, 6), ((3, 4), (5, 6)))
    assert prompt.right([3, 4, 5, 6]) == 1.0
    # the other item's first token, then led on by the text
    assert prompt.right([5, 4, 5, 6]) == 1.0
    assert prompt.right([3, 9, 5, 6]) == 0.5
    assert prompt.right([3, 4, 3, 6]) == 0.5  # the first was named already
    assert prompt.right([9, 9, 9, 9]) == 0.0


def test_no_room_is_refused():
    with pytest.raises(ValueError, match="length: expected"):
        prompts("needle", HAY, 50, 1)
    with pytest.raises(ValueError, match="length: expected"):
        prompts("needle", HAY, 50_000, 1)
    with pytest.raises(ValueError, match="give more words"):
        prompts("common words", HAY, 50_000, 1)
