"""Every published size of the VILA family by names, shapes and count, and its tokens a picture.

VILA1.5-3b and NVILA-8B are as in their published config.json (fields that change nothing left
out); the others are put together from the sizes of their language models and from the settings of
NVlabs/VILA's training scripts and the model cards. The witnesses are transformers' language models
and tower and the torch twin of the projector.
"""

import math

import pytest
import torch
import transformers
from flax import nnx
from test_published import NUM_CHECKED_LAYERS, llama, names_in_transformers, qwen2_5
from tiny_models import make_projector

from longrl_jax import models
from longrl_jax.models import siglip, vila

TOWER_WIDTH = 1152
QWEN2_7B = qwen2_5(3584, 18_944, 28, 28, 4, vocab=151_651)
NVILA = {
    "dynamic_s2": True,
    "s2": False,
    "s2_scales": "448,896,1344",
    "s2_max_split_size": 448,
    "s2_resize_output_to_scale_idx": -1,
    "image_aspect_ratio": "dynamic_s2",
    "image_encoder": '{"_target_": "llava.model.encoders.BasicImageEncoder"}',
    "video_encoder": '{"_target_": "llava.model.encoders.BasicVideoEncoder"}',
    "num_video_frames": 8,
    "fps": 0.0,
}
S2 = {"s2": True, "s2_scales": "384,768,1152", "s2_max_split_size": 384}
PUBLISHED = {  # name -> (language model, px, projector, what the top says, tokens of a frame)
    "VILA1.5-3b": (
        llama(32_000, 2560, 6912, 32, 20, 20), 384, "mlp_downsample",
        {"s2": False, "s2_scales": "336,672,1008", "s2_max_split_size": 336}, 14**2,
    ),
    "VILA1.5-3b-s2": (llama(32_000, 2560, 6912, 32, 20, 20), 384, "mlp_downsample", S2, 14**2),
    "Llama-3-VILA1.5-8b": (
        llama(128_256, 4096, 14_336, 32, 32, 8, theta=5e5), 384, "mlp_downsample", {}, 14**2,
    ),
    "VILA1.5-13b": (llama(32_000, 5120, 13_824, 40, 40, 40), 384, "mlp_downsample", {}, 14**2),
    "NVILA-8B": (
        qwen2_5(3584, 18_944, 28, 28, 4, vocab=151_648), 448, "mlp_downsample", NVILA, 16**2,
    ),
    "NVILA-Lite-2B": (
        qwen2_5(1536, 8960, 28, 12, 2, vocab=151_648, tied=True), 448, "mlp_downsample_3x3_fix",
        {"image_aspect_ratio": "dynamic", "num_video_frames": 8}, 11**2,
    ),
    "LongVILA-7B-256f": (
        QWEN2_7B, 448, "mlp_downsample_2x2_fix", {"num_video_frames": 256, "fps": 2.0}, 16**2,
    ),
    "LongVILA-7B-1M": (QWEN2_7B, 384, "mlp_downsample", {"num_video_frames": 2048}, 14**2),
    "LongVILA-R1-7B": (
        QWEN2_7B, 448, "mlp_downsample_2x2_fix",
        {
            "model_type": "vila",
            "video_encoder": '{"_target_": "llava.model.encoders.TSPVideoEncoder"}',
            "num_video_frames": 512,
            "fps": 2.0,
        },
        16**2,
    ),
}  # fmt: skip


def tower(px: int) -> dict:
    return {
        "model_type": "siglip_vision_model",
        "image_size": px,
        "patch_size": 14,
        "num_channels": 3,
        "hidden_size": TOWER_WIDTH,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "hidden_act": "gelu_pytorch_tanh",
        "layer_norm_eps": 1e-6,
    }


