"""DAPO and REINFORCE++ from their config keys, on real parts: what is asked, kept and counted."""

import json
from pathlib import Path

import killed_run
import numpy as np
import pytest

from longrl_jax import config, rewards
from longrl_jax.stages import grpo, sampling, saving

MAX_GAP = 1e-4  # as in test_loop.py
R, GROUPS = 2, 4
SMALL = (
    "mesh={data: 8, simulated: true}",
    f"rollout={{num_samples: {R}, dtype: float32, max_tokens: 12, max_model_len: 256, "
    "overlong_tokens: 12}",
    f"batch={{groups: {GROUPS}, max_row_tokens: 512, smallest_bucket: 128}}",
    "optimizer={learning_rate: 0.01}",
    "data.validation=",
    "run.export=false",
    "run.checkpoint_every=1",
)
DAPO = (
    *SMALL,
    "rewards={parity: 1.0, overlong: 0.5}",
    "algorithm={clip_high: 0.28, filter_by: parity/odd, max_tries: 4}",
    "run.num_steps=2",
)


@pytest.fixture(autouse=True)
def with_parity(monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "parity", killed_run.parity)


@pytest.fixture
def calls(monkeypatch):
    """The prompts of every call of the engine, by the step and the try that it was for."""
    found: list[list[str]] = []
    roll_out = sampling.roll_out

    def noted(cfg, engines, asked, embeddings, *, seeds):
        found.append([prompt.example.id for prompt in asked])
        return roll_out(cfg, engines, asked, embeddings, seeds=seeds)

    monkeypatch.setattr(sampling, "roll_out", noted)
    return found


def started(cfg: config.Config) -> Path:
    """Writes what a run that goes on is known by; returns the run folder."""
    folder = Path(cfg.run.dir)
    folder.mkdir()
    (folder / "resolved.yaml").write_text(config.to_yaml(cfg))
    return folder


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).open()]


def computed(folder: Path) -> list[dict]:
    """What a run has computed, without how long it took."""
    of_process = ("time/", "media/", "compilations")
    rows = lines(folder) + lines(folder, "rollouts.jsonl")
    return [{k: v for k, v in row.items() if not k.startswith(of_process)} for row in rows]


class Killed(BaseException):
    pass


@pytest.mark.slow
def test_dapo_counts_every_group_and_goes_on_within_a_step(
    configured, tmp_path, calls, monkeypatch
):
    cfg = configured("tiny_cpu_grpo.yaml", *DAPO, f"run.dir={tmp_path / 'whole'}")
    whole = started(cfg)
    grpo.run(cfg)
    asked, steps = list(calls), lines(whole)
    tries = [step["filter/tries"] for step in steps]
    assert sum(tries) == len(asked) and max(tries[1:]) > 1
    # no record twice: tries take the data as it comes, and a step goes on where the last one stood
    flat = [name for names in asked for name in names]
    assert len(set(flat[:24])) == len(flat[:24])  # the first epoch
    fates = ("kept", "surplus", "too_low", "too_high", "unjudged")
    for step, first in zip(steps, np.cumsum([0, *tries]), strict=False):
        drawn = sum(map(len, asked[first : first + step["filter/tries"]]))
        assert step["filter/drawn"] == drawn == sum(step[f"filter/{fate}"] for fate in fates)
        assert step["groups"] == step["filter/kept"] <= GROUPS
        assert step["groups"] == GROUPS or step["filter/tries"] == cfg.algorithm.max_tries
        assert step["gap/max"] < MAX_GAP and step["compilations"] == 1  # no reference
        answers = [r for r in lines(whole, "rollouts.jsonl") if r["step"] == step["step"]]
        assert len(answers) == step["groups"] * R
        odd = np.array([r["reward"]["parity/odd"] for r in answers]).reshape(-1, R)
        assert (odd.sum(axis=1) == 1).all()  # of two answers one: all others were dropped
        assert all(r["advantage"] for r in answers)
        assert -1 <= step["reward/overlong/punishment"] < 0
    assert sum(step["filter/too_low"] + step["filter/too_high"] for step in steps) > 0

    number = 2 + int(np.argmax(np.array(tries[1:]) > 1))  # a step of several tries
    calls.clear()
    journal = saving.Saver.journal

    def killed(self, step, entry, *, attempt=1):
        journal(self, step, entry, attempt=attempt)
        if (step, attempt) == (number, 1):
            raise Killed

    monkeypatch.setattr(saving.Saver, "journal", killed)
    cfg = configured("tiny_cpu_grpo.yaml", *DAPO, f"run.dir={tmp_path / 'run'}")
    folder = started(cfg)
    with pytest.raises(Killed):
        grpo.run(cfg)
    monkeypatch.setattr(saving.Saver, "journal", journal)
    assert [row["step"] for row in lines(folder)] == [*range(1, number)]
    grpo.run(cfg)
    assert calls == asked  # each try once, in two processes of one run
    assert computed(folder) == computed(whole)


@pytest.mark.slow
def test_a_run_that_keeps_nothing_says_why_and_stops(configured, tmp_path):
    """Of two answers no share lies between 0.6 and 0.9; the steps before the last are logged."""
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        *DAPO,
        "algorithm={filter_by: parity/odd, filter_low: 0.6, filter_high: 0.9, max_tries: 1}",
        "run.num_steps=4",
    )
    with pytest.raises(ValueError, match=r"no group of 3 steps was kept: of the last \d, \d have"):
        grpo.run(cfg)
    steps = lines(tmp_path / "run")
    assert [(step["step"], step["groups"]) for step in steps] == [(1, 0), (2, 0)]
    assert all("loss" not in step and step["reward/parity/odd"] > 0 for step in steps)
    assert not (tmp_path / "run" / "rollouts.jsonl").exists()


@pytest.mark.slow
def test_reinforce_plus_plus_takes_the_kl_from_rewards(configured, tmp_path):
    """With one answer to a prompt; nothing but the reward of later tokens tells them apart."""
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        *SMALL,
        "rollout.num_samples=1",
        "batch.groups=8",
        "rewards={parity: 1.0}",
        "algorithm={advantage: reinforce_plus_plus, kl: 0.1, kl_estimator: kl, kl_in: reward}",
        "run.num_steps=2",
    )
    grpo.run(cfg)
    first, last = lines(tmp_path / "run")
    assert abs(first["kl"]) < MAX_GAP  # engine and reference are one policy, and then no more
    assert abs(last["kl"]) > 10 * MAX_GAP
    for step in (first, last):
        assert step["gap/max"] < MAX_GAP and step["grad_norm"] > 0
        assert step["compilations"] == 2
        # on policy the loss is minus the mean of whitened advantages, which is 0
        assert abs(step["loss"]) < 1e-5
    answers = lines(tmp_path / "run", "rollouts.jsonl")
    worth = [row["advantage"] for row in answers if row["step"] == 1]
    odd = [row["reward"]["parity/odd"] for row in answers if row["step"] == 1]
    assert 0 < sum(odd) < len(odd)
    assert min(w for w, o in zip(worth, odd, strict=True) if o) > 0
    assert max(w for w, o in zip(worth, odd, strict=True) if not o) < 0
