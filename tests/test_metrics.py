"""What a run writes down."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from longrl_jax.metrics import Phases, RunLog, averages, check_wandb


def test_every_step_is_one_line_of_valid_json(tmp_path):
    with RunLog(tmp_path, 2, name="test") as log:
        log.step(1, {"loss": np.float32(0.5), "gap": math.nan, "tokens": 3}, shown=("loss",))
        log.step(2, {"loss": np.float64(0.25), "gap": math.inf}, shown=("loss", "absent"))
        log.rollouts(2, [{"id": "a", "reward": None}, {"id": "b", "reward": {"total": 1.0}}])
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").open()]
    assert lines == [
        {"step": 1, "loss": 0.5, "gap": None, "tokens": 3},
        {"step": 2, "loss": 0.25, "gap": None},
    ]
    rows = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").open()]
    assert rows == [
        {"step": 2, "id": "a", "reward": None},
        {"step": 2, "id": "b", "reward": {"total": 1.0}},
    ]


def test_sums_and_counts_become_means():
    means = averages({"kl": (np.float32(3), np.int32(4)), "none": (0, 0)})
    assert means["kl"] == 0.75 and math.isnan(means["none"])


def test_phases_add_up_to_the_step():
    phases = Phases()
    with phases.phase("update"):
        pass
    phases.add("decode", 0.0)
    phases.add("update", 0.001)
    times = phases.take()
    parts = times["time/update_s"] + times["time/decode_s"] + times["time/other_s"]
    assert times["time/update_s"] >= 0.001
    assert parts == pytest.approx(max(times["time/step_s"], parts))
    assert "time/update_s" not in phases.take()


def test_a_counter_that_was_named_reads_zero_in_a_step_without_it():
    phases = Phases()
    assert "media/decoded_frames" not in phases.take()
    phases.count("media/decoded_frames", 64)
    phases.count("media/decoded_frames", 6)
    assert [phases.take()["media/decoded_frames"] for _ in range(2)] == [70, 0]


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Reads TensorBoard's event files: records of length, checksum, message, checksum."""
    points: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            event = Event.FromString(content[12 : 12 + size])
            for value in event.summary.value:
                points.setdefault(value.tag, []).append((event.step, value.simple_value))
            content = content[16 + size :]
    return points


def test_tensorboard_shows_every_step_once_however_often_a_run_goes_on(tmp_path):
    with RunLog(tmp_path, 3, name="test") as log:
        log.step(1, {"loss": 0.5, "gap": math.nan})
        log.evaluation(1, {"total": 0.25})
        log.step(2, {"loss": 0.25, "gap": 2})
        log.step(3, {"loss": 0.125, "gap": 3})
    (events,) = (tmp_path / "tensorboard").iterdir()
    events.rename(events.with_name("events.out.tfevents.1.earlier"))  # not of this very second
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))  # as resume cuts
    with RunLog(tmp_path, 3, name="test", first_step=2) as log:
        log.step(3, {"loss": 0.0, "gap": 3})
    assert curves(tmp_path) == {
        "loss": [(1, 0.5), (2, 0.25), (3, 0.0)],
        "gap": [(2, 2.0), (3, 3.0)],
        "evaluation/total": [(1, 0.25)],
    }


def test_a_project_without_the_package_is_refused(monkeypatch):
    check_wandb("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"run.wandb='mine' needs .* pip install 'longrl_jax\[wandb"
    ):
        check_wandb("mine")


@pytest.mark.slow
def test_wandb_gets_the_numbers_under_one_id(tmp_path):
    """Offline: the same files that `wandb sync` sends. In processes of their own, as runs are."""
    pytest.importorskip("wandb", reason="an extra: pip install 'longrl_jax[wandb]'")
    program = f"""
import pathlib, sys
from longrl_jax.metrics import RunLog
first = int(sys.argv[1])
folder = pathlib.Path({str(tmp_path)!r})
with RunLog(folder, 4, name="test", first_step=first, wandb="mine") as log:
    for step in (first + 1, first + 2):
        log.step(step, {{"loss": step / 8, "gap": float("nan")}})
    log.evaluation(first + 2, {{"total": 0.5}})
"""
    (tmp_path / "resolved.yaml").write_text("seed: 7")
    for first in (0, 2):
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
        command = [sys.executable, "-c", program, str(first)]
        subprocess.run(command, env=environment, check=True, timeout=120)
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    written = [path for folder in folders for path in folder.glob("run-*.wandb")]
    assert len(written) == 2
    assert len({path.name for path in written}) == 1  # the id is in the name: one run
    rows = [row for path in written for row in history(path)]
    assert [(row["_step"], row["loss"]) for row in rows] == [(n, n / 8) for n in (1, 2, 3, 4)]
    assert [row.get("evaluation/total") for row in rows] == [None, 0.5, None, 0.5]
    assert "gap" not in rows[0]


def history(path: Path) -> list[dict]:
    """Reads W&B's own file: 7 bytes, then blocks of 32 KiB of parts (checksum, length, kind)."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, at, record, rows = path.read_bytes(), 7, b"", []
    while at < len(content):
        if at % 2**15 > 2**15 - 7:
            at += -at % 2**15  # no room for the head of a part: the rest of the block is empty
            continue
        size, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            message, record = Record.FromString(record), b""
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                rows.append(
                    {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in items}
                )
    return rows
