"""An engine in its own process says what one in this process says, whatever the backbone."""

import dataclasses

import numpy as np
import pytest
from parity_backbones import Questions, as_media, write
from tiny_qwen2 import CFG, assert_same, sample

from longrl_jax import models
from rollout_bridge import make_engines


def answers(folder, questions, requests, pushed, *, process):
    """Samples of the folder's weights, and of what was pushed after them."""
    cfg = dataclasses.replace(CFG, process=process)
    (engine,) = make_engines(folder, cfg, seed=0, banned_tokens=questions.banned)
    try:
        fresh = sample(engine, requests)
        engine.sync(pushed(), version=1)
        return fresh, sample(engine, requests)
    finally:
        engine.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Qwen2.5-VL"])
def test_a_worker_says_what_an_inline_engine_says(name, tmp_path):
    folder = write(name, tmp_path / "old")
    cfg, model = models.load(write(name, tmp_path / "new", seed=1))
    questions, rng = Questions(folder, cfg), np.random.default_rng(0)
    width = models.text_config(cfg).width
    requests = [
        as_media(a.prompt, rng.normal(size=(len(a.prompt.tokens), width)).astype(np.float32))
        if a.prompt.media
        else a.prompt.tokens
        for a in questions.ask()
    ]

    def pushed():
        return models.llm_weights(model, cfg)

    inline, worker = (
        answers(folder, questions, requests, pushed, process=process)
        for process in ("inline", "worker")
    )
    for got, want in zip(worker, inline, strict=True):
        assert_same(got, want)
    fresh, after = (groups[0][0].tokens.tolist() for groups in inline)
    assert fresh != after
