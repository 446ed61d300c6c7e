"""The engine against transformers: log probabilities, sampling, prefix sharing, refusals."""

import dataclasses
import json
import os
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from tiny_qwen2 import (
    BANNED,
    CFG,
    EOS,
    HIDDEN,
    LAYERS,
    LOGP_ATOL,
    STOP,
    VOCAB,
    as_embeddings,
    assert_same,
    child,
    fresh_prompt,
    greedy,
    hf_greedy,
    hf_logps,
    hf_model,
    named_weights,
    sample,
)

import rollout_bridge
from rollout_bridge import vllm_engine

BLOCK = 128  # tokens of a prefix-cache block on CPU


@pytest.fixture
def model(checkpoints, head):
    return hf_model(checkpoints[head, 0])


def check_logps(engine, model, prompts, host_prompts, temperature):
    answers = sample(engine, prompts, temperature=temperature)
    assert [len(group) for group in answers] == [4] * len(prompts)
    for prompt, group in zip(host_prompts, answers, strict=True):
        for answer in group:
            assert answer.tokens.dtype == np.int32
            assert answer.logps.dtype == np.float32
            assert not set(answer.tokens.tolist()) & set(BANNED)
            want = hf_logps(model, prompt, answer.tokens, temperature)
            np.testing.assert_allclose(answer.logps, want, rtol=0, atol=LOGP_ATOL)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_of_token_prompts_equal_transformers(engine, model, temperature):
    prompts = [fresh_prompt(n) for n in (1, 17, 200)]
    check_logps(engine, model, prompts, prompts, temperature)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_of_embedded_prompts_equal_transformers(
    engine, model, checkpoints, head, temperature
):
    host = [as_embeddings(checkpoints[head, 0], fresh_prompt(n)) for n in (2, 130, 40)]
    check_logps(engine, model, [host[0], jnp.asarray(host[1]), host[2]], host, temperature)


def test_an_embedded_prompt_may_be_split_over_devices(engine, model, checkpoints, head):
    host_PD = as_embeddings(checkpoints[head, 0], fresh_prompt(32))
    mesh = jax.make_mesh((8,), ("x",))
    split = jax.device_put(host_PD, jax.NamedSharding(mesh, jax.P("x", None)))
    whole = jax.device_put(host_PD, jax.NamedSharding(mesh, jax.P()))
    check_logps(engine, model, [split, whole], [host_PD, host_PD], 1.0)


def test_a_bfloat16_prompt_is_read_as_its_numbers(engine, checkpoints, head):
    rounded_PD = as_embeddings(checkpoints[head, 0], fresh_prompt(30)).astype(ml_dtypes.bfloat16)
    assert_same(
        sample(engine, [rounded_PD, jnp.asarray(rounded_PD)], seeds=[4, 4]),
        sample(engine, [rounded_PD.astype(np.float32)] * 2, seeds=[4, 4]),
    )


def test_greedy_equals_transformers(engine, model):
    prompts = [fresh_prompt(n) for n in (5, 60, 129)]
    assert greedy(engine, prompts) == [hf_greedy(model, prompt, 8) for prompt in prompts]


def test_stop_tokens_end_an_answer_and_the_checkpoints_own_eos_does_not(engine):
    answers = sum(sample(engine, [fresh_prompt(9) for _ in range(8)], num_samples=16), ())
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}
    for answer in answers:
        stopped = answer.finish_reason == "stop"
        assert [t in STOP for t in answer.tokens] == [False] * (len(answer.tokens) - 1) + [stopped]
        assert stopped or len(answer.tokens) == 16
    assert any(EOS in answer.tokens[:-1] for answer in answers)


def test_sample_i_equals_a_single_request_with_its_seed(engine):
    prompts = [fresh_prompt(20), fresh_prompt(140)]
    groups = sample(engine, prompts, num_samples=4, seeds=[1000, 7])
    assert [[answer.seed for answer in group] for group in groups] == [
        [1000, 1001, 1002, 1003],
        [7, 8, 9, 10],
    ]
    alone = [
        sample(engine, [prompt], num_samples=1, seeds=[answer.seed])[0]
        for prompt, group in zip(prompts, groups, strict=True)
        for answer in group
    ]
    assert_same([sum(groups, ())], [sum(alone, ())])
    assert len({tuple(answer.tokens.tolist()) for answer in groups[0]}) == 4


