"""Which groups dynamic sampling keeps, and what a step's answers are worth by part and source."""

import dataclasses

import numpy as np
import pytest
from tiny_groups import make_group, make_prompt

from longrl_jax import config
from longrl_jax.config import AlgorithmConfig
from longrl_jax.journal import Entry
from longrl_jax.metrics import averages
from longrl_jax.stages import grpo, sampling

DAPO = AlgorithmConfig(filter_by="qa/accuracy", filter_low=0.0, filter_high=1.0)

TWO_ANSWERS = {
    "stage": "grpo",
    "model": {"path": "x"},
    "data": {"root": "x", "num_frames": 8},
    "run": {"dir": "x"},
    "rollout": {"num_samples": 2},
}


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


def of_source(source, *parts):
    prompt = make_prompt([1, 2], name=source)
    prompt = dataclasses.replace(prompt, example=dataclasses.replace(prompt.example, source=source))
    return Entry(
        groups=[make_group(prompt, *[[3]] * len(parts))],
        parts=parts,
        sums={f"reward/{source}_rule/invalid": (float(parts.count(None)), float(len(parts)))},
    )


def test_the_parts_of_a_source_are_means_over_its_answers_in_one_process_and_in_two():
    """Films are judged by one reward, sums by two; each process may have no answer of a source."""
    films = of_source("films", {"total": 1.0, "vqa/accuracy": 1.0}, None)
    more = of_source(
        "films", {"total": 0.5, "vqa/accuracy": 0.0}, {"total": 0.0, "vqa/accuracy": 0}
    )
    sums = of_source("sums", *[{"total": x, "math/form": x, "own/x": 2 * x} for x in (4.0, 8.0)])
    cfg = config.records.build(config.Config, TWO_ANSWERS)
    whole = grpo.sampled_sums(cfg, sampling.joined(sampling.joined(films, sums), more))
    want = {
        "reward/total": (1 + 0.5 + 0 + 4 + 8) / 5,
        "reward/vqa/accuracy": 1 / 3,
        "reward/films/total": 1.5 / 3,
        "reward/math/form": 6.0,
        "reward/own/x": 12.0,
        "reward/sums/total": 6.0,
        "reward/mixed": 2 / 3,  # of the first one answer is known
        "reward/invalid": 1 / 6,
        "reward/films_rule/invalid": 1 / 4,
        "reward/sums_rule/invalid": 0.0,
    }
    means = averages(whole)
    assert {name: means[name] for name in means if name.startswith("reward/")} == want
    for cut in (
        (sampling.joined(films, more), sums),
        (films, sampling.joined(sums, more)),
        (Entry(groups=[], parts=[], sums={}), sampling.joined(sampling.joined(films, sums), more)),
    ):
        told = [grpo.sampled_sums(cfg, part) for part in cut]
        names = {name for one in told for name in one}
        pairs = {n: np.sum([one.get(n, (0.0, 0.0)) for one in told], axis=0) for n in names}
        assert averages(pairs) == means
