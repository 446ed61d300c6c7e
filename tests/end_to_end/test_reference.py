"""What updates may change: the policy's logps and its engine's inputs; never the reference's."""

import json
from pathlib import Path

import numpy as np
import pytest

from longrl_jax import convert, models, step
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions, sft, update


def test_large_updates_leave_the_reference_alone(configured, tmp_path):
    """The projector is trained: the policy's media embeddings move, the stored features do not."""
    cfg = configured("tiny_cpu_grpo.yaml", "algorithm.kl=0.1", "optimizer={learning_rate: 0.05}")
    policy, state = opened.open_policy(cfg)
    assert policy.stage == "packed"
    reference = opened.open_reference(cfg, policy, state)
    encoder = opened.open_encoder(policy, state)
    to_inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=64)
    pass_logps = update.make_pass_logps(cfg, policy)
    train_step = update.make_grpo_update(cfg, policy, state)
    with (
        RefusedLog(tmp_path / "refused.jsonl") as refused,
        questions.open_embedder(cfg, encoder, refused, Phases()) as embed,
    ):
        asked = questions.validation(cfg, policy, refused)
        kept, features = embed(asked, 0)
        groups = [sft.reference_group(prompt, policy, "think") for prompt in kept]
        pushes = [np.full(1, sign, np.float32) for sign in (1.0, -1.0, 1.0, -1.0)]
        passes, _ = update.make_passes(cfg, policy, groups, features, pushes)
        before = np.asarray(pass_logps(reference, passes)[0])
        inputs_before = to_inputs(state)(kept, features)
        for _ in range(2):
            state, _ = train_step(state, passes, before)
        np.testing.assert_array_equal(pass_logps(reference, passes)[0], before)
        moved = np.asarray(pass_logps(step.all_params(state), passes)[0])
        mask = np.asarray(passes.loss_mask)
        assert np.abs(moved - before)[mask].max() > 0.1
        # the engine's input comes from this step's projector and table, at media and at text
        for prompt, old, new in zip(
            kept, inputs_before, to_inputs(state)(kept, features), strict=True
        ):
            changed = np.abs(new - old).max(axis=1) > 1e-4
            assert changed[prompt.is_media].all() and changed[~prompt.is_media].any()
        # and a video that is new after the updates is still encoded with the frozen weights
        again = features[0].copy()
        for entry in Path(cfg.store.path).glob("*.emb"):
            entry.unlink()
        np.testing.assert_array_equal(embed(kept[:1], 1)[1][0], again)


def test_a_run_that_turns_nan_stops_and_names_it(configured, tmp_path):
    cfg = configured(
        "tiny_cpu_sft.yaml",
        "optimizer={learning_rate: 1e30}",
        "run.num_steps=4",
        "data.validation=",
    )
    with pytest.raises(FloatingPointError, match=r"step 2: loss and grad_norm not finite"):
        sft.run(cfg)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [line["step"] for line in lines] == [1]
    _, model = models.load(tmp_path / "run" / "export")  # what step 1 had made is kept


def test_a_reference_with_another_tower_is_refused(configured, world, tmp_path):
    other = tmp_path / "other"
    convert.main(
        ["init", "configs/models/tiny_vila.json", str(other), "--seed=1",
         "--time-tokens=64", f"--corpus={world / 'data' / 'corpus.txt'}"]
    )  # fmt: skip
    cfg = configured("tiny_cpu_grpo.yaml", f"model.reference={other}", "algorithm.kl=0.1")
    policy, state = opened.open_policy(cfg)
    with pytest.raises(ValueError, match="a part of model.frozen differs"):
        opened.open_reference(cfg, policy, state)


def test_without_kl_no_reference_is_loaded(configured):
    cfg = configured("tiny_cpu_grpo.yaml", "algorithm.kl=0.0", "model.reference=no/such/folder")
    policy, state = opened.open_policy(cfg)
    assert opened.open_reference(cfg, policy, state) is None
    assert models.feature_stage(["vision"]) == "packed"
