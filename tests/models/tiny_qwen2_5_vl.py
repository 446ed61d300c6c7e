"""Tiny random Qwen2.5-VL models of `transformers`, and folders in the layout of published ones."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from tiny_models import randomize
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VisionTransformerPretrainedModel,
)

PATCH, UNIT, TOKEN_PX = 4, 2, 8
"""Sizes of the tiny tower; its windows are 4 x 4 patches."""
IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}
VISION: dict[str, Any] = {
    "depth": 4,
    "hidden_size": 32,
    "hidden_act": "silu",
    "intermediate_size": 44,
    "num_heads": 2,
    "in_channels": 3,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": UNIT,
    "tokens_per_second": 2,
    "window_size": 16,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1, 3],
}
TEXT: dict[str, Any] = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-4,  # no default, so that a config that is not read shows
    "hidden_act": "silu",
    "use_sliding_window": False,
}
ROPE = {"rope_theta": 3e3, "sections": [4, 6, 6]}


def make_tower(seed: int = 0, **changed: Any) -> Qwen2_5_VisionTransformerPretrainedModel:
    torch.set_num_threads(1)
    config = transformers.models.qwen2_5_vl.Qwen2_5_VLVisionConfig(**VISION | changed)
    config._attn_implementation = "eager"
    return randomize(Qwen2_5_VisionTransformerPretrainedModel(config), seed)


def make_qwen2_5_vl(*, tied: bool = False, seed: int = 0) -> Any:
    torch.set_num_threads(1)
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT
        | {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": ROPE["rope_theta"],
                "mrope_section": ROPE["sections"],
            }
        },
        vision_config=VISION,
        tie_word_embeddings=tied,
        attn_implementation="eager",
        **IDS,
    )
    return randomize(transformers.Qwen2_5_VLForConditionalGeneration(config), seed)


def published_name(name: str) -> str:
    """The name of a tensor in published folders; transformers calls it otherwise since 4.52."""
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


def published_config(*, tied: bool) -> dict[str, Any]:
    """config.json as published: the language model's fields at the top, RoPE of type mrope."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **IDS,
        **TEXT,
        "rope_theta": ROPE["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": ROPE["sections"]},
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vision_config": VISION | {"model_type": "qwen2_5_vl"},
    }


def write_qwen2_5_vl(
    folder: Path, *, tied: bool = False, bfloat16: tuple[str, ...] = (), seed: int = 0
) -> Any:
    """Writes a folder as published, with safetensors.torch (not with our writer).

    Tensors whose name contains one of `bfloat16` are stored in that type.
    """
    from safetensors.torch import save_file

    model = make_qwen2_5_vl(tied=tied, seed=seed)
    state = {
        published_name(name): x.detach().contiguous().clone()
        for name, x in model.state_dict().items()
        if not (tied and name == "lm_head.weight")
    }
    for name in state:
        if any(part in name for part in bfloat16):
            state[name] = state[name].to(torch.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(published_config(tied=tied)))
    return model


def their_patches(pixels: np.ndarray, patch_size: int = PATCH) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels [F, Y, X, 3] as their tower takes them: (rows of one patch each, grid [[t, y, x]])."""
    processor = transformers.Qwen2VLVideoProcessor(
        patch_size=patch_size, merge_size=2, temporal_patch_size=UNIT
    )
    rows, *grid = processor.patchify(
        torch.tensor(pixels).permute(0, 3, 1, 2)[None].contiguous(),
        patch_size=patch_size,
        merge_size=2,
        temporal_patch_size=UNIT,
    )
    return rows[0], torch.tensor([grid])
