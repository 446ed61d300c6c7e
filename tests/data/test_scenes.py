"""Pictures with questions: what a file shows is what the answers say."""

import collections

import numpy as np
import pytest

from longrl_jax.data import image, scenes
from longrl_jax.data.longvideo_reason import open_records
from longrl_jax.data.stories import COLORS

MOST_FREQUENT = 0.5  # share of a kind's answers that saying one thing always may get right


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes") / "data"
    scenes.main([str(folder), "--images=40", "--validation=20", "--seed=3"])
    return folder


def looked_at(path):
    """[(colour, pixels)] of the things of a file, cell by cell, by the nearest named colour."""
    size = image.probe(str(path))
    (picture,) = image.read(str(path), size=size, scales=(), stored=size)
    found = []
    for y in range(0, size[0], scenes.CELL):
        for x in range(0, size[1], scenes.CELL):
            cell = picture[y : y + scenes.CELL, x : x + scenes.CELL].reshape(-1, 3).astype(int)
            thing = cell[np.ptp(cell, axis=1) > 60]  # grey is the background
            if len(thing):
                off = {name: np.abs(thing - rgb).sum() for name, rgb in COLORS.items()}
                found.append((min(off, key=off.get), len(thing)))
    return found


@pytest.mark.parametrize("split", ["train", "validation"])
def test_the_answers_are_what_the_files_show(folder, split):
    records = open_records(folder, f"{split}.jsonl")
    checked = collections.Counter()
    for i in range(len(records)):
        example = records[i]
        (file,) = example.media
        seen = looked_at(folder / file.path)
        colors = [color for color, _ in seen]
        if example.kind == "how_many":
            assert example.answer == str(len(seen))
        elif example.kind == "of_colour":
            asked = example.question.split()[-2]
            assert example.answer == str(colors.count(asked))
        elif example.kind == "which_colour":
            assert example.answer in colors
        told = [words.split()[0] for words in example.reasoning.partition(".")[0].split(", ")]
        assert told == colors
        checked[example.kind] += 1
    assert set(checked) == set(scenes.KINDS) and len(set(checked.values())) == 1


def test_shapes_are_told_apart_by_their_areas(folder):
    """A square fills most of its box, a cross least."""
    area = {"square": 441, "circle": 449, "triangle": 250, "cross": 297}  # counted by hand, r = 12
    records = open_records(folder, "train.jsonl")
    for i in range(0, len(records), len(scenes.KINDS)):
        words = records[i].reasoning.partition(".")[0].split(", ")
        seen = looked_at(folder / records[i].media[0].path)
        for (_, pixels), name in zip(seen, words, strict=True):
            assert abs(pixels - area[name.split()[1]]) <= 30, (name, pixels)


def test_no_answer_is_right_most_of_the_time(folder):
    answers = collections.defaultdict(collections.Counter)
    records = open_records(folder, "train.jsonl")
    for i in range(len(records)):
        answers[records[i].kind][records[i].answer] += 1
    for kind, counts in answers.items():
        assert max(counts.values()) / counts.total() <= MOST_FREQUENT, (kind, counts)


def test_the_splits_share_no_picture_and_the_seed_decides(folder, tmp_path):
    files = sorted((folder / "images").iterdir())
    assert len(files) == 60 and len({path.read_bytes() for path in files}) == 60
    scenes.main([str(tmp_path / "again"), "--images=3", "--validation=1", "--seed=3"])
    scenes.main([str(tmp_path / "other"), "--images=3", "--validation=1", "--seed=4"])
    first, again, other = (
        (f / "images/00000.png").read_bytes()
        for f in (folder, tmp_path / "again", tmp_path / "other")
    )
    assert first == again != other


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--images=0"], "at least 1 picture"),
        (["--images=99999", "--validation=2"], "at most 100000"),
        (["--seed=-1"], "--seed -1"),
    ],
)
def test_what_cannot_be_made_is_refused(tmp_path, arguments, named):
    with pytest.raises(SystemExit, match=named):
        scenes.main([str(tmp_path / "data"), *arguments])
    assert not (tmp_path / "data").exists()


def test_a_folder_with_data_is_left_alone(folder):
    with pytest.raises(SystemExit, match="already holds a data set"):
        scenes.main([str(folder)])
