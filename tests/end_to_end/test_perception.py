"""The stage that teaches a projector to name what frames show."""

import collections
import json
from pathlib import Path

import numpy as np
import pytest

from longrl_jax import convert, models
from longrl_jax.data import synthetic
from longrl_jax.data.stories import COLORS
from longrl_jax.stages import perception
from longrl_jax.types import Example, Media, Prompt, View

NUM_STEPS = 100


def guessed(path):
    """Returns the share of words that are right by the most frequent word of a place and a time."""
    counts = collections.defaultdict(collections.Counter)
    for record in map(json.loads, path.open()):
        for t, line in enumerate(record["reasoning"].split(";")):
            for part, said in (("frame", line), ("film", record["answer"])):
                for k, word in enumerate(said.split()):
                    counts[t, part, k][word] += 1
    return sum(max(c.values()) for c in counts.values()) / sum(c.total() for c in counts.values())


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
        f"run.num_steps={NUM_STEPS}",
    )
    perception.run(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == list(range(1, NUM_STEPS + 1))
    assert lines[0]["accuracy"] < 0.1  # classifiers start at zero: everywhere the empty word
    reached = np.mean([line["accuracy"] for line in lines[-10:]])
    assert reached > guessed(films / "naming.jsonl") + 0.15
    trained, start = (
        models.arrays_of(models.load(folder)[1])
        for folder in (tmp_path / "run" / "export", world / "init")
    )
    moved = {name for name in trained if not np.array_equal(trained[name], start[name])}
    assert moved and {name.partition(".")[0] for name in moved} == {"projector"}


def test_the_vocabulary_is_that_of_every_place(configured, films):
    cfg = configured("tiny_cpu_sft.yaml", f"data.root={films}", "data.train=naming.jsonl")
    frames, film = perception.vocabulary(cfg)
    assert all(known[0] == "" and known == sorted(known) for known in frames + film)
    assert {"white", "nobody"} <= set(frames[0]) and "walker" in frames[1]
    assert len(film) == 4 and all(set(known[1:]) <= set(COLORS) for known in film)  # the pads


def test_labels_stand_at_their_frames_and_padding_has_none():
    example = Example(id="q", question="?", answer="red blue", reasoning="a b; a; c d e")
    frames, film = (
        [["", "a", "c"], ["", "b", "d"], ["", "e"]],
        [["", "red"], ["", "blue"], ["", "x"]],
    )
    medium = Media(
        kind="video", path="film.mp4", key="k", grid=(3, 1, 2), times_s=(0.0, 1.0, 2.0),
        view=View(size=(2, 4), grid=(1, 2)), num_tokens=6, offset=0,
    )  # fmt: skip
    prompt = Prompt(
        example=example, tokens=np.zeros(9, np.int32), is_media=np.arange(9) < 6,
        rope_pos=np.arange(9), next_rope_pos=9, media=(medium,),
    )  # fmt: skip
    stored_MC = np.arange(24, dtype=np.float32).reshape(6, 4)
    rows_NFnC, labels_NFK = perception.make_batch([prompt], [stored_MC], frames, film, num_films=2)
    want = [[1, 1, 0, 1, 1, 0], [1, 0, 0, 1, 1, 0], [2, 2, 1, 1, 1, 0]]  # a third word is not said
    assert labels_NFK.tolist() == [want, [[-1] * 6] * 3]
    assert rows_NFnC.tolist() == [
        [[[8 * t + 4 * n + c for c in range(4)] for n in range(2)] for t in range(3)],
        np.zeros((3, 2, 4)).tolist(),
    ]


def test_a_record_with_another_number_of_lines_is_named(configured, films, tmp_path):
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "stage=perception",
        f"data.root={films}",
        "data.train=naming.jsonl",
        "data.num_frames=16",
        "batch={groups: 8, max_row_tokens: 1024}",
        "rollout={max_model_len: 1024, max_tokens: 64}",
    )
    with pytest.raises(ValueError, match="every record of 3 steps in a row was refused"):
        perception.run(cfg)
    row = json.loads((tmp_path / "run" / "refused.jsonl").read_text().splitlines()[0])
    assert "names 32 frames, 16 of its video are read, and data.num_frames=16" in row["message"]


def test_frames_that_share_tokens_are_refused(configured, films, tmp_path):
    shape = Path(__file__).parents[2] / "configs/models/tiny_qwen2_5_vl.json"
    convert.init(shape, tmp_path / "init")
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "stage=perception",
        f"model.path={tmp_path / 'init'}",
        f"data.root={films}",
        "data.train=naming.jsonl",
        "data.timestamp=",
    )
    with pytest.raises(ValueError, match="2 frames share their tokens, .* name a VILA checkpoint"):
        perception.run(cfg)
