"""GRPO of the language models that the other loops here do not have, with a real vLLM."""

import json

import numpy as np
import parity_backbones
import pytest
import torch
import transformers

from longrl_jax import models
from longrl_jax.stages import grpo

MAX_GAP = 1e-4  # float32, sums in another order
SUMS = [(a, b) for a in range(1, 5) for b in range(1, 5)]


@pytest.fixture(scope="module")
def sums(tmp_path_factory):
    """A data set of words alone."""
    root = tmp_path_factory.mktemp("sums")
    lines = [
        json.dumps({"id": f"{a}+{b}", "question": f"What is {a} + {b}?", "answer": str(a + b)})
        for a, b in SUMS
    ]
    for name in ("train", "validation"):
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return root


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Qwen3", "Llama", "VILA: Llama, 3x3"])
def test_two_steps_train_push_and_agree_with_the_engine(
    name, configured, world, sums, tmp_path, spaces
):
    init = parity_backbones.write(name, tmp_path / "init", corpus=world / "data" / "corpus.txt")
    vila = name.startswith("VILA")
    cfg = configured(
        "tiny_cpu_grpo.yaml" if vila else "smollm2_cpu_grpo.yaml",
        f"model.path={init}",
        *(["data.timestamp=''"] if vila else [f"data.root={sums}"]),
        "rewards={spaces: 1.0}",
        "algorithm.kl=0.01",
        "rollout.temperature=0.7",
        "optimizer={learning_rate: 0.02}",
        "batch.smallest_bucket=128",
        "run.num_steps=2",
        "run.eval_examples=1",
        "run.export_dtype=''",
    )
    grpo.run(cfg)
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    # the second step's answers are of the weights that the first one has made and pushed
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert abs(steps[0]["kl"]) < 1e-6 and steps[1]["kl"] > 1e-3
    trained, before = (models.arrays_of(models.load(f)[1]) for f in (run / "export", init))
    moved = {path for path in trained if not np.array_equal(trained[path], before[path])}
    assert {path.partition(".")[0] for path in moved} == (
        {"text", "projector"} if vila else {"text"}
    )
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        models.llm_folder(run / "export"), dtype=torch.float32
    )
    table = theirs.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table, trained["text.table"])
