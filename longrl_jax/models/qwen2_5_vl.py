"""Qwen2.5-VL: a tower of any frame size, Qwen2 with positions in three dims, films and images.

Source: arXiv:2502.13923; transformers models/qwen2_5_vl. Two frames become grid h * w media tokens,
without separators; between <|vision_start|> and <|vision_end|> stand those of one medium.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from longrl_jax.models import decoder, hf_files
from longrl_jax.models import qwen2_5_vision as vision
from longrl_jax.models.weights import Param
from longrl_jax.sharding import attend, constrain
from longrl_jax.types import Media, MediaLayout, View

FOLDERS = ("",)
"""Sub-folders of a checkpoint that hold tensors."""
LLM_FOLDER = ""
"""Sub-folder that the engine opens: the whole checkpoint, whose tower it leaves out."""
IGNORED: tuple[str, ...] = ()
"""Patterns of tensor names that we neither use nor change."""
PUBLISHED, RENAMED = ("model.", "visual."), ("model.language_model.", "model.visual.")
"""How names of text and vision begin: in published folders; in transformers' memory since 4.52."""
TEXT_MODULE = RENAMED[0]
"""How names of the decoder begin inside transformers' model."""
TOKEN_IDS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}
"""Field of config.json -> token whose number it holds."""
IMAGE_PROCESSOR = "preprocessor_config.json"
PROCESSORS = ("video_preprocessor_config.json", IMAGE_PROCESSOR)
IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
"""OpenAI CLIP's, as published."""
MIN_PIXELS, MAX_PIXELS = 128 * 28 * 28, 768 * 28 * 28
"""Of a film's frame: transformers' Qwen2VLVideoProcessor and qwen-vl-utils."""
IMAGE_PIXELS = 4 * 28 * 28, 16384 * 28 * 28
"""Fewest and most of an image: published preprocessor_config.json."""
UNSAID_PIXELS = 4 * 28 * 28, 1280 * 28 * 28
"""The same where the file does not say them: transformers' Qwen2VLImageProcessor."""
MAX_ASPECT = 200
ENCODER_VERSION = 1
"""Raise it when the same weights and frames would give other features."""
STAGES = ("packed", "projected")
"""What can be stored of a unit: packed patch states, or what the merger makes of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The parts, and how their tensors are called."""

    text: decoder.Config
    vision: vision.Config
    prefixes: tuple[str, str] = dataclasses.field(compare=False)  # names make no other model
    """PUBLISHED or RENAMED."""
    image_pixels: tuple[int, int] = dataclasses.field(compare=False, default=IMAGE_PIXELS)
    """Fewest and most pixels of an image, as the checkpoint's processor says it."""


