"""Films are encoded before training, questions are chosen: real films, real vLLM, real kills."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import clips
import killed_run
import numpy as np
import pytest
from killed_data import QUESTIONS
from test_bad_input import full_disk, under
from test_processes import finish, start

from longrl_jax import config, encode, rewards
from longrl_jax.data import difficulty, embed, video
from longrl_jax.data.longvideo_reason import open_records
from longrl_jax.data.pass_rates import Bounds
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.stages import evaluation, questions, sft
from longrl_jax.stages import policy as opened
from rollout_bridge import VideoStore
from rollout_bridge.video_cache import EntryWriter

SCRIPT = Path(__file__).with_name("killed_data.py")
RTOL = 1e-5
"""float32; other numbers of devices and frames in a call order sums anew."""
NUM_FILMS = 6
"""Of `world`: four to train on, two held out."""


def lines(path):
    return [json.loads(line) for line in path.open()]


def killed(path, tool, point, visit, *options):
    """Runs a tool until it kills itself."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(path), tool, point, str(visit), *options],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == -signal.SIGKILL, f"{point}\n{done.stdout}\n{done.stderr[-3000:]}"


def entries_of(store):
    return {path.name: path.read_bytes() for path in Path(store).glob("*.emb")}


@pytest.fixture
def embedded(configured, world, tmp_path):
    """(config, plan) of an embedding whose data have a film that ends in the middle."""
    data = tmp_path / "data"
    shutil.copytree(world / "data", data)
    fast = clips.make(tmp_path / "fast.mp4", num_frames=130, faststart=True)
    clips.cut(fast, data / "videos" / "half.mp4", part=0.6)
    records = (data / "train.jsonl").read_text()
    half = json.loads(records.splitlines()[0]) | {"id": "half", "video": "videos/half.mp4"}
    (data / "with_half.jsonl").write_text(json.dumps(half) + "\n" + records)
    cfg = configured(
        "tiny_cpu_sft.yaml", f"data.root={data}", "data.train=with_half.jsonl",
        "data.template=direct", f"store.path={tmp_path / 'store'}",
    )  # fmt: skip
    return cfg, embed.Plan(out=tmp_path / "embed")


def with_keys(cfg, tmp_path, *overrides):
    path = tmp_path / "with_keys.yaml"
    path.write_text(config.to_yaml(cfg))
    return config.load(path, overrides)


