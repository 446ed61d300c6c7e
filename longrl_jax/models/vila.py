"""The VILA family: SigLIP tower, projector and decoder, with media tokens inside the prompt.

Source: NVlabs/VILA llava/model (llava_arch.py, encoders/). Every frame of a video is n media tokens
and one "\\n" token; the latter is an ordinary token of the prompt, looked up in the current table,
so that it moves when the table is trained. TSP: several frames share the mean of their tokens.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, UInt8

from longrl_jax.models import decoder, projector, s2, siglip, vila_config
from longrl_jax.models.layers import wide
from longrl_jax.models.vila_config import ONE, Config, Pool
from longrl_jax.models.weights import Param
from longrl_jax.sharding import attend, constrain
from longrl_jax.types import MediaLayout, View

FOLDERS, PARTS = vila_config.FOLDERS, vila_config.PARTS
read_config, parse_config = vila_config.read_config, vila_config.parse_config
pools_of = vila_config.pools_of
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
MEDIA_TOKEN, IMAGE_TOKEN = "<vila/video>", "<image>"
ENCODER_VERSION = 2
"""Raise it when the same weights and frames would give other features."""
STAGES = ("packed", "projected")
"""What can be stored of a frame: packed patch states, or what the projector makes of them."""


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
        view: View | None = None,
        stage: str,
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "U n C"]:
        """Turns pictures of media_layout's size into rows of one media token each.

        view: what they are of; None: frames. stage "packed": states of the chosen tower layer,
        neighbours side by side; "projected": those through the projector, pooled.
        """
        _check_stage(stage)
        pixels = (frames.astype(jnp.float32) / 255 - 0.5) / 0.5  # SigLIP's preprocessing
        pixels = pixels.astype(compute_dtype)
        if view is not None and view.scales and view.unit_frames > 1:
            x_UnC = self._joined(self._tower(pixels), view)
        else:
            x_UnC = self._square_states(pixels)
            size = projector.pack_size(self.cfg.projector.kind)
            if size > 1:
                grid = round(x_UnC.shape[1] ** 0.5)
                x_UnC = projector.pack(x_UnC, grid=grid, size=size)
        if stage == "projected":
            x_UnC = self.projector(x_UnC)
        if view is not None and view.pools:
            assert stage == "projected", "tokens are pooled behind the projector"
            pooled = [_pooled(x_UnC, self.cfg.grid, pool) for pool in view.pools]
            units, D = len(x_UnC) // view.unit_frames, x_UnC.shape[-1]
            x_UnC = jnp.concatenate([x.reshape(units, -1, D) for x in pooled], axis=1)
        return constrain(x_UnC, "frames", None, None)

    def _joined(self, states: Float[Array, "N n C"], view: View) -> Float[Array, "U n W"]:
        """Puts the states of images' tiles at all scales together, packed (dynamic S2).

        A row a media token, in reading order over the whole image.
        """
        assert self.cfg.scales is not None
        x_NggC = s2.square(states)
        x_UTggC = x_NggC.reshape(-1, view.unit_frames, *x_NggC.shape[1:])
        height, width = view.size
        blocks = [(y // height, x // width) for y, x in view.scales]
        whole, used = [], 0
        for rows, columns in blocks:
            tiles = x_UTggC[:, used : used + rows * columns]
            whole.append(s2.merge(tiles.reshape(-1, *tiles.shape[2:]), (rows, columns)))
            used += rows * columns
        output = blocks[self.cfg.scales.output]
        x_BggW = s2.split(s2.stack(whole, self.cfg.scales.output), output)
        B, side = x_BggW.shape[:2]
        size = projector.pack_size(self.cfg.projector.kind)
        x_BnW = projector.pack(x_BggW.reshape(B, side * side, -1), grid=side, size=size)
        x_UYXW = s2.merge(s2.square(x_BnW), output)
        return x_UYXW.reshape(len(x_UYXW), -1, x_UYXW.shape[-1])

    def _square_states(self, pixels: Float[Array, "F Y X 3"]) -> Float[Array, "F n C"]:
        """States of square pictures, those of all scales in one."""
        scales = self.cfg.scales
        if scales is None:
            return self._tower(pixels)
        if scales.dynamic:  # as published: a film's frame has one scale, which stands for all
            return jnp.tile(self._tower(pixels), (1, 1, len(scales.sizes)))
        x_FYXC = s2.multiscale(pixels, scales, self._tower)
        return x_FYXC.reshape(len(pixels), -1, x_FYXC.shape[-1])

    def _tower(self, pixels: Float[Array, "N Y X 3"]) -> Float[Array, "N n C"]:
        x_NnC = self.vision(pixels, num_layers=self.cfg.num_vision_layers)
        return x_NnC[:, 1:] if self.cfg.drop_first else x_NnC

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


def media_layout(cfg: Config) -> MediaLayout:
    """Says what an image and a video become, so that prompts are laid out without the model."""
    side, cost = cfg.vision.image_size, 1
    if cfg.scales is not None and not cfg.scales.dynamic:
        side = cfg.scales.sizes[-1]
        cost = sum(rows * columns for rows, columns in cfg.scales.blocks)
    return MediaLayout(
        image_size=(side, side),
        grid=cfg.grid,
        media_token=MEDIA_TOKEN,
        image_token=IMAGE_TOKEN,
        separator=cfg.frame.end,
        opening=cfg.frame.start,
        ending=cfg.film_end,
        image_texts=(cfg.image.start, cfg.image.end),
        tile_text="\n",
        image_view=None if cfg.image_aspect == "resize" else functools.partial(image_view, cfg),
        video_pools=functools.partial(pools_of, pools=cfg.pools) if cfg.pools != (ONE,) else None,
        cost=cost,
    )


def image_view(cfg: Config, height: int, width: int) -> View:
    """Returns the tiles of a prompt's only image, whose grid follows its aspect.

    "dynamic_s2": tiles at all scales, joined; "dynamic": tiles, and the whole behind them where
    they are several. Source: NVlabs/VILA mm_utils.dynamic_s2_preprocess, dynamic_preprocess.
    """
    layout = media_layout(dataclasses.replace(cfg, image_aspect="resize"))
    tile = layout.image_size[0]
    rows, columns = s2.closest_grid(
        height, width, fewest=cfg.fewest_tiles, most=cfg.tiles[1], tile=tile
    )
    whole = rows * tile, columns * tile
    if cfg.image_aspect == "dynamic":
        tiles = (whole,) if rows * columns == 1 else (whole, (tile, tile))
        return View(size=layout.image_size, grid=cfg.grid, scales=tiles, cost=layout.cost)
    assert cfg.scales is not None
    scales = (*((size, size) for size in cfg.scales.sizes[:-1]), whole)
    out_rows, out_columns = (n // tile for n in scales[cfg.scales.output])
    grid = out_rows * cfg.grid[0], out_columns * cfg.grid[1]
    view = View(size=layout.image_size, grid=grid, scales=scales)
    return dataclasses.replace(view, unit_frames=view.inputs)


def feature_width(cfg: Config, stage: str) -> int:
    """Returns the width of a row that `encode` makes."""
    _check_stage(stage)
    if stage == "projected":
        return cfg.text.width
    return cfg.projector.width_in * projector.pack_size(cfg.projector.kind) ** 2


def stage_identity(cfg: Config, stage: str) -> str:
    """Names all but weights that the numbers of `encode` depend on, for keys of stored features."""
    _check_stage(stage)
    layers = cfg.num_vision_layers, cfg.drop_first
    return repr((ENCODER_VERSION, cfg.vision, layers, cfg.scales, cfg.projector))


def _check_stage(stage: str) -> None:
    if stage not in STAGES:
        raise ValueError(f"stage={stage!r} is unknown; choose one of {', '.join(STAGES)}")


def _pooled(x: Float[Array, "F n D"], grid: s2.Grid, pool: Pool) -> Float[Array, "U m D"]:
    """Means over t frames of h x w tokens. Source: NVlabs/VILA encoders/video/tsp.py."""
    (rows, columns), (t, h, w) = grid, pool
    x_UtYhXwD = wide(x).reshape(-1, t, rows // h, h, columns // w, w, x.shape[-1])
    y_UYXD = x_UtYhXwD.mean(axis=(1, 3, 5))
    return y_UYXD.reshape(len(y_UYXD), -1, x.shape[-1]).astype(x.dtype)
