"""One run on three sources at once: films, pictures by their bytes in parquet, text."""

import collections
import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from longrl_jax import config, train
from longrl_jax.data import image, mixing, scenes

ROOT = Path(__file__).parents[2]
NUM_STEPS, GROUPS = 4, 8
OF_THE_PROCESS = ("time/", "media/", "compilations")
"""Metrics that say how a process went, not what the run computed."""
PARTS = {"films": 2, "pictures": 1, "sums": 1}
MIX = [
    "{name: films, file: train.jsonl, weight: 2}",
    "{name: pictures, source: image_qa, file: '*.parquet', root: sets/clevr, template: direct}",
    "{name: sums, source: text_math, file: sums, root: sets, template: direct}",
]


@pytest.fixture(scope="module")
def sets(world):
    """Adds two published forms to the films: pictures in shards, and sums."""
    rows = []
    for index in range(6):
        _, picture, _ = scenes.make_picture(5, "train", index)
        file = io.BytesIO()
        image.write_png(file, picture)
        shown = [{"bytes": file.getvalue(), "path": f"CLEVR_{index}.png"}]
        rows.append({"images": shown, "problem": "<image>how many ?", "answer": str(index)})
    sums = [{"problem": f"what is 1 and {i} ?", "answer": str(1 + i)} for i in range(5)]
    for name, part in {
        "clevr/train-00000-of-00002": rows[:4],
        "clevr/train-00001-of-00002": rows[4:],
        "sums/train-00000-of-00001": sums,
    }.items():
        path = world / "data/sets" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(part), path)
    return world


def load(sets, folder, *overrides):
    small = [
        f"model.path={sets / 'init'}",
        f"data.root={sets / 'data'}",
        "data.validation=",
        f"data.mix=[{', '.join(MIX)}]",
        "data.num_frames=4",
        f"store.path={folder}_store",
        f"run.dir={folder}",
        "mesh={data: 2, simulated: true}",
        f"batch={{groups: {GROUPS}, max_row_tokens: 512, smallest_bucket: 64}}",
        "optimizer={learning_rate: 1e-3}",
        f"run.num_steps={NUM_STEPS}",
        *overrides,
    ]
    return config.load(ROOT / "configs/tiny_cpu_sft.yaml", small)


def lines(folder, file):
    return [json.loads(line) for line in (Path(folder) / file).read_text().splitlines()]


@pytest.mark.slow
def test_a_run_on_three_sources_trains_on_each_and_says_so(sets, tmp_path, capsys):
    cfg = load(sets, tmp_path / "run")
    path = tmp_path / "mix.yaml"
    path.write_text(config.to_yaml(cfg))
    train.main([str(path)])
    mixture = mixing.open_training(cfg.data)
    assert mixing.shares(mixture) in capsys.readouterr().out
    order = mixing.order(mixture, cfg.seed)
    rows, refused = lines(cfg.run.dir, "metrics.jsonl"), lines(cfg.run.dir, "refused.jsonl")
    assert len(rows) == NUM_STEPS
    for step, row in enumerate(rows):
        drawn = [mixture[order[step * GROUPS + place]] for place in range(GROUPS)]
        bad = [example for example in drawn if example.id == "broken"]
        want = collections.Counter(e.source for e in drawn if e.id != "broken")
        assert {name: row[f"data/{name}"] for name in PARTS} == {n: want[n] for n in PARTS}
        assert [r["id"] for r in refused if r["step"] == step + 1] == [e.id for e in bad]
        assert np.isfinite(row["loss"])
        so_far = [r["source"] for r in refused if r["step"] <= step + 1]
        for name in PARTS:
            assert row[f"refused/{name}"] == so_far.count(name)
    total = NUM_STEPS * GROUPS
    drawn = collections.Counter(mixture[order[place]].source for place in range(total))
    assert drawn == {n: share * total // sum(PARTS.values()) for n, share in PARTS.items()}
    taken_out = list((sets / "data/sets/clevr/unpacked").rglob("*.image"))
    assert 0 < len(taken_out) <= 6
    assert (Path(cfg.run.dir) / "report.html").is_file()


@pytest.mark.slow
def test_a_mixed_run_that_goes_on_is_the_unbroken_one(sets, tmp_path):
    store = f"store.path={tmp_path / 'store'}"
    runs = {}
    for name, ends in {"unbroken": [NUM_STEPS], "resumed": [1, NUM_STEPS]}.items():
        for end in ends:
            cfg = load(sets, tmp_path / name, store, f"run.num_steps={end}")
            path = tmp_path / f"{name}.yaml"
            path.write_text(config.to_yaml(cfg))
            train.main([str(path)])
        runs[name] = [
            {k: v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)}
            for row in lines(tmp_path / name, "metrics.jsonl")
        ]
    assert len(runs["resumed"]) == NUM_STEPS and runs["resumed"] == runs["unbroken"]
    assert lines(tmp_path / "resumed", "refused.jsonl") == lines(
        tmp_path / "unbroken", "refused.jsonl"
    )
