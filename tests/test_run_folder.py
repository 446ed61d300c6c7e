"""Going on with a run folder: from where, what is refused, and what the logs hold afterwards."""

import dataclasses
import json
import subprocess
import sys

import pytest

from longrl_jax import config, run_folder

SMALL = """
stage: grpo
model: {path: some/folder}
data: {root: data}
optimizer: {learning_rate: 1e-6}
run: {dir: RUN, num_steps: 10}
"""


@pytest.fixture
def tree(tmp_path):
    """tree(*overrides) -> the config as a tree; run.dir is tmp_path."""
    path = tmp_path.with_suffix(".yaml")
    path.write_text(SMALL.replace("RUN", str(tmp_path)))
    return lambda *overrides: dataclasses.asdict(config.load(path, overrides))


@pytest.fixture
def begun(tmp_path, tree):
    """A run folder with steps 1 to 7, a checkpoint at 5 and the journal of 5, 6 and 7."""
    cfg = config.load(tmp_path.with_suffix(".yaml"))
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(cfg))
    rows = [json.dumps({"step": number}) + "\n" for number in range(1, 8)]
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    made = tmp_path / run_folder.CHECKPOINTS / "step_00000005"
    made.mkdir(parents=True)
    logs = {"metrics.jsonl": sum(map(len, rows[:5]))}
    meta = {"format": run_folder.FORMAT, "step": 5, "logs": logs}
    (made / run_folder.META).write_text(json.dumps(meta))
    (tmp_path / run_folder.JOURNAL).mkdir()
    for number in (5, 6, 7):
        (tmp_path / run_folder.JOURNAL / f"step_{number:08d}.journal").touch()
    return tmp_path


def test_a_new_or_failed_start_begins_at_the_beginning(tmp_path, tree):
    assert run_folder.find(tmp_path, tree()) == run_folder.Point()
    for name in ("error.txt", "resolved.yaml", "refused.jsonl"):  # nothing is computed yet
        (tmp_path / name).write_text("stage: [nonsense")
    assert run_folder.find(tmp_path, tree()) == run_folder.Point()


def test_the_newest_checkpoint_is_where_it_goes_on(begun, tree):
    point = run_folder.find(begun, tree())
    assert (point.step, point.journaled) == (5, (6, 7))
    assert point.checkpoint == begun / run_folder.CHECKPOINTS / "step_00000005"
    line = run_folder.describe(begun, point, 10)
    assert "goes on after step 5 of 10 from" in line and "2 later steps are in its journal" in line


def test_logs_are_cut_to_the_checkpoint_and_the_half_line_is_gone(begun, tree):
    with (begun / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    (begun / "rollouts.jsonl").write_text('{"step": 6}\n')  # was not there at step 5
    point = run_folder.find(begun, tree())
    for _ in range(2):
        run_folder.cut_logs(begun, point)
        rows = [json.loads(line) for line in (begun / "metrics.jsonl").open()]
        assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
        assert (begun / "rollouts.jsonl").read_text() == ""
    assert run_folder.log_lengths(begun)["metrics.jsonl"] == point.meta["logs"]["metrics.jsonl"]
    (begun / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"metrics.jsonl has 0 bytes, but \d+ at .* step 5"):
        run_folder.cut_logs(begun, point)


def test_without_a_checkpoint_the_journal_is_replayed_from_the_start(begun, tree):
    (begun / run_folder.CHECKPOINTS / "step_00000005" / run_folder.META).unlink()
    with pytest.raises(ValueError, match=r"meta.json cannot be read .* remove .*step_00000005"):
        run_folder.find(begun, tree())
    (begun / run_folder.CHECKPOINTS / "step_00000005").rmdir()
    (begun / "rollouts.jsonl").write_text('{"step": 5}\n{"step": 6}\n')
    point = run_folder.find(begun, tree())
    assert (point.step, point.checkpoint, point.journaled) == (0, None, (5, 6, 7))
    (begun / "rollouts.jsonl").write_text('{"step": 4}\n{"step": 5}\n{"st')  # half a line: a kill
    with pytest.raises(ValueError, match="checkpoints are gone, and step 4 is in no journal"):
        run_folder.find(begun, tree())
    (begun / "rollouts.jsonl").write_text("")
    for path in (begun / run_folder.JOURNAL).iterdir():
        path.unlink()
    assert run_folder.find(begun, tree()) == run_folder.Point()  # nothing was ever sampled
    (begun / run_folder.FINISHED).write_text('{"step": 1}')
    with pytest.raises(ValueError, match="is finished, and has no checkpoint"):
        run_folder.find(begun, tree())


@pytest.mark.parametrize(
    "override",
    [
        "mesh={seq: 2, fsdp: 4, simulated: true}",
        "data.loader_workers=3",
        "rollout.replicas=2",
        "store.max_gib=1",
        "run.keep=7",
        "run.checkpoint_every=1",
        "run.num_steps=20",
        "run.num_steps=6",
    ],
)
def test_what_changes_no_number_may_change(begun, tree, override):
    assert run_folder.find(begun, tree(override)).step == 5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["seed=1"], "started with another seed; choose another folder"),
        (
            ["optimizer.learning_rate=2e-6", "rollout.num_samples=4"],
            "another optimizer.learning_rate, rollout.num_samples; choose",
        ),
        (["rewards={other: 1.0}"], r"another rewards\.other, rewards\.video_qa; choose"),
        (["optimizer.schedule=cosine"], "another optimizer.schedule; choose"),
        (["run.num_steps=4"], "it is at step 5, past run.num_steps=4"),
    ],
)
def test_another_experiment_is_refused_by_its_keys(begun, tree, overrides, message):
    with pytest.raises(ValueError, match=message):
        run_folder.find(begun, tree(*overrides))


