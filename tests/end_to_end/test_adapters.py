"""LoRA in training: what learns, what the reference shares, what a run goes on from and leaves."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
import transformers

from longrl_jax import checkpoint, config, models, run_folder, step
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.models import lora
from longrl_jax.stages import grpo, questions, sft, update
from longrl_jax.stages import policy as opened

LORA = ("model.lora_rank=4", "model.lora_alpha=8")
LEARNING = "optimizer={learning_rate: 0.01}"
MAX_GAP = 1e-4  # as in test_loop.py
MERGED_ATOL = 1e-4  # log p; float32 sums of merged kernels, of order 1


def sft_passes(cfg, policy, state, tmp_path):
    """The reference answers to the held-out questions, as one batch."""
    encoder = opened.open_encoder(policy, state)
    with (
        RefusedLog(tmp_path / "refused.jsonl") as refused,
        questions.open_embedder(cfg, encoder, refused, Phases()) as embed,
    ):
        kept, features = embed(questions.validation(cfg, policy, refused), 0)
    groups = [sft.reference_group(prompt, policy, "think") for prompt in kept]
    pushes = [np.ones(1, np.float32)] * len(groups)
    return update.make_passes(cfg, policy, groups, features, pushes)[0]


def live_bytes():
    return sum(x.nbytes for x in jax.live_arrays())


def size_bytes(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def test_adapters_learn_beside_a_frozen_model_that_the_reference_shares(configured, tmp_path):
    cfg = configured("tiny_cpu_grpo.yaml", *LORA, "algorithm.kl=0.1", LEARNING)
    policy, state = opened.open_policy(cfg)
    trained, frozen = models.arrays_of(state.params), models.arrays_of(state.frozen)
    assert {"lora" if ".lora." in path else path.split(".")[0] for path in trained} == {
        "lora",
        "projector",
    }
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert sum(x.size for x in moments) == 2 * sum(x.size for x in trained.values())

    before_bytes = live_bytes()
    reference = opened.open_reference(cfg, policy, state)
    projector = {path: x for path, x in trained.items() if path.startswith("projector")}
    assert live_bytes() - before_bytes == size_bytes(projector)  # it is trained, so it is copied
    shared = models.arrays_of(reference)
    assert set(shared) == {*frozen, *projector}
    assert all(shared[path] is x for path, x in frozen.items())

    passes = sft_passes(cfg, policy, state, tmp_path)
    learn, losses = update.make_sft_update(cfg, policy, state), []
    for _ in range(8):
        state, stats = learn(state, passes)
        losses.append(float(stats["loss"][0]))
    assert losses[-1] < 0.8 * losses[0]
    assert all(models.arrays_of(state.frozen)[path] is x for path, x in frozen.items())


@pytest.mark.slow
def test_the_reference_a_resumed_run_and_the_export(configured, world, tmp_path):
    cfg = configured("tiny_cpu_grpo.yaml", *LORA, "algorithm.kl=0.1", LEARNING)
    policy, state = opened.open_policy(cfg)
    reference = opened.open_reference(cfg, policy, state)
    passes = sft_passes(cfg, policy, state, tmp_path)
    mask = np.asarray(passes.loss_mask)
    plain_cfg = configured("tiny_cpu_grpo.yaml")
    plain, plain_state = opened.open_policy(plain_cfg)
    base_logps = update.make_pass_logps(plain_cfg, plain)(step.all_params(plain_state), passes)[0]
    logps_of_base = update.make_pass_logps(cfg, policy, adapters=False)
    np.testing.assert_array_equal(logps_of_base(reference, passes)[0], base_logps)
    logps_of = update.make_pass_logps(cfg, policy)
    start = np.asarray(logps_of(step.all_params(state), passes)[0])
    np.testing.assert_array_equal(start[mask], np.asarray(base_logps)[mask])  # b is zero

    learn = update.make_sft_update(cfg, policy, state)
    for number in range(1, 5):
        state, stats = learn(state, passes)
        if number == 2:
            saved = checkpoint.save(tmp_path / "run" / "checkpoints", state, step=2, about={})
    np.testing.assert_array_equal(logps_of_base(reference, passes)[0], base_logps)

    # another process would open the run anew, and go on from the checkpoint
    again = checkpoint.restore(saved, opened.open_policy(cfg)[1])
    for _ in range(2):
        again, stats_again = learn(again, passes)
    assert float(stats_again["loss"][0]) == float(stats["loss"][0])
    jax.tree.map(np.testing.assert_array_equal, again.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, again.opt_state, state.opt_state)

    # a folder for everyone else, which is the trained model without adapters
    opened.export(policy, state, tmp_path / "export")
    exported = configured("tiny_cpu_grpo.yaml", f"model.path={tmp_path / 'export'}")
    merged = step.all_params(opened.open_policy(exported)[1])
    got = np.asarray(logps_of_base(merged, passes)[0])
    want = np.asarray(logps_of(step.all_params(state), passes)[0])
    assert np.abs(want - start)[mask].max() > 0.1
    np.testing.assert_allclose(got[mask], want[mask], rtol=0, atol=MERGED_ATOL)
    base = models.arrays_of(models.load(world / "init")[1])
    for path, x in models.arrays_of(merged).items():
        kernel = path.startswith("text.layers.") and path.endswith("kernel")
        changed = not np.array_equal(x, base[path])
        assert changed == (kernel or path.startswith("projector")), path


@pytest.mark.slow
def test_grpo_with_adapters_pushes_and_exports_what_it_learned(configured, world, tmp_path, spaces):
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        *LORA,
        "model.frozen=[vision, projector]",
        "rewards={video_qa: 1.0, spaces: 1.0}",
        "algorithm.kl=0.01",
        "rollout.temperature=0.7",
        "optimizer={learning_rate: 0.02}",
        "batch.rows_per_pass=2",
        "batch.smallest_bucket=128",
        "run.num_steps=3",
    )
    grpo.run(cfg)
    run = tmp_path / "run"
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    # the engine had the merged weights of every step, the start's first
    assert max(row["gap/max"] for row in steps) < MAX_GAP
    assert abs(steps[0]["kl"]) < 1e-6 and steps[-1]["kl"] > 1e-3
    assert [row["compilations"] for row in steps] == [2] * 3  # reference logps and update
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        run / "export" / "llm", dtype=torch.float32
    )
    ours = models.arrays_of(models.load(run / "export")[1])
    up = theirs.model.layers[0].mlp.up_proj.weight.detach().numpy()
    np.testing.assert_array_equal(ours["text.layers.mlp.up.kernel"][0], up.T)
    start = models.arrays_of(models.load(world / "init")[1])
    moved = {path for path in ours if not np.array_equal(ours[path], start[path])}
    assert moved and all(path.endswith(".kernel") for path in moved)
    assert {path.name for path in (run / "adapter").iterdir()} == {lora.CONFIG, lora.TENSORS}
    said = json.loads((run / "adapter" / lora.CONFIG).read_text())
    assert (said["r"], said["base_model_name_or_path"]) == (4, str(world / "init" / "llm"))
    arrays = sum(path.stat().st_size for path in run.glob("checkpoints/step_*/state/**/*"))
    assert arrays < sum(path.stat().st_size for path in (world / "init" / "llm").iterdir())


def test_a_run_does_not_go_on_with_other_adapters(configured, tmp_path):
    cfg = configured("tiny_cpu_sft.yaml", *LORA)
    run = Path(cfg.run.dir)
    run.mkdir()
    (run / "resolved.yaml").write_text(config.to_yaml(cfg))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    assert config.load(run / "resolved.yaml") == cfg
    model = dataclasses.replace(cfg.model, lora_rank=8, lora_targets=("q",))
    other = dataclasses.asdict(dataclasses.replace(cfg, model=model))
    with pytest.raises(ValueError, match="another model.lora_rank, model.lora_targets"):
        run_folder.find(run, other)
