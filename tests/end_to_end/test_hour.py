"""configs/hour_cpu.yaml in small: four-minute films at one frame a second, on 8 devices."""

import json
from pathlib import Path

import numpy as np
import pytest

from longrl_jax import config, convert
from longrl_jax.data import synthetic
from longrl_jax.stages import grpo

ROOT = Path(__file__).parents[2]
MAX_GAP = 1e-4  # float32, sums in another order; measured 2e-6 to 3e-5
FRAMES = 240
QUESTIONS = 12  # of two films
FRAME_TOKENS = 6  # its time, 2 x 2, separator


@pytest.mark.slow
def test_the_second_epoch_decodes_and_encodes_nothing(tmp_path, spaces):
    data = tmp_path / "data"
    synthetic.main([str(data), "--clips=2", "--validation=0", "--minutes=4", "--seed=7"])
    convert.main(
        [
            "init",
            str(ROOT / "configs" / "models" / "hour_vila.json"),
            str(tmp_path / "init"),
            f"--corpus={data / 'corpus.txt'}",
            f"--time-tokens={FRAMES}",
        ]
    )
    cfg = config.load(
        ROOT / "configs" / "hour_cpu.yaml",
        [
            f"model.path={tmp_path / 'init'}",
            f"data.root={data}",
            f"store.path={tmp_path / 'store'}",
            f"run.dir={tmp_path / 'run'}",
            f"data.num_frames={FRAMES}",
            "batch.groups=6",
            "batch.max_row_tokens=2304",
            "batch.smallest_bucket=1024",  # one shape
            "rewards={video_qa: 1.0, spaces: 1.0}",
            "optimizer={learning_rate: 0.02}",
            "rollout.max_model_len=1664",
            "run.num_steps=4",
        ],
    )
    assert cfg.mesh.num_devices == 8 and cfg.rollout.num_samples == 8
    assert cfg.rollout.max_model_len > FRAMES * FRAME_TOKENS  # one piece: no chunked prefill on CPU
    grpo.run(cfg)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["groups"] for step in steps] == [6] * 4  # two epochs, nothing was refused
    for counter in ("media/decoded_frames", "media/encoded_frames"):
        counts = [step[counter] for step in steps]
        assert sum(counts[:2]) == 2 * FRAMES  # every film once
        assert counts[2:] == [0, 0]
    assert all(step["prompt/tokens"] > FRAMES * FRAME_TOKENS for step in steps)
    assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert max(step["gap/max"] for step in steps) < MAX_GAP  # after large updates and pushes
    hits = [step["rollout/prefix_hits"] for step in steps]
    assert min(hits) > 0.8  # eight answers share one prefill, but for the last cache block
    assert [step["compilations"] for step in steps] == [1] * 4