def config_json(name: str) -> dict:
    llm, px, kind, top, _ = PUBLISHED[name]
    return {
        "model_type": "llava_llama",
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "cls_patch",
        "image_aspect_ratio": "resize",
        "vision_resolution": -1,
        "interpolate_mode": "linear",
        "llm_cfg": llm,
        "vision_tower_cfg": tower(px),
        "mm_projector_cfg": {"model_type": "v2l_projector", "mm_projector_type": kind},
    } | top


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_has_the_published_tensors_and_tokens(name):
    tree = config_json(name)
    cfg = vila.parse_config(tree, where=name)
    rows, columns = vila.media_layout(cfg).grid
    assert rows * columns == PUBLISHED[name][-1]
    arrays = models.arrays_of(nnx.eval_shape(lambda: vila.Model(cfg, rngs=nnx.Rngs(0))))
    ours, count = {}, 0
    for path, row in vila.table(cfg).items():
        shape = arrays[path].shape
        count += math.prod(shape)
        num_layers, shape = (shape[0], shape[1:]) if "{i}" in row.hf else (1, shape)
        if row.transpose is not None:
            shape = tuple(shape[row.transpose.index(i)] for i in range(len(shape)))
        for i in range(min(num_layers, NUM_CHECKED_LAYERS)):
            ours[row.hf.format(i=i)] = shape
        if row.copy:
            ours[row.copy] = shape
    wanted, num_wanted = tensors_of(tree, num_scales=3 if cfg.scales else 1)
    assert ours == wanted
    assert count == num_wanted


def tensors_of(tree: dict, *, num_scales: int) -> tuple[dict, int]:
    """Names and shapes of the first layers, and the number of parameters of all."""
    llm, vision = tree["llm_cfg"], tree["vision_tower_cfg"]
    text = names_in_transformers(llm | {"num_hidden_layers": NUM_CHECKED_LAYERS})
    count = numbers(text, llm["num_hidden_layers"])
    count -= text["lm_head.weight"][0] * text["lm_head.weight"][1] * llm["tie_word_embeddings"]
    kind = tree["mm_projector_cfg"]["mm_projector_type"]
    with torch.device("meta"):
        part = vision | {"num_hidden_layers": NUM_CHECKED_LAYERS, "vision_use_head": False}
        seen = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**part))
        twin = make_projector(kind, num_scales * TOWER_WIDTH, llm["hidden_size"], seed=None)
    eyes = {n.removeprefix("vision_model."): tuple(x.shape) for n, x in seen.state_dict().items()}
    joint = {n: tuple(x.shape) for n, x in twin.state_dict().items()}
    count += numbers(eyes, vision["num_hidden_layers"]) + numbers(joint, 0)
    start = f"vision_tower/{siglip.PUBLISHED_PREFIX}"
    named = {"llm/": text, start: eyes, "mm_projector/": joint}
    return {f"{at}{n}": shape for at, part in named.items() for n, shape in part.items()}, count


def numbers(shapes: dict, num_layers: int) -> int:
    """Parameters, where the checked layers stand for num_layers."""
    layers = sum(math.prod(s) for n, s in shapes.items() if "layers." in n and n[0] != "l")
    if not num_layers:
        return sum(math.prod(s) for s in shapes.values())
    others = sum(math.prod(s) for s in shapes.values()) - layers
    assert layers % NUM_CHECKED_LAYERS == 0
    return others + layers // NUM_CHECKED_LAYERS * num_layers


@pytest.mark.parametrize(
    ("num_frames", "tokens"),
    [(256, 16_448), (512, 16_448), (1024, 16_448), (2048, 16_448), (8192, 65_792)],
)
def test_longvila_r1_pools_a_film_by_its_length(num_frames, tokens):
    cfg = vila.parse_config(config_json("LongVILA-R1-7B"), where="here")
    ((t, h, w),) = vila.pools_of(num_frames, cfg.pools)
    rows, columns = cfg.grid
    assert num_frames % t == 0
    assert num_frames // t * (rows // h * (columns // w) + 1) == tokens  # 1: "\n"


@pytest.mark.parametrize(
    ("num_frames", "pool"), [(1, 4), (257, 8), (513, 16), (1025, 32), (4096, 32)]
)
def test_pools_of_longvila_r1_between_the_published_lengths(num_frames, pool):
    assert vila.pools_of(num_frames, ()) == ((pool, 1, 1),)