def read_config(folder: Path) -> Config:
    """Reads config.json and the processor's; what we cannot do is refused by name."""
    cfg = parse_config(hf_files.read_json(folder / "config.json"), where=str(folder))
    for name in PROCESSORS:
        if (folder / name).is_file():
            tree = hf_files.read_json(folder / name)
            _check_processor(tree, cfg.vision, where=f"{folder}/{name}")
            if name == IMAGE_PROCESSOR:
                pixels = _image_pixels(tree, where=f"{folder}/{name}")
                cfg = dataclasses.replace(cfg, image_pixels=pixels)
    if not list(folder.glob("*.safetensors")):
        return cfg
    renamed = any(name.startswith(RENAMED) for name in hf_files.open_tensors(folder))
    return dataclasses.replace(cfg, prefixes=RENAMED if renamed else PUBLISHED)


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns the object of a config.json into our record, with names as published.

    The language model's fields stand at its top (as published) or in text_config.
    """
    if (model_type := tree.get("model_type")) != "qwen2_5_vl":
        raise ValueError(f"{where}: model_type is {model_type!r}, this is 'qwen2_5_vl'")
    inner = hf_files.part(tree, "text_config", where) or tree
    rope = hf_files.part(inner, "rope_parameters", where)
    rope = rope or hf_files.part(inner, "rope_scaling", where)
    kind = rope.get("rope_type", rope.get("type", "mrope"))
    if kind not in ("mrope", "default"):
        raise ValueError(f"{where}: rope_type={kind!r} is not supported, only 'mrope' is")
    tied = tree.get("tie_word_embeddings") or inner.get("tie_word_embeddings", False)
    plain = {
        **inner,
        "model_type": "qwen2",
        "rope_theta": rope.get("rope_theta", inner.get("rope_theta", 1e6)),
        "rope_parameters": None,
        "rope_scaling": None,
        "tie_word_embeddings": tied,
    }
    text = decoder.parse_config(plain, where=where)
    tower = vision.parse_config(
        hf_files.part(tree, "vision_config", where), where=f"{where}: vision_config"
    )
    sections = rope.get("mrope_section")
    if not (
        isinstance(sections, list | tuple)
        and len(sections) == 3
        and all(isinstance(n, int) for n in sections)
        and sum(sections) == text.head_dim // 2
    ):
        raise ValueError(
            f"{where}: mrope_section={sections!r} must be three numbers that add up to half a "
            f"head, {text.head_dim // 2}"
        )
    if tower.width_out != text.width:
        raise ValueError(
            f"{where}: vision_config.out_hidden_size={tower.width_out} is not the language model's "
            f"hidden_size={text.width}"
        )
    rope_3d = dataclasses.replace(text.rope, sections=tuple(sections))
    text = dataclasses.replace(text, rope=rope_3d)
    return Config(text=text, vision=tower, prefixes=PUBLISHED)


class Model(nnx.Module):
    """Parts: text, vision, projector (the merger)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.text = decoder.Decoder(cfg.text, rngs=rngs)
        self.projector = vision.Merger(cfg.vision, rngs=rngs)
        self.vision = vision.Tower(cfg.vision, rngs=rngs)

    def encode(
        self,
        frames: UInt8[Array, "F Y X 3"],
        *,
        view: View | None = None,
        stage: str,
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "U n C"]:
        """Turns frames, two a unit, into rows of one media token each. An image is a unit of twice
        the same frame.

        view: what they are of, which changes nothing here. stage "packed": states of the last
        layer, merge x merge neighbours side by side; "projected": those through the merger.
        """
        _check_stage(stage)
        assert view is None or view.unit_frames == self.cfg.vision.unit_frames, f"{view} of others"
        mean, std = (np.array(x, np.float32) for x in (IMAGE_MEAN, IMAGE_STD))
        pixels = (frames.astype(jnp.float32) / 255 - mean) / std
        x_UnC = vision.pack(self.vision(pixels.astype(compute_dtype)), merge=self.cfg.vision.merge)
        if stage == "projected":
            x_UnC = self.projector(x_UnC)
        return constrain(x_UnC, "frames", None, None)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        is_media: Bool[Array, "B T"] | None = None,
        features: Float[Array, "B T C"] | None = None,
        *,
        stage: str = "packed",
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B T D"]:
        """Puts media features where is_media, the token table elsewhere (see vila.Model.embed)."""
        _check_stage(stage)
        x_BTD = self.text.embed(tokens, compute_dtype=compute_dtype)
        if features is None or is_media is None:
            return x_BTD
        media = jnp.where(is_media[..., None], features, 0).astype(compute_dtype)
        if stage == "packed":  # recomputed backwards: its states are 4 tower widths a token
            media = jax.checkpoint(lambda x: self.projector(x))(media)
        x_BTD = jnp.where(is_media[..., None], media, x_BTD)
        return constrain(x_BTD, "batch", "tokens", None)

    def hidden(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T 3"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        remat: str = "nothing",
        compute_dtype: DTypeLike = jnp.float32,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        """See decoder.Decoder.hidden; rope_pos: time, row and column (rope_positions)."""
        return self.text.hidden(
            x,
            rope_pos,
            order,
            branch,
            segment,
            remat=remat,
            compute_dtype=compute_dtype,
            attention=attention,
        )

    def head(self) -> Float[Array, "D V"]:
        """Returns the kernel that turns hidden states into logits."""
        return self.text.head()


def table(cfg: Config) -> dict[str, Param]:
    """Returns the row of every parameter."""
    text, visual = cfg.prefixes
    rows = {
        path: dataclasses.replace(row, hf=text + row.hf.removeprefix(PUBLISHED[0]))
        if row.hf.startswith(PUBLISHED[0])
        else row
        for path, row in decoder.table(cfg.text).items()
    }
    return {**rows, **vision.table(cfg.vision, hf=visual)}


def text_config(cfg: Config) -> decoder.Config:
    """Returns the decoder's part of a config."""
    return cfg.text


def media_layout(cfg: Config) -> MediaLayout:
    """Says what images and films become, so that prompts are laid out without the model."""
    side = cfg.vision.token_px
    return MediaLayout(
        image_size=(side, side),
        grid=(1, 1),
        media_token=TOKEN_IDS["video_token_id"],
        image_token=TOKEN_IDS["image_token_id"],
        separator="",
        around=(TOKEN_IDS["vision_start_token_id"], TOKEN_IDS["vision_end_token_id"]),
        unit_frames=cfg.vision.unit_frames,
        pixels=(MIN_PIXELS, MAX_PIXELS),
        image_pixels=cfg.image_pixels,
        resize=functools.partial(smart_resize, factor=side),
        positions=functools.partial(rope_positions, tokens_per_second=cfg.vision.tokens_per_second),
        media_apart=True,
    )


def smart_resize(
    height: int, width: int, min_pixels: int, max_pixels: int, *, factor: int
) -> tuple[int, int]:
    """Returns the size, in multiples of factor px, that a picture is resized to.

    Its area is within the bounds, its aspect about the same. Source: transformers
    image_processing_qwen2_vl.smart_resize (the same numbers).
    """
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise ValueError(
            f"pictures of {height} x {width} px are over {MAX_ASPECT} times as long as wide; cut "
            "them"
        )
    Y, X = round(height / factor) * factor, round(width / factor) * factor
    if max_pixels < Y * X:
        shrink = math.sqrt(height * width / max_pixels)
        Y = max(factor, math.floor(height / shrink / factor) * factor)
        X = max(factor, math.floor(width / shrink / factor) * factor)
    elif min_pixels > Y * X:
        grow = math.sqrt(min_pixels / (height * width))
        Y = math.ceil(height * grow / factor) * factor
        X = math.ceil(width * grow / factor) * factor
    return Y, X


def rope_positions(
    num_tokens: int, media: Sequence[Media], *, tokens_per_second: float
) -> tuple[Int[np.ndarray, "P 3"], int]:
    """Returns time, row and column of every token of a prompt, and where the next token stands.

    Text counts all three up; a medium starts where the text before it ends, and text goes on behind
    its largest number. Source: vLLM 0.32 Qwen2_5_VL get_mrope_input_positions, the original
    Qwen2.5-VL code and transformers up to 5.2: time is int(unit * seconds a unit *
    tokens_per_second), the seconds in float32. transformers 5.19 lets text go on behind the rows
    and columns of a *film* only (docs/parity.md); images and text are the same there.
    """
    pieces, used, following = [], 0, 0
    for medium in sorted(media, key=lambda m: m.offset):
        text = medium.offset - used
        pieces.append(np.repeat(following + np.arange(text)[:, None], 3, axis=1))
        index = np.indices(medium.grid).reshape(3, -1).T
        if medium.kind == "video":
            factor = float(np.float32(medium.unit_s)) * tokens_per_second
            index[:, 0] = (index[:, 0] * factor).astype(np.int64)
        pieces.append(following + text + index)
        following = int(pieces[-1].max()) + 1
        used = medium.offset + len(index)
    pieces.append(np.repeat(following + np.arange(num_tokens - used)[:, None], 3, axis=1))
    return np.concatenate(pieces).astype(np.int32), following + num_tokens - used


def processor_config(cfg: Config) -> dict[str, Any]:
    """Returns what a published preprocessor_config.json says, for a checkpoint of our own."""
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
        "min_pixels": cfg.image_pixels[0],
        "max_pixels": cfg.image_pixels[1],
        "patch_size": cfg.vision.patch_size,
        "temporal_patch_size": cfg.vision.unit_frames,
        "merge_size": cfg.vision.merge,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def feature_width(cfg: Config, stage: str) -> int:
    """Returns the width of a row that `encode` makes."""
    _check_stage(stage)
    return cfg.text.width if stage == "projected" else cfg.vision.width * cfg.vision.merge**2


def stage_identity(cfg: Config, stage: str) -> str:
    """Names all but weights that the numbers of `encode` depend on, for keys of stored features."""
    _check_stage(stage)
    return repr((ENCODER_VERSION, cfg.vision, IMAGE_MEAN, IMAGE_STD))


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is unknown; choose one of {', '.join(STAGES)}")


def _check_processor(tree: Mapping[str, Any], tower: vision.Config, *, where: str) -> None:
    """Refuses a processor that prepares frames otherwise than `encode` does."""
    wanted = {
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
        "patch_size": tower.patch_size,
        "temporal_patch_size": tower.unit_frames,
        "merge_size": tower.merge,
    }
    for name, value in wanted.items():
        if tree.get(name, value) != value:
            raise ValueError(f"{where}: {name}={tree[name]!r} is not supported, only {value!r} is")


def _image_pixels(tree: Mapping[str, Any], *, where: str) -> tuple[int, int]:
    """Reads an image processor's bounds, under the names of either generation."""
    size = hf_files.part(tree, "size", where)
    names = (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge"))
    fewest, most = (
        next((x for x in (tree.get(older), size.get(newer)) if x is not None), default)
        for (older, newer), default in zip(names, UNSAID_PIXELS, strict=True)
    )
    if not (isinstance(fewest, int) and isinstance(most, int) and 1 <= fewest <= most):
        raise ValueError(
            f"{where}: images of min_pixels={fewest!r} to max_pixels={most!r} cannot be; write two "
            "whole numbers"
        )
    return fewest, most
