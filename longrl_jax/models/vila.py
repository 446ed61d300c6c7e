"""The VILA family: SigLIP tower, projector and decoder, with video tokens inside the prompt.

Source: NVlabs/VILA llava/model (llava_arch.py, encoders/video/basic.py). Every frame of a video is
n media tokens and one "\\n" token; the latter is an ordinary token of the prompt, looked up in the
current table, so that it moves when the table is trained.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from longrl_jax.models import decoder, hf_files, projector, siglip
from longrl_jax.models.weights import Param
from longrl_jax.sharding import attend, constrain
from longrl_jax.types import VideoLayout

FOLDERS = ("llm", "vision_tower", "mm_projector")
"""Sub-folders of a checkpoint that hold tensors."""
PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
"""Sub-folder -> its config inside a config.json that stands alone (convert init, plan)."""
LLM_FOLDER = "llm"
"""Sub-folder that the engine opens."""
IGNORED = (
    *(f"llm/{pattern}" for pattern in decoder.IGNORED),
    *(
        f"vision_tower/{prefix}{name}*"
        for prefix in ("", siglip.PUBLISHED_PREFIX)
        for name in siglip.UNUSED
    ),
)
"""Patterns of tensor names that we neither use nor change."""
TEXT_MODULE = decoder.TEXT_MODULE
"""How names of the decoder begin inside transformers' model of LLM_FOLDER."""
MEDIA_TOKEN = "<vila/video>"
SEPARATOR = "\n"
ENCODER_VERSION = 1
"""Raise it when the same weights and frames would give other features."""
STAGES = ("packed", "projected")
"""What can be stored of a frame: packed patch states, or what the projector makes of them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The three parts, and which layer of the tower is read."""

    text: decoder.Config
    vision: siglip.Config
    projector: projector.Config
    num_vision_layers: int
    """Layers of the tower that are run (mm_vision_select_layer -2: all but the last)."""
    vision_prefix: str = dataclasses.field(compare=False)  # names make no other model
    """What the tower's tensor names start with: "vision_model." or nothing."""

    @property
    def side(self) -> int:
        """Media tokens along one side of a frame."""
        return projector.packed_side(self.vision.grid, projector.pack_size(self.projector.kind))


def read_config(folder: Path) -> Config:
    """Reads config.json and those of the sub-folders; what we cannot do is refused by name."""
    top = hf_files.read_json(folder / "config.json")
    _refuse_unsupported(top, where=str(folder))
    parts = {sub: hf_files.read_json(folder / sub / "config.json") for sub in FOLDERS}
    return _config(top, parts, where=str(folder), vision_prefix=_vision_prefix(folder))


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns one config.json that holds the parts' configs (PARTS) into our record, no folder."""
    _refuse_unsupported(tree, where=where)
    parts = {sub: hf_files.part(tree, key, where) for sub, key in PARTS.items()}
    return _config(tree, parts, where=where, vision_prefix=siglip.PUBLISHED_PREFIX)


def _config(
    top: Mapping[str, Any],
    parts: Mapping[str, Mapping[str, Any]],
    *,
    where: str,
    vision_prefix: str,
) -> Config:
    """parts: the config of every sub-folder."""
    text = decoder.parse_config(parts["llm"], where=f"{where}/llm")
    vision = siglip.parse_config(parts["vision_tower"], where=f"{where}/vision_tower")
    kind = parts["mm_projector"].get("mm_projector_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"{where}/mm_projector/config.json: mm_projector_type={kind!r} must be a name"
        )
    cfg = Config(
        text=text,
        vision=vision,
        projector=projector.Config(kind=kind, width_in=vision.width, width_out=text.width),
        num_vision_layers=_num_vision_layers(top, vision, where=where),
        vision_prefix=vision_prefix,
    )
    projector.steps(cfg.projector)  # refuses what it does not know
    return cfg


