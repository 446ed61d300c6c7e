"""What a run writes down."""

import json
import math

import numpy as np
import pytest

from longrl_jax.metrics import Phases, RunLog, averages


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
