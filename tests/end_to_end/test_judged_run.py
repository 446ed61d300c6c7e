"""GRPO whose answers another model judges: faults and kills change nothing and cost nothing."""

import collections
import json
import os
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from chat_server import ChatServer, cut, hang, status, truncated

from longrl_jax import chat, config

ROOT = Path(__file__).parents[2]
NUM_STEPS, NUM_SAMPLES, MAX_TRIES = 3, 4, 3
KILLS = [("judging", 6), ("journaled", 2)]
"""In the middle of a step's verdicts; before the update of the second step."""
OF_THE_PROCESS = ("time/", "media/", "compilations")
FAULTS = (
    status(429, retry_after=0.05),
    status(500),
    cut(),
    truncated(),
    '{"verdict": "corr',
)


class Oracle:
    """Knows the right answer. It never says of some, among them all answers to some questions, and
    with ill=True fails once with every other."""

    def __init__(self, *, ill: bool):
        self.ill, self.num_faults = ill, 0
        self.given: collections.Counter[str] = collections.Counter()
        """Whole verdicts, by what was judged."""

    def __call__(self, asked):
        sheet = json.loads(asked.body["messages"][1]["content"])
        of_all, of_some = (
            zlib.crc32(text.encode()) >> 8 for text in (sheet["question"], json.dumps(sheet))
        )
        if of_all % 4 == 0 or of_some % 6 == 0:
            return "perhaps"
        if self.ill and asked.visit == 1:
            self.num_faults += 1
            return hang(8) if self.num_faults == 1 else FAULTS[self.num_faults % len(FAULTS)]
        self.given[json.dumps(sheet)] += 1
        right = sheet["answer"] == sheet["reference"]
        return json.dumps({"verdict": "correct" if right else "incorrect"})


def configure(world: Path, folder: Path, server: ChatServer) -> Path:
    judge = {"base_url": server.base_url, "model": "oracle", "concurrency": 1, "timeout_s": 5}
    judge |= {"max_tries": MAX_TRIES}
    cfg = config.load(
        ROOT / "configs" / "tiny_cpu_grpo.yaml",
        [
            f"model.path={ROOT / 'configs/models/tiny_vila_start'}",
            f"data.root={world / 'data'}",
            "data.validation=",
            f"store.path={folder.with_name('store')}",
            f"run={{dir: {folder}, num_steps: {NUM_STEPS}, checkpoint_every: 2, export: false}}",
            "batch={groups: 3, max_row_tokens: 768, smallest_bucket: 128}",
            f"rollout.num_samples={NUM_SAMPLES}",
            "mesh={data: 1, simulated: true}",
            "optimizer.warmup_steps=0",
            "rewards={judge: 1.0, video_qa: 0.5}",
            f"judge={json.dumps(judge)}",
        ],
    )
    path = folder.with_suffix(".yaml")
    path.write_text(config.to_yaml(cfg))
    return path


def run(path: Path, point: str = "none", visit: int = 0) -> None:
    script = Path(__file__).with_name("killed_run.py")
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # else 8 devices
    command = [sys.executable, str(script), str(path), point, str(visit)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT)
    wanted = 0 if point == "none" else -signal.SIGKILL
    assert done.returncode == wanted, f"{point}: {done.returncode}\n{done.stderr[-3000:]}"


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.open()]


@pytest.mark.slow
def test_a_judged_run_goes_on_after_faults_and_kills_and_pays_for_each_verdict_once(
    world, tmp_path
):
    runs = []
    for name, ill, kills in (("whole", False, []), ("killed", True, KILLS)):
        oracle, folder = Oracle(ill=ill), tmp_path / name / "run"
        folder.parent.mkdir()
        with ChatServer(oracle) as server:
            path = configure(world, folder, server)
            for point, visit in kills:
                run(path, point, visit)
            run(path)
        runs.append(folder)
        assert len(oracle.given) >= 6 and max(oracle.given.values()) == 1
        assert oracle.num_faults == (len(oracle.given) if ill else 0)
        totals = chat.spent(folder / "judge.jsonl")
        assert totals.replies == len(oracle.given) and totals.failures > 0
        assert ill or totals.refused == MAX_TRIES * totals.failures
    steps = [lines(folder / "metrics.jsonl") for folder in runs]
    whole, killed = [
        [{k: v for k, v in row.items() if not k.startswith(OF_THE_PROCESS)} for row in rows]
        for rows in steps
    ]
    assert whole == killed and [row["step"] for row in whole] == [1, 2, 3]
    rollouts = [lines(folder / "rollouts.jsonl") for folder in runs]
    assert rollouts[0] == rollouts[1]
    invalid = [row for row in rollouts[0] if row["reward"] is None]
    assert invalid and all(row["advantage"] == 0 for row in invalid)
    counted = sum(row["reward/judge/invalid"] * row["groups"] * NUM_SAMPLES for row in whole)
    assert counted == pytest.approx(len(invalid))
    assert all(row["reward/video_qa/invalid"] == 0 for row in whole)
    assert any(row["advantage"] != 0 for row in rollouts[0])
