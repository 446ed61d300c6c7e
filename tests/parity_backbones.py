"""Tiny random checkpoints of every backbone, in the published layout, and prompts to ask them.

The language models have heads that vLLM takes on a CPU. A new backbone is a row of BACKBONES.
"""

import copy
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file
from tiny_models import LLAMA3

from longrl_jax import convert, models
from longrl_jax.data import prompts
from longrl_jax.types import Example, Media, MediaLayout, Prompt, View
from rollout_bridge import EngineMedia, MediaPrompt

ROOT = Path(__file__).parents[1]
SCALE = 0.15  # of random numbers: states and logits of order 1 to 10
TEXT: dict[str, Any] = {
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-4,  # no default, as theta, so that a config that is not read shows
    "rope_theta": 3e3,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def text(name: str, **changes: Any) -> dict[str, Any]:
    """config.json of a text-only model; name: as transformers begins its classes."""
    return {"model_type": name.lower(), "architectures": [f"{name}ForCausalLM"], **TEXT} | changes


def vila(llm: dict[str, Any], projector: str, **changes: Any) -> dict[str, Any]:
    """config.json of a VILA, with those of its parts; frames of 4 x 4 patches."""
    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text())
    tower = {"image_size": 32, "patch_size": 8, "hidden_size": 48, "intermediate_size": 96}
    tree["vision_tower_cfg"] |= tower | {"num_hidden_layers": 3, "layer_norm_eps": 1e-4}
    tree["mm_projector_cfg"]["mm_projector_type"] = projector
    return tree | {"llm_cfg": llm} | changes


def qwen2_5_vl(**changes: Any) -> dict[str, Any]:
    """config.json of a Qwen2.5-VL of two layers."""
    tree = json.loads((ROOT / "configs/models/tiny_qwen2_5_vl.json").read_text())
    tree |= {"num_hidden_layers": 2, "rms_norm_eps": 1e-4, "rope_theta": 3e3}
    tree["vision_config"] |= {"depth": 2, "fullatt_block_indexes": [1]}
    return tree | changes


S2 = {"s2": True, "s2_scales": "32,64", "s2_max_split_size": 32}
NVILA = {
    "dynamic_s2": True,
    "s2_scales": "32,64",
    "s2_resize_output_to_scale_idx": -1,
    "image_aspect_ratio": "dynamic_s2",
    "max_tiles": 6,
    "video_encoder": {
        "_target_": "llava.model.encoders.TSPVideoEncoder",
        "pool_sizes": [[4, 1, 1]],
        "start_tokens": "t",
    },
}
BACKBONES: dict[str, dict[str, Any]] = {
    "Qwen2": text("Qwen2"),
    "Qwen2, tied head": text("Qwen2", tie_word_embeddings=True),
    "Qwen3": text("Qwen3", head_dim=64),
    "Llama": text("Llama"),
    "Llama, Llama-3 rotation": text("Llama", rope_scaling=LLAMA3),
    "VILA: Qwen2, 2x2": vila(text("Qwen2"), "mlp_downsample_2x2_fix"),
    "VILA: Llama, 3x3": vila(text("Llama"), "mlp_downsample_3x3_fix"),
    "VILA: Llama, 2x2, S2": vila(text("Llama"), "mlp_downsample", **S2),
    "NVILA: Qwen2, dynamic S2, TSP": vila(text("Qwen2"), "mlp_downsample_3x3_s2", **NVILA),
    "Qwen2.5-VL": qwen2_5_vl(),
}
"""Name -> config.json."""