def test_more_steps_would_bend_a_cosine(begun, tree, tmp_path):
    cosine = config.load(tmp_path.with_suffix(".yaml"), ["optimizer.schedule=cosine"])
    (begun / "resolved.yaml").write_text(config.to_yaml(cosine))
    assert run_folder.find(begun, tree("optimizer.schedule=cosine")).step == 5
    with pytest.raises(ValueError, match=r"another run\.num_steps"):
        run_folder.find(begun, tree("optimizer.schedule=cosine", "run.num_steps=20"))


def test_a_finished_run_is_refused_until_it_has_more_to_do(begun, tree):
    run_folder.mark_finished(begun, 10)
    with pytest.raises(ValueError, match=r"it is finished \(10 steps\); raise run.num_steps"):
        run_folder.find(begun, tree())
    assert run_folder.find(begun, tree("run.num_steps=11")).step == 5


def test_steps_without_their_config_are_refused(begun, tree):
    (begun / "resolved.yaml").write_text("run: {no_such_key: 1}")
    with pytest.raises(ValueError, match="no config any more .*no_such_key"):
        run_folder.find(begun, tree())
    (begun / "resolved.yaml").unlink()
    with pytest.raises(ValueError, match="no resolved.yaml that says of what"):
        run_folder.find(begun, tree())


def test_a_disk_that_is_too_small_is_refused_with_numbers(tmp_path):
    small = run_folder.Need(what="3 checkpoints", size_bytes=1)
    run_folder.check_disk(tmp_path, [small])
    huge = dataclasses.replace(small, size_bytes=2**50 // 1024)
    with pytest.raises(ValueError, match=r"up to 1.02e\+03 GiB \(3 checkpoints 1.02e\+03 GiB, exp"):
        run_folder.check_disk(tmp_path, [huge, run_folder.Need(what="export", size_bytes=0)])


@pytest.mark.parametrize(
    ("there", "credited"),
    [
        ({}, 0),
        ({"checkpoints/step_00000001/a": 30, "checkpoints/step_00000002/a": 30}, 60),
        ({"checkpoints/step_00000001/a": 300}, 100),  # no more than it needs: it has to stay
        ({"rollouts.jsonl": 7}, 7),
        ({"rollouts.jsonl": 7, "checkpoints/.step_00000002.partial/a": 9}, 16),  # swept at once
        ({"export/model.safetensors": 50, "metrics.jsonl": 50}, 0),  # nothing needs their room
    ],
)
def test_what_a_run_has_on_disk_already_is_credited(tmp_path, monkeypatch, there, credited):
    needs = [
        run_folder.Need(what="2 checkpoints", size_bytes=100, name="checkpoints"),
        run_folder.Need(what="another", size_bytes=50),
        run_folder.Need(what="rollouts.jsonl", size_bytes=20, name="rollouts.jsonl"),
    ]
    for name, size in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    usage = type("Usage", (), {"free": 170 - credited})
    monkeypatch.setattr(run_folder.shutil, "disk_usage", lambda _: usage)
    run_folder.check_disk(tmp_path, needs)
    usage.free -= 1
    said = "GiB\\), of which .* are there, its disk" if credited else "GiB\\), its disk"
    with pytest.raises(ValueError, match=said):
        run_folder.check_disk(tmp_path, needs)


def test_a_folder_has_one_process(tmp_path):
    program = f"""
import pathlib
from longrl_jax import run_folder
try:
    run_folder.lock(pathlib.Path({str(tmp_path)!r}))
except ValueError as error:
    print(error)
"""
    held = run_folder.lock(tmp_path)
    command = [sys.executable, "-c", program]
    assert "in use by another process" in subprocess.check_output(command, text=True)
    held.close()
    assert subprocess.check_output(command, text=True) == ""
