"""Options in another order: every order occurs, none twice as often, and the letter follows."""

import collections
import itertools

import pytest

from longrl_jax import shuffled
from longrl_jax.types import Example, MediaFile

BLOCK = "Who came\nfirst?\n(A) the cat\n(B) a dog,\nlater on\nC. A bird"
INLINE = "which pad is A ? two of red = A blue = B green = C"


def example(question, answer="B", **more):
    return Example(id="q", question=question, answer=answer, reasoning="it is B", **more)


@pytest.mark.parametrize("question", [BLOCK, INLINE])
def test_the_letter_follows_its_words_and_nothing_else_changes(question):
    asked = example(question)
    before = shuffled.options_of(question)
    assert len(before) == 3
    for order in itertools.permutations(range(3)):
        got = shuffled.shuffled(asked, order)
        after = shuffled.options_of(got.question)
        assert after == [before[i] for i in order]
        assert after["ABC".index(got.answer)] == before[1] and not got.reasoning
        frame = got.question  # what is left without the options' words is what it was
        for text in sorted(before, key=len, reverse=True):
            frame = frame.replace(text, "#", 1)
        assert frame == question.replace(before[0], "#", 1).replace(before[1], "#", 1).replace(
            before[2], "#", 1
        )


def test_orders_come_from_seed_question_and_number_and_are_drawn_evenly():
    asked = example(BLOCK)
    drawn = [shuffled.order_of(asked, seed=0, number=number) for number in range(1200)]
    assert drawn == [shuffled.order_of(asked, seed=0, number=number) for number in range(1200)]
    counts = collections.Counter(drawn)
    assert set(counts) == set(itertools.permutations(range(3)))
    assert all(abs(count - 200) < 70 for count in counts.values())  # 5.4 deviations of 12.9
    other_seed = [shuffled.order_of(asked, seed=1, number=number) for number in range(20)]
    assert other_seed != drawn[:20]


def test_none_of_the_above_keeps_its_place():
    asked = example("Who?\nA. he\nB. she\nC. they\nD. None of the above", answer="D")
    orders = {shuffled.order_of(asked, seed=0, number=number) for number in range(100)}
    assert orders == {(*order, 3) for order in itertools.permutations(range(3))}
    assert all(shuffled.shuffled(asked, order).answer == "D" for order in orders)


@pytest.mark.parametrize(
    "asked",
    [
        example("How many?", "4"),
        example("Who?\nA. he\nB. she", "a free answer"),
        example("Who?\nA. he\nB. she", "C"),
        example("Who?\nA. he\nB. she\nC. Both A and B"),
        example("Who?\nA. he\nB. she\nC. only B"),
        example("Who?\nA. he\nB. all of the above"),
        example("Is it? red = A blue = C"),
        example("Who?\nA. \nB. she", "B", media=(MediaFile(kind="image", path="x.png", at=8),)),
    ],
)
def test_a_question_whose_options_may_not_move_is_left_alone(asked):
    assert shuffled.order_of(asked, seed=0, number=0) is None


def test_media_before_the_options_stay_where_they_are():
    media = (MediaFile(kind="image", path="x.png", at=3),)
    asked = example("Is  red?\nA. yes\nB. no", media=media)
    order = shuffled.order_of(asked, seed=0, number=0)
    assert order is not None and shuffled.shuffled(asked, order).media == media