def write(name: str, folder: Path, *, seed: int = 0, corpus: Path | None = None) -> Path:
    """Makes the folder with tokenizer and all, then gives every tensor random numbers (norms around
    1), so that no bias or scale is trivial; some of them in bfloat16.

    corpus: what the tokenizer learns from.
    """
    tree = copy.deepcopy(BACKBONES[name])
    config_json = folder.with_suffix(".json")
    config_json.parent.mkdir(parents=True, exist_ok=True)
    config_json.write_text(json.dumps(tree))
    convert.init(config_json, folder, corpus=corpus)
    config_json.unlink()
    rng = np.random.default_rng(seed)
    for path in sorted(folder.rglob("*.safetensors")):
        tensors = load_file(path)
        for tensor, x in tensors.items():
            is_scale = x.ndim == 1 and tensor.endswith("weight")
            dtype = ml_dtypes.bfloat16 if "up_proj" in tensor else x.dtype
            tensors[tensor] = (rng.normal(size=x.shape) * SCALE + is_scale).astype(dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return folder


@dataclasses.dataclass(frozen=True)
class Asked:
    """A prompt and the pictures of its media."""

    prompt: Prompt
    frames: tuple[np.ndarray, ...]
    """uint8 [F, Y, X, 3] each, as the model's encode takes them."""


World = Sequence[tuple[str, tuple[int, int, int], float]]
"""Kind, size and seconds a unit of every medium. Size: Qwen2.5-VL's grid in tokens; else frames and
pixels of the file."""


class Questions:
    """Prompts for a checkpoint: words alone and, where it has a tower, images and films."""

    def __init__(self, folder: Path, cfg: Any, *, seed: int = 0):
        self.rng = np.random.default_rng(seed)
        self.layout: MediaLayout | None = models.backbone_of(folder).media_layout(cfg)
        self.tokenizer = prompts.load_tokenizer(models.llm_folder(folder))
        self.banned = tuple(prompts.media_token_ids(self.tokenizer))
        self.ids = self.tokenizer.get_vocab()
        first = max(self.ids[token] for token in self.tokenizer.all_special_tokens) + 1
        self.words = np.setdiff1d(np.arange(first, len(self.ids)), self.banned)

    def ask(self) -> list[Asked]:
        """Words alone, twice; with media where the backbone takes any."""
        worlds: list[World] = [[], []]
        if self.layout is not None and self.layout.media_apart:
            worlds[1:] = [
                [("image", (1, 2, 3), 1.0)],
                [("video", (3, 2, 2), 1.5), ("image", (1, 1, 2), 1.0)],
            ]
        elif self.layout is not None:
            worlds[1:] = [[("video", (8, 30, 50), 1.0)], [("image", (1, 320, 480), 1.0)]]
        return [self.lay_out(world) for world in worlds]

    def lay_out(self, world: World) -> Asked:
        tokens = self.some_words(40)
        media: list[Media] = []
        is_media = [False] * len(tokens)
        for kind, size, unit_s in world:
            view, units = self._view(kind, size)
            pieces = self._pieces(kind, view, units)
            offset = len(tokens) + [at for _, at in pieces].index(True)
            media.append(
                Media(
                    kind=kind,
                    path="",
                    key=str(self.rng.integers(2**40)),
                    grid=(units, *view.grid),
                    view=view,
                    times_s=(),
                    num_tokens=units * math.prod(view.grid),
                    offset=offset,
                    unit_s=unit_s,
                )  # fmt: skip
            )
            pieces += [(word, False) for word in self.some_words(5)]
            tokens += [token for token, _ in pieces]
            is_media += [at for _, at in pieces]
        rope_pos, following = np.arange(len(tokens), dtype=np.int32), len(tokens)
        if self.layout is not None and self.layout.positions is not None:
            rope_pos, following = self.layout.positions(len(tokens), media)
        prompt = Prompt(
            example=Example(id="q", question="", answer=""), tokens=np.array(tokens, np.int32),
            is_media=np.array(is_media), rope_pos=rope_pos, next_rope_pos=following,
            media=tuple(media),
        )  # fmt: skip
        return Asked(prompt, tuple(self._frames(m) for m in media))

    def some_words(self, count: int) -> list[int]:
        return self.rng.choice(self.words, count).tolist()

    def _view(self, kind: str, size: tuple[int, int, int]) -> tuple[View, int]:
        """What the tower gets, and how many units of it."""
        first, *rest = size
        if self.layout.media_apart:
            grid = tuple(rest)
            px = tuple(n * side for n, side in zip(grid, self.layout.image_size, strict=True))
            return View(size=px, grid=grid, unit_frames=self.layout.unit_frames), first
        if kind == "image":
            return self.layout.image(*rest), 1
        view = self.layout.video(*rest, first)
        return view, first // view.unit_frames

    def _pieces(self, kind: str, view: View, units: int) -> list[tuple[int, bool]]:
        """(token, whether a feature stands there) of a medium: drawn as the papers draw them."""
        count = math.prod(view.grid)
        if self.layout.media_apart:
            token = self.ids["<|image_pad|>" if kind == "image" else "<|video_pad|>"]
            start, end = (self.ids[f"<|vision_{side}|>"] for side in ("start", "end"))
            return [(start, False), *[(token, True)] * (units * count), (end, False)]
        token = self.ids["<image>" if kind == "image" else "<vila/video>"]
        opening, closing = "" if kind == "image" else self.layout.opening, self.layout.separator
        before, after = (
            [(t, False) for t in self.tokenizer.encode(words)] for words in (opening, closing)
        )
        return [*before, *[(token, True)] * count, *after] * units

    def _frames(self, medium: Media) -> np.ndarray:
        view = medium.view
        count = view.inputs if medium.kind == "image" else medium.grid[0] * view.unit_frames
        frames = self.rng.integers(0, 256, (count, *view.size, 3), dtype=np.uint8)
        if medium.kind == "image" and not view.scales:
            frames[1:] = frames[:1]
        return frames


def as_media(prompt: Prompt, x_PD: np.ndarray) -> MediaPrompt:
    """What an engine gets that takes media apart: tokens, and the media's rows of x_PD."""
    media = [
        EngineMedia(
            kind=m.kind,
            offset=m.offset,
            grid=m.grid,
            unit_s=m.unit_s,
            features=x_PD[m.offset : m.offset + m.num_tokens].copy(),
        )
        for m in prompt.media
    ]
    return MediaPrompt(prompt.tokens, tuple(media))
