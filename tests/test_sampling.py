"""Which groups dynamic sampling keeps."""

import pytest
from tiny_groups import make_group, make_prompt

from longrl_jax.config import AlgorithmConfig
from longrl_jax.journal import Entry
from longrl_jax.stages import sampling

DAPO = AlgorithmConfig(filter_by="qa/accuracy", filter_low=0.0, filter_high=1.0)


def group(*accuracies, name="a"):
    """None: not judged."""
    parts = [None if a is None else {"total": 2 * a - 1, "qa/accuracy": a} for a in accuracies]
    return Entry(
        groups=[make_group(make_prompt([1, 2], name=name), *[[3]] * len(parts))],
        parts=parts,
        sums={"hits": (1.0, len(parts))},
    )


@pytest.mark.parametrize(
    ("accuracies", "fate"),
    [
        ((1, 0, 1, 1), "kept"),
        ((0, 0, 0, 0), "too_low"),
        ((1, 1, 1, 1), "too_high"),
        ((1, None, 0, None), "kept"),
        ((1, None, 1, None), "too_high"),  # what nobody has judged is not wrong
        ((None, None), "unjudged"),
    ],
)
def test_a_group_is_kept_where_answers_differ(accuracies, fate):
    """arXiv:2503.14476 equation 11: neither all answers are right nor none is."""
    assert sampling.fate_of(group(*accuracies), DAPO) == fate
    assert sampling.fate_of(group(*accuracies), AlgorithmConfig()) == "kept"


def test_bounds_are_strict_as_in_long_rl():
    quarter = AlgorithmConfig(filter_by="qa/accuracy", filter_low=0.25, filter_high=0.75)
    fates = [sampling.fate_of(group(*[1] * n, *[0] * (4 - n)), quarter) for n in range(5)]
    assert fates == ["too_low", "too_low", "kept", "too_high", "too_high"]


def test_a_metric_that_no_reward_has_names_those_there_are():
    unknown = AlgorithmConfig(filter_by="qa/right")
    with pytest.raises(ValueError, match="'qa/right' is no part of .* choose one of qa/accuracy,"):
        sampling.fate_of(group(1, 0), unknown)


def test_entries_are_split_by_group_and_joined_again():
    both = sampling.joined(group(1, 0, name="a"), group(0, None, 1, name="b"))
    assert both.sums == {"hits": (2.0, 5)}
    ones = sampling.by_group(both)
    assert [[g.prompt.example.id for g in one.groups] for one in ones] == [["a"], ["b"]]
    assert [len(one.parts) for one in ones] == [2, 3]
    again = sampling.joined(*ones)
    assert again.groups == both.groups and again.parts == both.parts
