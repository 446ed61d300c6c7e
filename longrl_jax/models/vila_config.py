"""What the config.json files of a VILA checkpoint say, and what of it we cannot follow.

Source: NVlabs/VILA llava/model/configuration_llava.py, llava_arch.py, encoders/, mm_utils.py.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrl_jax.models import decoder, hf_files, projector, s2, siglip

FOLDERS = ("llm", "vision_tower", "mm_projector")
"""Sub-folders of a checkpoint that hold tensors."""
PARTS = {"llm": "llm_cfg", "vision_tower": "vision_tower_cfg", "mm_projector": "mm_projector_cfg"}
"""Sub-folder -> its config inside a config.json that stands alone (convert init, plan)."""
Pool = tuple[int, int, int]
"""Frames, rows and columns of projected tokens that become one by their mean."""
ONE = (1, 1, 1)
ASPECTS = ("resize", "dynamic", "dynamic_s2")
"""image_aspect_ratio: one square picture; tiles and the whole; tiles at several scales."""
POOL_FRAMES = 256
"""LongVILA-R1: so many frames for every 4 that are pooled, 4, 8, 16 or 32 (reference code:
4 * {1, 2, 4, 8})."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaText:
    """Texts around the tokens of a picture, looked up in the current token table; "": none."""

    start: str = ""
    end: str = "\n"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """The three parts, and how pictures and films become tokens."""

    text: decoder.Config
    vision: siglip.Config
    projector: projector.Config
    num_vision_layers: int
    """Layers of the tower that are run (mm_vision_select_layer -2: all but the last)."""
    drop_first: bool = False
    """mm_vision_select_feature "patch": without the first of the tower's tokens."""
    scales: s2.Scales | None = None
    """Of S2; None: one."""
    image_aspect: str = "resize"
    """A name in ASPECTS."""
    tiles: tuple[int, int] = (1, 12)
    """Fewest and most tiles of an image that follow its aspect."""
    image: MediaText = MediaText()
    frame: MediaText = MediaText()
    """Of every (pooled) frame of a film."""
    film_end: str = ""
    """Text after a film, of every pool size."""
    pools: tuple[Pool, ...] = (ONE,)
    """Of a film, whose results follow one another; empty: LongVILA-R1's, by its length."""
    vision_prefix: str = dataclasses.field(compare=False)  # names make no other model
    """What the tower's tensor names start with: "vision_model." or nothing."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens of a video frame."""
        if self.drop_first:
            return 1, self.vision.grid**2 - 1
        side = self.vision.grid
        if self.scales is not None and not self.scales.dynamic:
            size = self.scales.sizes[self.scales.output]
            side = -(-side * size // self.scales.tile)  # of tiles that the scale may not fill
        side = projector.packed_side(side, projector.pack_size(self.projector.kind))
        return side, side

    @property
    def fewest_tiles(self) -> int:
        """Fewest tiles of an image, at its last scale."""
        if self.image_aspect == "dynamic_s2" and self.scales is not None:
            return (self.scales.sizes[-1] // self.scales.tile) ** 2
        return self.tiles[0]


def pools_of(num_frames: int, pools: tuple[Pool, ...]) -> tuple[Pool, ...]:
    """Returns the pool sizes of a film; pools: Config.pools.

    Source: LongVILA-R1-7B's modeling_vila.py: 4 frames up to 256, 8 up to 512, 16 up to 1,024, else
    32.
    """
    if pools:
        return pools
    wished = -(-num_frames // POOL_FRAMES)
    return ((4 * next((n for n in (1, 2, 4) if n >= wished), 8), 1, 1),)


def read_config(folder: Path) -> Config:
    """Reads config.json and those of the sub-folders; what we cannot do is refused by name."""
    top = hf_files.read_json(folder / "config.json")
    parts = {sub: hf_files.read_json(folder / sub / "config.json") for sub in FOLDERS}
    return _config(top, parts, where=str(folder), vision_prefix=_vision_prefix(folder))


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns one config.json that holds the parts' configs (PARTS) into our record, no folder."""
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
    vision = siglip.parse_config(
        parts["vision_tower"],
        where=f"{where}/vision_tower",
        resolution=_resolution(top, parts["vision_tower"], where=where),
    )
    kind = parts["mm_projector"].get("mm_projector_type")
    if not isinstance(kind, str):
        raise ValueError(
            f"{where}/mm_projector/config.json: mm_projector_type={kind!r} must be a name"
        )
    scales = _scales(top, vision, where=where)
    width_in = vision.width * (1 if scales is None else len(scales.sizes))
    drop_first = (
        _one_of(top, "mm_vision_select_feature", ("cls_patch", "patch"), where=where) == "patch"
    )
    cfg = Config(
        text=text,
        vision=vision,
        projector=projector.Config(kind=kind, width_in=width_in, width_out=text.width),
        num_vision_layers=_num_vision_layers(top, vision, where=where),
        drop_first=drop_first,
        scales=scales,
        vision_prefix=vision_prefix,
        **_media(top, where=where),
    )
    projector.steps(cfg.projector)  # refuses what it does not know
    _check_together(cfg, where=where)
    return cfg


def _media(top: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Returns the fields of Config that say how images and films are laid out."""
    image = _encoder(top, "image_encoder", ("BasicImageEncoder",), where=where)
    video = _encoder(top, "video_encoder", ("BasicVideoEncoder", "TSPVideoEncoder"), where=where)
    pools: tuple[Pool, ...] = (ONE,)
    if video["_target_"] == "TSPVideoEncoder":
        pools = tuple(_pool(size, where=where) for size in video.get("pool_sizes") or ())
    tiles = tuple(
        hf_files.positive_int({name: top.get(name) or default}, name, where)
        for name, default in (("min_tiles", 1), ("max_tiles", 12))
    )
    most = top.get("video_max_tiles") or 1
    if most != 1:
        raise ValueError(
            f"{where}: video_max_tiles={most!r} is not supported, only 1 is: a frame is one picture"
        )
    return {
        "image_aspect": _one_of(top, "image_aspect_ratio", ASPECTS, where=where),
        "tiles": tiles,
        "image": _texts(image, "image_encoder", where=where),
        "frame": _texts(video, "video_encoder", where=where),
        "film_end": _text(video, "sep_tokens", None, where=f"{where}: video_encoder"),
        "pools": pools,
    }


def _encoder(
    top: Mapping[str, Any], name: str, known: tuple[str, ...], *, where: str
) -> dict[str, Any]:
    """Returns a media encoder's settings, which may be a text of JSON; _target_ is its class."""
    value = top.get(name)
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise ValueError(f"{where}: {name}={value!r} is not valid JSON") from None
    tree = dict(hf_files.part({name: value}, name, where))
    target = str(tree.get("_target_", known[0])).rpartition(".")[2]
    if target not in known:
        raise ValueError(
            f"{where}: {name}._target_={tree['_target_']!r} is not supported; we know "
            f"{', '.join(known)}"
        )
    return tree | {"_target_": target}


def _texts(encoder: Mapping[str, Any], name: str, *, where: str) -> MediaText:
    return MediaText(
        start=_text(encoder, "start_tokens", None, where=f"{where}: {name}"),
        end=_text(encoder, "end_tokens", "\n", where=f"{where}: {name}"),
    )


def _text(tree: Mapping[str, Any], name: str, default: str | None, *, where: str) -> str:
    value = tree.get(name, default)
    if not (value is None or isinstance(value, str)):
        raise ValueError(f"{where}.{name}={value!r} must be a text or null")
    return value or ""


def _pool(size: Any, *, where: str) -> Pool:
    whole = isinstance(size, list | tuple) and len(size) == 3
    if not (whole and all(isinstance(n, int) and n > 0 for n in size)):
        raise ValueError(
            f"{where}: video_encoder.pool_sizes holds {size!r}, which should be three numbers: "
            "frames, rows, columns"
        )
    t, h, w = size
    return t, h, w


def _one_of(top: Mapping[str, Any], name: str, known: tuple[str, ...], *, where: str) -> str:
    value = top.get(name) or known[0]
    if value not in known:
        raise ValueError(
            f"{where}: {name}={value!r} is not supported; choose a checkpoint with one of "
            f"{', '.join(known)}"
        )
    return str(value)


def _resolution(top: Mapping[str, Any], tower: Mapping[str, Any], *, where: str) -> int | None:
    """Returns the side of the tower's pictures, in pixels, where its own config says another."""
    value = top.get("vision_resolution")
    if value in (None, -1):
        return None
    given = hf_files.positive_int(top, "vision_resolution", where)
    if (mode := top.get("interpolate_mode") or "linear") != "linear":
        raise ValueError(f"{where}: interpolate_mode={mode!r} is not supported, only 'linear' is")
    inner = hf_files.part(tower, "vision_config", where) or tower
    return None if given == inner.get("image_size") else given


def _scales(top: Mapping[str, Any], vision: siglip.Config, *, where: str) -> s2.Scales | None:
    fixed, dynamic = bool(top.get("s2")), bool(top.get("dynamic_s2"))
    if not (fixed or dynamic):
        return None
    given = top.get("s2_scales")
    parts = given.split(",") if isinstance(given, str) else given
    try:
        sizes = tuple(sorted(int(part) for part in parts))  # type: ignore[union-attr]
    except (TypeError, ValueError):
        raise ValueError(
            f"{where}: s2_scales={given!r} must be sizes in pixels, e.g. '448,896,1344'"
        ) from None
    if not sizes or sizes[0] < 1 or len(set(sizes)) < len(sizes) or sizes[-1] > hf_files.MAX_SIZE:
        raise ValueError(f"{where}: s2_scales={given!r} must be different sizes over 0")
    # dynamic (it comes first where both are set): tiles have the smallest scale's size
    tile = sizes[0] if dynamic else top.get("s2_max_split_size") or sizes[0]
    if tile != vision.image_size:
        name = "the smallest of s2_scales" if dynamic else "s2_max_split_size"
        raise ValueError(
            f"{where}: {name} is {tile!r}, but the tower takes pictures of {vision.image_size} px"
        )
    if dynamic and (len(sizes) < 2 or any(size % tile for size in sizes)):
        raise ValueError(
            f"{where}: s2_scales={given!r} must be several sizes, multiples of the smallest"
        )
    index = top.get("s2_resize_output_to_scale_idx") or 0
    if not isinstance(index, int) or not -len(sizes) <= index < len(sizes):
        raise ValueError(
            f"{where}: s2_resize_output_to_scale_idx={index!r} is none of the {len(sizes)} scales"
        )
    return s2.Scales(sizes=sizes, tile=tile, output=index % len(sizes), dynamic=dynamic)


def _check_together(cfg: Config, *, where: str) -> None:
    """Refuses settings that the published code has no meaning for together."""
    kind = cfg.projector.kind
    if cfg.drop_first and (cfg.scales is not None or projector.pack_size(kind) > 1):
        raise ValueError(
            f"{where}: mm_vision_select_feature='patch' leaves no square of tokens for "
            f"mm_projector_type={kind!r} or S2; 'cls_patch' does"
        )
    dynamic = cfg.scales is not None and cfg.scales.dynamic
    if cfg.image_aspect == "dynamic_s2" and not dynamic:
        raise ValueError(f"{where}: image_aspect_ratio='dynamic_s2' needs dynamic_s2=true")
    fewest = cfg.fewest_tiles
    if fewest > cfg.tiles[1]:
        raise ValueError(
            f"{where}: an image has {fewest} tiles or more, over max_tiles={cfg.tiles[1]}"
        )
    for pool in cfg.pools:
        if any(n % p for n, p in zip(cfg.grid, pool[1:], strict=True)):
            rows, columns = cfg.grid
            raise ValueError(
                f"{where}: video_encoder.pool_sizes holds {list(pool)}, which does not divide the "
                f"{rows} x {columns} tokens of a frame"
            )


def _num_vision_layers(top: Mapping[str, Any], vision: siglip.Config, *, where: str) -> int:
    """Hidden state i follows i layers, so -2 means all layers but the last."""
    select = top.get("mm_vision_select_layer", -2)
    if not isinstance(select, int) or isinstance(select, bool):
        raise ValueError(f"{where}: mm_vision_select_layer={select!r} must be a whole number")
    num = select if select >= 0 else vision.num_layers + 1 + select
    if not 0 <= num <= vision.num_layers:
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
