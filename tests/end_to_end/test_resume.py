"""kill -9 anywhere, the same command again: the run is the one that was never killed."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from killed_run import POINTS
from safetensors.numpy import load_file

from longrl_jax import config, run_folder
from longrl_jax.stages import policy as opened
from longrl_jax.stages import saving, sft

ROOT = Path(__file__).parents[2]
NUM_STEPS = 6
OF_THE_PROCESS = ("time/", "media/", "compilations")
"""Metrics that say how a process went, not what the run computed."""
CHAINS = {  # each kill is that of a new process; (point, at its how many-th visit there): where
    "films_and_engine": [
        ("embedding", 2),  # step 1
        ("decoding", 2),  # step 1 again
        ("rollout", 30),  # step 3: a step draws 12 tokens; the checkpoint is that of step 2
        ("push", 3),  # step 4: the first push is that of the state that was restored
    ],
    "journal_and_update": [
        ("journal", 1),  # step 1
        ("journaled", 3),  # step 3
        ("resume", 1),
        ("update", 2),  # step 4, after step 3 was replayed
        ("log", 3),  # step 5, after steps 3 and 4 were replayed
    ],
    "checkpoint_and_end": [
        ("arrays", 1),  # the first checkpoint, of step 2: both steps are replayed from the start
        ("checkpointed", 1),  # that checkpoint; the journal of its steps is still there
        ("arrays", 2),  # the checkpoint of step 4; the first visit is that of the restored one
        ("checkpointed", 2),  # the last checkpoint
        ("export", 1),  # nothing but the export is left to do
    ],
}

SFT_KILLS = [  # (point, at its how many-th visit, steps in the log)
    ("update", 4, 3),  # step 4 is made, not logged
    ("arrays", 2, 4),  # in the checkpoint of step 4; the first visit is that of the restored
]
SFT_RUNS = {  # overrides, and the checkpoints that either kill leaves
    "a row an example": ((), [2]),
    "packed, adapters, cosine, the best is kept": (
        (
            "batch.pack=true",
            "model.lora_rank=4",
            "optimizer={learning_rate: 0.01, schedule: cosine, warmup_steps: 2}",
            "run.best_metric=total",
        ),
        [2, 3],  # step 3 is evaluated, and the best so far
    ),
}


@pytest.fixture(scope="module")
def run_config(world):
    """run_config(folder, *overrides, stage=...) -> path of a config whose run is in folder."""

    def write(folder: Path, *overrides: str, stage: str = "grpo") -> Path:
        small = [
            f"model.path={world / 'init'}",
            f"data.root={world / 'data'}",
            f"store.path={folder.with_name(folder.name + '_store')}",
            f"run.dir={folder}",
            "data.num_frames=64",  # prompts of more than one block of the prefix cache
            "mesh={seq: 2, simulated: true}",
            "batch={groups: 4, max_row_tokens: 512, smallest_bucket: 128}",
            "rollout={num_samples: 4, dtype: float32, max_tokens: 12, max_model_len: 320}",
            "rewards={spaces: 1.0}",
            "optimizer={learning_rate: 0.01}",
            f"run.num_steps={NUM_STEPS}",
            "run.checkpoint_every=2",
            "run.eval_every=3",
            "run.eval_examples=4",
            "run.best_metric=",
            *overrides,
        ]
        path = folder.with_suffix(".yaml")
        cfg = config.load(ROOT / "configs" / f"tiny_cpu_{stage}.yaml", small)
        path.write_text(config.to_yaml(cfg))
        return path

    return write


@pytest.fixture(scope="module")
def unbroken(run_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    run(run_config(folder))
    return folder


def run(path: Path, point: str = "none", visit: int = 0) -> str:
    """Runs a config in a process of its own; returns its output. It must be killed at the point."""
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script), str(path), point, str(visit)]
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # else 8 devices
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=ROOT, timeout=600, check=False
    )
    wanted = 0 if point == "none" else -signal.SIGKILL
    assert done.returncode == wanted, f"{point}: {done.returncode}\n{done.stderr[-3000:]}"
    return done.stdout


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


def assert_same_run(folder: Path, unbroken: Path) -> None:
    """Everything but times is equal to the last bit, and stands there once."""
    for name in run_folder.LOGS:
        assert (folder / name).exists() == (unbroken / name).exists(), name
        if not (folder / name).exists():  # rollouts.jsonl, in SFT
            continue
        kept = [
            [
                {k: v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)}
                for row in lines(f / name)
            ]
            for f in (folder, unbroken)
        ]
        assert kept[0] == kept[1], name
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [*range(1, NUM_STEPS + 1)]
    assert steps_of_tensorboard(folder) == steps_of_tensorboard(unbroken) == {
        "loss": [*range(1, NUM_STEPS + 1)],
        "evaluation/total": [3, 6],
    }  # fmt: skip
    tensors = [
        {
            str(path.relative_to(f / "export")): load_file(path)
            for path in sorted((f / "export").rglob("*.safetensors"))
        }
        for f in (folder, unbroken)
    ]
    assert tensors[0].keys() == tensors[1].keys()
    for file, arrays in tensors[0].items():
        for name, x in arrays.items():
            assert np.array_equal(x, tensors[1][file][name]), name
    assert not list(folder.glob("journal/*"))
    assert not list(folder.rglob("*.partial"))


def steps_of_tensorboard(folder: Path) -> dict[str, list[int]]:
    """Reads the event files: records of length, checksum, message, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    steps: dict[str, list[int]] = {"loss": [], "evaluation/total": []}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                if value.tag in steps:
                    steps[value.tag].append(event.step)
            content = content[16 + size :]
    return steps


