"""Qwen3 and Llama in the engine: what the learner's pushed weights give, against the learner itself
and transformers."""

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_qwen2 import (
    BANNED,
    CFG,
    LOGP_ATOL,
    STOP,
    fresh_prompt,
    greedy,
    hf_greedy,
    hf_model,
    sample,
    save_checkpoint,
)

from longrl_jax import models, step
from rollout_bridge import make_engines

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
TEMPERATURE = 0.7
CASES = {
    "qwen3": ("Qwen3", {"tied": True, "head_dim": 64}),
    "qwen3_yarn": ("Qwen3", {"tied": False, "head_dim": 64, "rope_parameters": YARN}),
    "qwen2_yarn": ("Qwen2", {"tied": True, "rope_parameters": YARN}),
    "llama": ("Llama", {"tied": False}),
    "llama3": ("Llama", {"tied": True, "rope_parameters": LLAMA3}),
}


def learner_logps(model, prompt, tokens):
    """log p of an answer's tokens, by the functions that the stages use."""
    row = jnp.asarray(np.concatenate([prompt, tokens]))[None]
    pos = jnp.arange(row.shape[1])[None]
    h_1TD = model.hidden(model.embed(row), pos, pos, jnp.zeros_like(pos), jnp.ones_like(pos))
    first = len(prompt) - 1
    logps_11A, _ = step.head_logps(
        h_1TD[:, None, first:-1],
        model.head(),
        row[:, None, first + 1 :],
        temperature=TEMPERATURE,
        banned_tokens=BANNED,
        head_chunk=step.HEAD_CHUNK,
    )
    return np.asarray(logps_11A)[0, 0]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_push_from_the_learner_gives_its_logps_and_the_greedy_text(tmp_path, case):
    family, sizes = CASES[case]
    old, new = (
        save_checkpoint(tmp_path / f"v{seed}", seed=seed, family=family, **sizes) for seed in (0, 1)
    )
    cfg, model = models.load(new)
    prompts = [fresh_prompt(n) for n in (7, 140, 300)]  # under and over the first length
    want = [hf_greedy(hf_model(new), prompt, 8) for prompt in prompts]
    (engine,) = make_engines(old, CFG, seed=0, banned_tokens=BANNED, stop_tokens=STOP)
    try:
        assert greedy(engine, prompts) == [hf_greedy(hf_model(old), p, 8) for p in prompts] != want
        engine.sync(models.llm_weights(model, cfg), version=1)
        assert greedy(engine, prompts) == want
        groups = sample(engine, prompts, num_samples=2, temperature=TEMPERATURE)
    finally:
        engine.close()
    for prompt, group in zip(prompts, groups, strict=True):
        for answer in group:
            got = learner_logps(model, prompt, answer.tokens)
            np.testing.assert_allclose(answer.logps, got, rtol=0, atol=LOGP_ATOL)