class Model(nnx.Module):
    """Parts: text, vision, projector."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.text = decoder.Decoder(cfg.text, rngs=rngs)
        self.projector = projector.Projector(cfg.projector, rngs=rngs)
        self.vision = siglip.Tower(cfg.vision, rngs=rngs)

    def encode(
        self,
        frames: UInt8[Array, "F Y X 3"],
        *,
        stage: str,
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "F n C"]:
        """Turns frames, resized to the tower's image size, into rows of one media token each.

        stage "packed": states of the chosen tower layer, neighbours side by side;
        "projected": those through the projector.
        """
        _check_stage(stage)
        pixels = (frames.astype(jnp.float32) / 255 - 0.5) / 0.5  # SigLIP's preprocessing
        x_FnC = self.vision(pixels.astype(compute_dtype), num_layers=self.cfg.num_vision_layers)
        size = projector.pack_size(self.cfg.projector.kind)
        x_FnC = projector.pack(x_FnC, grid=self.cfg.vision.grid, size=size)
        if stage == "projected":
            x_FnC = self.projector(x_FnC)
        return constrain(x_FnC, "frames", None, None)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        is_media: Bool[Array, "B T"] | None = None,
        features: Float[Array, "B T C"] | None = None,
        *,
        stage: str = "packed",
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B T D"]:
        """Puts media features where is_media, the token table elsewhere.

        features are aligned with the tokens (anything where not is_media) and come from `stage`;
        None: text only.
        """
        _check_stage(stage)
        x_BTD = self.text.embed(tokens, compute_dtype=compute_dtype)
        if features is None or is_media is None:
            return x_BTD
        # zeros where no feature stands: whatever is there must not reach a gradient as nan
        media = jnp.where(is_media[..., None], features, 0).astype(compute_dtype)
        if stage == "packed":  # recomputed backwards: its states are up to 9 tower widths a token
            media = jax.checkpoint(lambda x: self.projector(x))(media)
        x_BTD = jnp.where(is_media[..., None], media, x_BTD)
        return constrain(x_BTD, "batch", "tokens", None)

    def hidden(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        remat: str = "nothing",
        compute_dtype: DTypeLike = jnp.float32,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        """See decoder.Decoder.hidden."""
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
    return {
        **decoder.table(cfg.text, hf="llm/"),
        **projector.table(cfg.projector, hf="mm_projector/"),
        **siglip.table(cfg.vision, hf=f"vision_tower/{cfg.vision_prefix}"),
    }


def text_config(cfg: Config) -> decoder.Config:
    """Returns the decoder's part of a config."""
    return cfg.text


def video_layout(cfg: Config) -> VideoLayout:
    """Says what a frame becomes, so that prompts are laid out without the model."""
    return VideoLayout(
        image_size=(cfg.vision.image_size, cfg.vision.image_size),
        grid=(cfg.side, cfg.side),
        media_token=MEDIA_TOKEN,
        separator=SEPARATOR,
    )


def feature_width(cfg: Config, stage: str) -> int:
    """Returns the width of a row that `encode` makes."""
    _check_stage(stage)
    if stage == "projected":
        return cfg.text.width
    return cfg.vision.width * projector.pack_size(cfg.projector.kind) ** 2


def stage_identity(cfg: Config, stage: str) -> str:
    """Names all but weights that the numbers of `encode` depend on, for keys of stored features."""
    _check_stage(stage)
    return repr((ENCODER_VERSION, cfg.vision, cfg.num_vision_layers, cfg.projector))


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is unknown; choose one of {', '.join(STAGES)}")


def _refuse_unsupported(top: Mapping[str, Any], *, where: str) -> None:
    for name in ("s2", "dynamic_s2"):
        if top.get(name):
            raise ValueError(
                f"{where}: {name}={top[name]!r}: several image scales are not supported yet; "
                "choose a checkpoint with one scale"
            )
    encoder = hf_files.part(top, "video_encoder", where)
    target = str(encoder.get("_target_", "BasicVideoEncoder")).rpartition(".")[2]
    if target != "BasicVideoEncoder":
        raise ValueError(
            f"{where}: video_encoder._target_={encoder['_target_']!r} is not supported yet (time "
            "pooling is TSPVideoEncoder's); only BasicVideoEncoder is"
        )
    feature = top.get("mm_vision_select_feature", "cls_patch")
    wanted = {
        "video_encoder.start_tokens": (encoder.get("start_tokens"), None),
        "video_encoder.end_tokens": (encoder.get("end_tokens", SEPARATOR), SEPARATOR),
        "mm_vision_select_feature": (feature, "cls_patch"),
    }
    for name, (value, only) in wanted.items():
        if value != only:
            raise ValueError(f"{where}: {name}={value!r} is not supported, only {only!r} is")


def _num_vision_layers(top: Mapping[str, Any], vision: siglip.Config, *, where: str) -> int:
    """Hidden state i follows i layers, so -2 means all layers but the last."""
    select = top.get("mm_vision_select_layer", -2)
    if not isinstance(select, int) or isinstance(select, bool):
        raise ValueError(f"{where}: mm_vision_select_layer={select!r} must be a whole number")
    num = select if select >= 0 else vision.num_layers + 1 + select
    if not 1 <= num <= vision.num_layers:
        raise ValueError(
            f"{where}: mm_vision_select_layer={select} is not among the {vision.num_layers} layers"
        )
    return num


def _vision_prefix(folder: Path) -> str:
    """Looks how the tower's tensors are named; a folder without tensors gets published names."""
    if not list((folder / "vision_tower").glob("*.safetensors")):
        return siglip.PUBLISHED_PREFIX
    names = hf_files.open_tensors(folder / "vision_tower")
    prefixed = any(name.startswith(siglip.PUBLISHED_PREFIX) for name in names)
    return siglip.PUBLISHED_PREFIX if prefixed else ""
