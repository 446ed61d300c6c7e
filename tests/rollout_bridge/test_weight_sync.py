"""Pushes: what the engine computes afterwards, how much memory they take, what is refused."""

import json
import os
import sys
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
from tiny_qwen2 import (
    HIDDEN,
    LOGP_ATOL,
    VOCAB,
    assert_same,
    child,
    fresh_prompt,
    greedy,
    hf_logps,
    hf_model,
    named_weights,
    sample,
    save_checkpoint,
)

import rollout_bridge
from rollout_bridge import weight_sync

MIB = 2**20
SLACK_BYTES = 4 * MIB  # small arrays, Python's own; measured: under 1 MiB


def prompts_of_all_lengths():
    return [fresh_prompt(n) for n in (6, 40, 129, 300)]


def test_after_a_push_greedy_equals_a_fresh_engine(engine, head, checkpoints, make_engine):
    prompts = prompts_of_all_lengths()
    old = greedy(engine, prompts)
    new = greedy(make_engine("inline", head, 1), prompts)
    assert all(a != b for a, b in zip(old, new, strict=True))
    for version, want in ((1, new), (0, old), (1, new)):
        engine.sync(named_weights(checkpoints[head, version]), version=version)
        assert engine.version == version
        assert greedy(engine, prompts) == want


def test_after_a_push_logps_equal_transformers(engine, head, checkpoints):
    engine.sync(named_weights(checkpoints[head, 1]), version=1)
    model, prompt = hf_model(checkpoints[head, 1]), fresh_prompt(140)
    for answer in sample(engine, [prompt], temperature=0.7)[0]:
        want = hf_logps(model, prompt, answer.tokens, 0.7)
        np.testing.assert_allclose(answer.logps, want, rtol=0, atol=LOGP_ATOL)


def test_jax_arrays_can_be_pushed_and_deleted(engine, head, checkpoints, make_engine):
    prompts = prompts_of_all_lengths()
    mesh = jax.make_mesh((8,), ("x",))
    places = [
        jax.NamedSharding(mesh, jax.P()),
        jax.NamedSharding(mesh, jax.P("x")),
        jax.devices()[2],
    ]
    arrays = [
        (name, jax.device_put(x, places[i % 3]))
        for i, (name, x) in enumerate(named_weights(checkpoints[head, 1]))
    ]
    engine.sync(arrays, version=1)
    for _, array in arrays:
        array.delete()
    assert greedy(engine, prompts) == greedy(make_engine("inline", head, 1), prompts)


def test_bfloat16_weights_are_read_as_their_numbers(engine, head, checkpoints):
    rounded = [(n, x.astype(ml_dtypes.bfloat16)) for n, x in named_weights(checkpoints[head, 1])]
    prompts = prompts_of_all_lengths()
    engine.sync([(n, x.astype(np.float32)) for n, x in rounded], version=1)
    want = sample(engine, prompts)
    engine.sync(named_weights(checkpoints[head, 0]), version=2)
    engine.sync(rounded, version=3)
    assert_same(sample(engine, prompts), want)


def test_without_the_reset_of_the_prefix_cache_old_keys_would_be_used(
    inline, checkpoints, make_engine
):
    prompts = [fresh_prompt(300) for _ in range(4)]
    greedy(inline, prompts)  # their first two blocks are cached now
    want = greedy(make_engine("inline", "tied", 1), prompts)
    inline._llm.start_weight_update()
    for layer in weight_sync.layers(
        named_weights(checkpoints["tied", 1]), inline.shapes, target=inline.name
    ):
        inline.load(layer)
    inline._llm.finish_weight_update()
    inline._push = "none"
    assert greedy(inline, prompts) != want
    inline.sync(named_weights(checkpoints["tied", 1]), version=1)
    assert greedy(inline, prompts) == want


def test_one_push_reaches_every_replica(inline, checkpoints, make_engine):
    prompts = prompts_of_all_lengths()
    other = make_engine("inline", "tied", 1)
    rollout_bridge.sync_all([inline, other], iter(named_weights(checkpoints["tied", 0])), version=5)
    assert (inline.version, other.version) == (5, 5)
    want = greedy(inline, prompts)
    assert greedy(other, prompts) == want
    rollout_bridge.sync_all([inline, other], iter(named_weights(checkpoints["tied", 1])), version=1)
    assert greedy(other, prompts) == greedy(inline, prompts) != want


