"""Real mp4 files, one of them damaged, and a tiny random VILA, shared by the tests here."""

import json
from pathlib import Path

import pytest

from longrl_jax import config, convert, rewards
from longrl_jax.data import image, scenes, synthetic

ROOT = Path(__file__).parents[2]
NUM_CLIPS, NUM_VALIDATION_CLIPS = 4, 2
BROKEN_ID = "broken"


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """A folder with data/ (train, validation; one train record's file is no video) and init/."""
    folder = tmp_path_factory.mktemp("world")
    data = folder / "data"
    synthetic.main(
        [str(data), f"--clips={NUM_CLIPS}", f"--validation={NUM_VALIDATION_CLIPS}", "--seed=5"]
    )
    (data / "videos" / "broken.mp4").write_bytes(b"this is no film" * 100)
    with (data / "train.jsonl").open("a") as file:
        record = json.loads((data / "train.jsonl").read_text().splitlines()[0])
        file.write(json.dumps(record | {"id": BROKEN_ID, "video": "videos/broken.mp4"}) + "\n")
    convert.main(
        [
            "init",
            str(ROOT / "configs" / "models" / "tiny_vila.json"),
            str(folder / "init"),
            f"--corpus={data / 'corpus.txt'}",
            "--time-tokens=64",  # as many as a film has seconds
        ]
    )
    return folder


@pytest.fixture(scope="session")
def mixed(world):
    """Name of a file of six records in data/: text, an image, images, a long film, two films, both.

    A film of 64 s, one of 6 s; the media of two records stand in the words.
    """
    data = world / "data"
    (data / "images").mkdir()
    for index in range(3):
        _, picture, _ = scenes.make_picture(5, "train", index)
        image.write_png(data / f"images/{index}.png", picture)
    _, frames_FHW3, _ = synthetic.make_clip(5, "train", 0)
    synthetic.write_video(data / "videos/short.mp4", frames_FHW3[:6])
    long, short = "videos/00001.mp4", "videos/short.mp4"
    fields = {
        "text": {},
        "an image": {"image": "images/0.png"},
        "images": {
            "images": [f"images/{i}.png" for i in range(3)],
            "question": "is <image> as red as <image> and <image> ?",
        },
        "a long film": {"video": long},
        "two films": {"videos": [short, long]},
        "both": {"image": "images/1.png", "video": short, "question": "is <image> in <video> ?"},
    }
    lines = [
        json.dumps({"id": name, "question": "how many things are red ?", "answer": "2"} | more)
        for name, more in fields.items()
    ]
    (data / "mixed.jsonl").write_text("\n".join(lines) + "\n")
    return "mixed.jsonl"


def count_spaces(items):
    return [{"total": item.text.count(" ") / max(len(item.text), 1)} for item in items]


@pytest.fixture
def spaces(monkeypatch):
    """Makes `spaces` a reward: one that a random policy varies in."""
    monkeypatch.setitem(rewards.REWARDS, "spaces", count_spaces)


@pytest.fixture
def configured(world, tmp_path):
    """configured(name, *overrides) -> the config `name` of configs/, made small, on 8 devices."""

    def load(name: str, *overrides: str) -> config.Config:
        small = [
            f"model.path={world / 'init'}",
            f"data.root={world / 'data'}",
            f"store.path={world / 'store'}",
            f"run.dir={tmp_path / 'run'}",
            "data.num_frames=8",
            "mesh={seq: 4, fsdp: 2, simulated: true}",
            "batch={groups: 4, max_row_tokens: 512, smallest_bucket: 64}",
            "rollout={num_samples: 4, dtype: float32, max_tokens: 12, max_model_len: 256}",
            "optimizer.warmup_steps=0",
            "run.num_steps=3",
            "run.eval_every=0",
            "run.eval_examples=4",
            "run.best_metric=",
        ]
        return config.load(ROOT / "configs" / name, [*small, *overrides])

    return load