def test_samples_do_not_depend_on_how_many_prompts_come_at_once(engine):
    """More tokens than vLLM takes in one step (4096): it must not split a prompt, since its seeded
    sampling cannot do that on a CPU."""
    prompts = [fresh_prompt(350 + i) for i in range(13)]
    seeds = [10 * i for i in range(13)]
    together = sample(engine, prompts, num_samples=2, max_tokens=3, seeds=seeds)
    for i in (0, 10, 11, 12):
        alone = sample(
            engine, prompts[i : i + 1], num_samples=2, max_tokens=3, seeds=seeds[i : i + 1]
        )
        assert_same(alone, together[i : i + 1])


def test_samples_do_not_depend_on_the_size_of_the_cache(checkpoints, inline):
    """20 blocks: most of the 24 samples wait, and some are put back to be computed again."""
    small = vllm_engine.VllmEngine(
        checkpoints["tied", 0],
        cfg=dataclasses.replace(CFG, kv_cache_gib=0.004),
        seed=0,
        banned_tokens=BANNED,
        stop_tokens=STOP,
    )
    prompts = [fresh_prompt(n) for n in (250, 120, 380, 130, 100, 127)]
    assert_same(sample(small, prompts, max_tokens=80), sample(inline, prompts, max_tokens=80))
    small.close()


@pytest.mark.parametrize("embedded", [False, True])
@pytest.mark.parametrize("length", [127, 128, 129, 385])
def test_samples_of_a_prompt_share_its_prefill(engine, checkpoints, head, length, embedded):
    prompt = fresh_prompt(length)
    if embedded:
        prompt = as_embeddings(checkpoints[head, 0], prompt)
    before = engine.prefix_cache_stats()
    sample(engine, [prompt], num_samples=4, max_tokens=2)
    after = engine.prefix_cache_stats()
    assert after["queries"] - before["queries"] == 4 * length
    assert after["hits"] - before["hits"] == 3 * ((length - 1) // BLOCK) * BLOCK


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": [np.arange(4), np.zeros((3, 8), np.float32)]}, "prompt 1 is 8 wide"),
        ({"prompts": [np.array([4, VOCAB])]}, f"outside 0..{VOCAB - 1}"),
        ({"prompts": [np.array([-1])]}, f"outside 0..{VOCAB - 1}"),
        ({"prompts": [np.zeros(0, np.int32)]}, r"prompt 0 is \[0\]"),
        ({"prompts": [np.zeros((1, 2, HIDDEN), np.float32)]}, "give .P. tokens"),
        ({"prompts": [np.ones(4, np.float32)]}, "tokens are integers"),
        ({"prompts": [np.ones((4, HIDDEN), np.int32)]}, "embeddings one of float32"),
        ({"prompts": [np.ones((4, HIDDEN))]}, "embeddings one of float32"),
        ({"prompts": [np.full(497, 5)]}, "rollout.max_model_len=512"),
        ({"seeds": [1, 2]}, "1 prompts but 2 seeds"),
        ({"temperature": 0.0}, "greedy"),
        ({"temperature": 0.005, "num_samples": 1}, "at least 0.01"),
        ({"temperature": -1.0}, "at least 0.01"),
    ],
)
def test_a_request_that_would_be_misread_is_refused(engine, change, message):
    request = {
        "prompts": [np.arange(4)],
        "num_samples": 2,
        "temperature": 1.0,
        "max_tokens": 16,
        "seeds": [0] * len(change.get("prompts", [0])),
    } | change
    with pytest.raises(ValueError, match=message):
        engine.generate(request.pop("prompts"), **request)


def test_two_replicas_answer_as_one_and_split_no_group(checkpoints, inline):
    cfg = dataclasses.replace(CFG, replicas=2)
    engines = rollout_bridge.make_engines(
        checkpoints["tied", 0], cfg, seed=0, banned_tokens=BANNED, stop_tokens=STOP
    )
    try:
        prompts = [fresh_prompt(n) for n in (10, 140, 30, 131, 50)]
        settings = {"num_samples": 3, "temperature": 1.0, "max_tokens": 12}
        settings["seeds"] = [11, 22, 33, 44, 55]
        got = rollout_bridge.generate_all(engines, prompts, **settings)
        assert_same(got, rollout_bridge.generate_all([inline], prompts, **settings))
        queries = [engine.prefix_cache_stats()["queries"] for engine in engines]
        assert queries == [3 * (10 + 30 + 50), 3 * (140 + 131)]
        with pytest.raises(ValueError, match="5 prompts but 1 seeds"):
            rollout_bridge.generate_all(engines, prompts, **settings | {"seeds": [1]})
    finally:
        for engine in engines:
            engine.close()