@pytest.mark.slow
def test_what_is_encoded_beforehand_is_never_decoded_again(embedded, tmp_path, monkeypatch, capsys):
    cfg, plan = embedded
    store = Path(cfg.store.path)
    with monkeypatch.context() as patch:
        under(full_disk, patch, EntryWriter, "write", "publish")
        with pytest.raises(OSError, match=r"store cannot be written .*lower store.max_gib"):
            embed.run(cfg, plan)
    assert entries_of(store) == {} and not list(store.glob("*.partial"))
    dry = embed.Plan(out=plan.out, dry_run=True)
    assert embed.run(cfg, dry) == 0 and entries_of(store) == {}
    needed = f"needed    {NUM_FILMS + 1} films, 0 images: {8 * (NUM_FILMS + 1)} frames"
    assert needed in capsys.readouterr().out

    path = tmp_path / "embed.yaml"
    path.write_text(config.to_yaml(cfg))
    killed(path, "embed", "embedding", 3)
    after_kill = entries_of(store)
    assert len(after_kill) == 2 and len(list(store.glob("*.partial"))) == 1
    assert embed.run(cfg, plan) == embed.REFUSED_STATUS
    whole = entries_of(store)
    assert len(whole) == NUM_FILMS and after_kill.items() <= whole.items()
    assert not list(store.glob("*.partial"))
    refused = {row["id"]: row["kind"] for row in lines(plan.out / "refused.jsonl")}
    assert set(refused) == {"broken", "half"} and refused["half"] == "truncated"
    assert f"encoded   {NUM_FILMS - 2} files" in capsys.readouterr().out

    # a check reads no pixels, and names what is missing, damaged or of no use
    with monkeypatch.context() as patch:
        patch.setattr(video.DecoderPool, "decode", None)
        first, second = sorted(whole)[:2]
        (store / first).unlink()
        (store / second).write_bytes(whole[second][:-1] + bytes([whole[second][-1] ^ 1]))
        check = embed.Plan(out=plan.out, check=True)
        assert embed.run(cfg, check) == 1
        said = capsys.readouterr().out
        assert f"it is missing ({store / first})" in said
        assert f"its checksum is wrong ({store / second})" in said
        assert "videos/half.mp4: refused before: " in said
        assert f"2 of {NUM_FILMS + 1} entries are missing or damaged" in said
    embed.run(cfg, embed.Plan(out=plan.out, repair=True))
    assert entries_of(store) == whole
    assert embed.run(cfg, dry) == 0 and embed.run(cfg, check) == embed.REFUSED_STATUS
    cfg = with_keys(cfg, tmp_path, "data.train=train.jsonl")
    assert embed.run(cfg, check) == 0
    assert "every entry is there and whole" in capsys.readouterr().out

    # what another run makes meanwhile is not made again
    (store / first).unlink()
    room = embed.check_room
    with monkeypatch.context() as patch:
        patch.setattr(embed, "check_room", lambda *_: other_run(cfg, plan, patch, room))
        assert embed.run(cfg, plan) == embed.REFUSED_STATUS
    made = re.findall(r"encoded   (\d) files", capsys.readouterr().out)
    assert made == ["1", "0"] and entries_of(store) == whole

    # and training decodes nothing
    cfg = with_keys(cfg, tmp_path, "data.validation=", "run.num_steps=4")
    sft.run(cfg)
    steps = lines(Path(cfg.run.dir) / "metrics.jsonl")
    assert len(steps) == 4 and sum(row["groups"] for row in steps) > 8
    assert all(row[counter] == 0 for row in steps for counter in encode.COUNTERS)
    assert entries_of(store) == whole


def other_run(cfg, plan, patch, room):
    patch.setattr(embed, "check_room", room)
    embed.run(cfg, embed.Plan(out=plan.out.with_name("other")))


@pytest.mark.slow
def test_two_processes_share_the_films(configured, tmp_path):
    stores = tmp_path / "one", tmp_path / "two"
    one, two = (
        configured("tiny_cpu_sft.yaml", f"store.path={store}", f"run.dir={store}_run")
        for store in stores
    )
    assert embed.run(one, embed.Plan(out=tmp_path / "embed")) == embed.REFUSED_STATUS
    wanted = (embed.REFUSED_STATUS,) * 2
    arguments = ("embed", "none", "0")
    said, _ = finish(
        start(two, tmp_path, SCRIPT.name, arguments, arguments), wanted=(wanted[0], wanted[1])
    )
    assert f"encoded   {NUM_FILMS} files, {8 * NUM_FILMS} frames" in said  # each once
    assert [row["id"] for row in lines(tmp_path / "two_run/embed/refused.jsonl")] == ["broken"]
    names = [sorted(path.stem for path in store.glob("*.emb")) for store in stores]
    assert names[0] == names[1] and len(names[0]) == NUM_FILMS
    a, b = (VideoStore(store, 2**30) for store in stores)
    for name in names[0]:
        want = np.array(a.get(name))
        np.testing.assert_allclose(b.get(name), want, rtol=0, atol=RTOL * np.abs(want).max())


