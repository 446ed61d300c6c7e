"""Every full size by shape: the published number of parameters, names and shapes of transformers.

The configs hold what the published config.json files say (fields that change no shape left out).
"""

import math

import pytest
import torch
import transformers
from flax import nnx

from longrl_jax import models
from longrl_jax.models import decoder


def qwen2_5(width, mlp, layers, heads, kv_heads, *, vocab=152_064, tied=False):
    return {
        "model_type": "qwen2",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def qwen3(width, mlp, layers, heads, *, tied=False):
    return qwen2_5(width, mlp, layers, heads, 8, vocab=151_936, tied=tied) | {
        "model_type": "qwen3",
        "head_dim": 128,
        "attention_bias": False,
        "rope_scaling": None,
    }


def llama(vocab, width, mlp, layers, heads, kv_heads, *, tied=False, theta=1e4):
    return {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": 1e-5,
        "rope_theta": theta,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "pretraining_tp": 1,
    }


SMALL = {"vocab": 151_936, "tied": True}
LLAMA3_ROPE = {
    "factor": 32.0,
    "high_freq_factor": 4.0,
    "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
PUBLISHED = {
    "Qwen2.5-0.5B": (qwen2_5(896, 4864, 24, 14, 2, **SMALL), 494_032_768),
    "Qwen2.5-1.5B": (qwen2_5(1536, 8960, 28, 12, 2, **SMALL), 1_543_714_304),
    "Qwen2.5-3B": (qwen2_5(2048, 11_008, 36, 16, 2, **SMALL), 3_085_938_688),
    "Qwen2.5-7B": (qwen2_5(3584, 18_944, 28, 28, 4), 7_615_616_512),
    "Qwen2.5-14B": (qwen2_5(5120, 13_824, 48, 40, 8), 14_770_033_664),
    "Qwen2.5-32B": (qwen2_5(5120, 27_648, 64, 40, 8), 32_763_876_352),
    "Qwen2.5-72B": (qwen2_5(8192, 29_568, 80, 64, 8), 72_706_203_648),
    "Qwen3-0.6B": (qwen3(1024, 3072, 28, 16, tied=True), 596_049_920),
    "Qwen3-1.7B": (qwen3(2048, 6144, 28, 16, tied=True), 1_720_574_976),
    "Qwen3-4B": (qwen3(2560, 9728, 36, 32, tied=True), 4_022_468_096),
    "Qwen3-8B": (qwen3(4096, 12_288, 36, 32), 8_190_735_360),
    "Qwen3-14B": (qwen3(5120, 17_408, 40, 40), 14_768_307_200),
    "Qwen3-32B": (qwen3(5120, 25_600, 64, 64), 32_762_123_264),
    "Llama-2-7b": (llama(32_000, 4096, 11_008, 32, 32, 32), 6_738_415_616),
    "Llama-2-13b": (llama(32_000, 5120, 13_824, 40, 40, 40), 13_015_864_320),
    "Llama-3-8B": (llama(128_256, 4096, 14_336, 32, 32, 8, theta=5e5), 8_030_261_248),
    "Llama-3.2-1B": (
        llama(128_256, 2048, 8192, 16, 32, 8, theta=5e5, tied=True)
        | {"head_dim": 64, "rope_scaling": LLAMA3_ROPE},
        1_235_814_400,
    ),
    "SmolLM2-135M": (llama(49_152, 576, 1536, 30, 9, 3, theta=1e5, tied=True), 134_515_008),
}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}
NUM_CHECKED_LAYERS = 2
"""Of transformers; the others have the same names and shapes, and would take minutes to make."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_has_the_published_parameters(name):
    tree, num_parameters = PUBLISHED[name]
    cfg = decoder.parse_config(tree, where=name)
    arrays = models.arrays_of(nnx.eval_shape(lambda: decoder.Model(cfg, rngs=nnx.Rngs(0))))
    assert sum(math.prod(x.shape) for x in arrays.values()) == num_parameters
    layers = tree["num_hidden_layers"]
    ours = {}
    for path, row in decoder.table(cfg).items():
        shape = arrays[path].shape
        if "{i}" in row.hf:
            assert shape[0] == layers
            shape = shape[1:]
        if row.transpose is not None:
            shape = shape[::-1]
        for i in range(NUM_CHECKED_LAYERS):
            ours[row.hf.format(i=i)] = shape
        if row.copy:
            ours[row.copy] = shape
    assert ours == names_in_transformers(tree | {"num_hidden_layers": NUM_CHECKED_LAYERS})


def names_in_transformers(tree):
    kind = CLASSES[tree["model_type"]]
    config = getattr(transformers, f"{kind}Config").from_dict(tree)
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}