def test_closing_an_engine_leaves_the_others_running(checkpoints, inline):
    """vLLM's own shutdown tears down torch.distributed for the whole process."""
    prompt = fresh_prompt(20)
    want = sample(inline, [prompt])
    other = vllm_engine.VllmEngine(
        checkpoints["tied", 0], cfg=CFG, seed=0, banned_tokens=BANNED, stop_tokens=STOP
    )
    assert_same(sample(other, [prompt]), want)
    other.close()
    other.close()
    assert_same(sample(inline, [prompt]), want)
    inline.sync(named_weights(checkpoints["tied", 0]), version=0)
    assert_same(sample(inline, [prompt]), want)


def test_embeddings_are_handed_over_without_a_copy():
    host = np.ones((16, HIDDEN), np.float32)
    assert vllm_engine.to_torch(host).data_ptr() == host.ctypes.data
    device = jax.device_put(host, jax.devices()[3])
    assert vllm_engine.to_torch(device).data_ptr() == device.unsafe_buffer_pointer()
    half = jnp.ones((16, HIDDEN), jnp.bfloat16)
    assert vllm_engine.to_torch(half).data_ptr() == half.unsafe_buffer_pointer()
    mesh = jax.make_mesh((8,), ("x",))
    whole = jax.device_put(host, jax.NamedSharding(mesh, jax.P()))
    pointers = [shard.data.unsafe_buffer_pointer() for shard in whole.addressable_shards]
    assert vllm_engine.to_torch(whole).data_ptr() in pointers


def test_the_engine_keeps_to_its_settings(inline):
    from vllm import envs

    assert not envs.VLLM_ENABLE_V1_MULTIPROCESSING
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"
    block_bytes = 2 * BLOCK * 2 * 32 * 4 * LAYERS  # K and V, tokens, heads, head dim, float32
    cache = inline._llm.llm_engine.vllm_config.cache_config
    assert cache.num_gpu_blocks == int(CFG.kv_cache_gib * 2**30) // block_bytes


SAMPLE_IN_A_CHILD = """
import json, sys, time
from pathlib import Path
import numpy as np
from longrl_jax.platform import prepare_vllm
from tiny_qwen2 import BANNED, CFG, STOP, sample
prepare_vllm(CFG)
from rollout_bridge.vllm_engine import VllmEngine
engine = VllmEngine(sys.argv[1], cfg=CFG, seed=0, banned_tokens=BANNED, stop_tokens=STOP)
prompts = [np.arange(4, 4 + n, dtype=np.int32) for n in (12, 150)]
start = time.monotonic()
groups = sample(engine, prompts, temperature=0.7)
groups += sample(engine, prompts, num_samples=1, temperature=0.0)
seconds = time.monotonic() - start
print(json.dumps([seconds, [[a.tokens.tolist(), a.logps.tolist()] for g in groups for a in g]]))
engine.close()
"""


@pytest.mark.slow
def test_without_torch_dynamo_the_samples_are_the_same(checkpoints, tmp_path):
    """platform.prepare_vllm switches it off for the compile of 10 to 50 s that it costs."""
    answers = {}
    for disabled in ("1", "0"):
        env = {"TORCHDYNAMO_DISABLE": disabled, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        done = child(SAMPLE_IN_A_CHILD, checkpoints["tied", 0], env=env)
        assert done.returncode == 0, done.stderr
        seconds, answers[disabled] = json.loads(done.stdout.splitlines()[-1])
        sys.stdout.write(f"TORCHDYNAMO_DISABLE={disabled}: first calls took {seconds:.2f} s\n")
    for (tokens, logps), (other_tokens, other_logps) in zip(*answers.values(), strict=True):
        assert tokens == other_tokens
        np.testing.assert_allclose(logps, other_logps, rtol=0, atol=1e-6)  # one ulp at 8
