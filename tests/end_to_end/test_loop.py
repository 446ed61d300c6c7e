"""The whole loop on real parts: what a run leaves behind, and that engine and learner agree."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from longrl_jax import models
from longrl_jax.stages import grpo, sft

MAX_GAP = 1e-4  # float32, sums in another order; measured 2e-6 to 3e-5
SAME_RUN_RTOL = 1e-4  # two runs whose engines split the work differently, float32
ROOT = Path(__file__).parents[2]


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def test_grpo_trains_pushes_and_agrees_with_its_engine(configured, world, tmp_path, spaces):
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        "rewards={video_qa: 1.0, spaces: 1.0}",
        "algorithm.kl=0.01",
        "rollout.temperature=0.7",
        "optimizer={learning_rate: 0.02}",
        "batch.rows_per_pass=2",
        "batch.smallest_bucket=128",  # holds every prefix and every group's answers: one shape
        "run.num_steps=6",
    )
    grpo.run(cfg)
    run = tmp_path / "run"
    steps = lines(run)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    assert all(np.isfinite([step["loss"], step["grad_norm"]]).all() for step in steps)
    # after updates of a large learning rate the engine still holds the learner's weights, its
    # inputs come from the trained projector, and the reference is the start of the run
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert abs(steps[0]["kl"]) < 1e-6 and steps[-1]["kl"] > 1e-3
    assert [step["compilations"] for step in steps] == [2] * 6  # reference logps and update
    # the damaged file: its record is named and counted, its place stays empty
    refused = lines(run, "refused.jsonl")
    assert {row["id"] for row in refused} == {"broken"}
    assert steps[-1]["refused"] == len(refused)
    empty = {row["step"] for row in refused}
    assert empty == {step["step"] for step in steps if step["groups"] < 4}
    # every answer is on file, with its reward
    answers = lines(run, "rollouts.jsonl")
    assert len(answers) == sum(step["groups"] for step in steps) * 4
    assert {"id", "text", "reward", "advantage", "seed"} <= set(answers[0])
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["questions"] == 4 and 0 <= scores["video_qa/accuracy"] <= 1
    # the export is a checkpoint for others, and not the start
    _, model = models.load(run / "export")
    _, start = models.load(world / "init")
    trained, before = models.arrays_of(model), models.arrays_of(start)
    moved = {name for name in trained if not np.array_equal(trained[name], before[name])}
    assert {name.partition(".")[0] for name in moved} == {"text", "projector"}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        run / "export" / "llm", dtype=torch.float32
    )
    table = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, trained["text.table"])


@pytest.mark.slow
def test_a_step_mixes_text_images_and_films(configured, mixed, tmp_path, spaces):
    """Six kinds of questions in one step, two steps: what the engine saw is what the learner sees.

    test_qwen2_5_vl_loop.py does the same with the other family.
    """
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        f"data.train={mixed}",
        "data.validation=''",
        "data.fps=1",
        "data.num_frames=64",
        "rewards={spaces: 1.0}",
        "rollout={num_samples: 4, dtype: float32, max_tokens: 12, max_model_len: 640}",
        "rollout.temperature=0.7",
        "optimizer={learning_rate: 0.02}",
        "batch={groups: 6, max_row_tokens: 1024, smallest_bucket: 128}",
        "run.num_steps=2",
    )
    grpo.run(cfg)
    steps = lines(tmp_path / "run")
    assert [step["groups"] for step in steps] == [6, 6]
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert all(step["grad_norm"] > 0 for step in steps)
    frames = 3 + 64 + 6  # pictures, the long film, the short one: each once, whoever asks
    assert [step["media/encoded_frames"] for step in steps] == [frames, 0]


def test_sft_learns_its_targets(configured, world, tmp_path):
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "optimizer={learning_rate: 0.01, warmup_steps: 2}",
        "run.num_steps=8",
        "rollout.process=inline",
    )
    sft.run(cfg)
    steps = lines(tmp_path / "run")
    assert steps[-1]["loss"] < 0.8 * steps[0]["loss"]
    vocab_size = json.loads((world / "init" / "llm" / "config.json").read_text())["vocab_size"]
    assert abs(steps[0]["loss"] - np.log(vocab_size)) < 1.0  # a random model: all words are alike
    assert (tmp_path / "run" / "evaluation.json").exists()


@pytest.mark.slow
def test_two_worker_replicas_do_what_one_inline_engine_does(configured, tmp_path):
    runs = {}
    for name, rollout in (
        ("inline", "rollout.process=inline"),
        ("worker", "rollout={process: worker, replicas: 2, num_samples: 4, dtype: float32, "
         "max_tokens: 12, max_model_len: 256}"),
    ):  # fmt: skip
        cfg = configured("tiny_cpu_grpo.yaml", rollout, f"run.dir={tmp_path / name}")
        grpo.run(cfg)
        runs[name] = tmp_path / name
    texts = {n: [r["text"] for r in lines(f, "rollouts.jsonl")] for n, f in runs.items()}
    assert texts["inline"] == texts["worker"]
    for a, b in zip(lines(runs["inline"]), lines(runs["worker"]), strict=True):
        np.testing.assert_allclose(a["loss"], b["loss"], rtol=SAME_RUN_RTOL, atol=1e-6)


@pytest.mark.slow
def test_a_reward_that_can_be_learned_rises(configured, tmp_path, spaces):
    """The sign of everything: a policy that is paid for spaces writes more of them."""
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        "rewards={spaces: 1.0}",
        "algorithm.kl=0.0",
        "rollout={num_samples: 8, dtype: float32, max_tokens: 12, max_model_len: 256}",
        "optimizer={learning_rate: 0.003}",
        "run.num_steps=20",
        "data.validation=''",
    )
    grpo.run(cfg)
    totals = [step["reward/total"] for step in lines(tmp_path / "run")]
    first, last = np.mean(totals[:4]), np.mean(totals[-4:])
    spread = np.std(totals[:4])
    assert last > first + max(0.05, 3 * spread)