def test_every_point_is_killed_at():
    assert {point for chain in CHAINS.values() for point, _ in chain} == set(POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("chain", CHAINS)
def test_a_killed_run_ends_as_the_unbroken_one(unbroken, run_config, tmp_path, chain):
    folder = tmp_path / "run"
    path = run_config(folder)
    for point, visit in CHAINS[chain]:
        run(path, point, visit)
        assert not (folder / "finished.json").exists()
    tree = dataclasses.asdict(config.load(path))
    left = run_folder.describe(folder, run_folder.find(folder, tree), NUM_STEPS)
    assert run(path).splitlines()[0] == left
    assert_same_run(folder, unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("name", SFT_RUNS)
def test_a_killed_sft_run_ends_as_the_unbroken_one(run_config, tmp_path, name):
    """Without a journal: what was learned since the newest checkpoint is learned again."""
    whole, folder = tmp_path / "whole", tmp_path / "run"
    overrides, kept = SFT_RUNS[name]
    run(run_config(whole, *overrides, stage="sft"))
    fullest = max(row["pack/examples_per_row"] for row in lines(whole / "metrics.jsonl"))
    assert (fullest > 1) == ("batch.pack=true" in overrides)
    path = run_config(folder, *overrides, stage="sft")
    for point, visit, logged in SFT_KILLS:
        run(path, point, visit)
        assert [meta["step"] for _, meta in run_folder.metas(folder)] == kept, point
        assert len(lines(folder / "metrics.jsonl")) == logged, point
    run(path)
    assert_same_run(folder, whole)


@pytest.mark.slow
def test_journaled_steps_are_not_sampled_again(run_config, unbroken, tmp_path):
    """A damaged journal is named and its step sampled again; the others are taken as they are."""
    folder = tmp_path / "run"
    path = run_config(folder)
    run(path, "log", 4)  # after the update of step 4; the checkpoint is that of step 2
    three, four = sorted((folder / "journal").iterdir())
    assert [three.name, four.name] == ["step_00000003.journal", "step_00000004.journal"]
    four.write_bytes(four.read_bytes()[:-1])
    said = run(path, "journaled", 1)  # the first step that is journaled anew
    assert f"{four} is damaged: its checksum is wrong; step 4 is sampled again" in said
    assert [row["step"] for row in lines(folder / "metrics.jsonl")] == [1, 2, 3]
    run(path)
    assert_same_run(folder, unbroken)


def test_sft_goes_on_where_it_stopped(configured, tmp_path, monkeypatch):
    """In this process, without engines: broken off in the middle of writing a checkpoint."""
    from longrl_jax import checkpoint

    settings = (
        "run.num_steps=4",
        "run.checkpoint_every=2",
        "data.validation=",
        "optimizer={learning_rate: 0.01}",
    )
    sft.run(configured("tiny_cpu_sft.yaml", *settings, f"run.dir={tmp_path / 'whole'}"))
    cfg = configured("tiny_cpu_sft.yaml", *settings)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "resolved.yaml").write_text(config.to_yaml(cfg))

    class Killed(BaseException):
        pass

    digests = checkpoint._digests

    def killed_at_four(path, **options):
        if path.name.startswith(".step_00000004"):
            raise Killed
        return digests(path, **options)

    monkeypatch.setattr(checkpoint, "_digests", killed_at_four)
    with pytest.raises(Killed):
        sft.run(cfg)
    monkeypatch.undo()
    assert [path.name for path, _ in run_folder.metas(folder)] == ["step_00000002"]
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    sft.run(cfg)
    names = ("step", "loss", "grad_norm", "tokens", "groups", "refused")
    for one, other in zip(
        lines(folder / "metrics.jsonl"), lines(tmp_path / "whole" / "metrics.jsonl"), strict=True
    ):
        assert [one[name] for name in names] == [other[name] for name in names]
    a, b = (
        load_file(f / "export" / "llm" / "model.safetensors") for f in (folder, tmp_path / "whole")
    )
    assert all(np.array_equal(a[name], b[name]) for name in a | b)
    with pytest.raises(ValueError, match="it is finished"):
        sft.run(cfg)


def test_a_step_is_saved_when_it_is_due_or_the_best(configured, tmp_path, monkeypatch):
    cfg = configured(
        "tiny_cpu_sft.yaml", "run={dir: RUN, num_steps: 9, checkpoint_every: 3, keep: 1, "
        "best_metric: total}".replace("RUN", str(tmp_path / "run")), "data.validation=v.jsonl",
        "optimizer.warmup_steps=0",
    )  # fmt: skip
    policy, state = opened.open_policy(cfg)
    other = jax.tree.map(lambda x: x + 1, state.frozen)
    folder = tmp_path / "run"
    folder.mkdir()
    # nothing is computed yet: a first try with another model.path binds nobody
    saving.open_saver(cfg, policy, dataclasses.replace(state, frozen=other))
    saver, state = saving.open_saver(cfg, policy, state)
    (folder / "resolved.yaml").write_text(config.to_yaml(cfg))
    kept = []
    for number, score in enumerate((0.1, None, 0.3, 0.2, 0.4, None), start=1):
        saver.after_step(number, state, None if score is None else {"total": score})
        kept.append([meta["step"] for _, meta in run_folder.metas(folder)])
    assert kept == [[1], [1], [3], [3], [5], [5, 6]]
    with pytest.raises(
        ValueError, match="best_metric='total' is no score of .* choose one of bleu"
    ):
        saver.after_step(8, state, {"bleu": 0.1})
    # the frozen parts are those of model.path, which has to be what it was
    with pytest.raises(ValueError, match="the frozen parameters are not those .* was started with"):
        saving.open_saver(cfg, policy, dataclasses.replace(state, frozen=other))
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: Usage(free=1000))
    with pytest.raises(
        ValueError, match=r"2 checkpoints .* GiB, another .* GiB, export .* are there"
    ):
        saving.open_saver(cfg, policy, state)


@dataclasses.dataclass
class Usage:
    free: int
