import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrl_jax.options import LETTERS, join_options, split_options

WORD = st.text("abcXYZ .,:()0", min_size=1).map(str.strip).filter(bool)


@pytest.mark.parametrize(
    ("question", "stem", "options"),
    [
        ("Who?\nA. he\nB. she", "Who?", ["he", "she"]),
        ("Who?\n\nA) he\n(B) she\nC: it", "Who?\n", ["he", "she", "it"]),
        ("Who?\nA. he\nwho eats\nB. she ", "Who?", ["he\nwho eats", "she"]),
        ("A. first?\nA. he\nB. she", "A. first?", ["he", "she"]),
        ("A. one\nB. two\nWho?\nA. he\nB. she", "A. one\nB. two\nWho?", ["he", "she"]),
        ("A. he\nB. she", "", ["he", "she"]),
        ("Who?\nA. he\nC. she", None, []),
        ("Who?\nA. he", None, []),
        ("A man? B. Or C. not", None, []),
        ("Who?\nB. he\nC. she", None, []),
        ("", None, []),
    ],
)
def test_a_question_is_taken_apart(question, stem, options):
    assert split_options(question) == (question if stem is None else stem, options)


@given(WORD, st.lists(WORD, min_size=2, max_size=len(LETTERS)))
def test_joining_undoes_splitting(stem, options):
    question = join_options(stem, options)
    assert split_options(question) == (stem, options)
    assert join_options(*split_options(question)) == question


def test_there_are_no_more_options_than_letters():
    with pytest.raises(ValueError, match="11 options"):
        join_options("Who?", ["x"] * 11)
