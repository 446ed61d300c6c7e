"""One run on three sources at once: films, pictures by their bytes in parquet, text; GRPO on
films, sums and open questions, each judged in its own way."""

import collections
import io
import json
import zlib
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from chat_server import ChatServer
from pyarrow import parquet

from longrl_jax import config, train
from longrl_jax.data import image, mixing, scenes
from longrl_jax.stages import grpo

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


def load(sets, folder, *overrides, name="tiny_cpu_sft.yaml"):
    small = [
        f"model.path={sets / 'init'}",
        f"data.root={sets / 'data'}",
        "data.validation=",
        f"data.mix=[{', '.join(MIX)}]",
        "data.num_frames=4",
        f"store.path={folder}_store",
        f"run.dir={folder}",
        "mesh={data: 8, simulated: true}",
        f"batch={{groups: {GROUPS}, max_row_tokens: 512, smallest_bucket: 64}}",
        "optimizer={learning_rate: 1e-3}",
        f"run.num_steps={NUM_STEPS}",
        *overrides,
    ]
    return config.load(ROOT / "configs" / name, small)


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


OWN_REWARD = """
def spaces(items):
    return [{"total": item.text.count(" "), "spaces": item.text.count(" ")} for item in items]
"""
JUDGED = [
    "{name: films, file: train.jsonl, weight: 2, template: think}",
    "{name: sums, source: text_math, file: sums, root: sets, template: boxed, "
    "rewards: {math_answer: 1.0, 'mix_rewards:spaces': 0.25}}",
    "{name: open, file: open.jsonl, rewards: {judge: 2.0}}",
]
"""Films have the rewards of the run, video_qa."""
REWARD_PARTS = {
    "films": {"video_qa/format", "video_qa/accuracy"},
    "sums": {"math_answer/format", "math_answer/accuracy", "math_answer/gave_up"}
    | {"mix_rewards:spaces/spaces"},
    "open": {"judge/accuracy"},
}
NUM_SAMPLES = 4


def verdict(asked):
    """Of some answers the judge cannot say."""
    number = zlib.crc32(json.loads(asked.body["messages"][1]["content"])["answer"].encode())
    if number % 3 == 0:
        return "perhaps"
    return json.dumps({"verdict": "correct" if number % 2 else "incorrect"})


def check_step(row, answers):
    """Every number of a step's metrics that has to do with sources, from the answers on file."""
    groups = [answers[i : i + NUM_SAMPLES] for i in range(0, len(answers), NUM_SAMPLES)]
    known = [answer for answer in answers if answer["reward"] is not None]
    assert all(
        set(answer["reward"]) == {"total"} | REWARD_PARTS[answer["source"]] for answer in known
    )
    want = {"total": [answer["reward"]["total"] for answer in known]}
    for source, parts in REWARD_PARTS.items():
        mine = [answer["reward"] for answer in known if answer["source"] == source]
        assert all(len({answer["source"] for answer in group}) == 1 for group in groups)
        want |= {f"{source}/total": [reward["total"] for reward in mine]}
        want |= {part: [reward[part] for reward in mine] for part in parts}
    for name, values in want.items():
        assert (f"reward/{name}" in row) == bool(values), name
        if values:
            np.testing.assert_allclose(row[f"reward/{name}"], np.mean(values), rtol=1e-12)
    judged = [answer for answer in answers if answer["source"] == "open"]
    invalid = [answer for answer in judged if answer["reward"] is None]
    assert row["reward/invalid"] == pytest.approx(len(invalid) / len(answers))
    assert row.get("reward/judge/invalid", 0) == pytest.approx(len(invalid) / max(len(judged), 1))
    for group in groups:
        totals = [a["reward"]["total"] for a in group if a["reward"] is not None]
        for answer in group:
            got, scale = 0.0, np.std(totals, ddof=1) if len(totals) > 1 else 0.0
            if scale and answer["reward"] is not None:
                got = (answer["reward"]["total"] - np.mean(totals)) / (scale + 1e-6)
            np.testing.assert_allclose(answer["advantage"], got, atol=1e-9)
    return len(invalid)


@pytest.mark.slow
def test_grpo_on_a_mix_judges_each_source_in_its_own_way(sets, tmp_path, monkeypatch):
    (tmp_path / "mix_rewards.py").write_text(OWN_REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    record = {"question": "what is seen in the film ?", "answer": "a red pad"}
    open_lines = [json.dumps(record | {"id": f"open{i}"}) for i in range(3)]
    (sets / "data/open.jsonl").write_text("\n".join(open_lines))
    with ChatServer(verdict) as server:
        cfg = load(
            sets,
            tmp_path / "run",
            f"model.path={ROOT / 'configs/models/tiny_vila_start'}",
            "data.validation=validation.jsonl",
            f"data.mix=[{', '.join(JUDGED)}]",
            f"judge={{base_url: '{server.base_url}', model: m, max_tries: 1}}",
            "batch={groups: 6, max_row_tokens: 512, smallest_bucket: 128}",
            f"rollout.num_samples={NUM_SAMPLES}",
            "run={dir: %s, num_steps: 3, export: false, eval_examples: 2, eval_every: 0}"
            % (tmp_path / "run"),
            name="tiny_cpu_grpo.yaml",
        )
        folder = Path(cfg.run.dir)
        folder.mkdir()
        (folder / "resolved.yaml").write_text(config.to_yaml(cfg))
        train.check_names(cfg)
        grpo.run(cfg)
        assert server.num_paid
    rows, answers = lines(folder, "metrics.jsonl"), lines(folder, "rollouts.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3]
    num_invalid = sum(
        check_step(row, [a for a in answers if a["step"] == row["step"]]) for row in rows
    )
    assert num_invalid and {a["source"] for a in answers} == set(REWARD_PARTS)
    for source in REWARD_PARTS:
        assert any(a["advantage"] for a in answers if a["source"] == source), source
    scores = json.loads((folder / "evaluation.json").read_text())
    assert {name.split("/")[0] for name in scores} == {"step", "questions", "total", "video_qa"}
