"""GRPO of Qwen2.5-VL on real mp4 files and a real vLLM, from the config for the published size."""

import json
from pathlib import Path

import numpy as np
import pytest
import transformers

from longrl_jax import convert, models, rewards
from longrl_jax.stages import grpo

MAX_GAP = 1e-4  # float32, sums in another order
ROOT = Path(__file__).parents[2]


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


@pytest.mark.slow
def test_grpo_trains_pushes_and_agrees_with_its_engine(
    configured, world, mixed, tmp_path, monkeypatch
):
    """Each step has all six kinds of questions: text, images, films, both."""

    def count_spaces(items):
        """A reward that a random policy varies in."""
        return [{"total": item.text.count(" ") / max(len(item.text), 1)} for item in items]

    monkeypatch.setitem(rewards.REWARDS, "spaces", count_spaces)
    init = tmp_path / "init"
    convert.init(
        ROOT / "configs/models/tiny_qwen2_5_vl.json", init, corpus=world / "data" / "corpus.txt"
    )
    cfg = configured(
        "qwen2_5_vl_3b_video_grpo.yaml",
        f"model.path={init}",
        "model.frozen=[vision]",  # the merger moves: features go through that of the step
        "model.compute_dtype=float32",
        f"data.train={mixed}",
        "data.fps=1",
        "data.num_frames=64",
        "data.min_pixels=3136",
        "data.max_pixels=4704",
        "data.validation=validation.jsonl",
        "rewards={video_qa: 1.0, spaces: 1.0}",
        "rollout.process=worker",
        "rollout.replicas=1",
        "rollout.kv_cache_gib=0.25",
        "rollout.temperature=0.7",
        "optimizer={learning_rate: 0.02}",
        "rollout.max_model_len=640",
        "batch={groups: 6, max_row_tokens: 1024, smallest_bucket: 128}",
        "run.num_steps=3",
    )
    grpo.run(cfg)
    run = tmp_path / "run"
    steps = lines(run)
    assert [step["step"] for step in steps] == [1, 2, 3]
    assert all(np.isfinite([step["loss"], step["grad_norm"]]).all() for step in steps)
    # after updates of a large learning rate the engine still holds the learner's weights, and its
    # features come from the trained merger
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert abs(steps[0]["kl"]) < 1e-6 and steps[-1]["kl"] > 1e-3
    assert [step["groups"] for step in steps] == [6, 6, 6]
    frames = 3 * 2 + 64 + 6  # a picture is a unit of two frames; each file once, whoever asks
    assert [step["media/encoded_frames"] for step in steps[:2]] == [frames, 0]
    scores = json.loads((run / "evaluation.json").read_text())
    assert scores["questions"] == 4
    # the export is a checkpoint for others; the frozen tower in it is the start's, byte for byte
    trained, before = (models.arrays_of(models.load(f)[1]) for f in (run / "export", init))
    moved = {name for name in trained if not np.array_equal(trained[name], before[name])}
    assert {name.partition(".")[0] for name in moved} == {"text", "projector"}
    theirs = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(run / "export")
    table = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, trained["text.table"])