@pytest.mark.slow
def test_a_filter_that_is_killed_is_the_one_that_was_not(configured, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "parity", killed_run.parity)
    monkeypatch.setattr(evaluation, "MAX_QUESTIONS", QUESTIONS)
    cfg = configured("tiny_cpu_grpo.yaml", "rewards={parity: 1.0}", f"store.path={tmp_path}/store")
    bounds = Bounds(part="parity/odd", min_valid=2)
    plan = difficulty.Plan(out=tmp_path / "whole", num_samples=4, bounds=bounds)
    plan.out.mkdir()
    whole = difficulty.run(cfg, plan)
    num_questions = whole["kinds"]["all"]["kept"]
    assert (
        num_questions > 4 and whole["refused"] == 1 and whole["sft"] + whole["rl"] == num_questions
    )

    # killed twice, it then asks exactly what its journal does not hold
    path = tmp_path / "filter.yaml"
    path.write_text(config.to_yaml(cfg))
    out = tmp_path / "killed"
    options = (f"--out={out}", "--samples=4", "--part=parity/odd")
    journaled = []
    for point, visit in (("rollout", 18), ("torn", 1)):  # a batch draws 12 tokens
        killed(path, "difficulty", point, visit, *options)
        whole_lines = (out / "answers.jsonl").read_bytes().split(b"\n")[:-1]
        journaled.append([json.loads(line)["id"] for line in whole_lines])
    assert len(journaled[0]) == QUESTIONS < len(journaled[1]) < 2 * QUESTIONS
    asked = []

    def answer(cfg, policy, engines, batch, *rest, **named):
        asked.extend(prompt.example.id for prompt in batch)
        return answer_them(cfg, policy, engines, batch, *rest, **named)

    answer_them = evaluation.answer
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "answer", answer)
        assert difficulty.run(cfg, difficulty.Plan(**vars(plan) | {"out": out})) == whole
    assert journaled[1] + asked == [row["id"] for row in lines(plan.out / "answers.jsonl")]
    for name in ("answers.jsonl", "questions.jsonl", "kept.jsonl", "sft.jsonl", "rl.jsonl"):
        assert (out / name).read_bytes() == (plan.out / name).read_bytes(), name

    # what is kept are records as they were, no film is on both sides
    records = open_records(Path(cfg.data.root), cfg.data.train)
    known = {records[i].id: records[i] for i in range(len(records))}
    parts = [open_records(plan.out, f"{name}.jsonl") for name in ("sft", "rl")]
    chosen = [[part[i] for i in range(len(part))] for part in parts]
    assert all(known[example.id] == example for part in chosen for example in part)
    films = [{example.about for example in part} for part in chosen]
    assert not films[0] & films[1] and all(films)

    # the pass rates are those of evaluate's sampled answers
    said = {row["id"]: row for row in lines(plan.out / "questions.jsonl")}
    for name, rates in sampled_rates(cfg, tmp_path).items():
        assert said[name]["rate"] == rates, name

    # other bounds sample nothing, other settings are refused by name
    tight = Bounds(part="parity/odd", min_valid=2, above=0.3, below=0.7)
    with monkeypatch.context() as patch:
        patch.setattr(difficulty, "sample", None)
        found = difficulty.run(cfg, difficulty.Plan(**vars(plan) | {"bounds": tight}))
    assert found["kinds"]["all"]["kept"] == sum(row["pass"] == 2 for row in said.values())
    other = difficulty.Plan(**vars(plan) | {"num_samples": 5})
    with pytest.raises(ValueError, match="holds answers with another --samples; choose another"):
        difficulty.run(cfg, other)


def sampled_rates(cfg, tmp_path):
    """Returns the mean of parity/odd over the four answers of evaluate's mode `sampled`, by id."""
    cfg = with_keys(cfg, tmp_path, f"data.validation={cfg.data.train}", "run.eval_examples=100")
    policy, state = opened.open_policy(cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=64)(state)
    mode = evaluation.Mode(name="sampled", num_samples=4, temperature=1.0)
    with (
        RefusedLog(tmp_path / "refused.jsonl") as refused,
        questions.open_embedder(cfg, encoder, refused, Phases()) as embedded,
        opened.open_engines(cfg, policy) as engines,
    ):
        asked = questions.validation(cfg, policy, refused)[::-1]  # other batches
        found = evaluation.answer(cfg, policy, engines, asked, embedded, inputs, mode=mode)
    return {
        rows[0]["id"]: float(np.mean([row["reward"]["parity/odd"] for row in rows]))
        for rows in found
    }