def test_one_layer_of_the_stream_is_alive_at_a_time(engine, head, checkpoints):
    arrays = []

    def stream():
        for name, x in named_weights(checkpoints[head, 1]):
            alive = {layer_of(n) for n, array in arrays if array() is not None}
            assert alive <= {layer_of(name)}, f"{alive} still alive when {name} is made"
            x = x.copy()
            arrays.append((name, weakref.ref(x)))
            yield name, x
            del x

    engine.sync(stream(), version=1)
    assert all(array() is None for _, array in arrays)


def layer_of(name: str) -> str:
    """What Qwen2 calls a layer; written out, not taken from the code under test."""
    parts = name.split(".")
    return parts[2] if parts[1] == "layers" else name


BAD_PUSHES = {
    "unknown": (
        lambda w: [*w[:5], ("model.layers.9.mlp.up_proj.weight", w[0][1]), *w[5:]],
        "9.mlp",
    ),
    "near": (
        lambda w: [("model.embed_token.weight", w[0][1]), *w[1:]],
        "model.embed_tokens.weight",
    ),
    "doubled": (lambda w: [*w[:3], w[2], *w[3:]], "q_proj.bias was pushed twice"),
    "doubled at the end": (lambda w: [*w, w[4]], r"was pushed twice"),
    "misshapen": (lambda w: [(n, x[:-1] if n == "model.norm.weight" else x) for n, x in w], "norm"),
    "of integers": (lambda w: [(w[0][0], w[0][1].astype(int)), *w[1:]], "embed.*int64.*bfloat16"),
    "without the head": (lambda w: w[:-1], r"lacks 1 weights .*lm_head\.weight"),
    "without a norm": (
        lambda w: [i for i in w if i[0] != "model.norm.weight"],
        "model.norm.weight",
    ),
    "without one of a layer": (
        lambda w: [i for i in w if i[0] != "model.layers.1.mlp.down_proj.weight"],
        r"model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "in pieces": (lambda w: [*w[:2], *w[20:25], *w[2:20], *w[25:]], "send a layer whole"),
    "of nothing": (lambda w: [], "lacks 39 weights"),
}


@pytest.mark.parametrize("case", BAD_PUSHES)
def test_a_bad_list_is_refused_by_name_before_anything_is_sent(inline, checkpoints, case):
    change, message = BAD_PUSHES[case]
    prompts = prompts_of_all_lengths()[:1]
    want = greedy(inline, prompts)
    with pytest.raises(ValueError, match=message):
        inline.sync(change(named_weights(checkpoints["tied", 1])), version=1)
    assert inline.version == 0
    assert greedy(inline, prompts) == want


@pytest.mark.parametrize("case", ["unknown", "misshapen", "without a norm"])
def test_a_bad_stream_leaves_an_engine_that_refuses_until_the_next_push(
    inline, checkpoints, make_engine, case
):
    change, message = BAD_PUSHES[case]
    with pytest.raises(ValueError, match=message):
        inline.sync(iter(change(named_weights(checkpoints["tied", 1]))), version=1)
    check_recovers(inline, "tied", checkpoints, make_engine)


@pytest.mark.parametrize("num_sent", [0, 13, 38])
def test_a_push_that_broke_off_makes_generate_refuse_until_the_next(
    engine, head, checkpoints, make_engine, num_sent
):
    def stream():
        yield from named_weights(checkpoints[head, 1])[:num_sent]
        raise OSError("the learner's disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        engine.sync(stream(), version=1)
    check_recovers(engine, head, checkpoints, make_engine)


def check_recovers(engine, head, checkpoints, make_engine):
    prompts = prompts_of_all_lengths()[:2]
    assert engine.version is None
    with pytest.raises(RuntimeError, match="broke off"):
        greedy(engine, prompts)
    engine.sync(named_weights(checkpoints[head, 1]), version=1)
    assert greedy(engine, prompts) == greedy(make_engine("inline", head, 1), prompts)


def test_expected_shapes_name_every_weight(checkpoints):
    for head in ("tied", "untied"):
        want = {name: x.shape for name, x in named_weights(checkpoints[head, 0])}
        assert weight_sync.expected_shapes(checkpoints[head, 0]) == want
        assert want["lm_head.weight"] == (VOCAB, HIDDEN)


def test_the_rates_that_older_files_hold_are_not_expected(checkpoints, tmp_path):
    """Llama-2's; no engine loads them, and a push has none."""
    state = safetensors.torch.load_file(checkpoints["untied", 0] / "model.safetensors")
    rates = {"model.layers.0.self_attn.rotary_emb.inv_freq": state["model.norm.weight"].clone()}
    safetensors.torch.save_file(state | rates, tmp_path / "model.safetensors")
    want = weight_sync.expected_shapes(checkpoints["untied", 0])
    assert weight_sync.expected_shapes(tmp_path) == want


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no"):
        weight_sync.expected_shapes(tmp_path)


def test_a_shared_file_carries_arrays_and_has_no_name():
    arrays = [
        np.arange(6, dtype=np.int32).reshape(2, 3),
        np.arange(4).astype(ml_dtypes.bfloat16),
        np.asfortranarray(np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)),
        jnp.arange(3.0),
    ]
    shared = weight_sync.SharedFile()
    rows = shared.write(arrays)
    for got, want in zip(weight_sync.read(shared.path, rows), arrays, strict=True):
        assert got.dtype == want.dtype
        assert not got.flags.writeable
        assert got.ctypes.data % 64 == 0
        np.testing.assert_array_equal(got, want)
    del got
    shared.clear()
    assert os.stat(shared.path).st_size == 0
    ((got,),) = [weight_sync.read(shared.path, shared.write([np.ones(3)]))]
    assert got.tolist() == [1, 1, 1]
    shared.close()
    assert not Path(shared.path).exists()


MEMORY_OF_A_PUSH = """
import gc, json, sys
import numpy as np
from longrl_jax.config import RolloutConfig
from longrl_jax.platform import prepare_vllm
cfg = RolloutConfig(dtype="float32", max_model_len=4096, kv_cache_gib=0.5)
prepare_vllm(cfg)
from rollout_bridge.vllm_engine import VllmEngine

def rss(field):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))

def peak(call):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # VmHWM starts again
    before = rss("VmRSS")
    call()
    return rss("VmHWM") - before

engine = VllmEngine(sys.argv[1], cfg=cfg, seed=0)
layer_bytes = {}
for name, shape in engine.shapes.items():
    key = name.split(".")[2] if ".layers." in name else name
    layer_bytes[key] = layer_bytes.get(key, 0) + 4 * int(np.prod(shape))

def stream():
    for name in sorted(engine.shapes):
        yield name, np.ones(engine.shapes[name], np.float32)

def push():
    engine.sync(stream(), version=1)

def generate(prompt):
    engine.generate([prompt], num_samples=4, temperature=1.0, max_tokens=2, seeds=[0])

hidden, vocab = engine.hidden_and_vocab
P = 4000
tokens = np.arange(P) % vocab
rng = np.random.default_rng(0)
prompts = [rng.normal(size=(P, hidden)).astype(np.float32) for _ in range(3)]
generate(tokens); generate(prompts[0])  # what is allocated once
out = {"model": sum(layer_bytes.values()), "layer": max(layer_bytes.values())}
out["matrix"] = max(4 * int(np.prod(shape)) for shape in engine.shapes.values())
push()
out["push"] = max(peak(push) for _ in range(3))
out["prompt"] = prompts[0].nbytes
out["tokens"] = peak(lambda: generate(tokens[::-1].copy()))
out["embeddings"] = max(peak(lambda p=p: generate(p)) for p in prompts[1:])
print(json.dumps(out))
engine.close()
"""


@pytest.mark.slow
def test_memory_of_a_push_and_of_an_embedded_prompt(tmp_path):
    """Peak resident memory over that before the call, in a process of its own.

    A push may add the layer that the stream holds, and one matrix twice: as vLLM reads it and as it
    packs it for the CPU. A prompt as embeddings may add nothing to what it takes as tokens: the one
    copy goes into a buffer that vLLM has from the start.
    """
    folder = save_checkpoint(
        tmp_path / "big",
        tied=True,
        seed=0,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=6,
        num_attention_heads=12,
        num_key_value_heads=4,
        vocab_size=8000,
        max_position_embeddings=4096,
    )
    exact = {"MALLOC_MMAP_THRESHOLD_": str(2**18)}  # freed arrays go back to the kernel at once
    done = child(MEMORY_OF_A_PUSH, folder, env=exact)
    assert done.returncode == 0, done.stderr
    got = json.loads(done.stdout.splitlines()[-1])
    sys.stdout.write(f"{ {name: f'{value / MIB:.1f} MiB' for name, value in got.items()} }\n")
    assert got["model"] > 5 * got["layer"]
    assert 0 < got["push"] < got["layer"] + 2 * got["matrix"] + SLACK_BYTES
    assert abs(got["embeddings"] - got["tokens"]) < SLACK_BYTES < got["prompt"] / 2
