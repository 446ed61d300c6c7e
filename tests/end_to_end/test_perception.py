"""The stage that teaches a projector to name what frames show."""

import json

import numpy as np
import pytest

from longrl_jax import models
from longrl_jax.data import synthetic
from longrl_jax.stages import perception

GUESSED = 0.45
"""Share of words that are right without looking: the most frequent word of every place."""


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "data"
    synthetic.main([str(folder), "--clips=24", "--validation=1", "--lessons=2", "--seed=6"])
    return folder


def test_the_projector_learns_to_name_what_is_shown(configured, films, world, tmp_path):
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "stage=perception",
        f"data.root={films}",
        "data.train=naming.jsonl",
        "data.num_frames=32",
        "batch={groups: 8, max_row_tokens: 1024}",
        "rollout={max_model_len: 1024, max_tokens: 64}",
        "optimizer={learning_rate: 3e-3, beta2: 0.98}",
        "run.num_steps=150",
    )
    perception.run(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, 151))
    assert lines[0]["accuracy"] < 0.1  # classifiers start at zero: everywhere the empty word
    assert np.mean([line["accuracy"] for line in lines[-10:]]) > GUESSED + 0.2
    trained, start = (
        models.arrays_of(models.load(folder)[1])
        for folder in (tmp_path / "run" / "export", world / "init")
    )
    moved = {name for name in trained if not np.array_equal(trained[name], start[name])}
    assert moved and {name.partition(".")[0] for name in moved} == {"projector"}


def test_labels_stand_at_their_frames_and_padding_has_none(configured, films):
    cfg = configured("tiny_cpu_sft.yaml", f"data.root={films}", "data.train=naming.jsonl")
    words = perception.vocabulary(cfg)
    assert all(known[0] == "" and known == sorted(known) for known in words)
    assert {"white", "nobody"} <= set(words[0]) and "walker" in words[1]


def test_a_record_with_another_number_of_lines_is_named(configured, films):
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "stage=perception",
        f"data.root={films}",
        "data.train=naming.jsonl",
        "data.num_frames=16",
        "batch={groups: 8, max_row_tokens: 1024}",
        "rollout={max_model_len: 1024, max_tokens: 64}",
    )
    with pytest.raises(ValueError, match=r"names 32 frames, but data.num_frames=16 are read"):
        perception.run(cfg)
