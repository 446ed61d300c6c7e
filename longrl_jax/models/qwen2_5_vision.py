"""Qwen2.5-VL's vision tower and merger: patches of two frames, attention in windows and whole.

Source: arXiv:2502.13923; transformers models/qwen2_5_vl/modeling_qwen2_5_vl.py (numbers and names).
A *unit* is two frames that share their patches; no attention crosses it, so units may be encoded
in any groups. transformers orders patches by window, ours stay in rows: the numbers are equal.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from longrl_jax.models import hf_files, layers
from longrl_jax.models.rope import rotate_by
from longrl_jax.models.weights import Param
from longrl_jax.sharding import constrain

NORM_EPS = 1e-6
"""Fixed in transformers' code, not in a config."""
ROPE_THETA = 1e4
"""The same."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a tower and its merger, from vision_config of a config.json."""

    patch_size: int
    unit_frames: int
    """Frames that share their patches."""
    merge: int
    """Patches along one side of a media token."""
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    window: int
    """Patches along one side of a window."""
    full_layers: tuple[int, ...]
    """Layers whose patches see the whole unit; in the others they see their window."""
    width_out: int
    tokens_per_second: float
    """Time positions of the decoder for each second of a film."""

    @property
    def token_px(self) -> int:
        """Pixels along one side of a media token."""
        return self.patch_size * self.merge


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns the object vision_config into our record; `where` is for errors."""
    patch_size = hf_files.positive_int(tree, "patch_size", where)
    merge = hf_files.positive_int(tree, "spatial_merge_size", where)
    width = hf_files.positive_int(tree, "hidden_size", where)
    num_layers = hf_files.positive_int(tree, "depth", where)
    num_heads = hf_files.positive_int(tree, "num_heads", where)
    window_px = hf_files.positive_int(tree, "window_size", where)
    full_layers = tree.get("fullatt_block_indexes", [7, 15, 23, 31])
    fixed = {
        "hidden_act": (tree.get("hidden_act", "silu"), "silu"),
        "in_channels": (tree.get("in_channels", tree.get("in_chans", 3)), 3),
    }
    for name, (value, only) in fixed.items():
        if value != only:
            raise ValueError(f"{where}: {name}={value!r} is not supported, only {only!r} is")
    if width % (4 * num_heads):
        raise ValueError(
            f"{where}: hidden_size={width} and num_heads={num_heads} give heads of "
            f"{width / num_heads:g}; two axes rotate pairs, so a head must be a multiple of 4"
        )
    if window_px % (patch_size * merge):
        raise ValueError(
            f"{where}: window_size={window_px} px is no multiple of a media token's "
            f"{patch_size * merge} px"
        )
    if not isinstance(full_layers, list | tuple) or not all(
        isinstance(i, int) and 0 <= i < num_layers for i in full_layers
    ):
        raise ValueError(
            f"{where}: fullatt_block_indexes={full_layers!r} must be among the {num_layers} layers"
        )
    return Config(
        patch_size=patch_size,
        unit_frames=hf_files.positive_int(tree, "temporal_patch_size", where),
        merge=merge,
        width=width,
        num_layers=num_layers,
        num_heads=num_heads,
        mlp_width=hf_files.positive_int(tree, "intermediate_size", where),
        window=window_px // patch_size,
        full_layers=tuple(sorted(full_layers)),
        width_out=hf_files.positive_int(tree, "out_hidden_size", where),
        tokens_per_second=hf_files.positive_float(tree, "tokens_per_second", 4.0, where),
    )


class Tower(nnx.Module):
    """Patches and stacked layers; no final norm (the merger has it)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        t, p = cfg.unit_frames, cfg.patch_size
        std = 1 / math.sqrt(t * p * p * 3)
        self.patch_kernel = nnx.Param(std * rngs.params.normal((t, p, p, 3, cfg.width)))
        self.layers = layers.stack(cfg.num_layers, lambda r: Layer(cfg, rngs=r), rngs)

    def __call__(self, pixels: Float[Array, "F Y X 3"]) -> Float[Array, "U y x C"]:
        """Returns the states of the patches of every unit, row by row.

        Y and X are multiples of a media token, F of a unit. Numbers are of pixels' type.
        """
        x_UyxC = _constrain(self.embed(pixels))
        graphdef, state = nnx.split(self.layers)
        full_L = jnp.asarray(np.isin(np.arange(self.cfg.num_layers), self.cfg.full_layers))

        def body(x: Array, layer: tuple[nnx.State, Array]) -> tuple[Array, None]:
            weights, full = layer
            return _constrain(nnx.merge(graphdef, weights)(x, full=full)), None

        return jax.lax.scan(body, x_UyxC, (state, full_L))[0]

    def embed(self, pixels: Float[Array, "F Y X 3"]) -> Float[Array, "U y x C"]:
        """Turns the t x p x p pixels of every patch into one state."""
        F, Y, X, _ = pixels.shape
        t, p, side = self.cfg.unit_frames, self.cfg.patch_size, self.cfg.token_px
        if F % t or Y % side or X % side:
            raise ValueError(
                f"{F} frames of {Y} x {X} px do not split into units of {t} frames and tokens of "
                f"{side} px; repeat the last frame and resize them first"
            )
        patches = pixels.reshape(F // t, t, Y // p, p, X // p, p, 3)
        kernel = self.patch_kernel.get_value().astype(pixels.dtype)
        return jnp.einsum("UtyaxbK,tabKC->UyxC", patches, kernel)


class Layer(nnx.Module):
    """Attention, in windows or over the unit, and a gated MLP, each behind a norm."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.num_heads, self.window = cfg.num_heads, cfg.window
        self.norm1 = layers.RmsNorm(cfg.width, eps=NORM_EPS)
        self.qkv = layers.Linear(cfg.width, 3 * cfg.width, rngs=rngs)
        self.o = layers.Linear(cfg.width, cfg.width, rngs=rngs)
        self.norm2 = layers.RmsNorm(cfg.width, eps=NORM_EPS)
        self.gate = layers.Linear(cfg.width, cfg.mlp_width, rngs=rngs)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, rngs=rngs)

    def __call__(
        self, x: Float[Array, "U y x C"], *, full: Bool[Array, ""]
    ) -> Float[Array, "U y x C"]:
        """full: every patch sees the whole unit, else its window; one of the two is computed."""
        U, y, w, C = x.shape
        qkv = self.qkv(self.norm1(x)).reshape(U, y, w, 3, self.num_heads, -1)
        q, k, v = (qkv[:, :, :, i] for i in range(3))
        angle = jnp.asarray(_angles(y, w, C // self.num_heads))
        q, k = rotate_by(q, angle), rotate_by(k, angle)
        in_windows = functools.partial(_attend, window=(self.window, self.window))
        whole = functools.partial(_attend, window=(y, w))
        o_UyxNH = jax.lax.cond(full, whole, in_windows, q, k, v)
        x = x + self.o(o_UyxNH.reshape(U, y, w, C))
        y_UyxC = self.norm2(x)
        return x + self.down(nnx.silu(self.gate(y_UyxC)) * self.up(y_UyxC))


class Merger(nnx.Module):
    """Turns merge x merge neighbours, side by side, into one media token; it takes packed rows."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.width = cfg.width
        W = cfg.width * cfg.merge**2
        self.norm = layers.RmsNorm(cfg.width, eps=NORM_EPS)
        self.up = layers.Linear(W, W, rngs=rngs)
        self.down = layers.Linear(W, cfg.width_out, rngs=rngs)

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... D"]:
        patches = self.norm(x.reshape(*x.shape[:-1], -1, self.width))
        return self.down(jax.nn.gelu(self.up(patches.reshape(x.shape)), approximate=False))


def pack(x: Float[Array, "U y x C"], *, merge: int) -> Float[Array, "U n W"]:
    """Puts merge x merge neighbours side by side, row by row; W = merge**2 * C."""
    U, y, w, C = x.shape
    x = x.reshape(U, y // merge, merge, w // merge, merge, C)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(U, -1, merge * merge * C)


def table(cfg: Config, *, hf: str) -> dict[str, Param]:
    """Returns the row of every parameter; `hf` stands before every Hugging Face name."""
    layer, merger = hf + "blocks.{i}.", hf + "merger."
    rows = {
        "vision.patch_kernel": Param(
            hf + "patch_embed.proj.weight", (None, None, None, None, "embed"), (2, 3, 4, 1, 0)
        ),
        "vision.layers.norm1.scale": Param(layer + "norm1.weight", (None,)),
        "vision.layers.norm2.scale": Param(layer + "norm2.weight", (None,)),
        "projector.norm.scale": Param(merger + "ln_q.weight", (None,)),
    }
    kernels = {
        "vision.layers.qkv": (layer + "attn.qkv.", ("embed", "heads")),
        "vision.layers.o": (layer + "attn.proj.", ("heads", "embed")),
        "vision.layers.gate": (layer + "mlp.gate_proj.", ("embed", "mlp")),
        "vision.layers.up": (layer + "mlp.up_proj.", ("embed", "mlp")),
        "vision.layers.down": (layer + "mlp.down_proj.", ("mlp", "embed")),
        "projector.up": (merger + "mlp.0.", ("embed", None)),
        "projector.down": (merger + "mlp.2.", ("embed", None)),
    }
    for path, (at, dims) in kernels.items():
        rows[f"{path}.kernel"] = Param(at + "weight", dims, (1, 0))
        rows[f"{path}.bias"] = Param(at + "bias", (None if dims[1] == "embed" else dims[1],))
    return rows


def _constrain(x: Float[Array, "U y x C"]) -> Float[Array, "U y x C"]:
    return constrain(x, "frames", None, None, None)


def _angles(y: int, x: int, head_dim: int) -> Float[np.ndarray, "y x 1 h"]:
    """Rotations of a patch: half of the pairs turn with its row, half with its column."""
    rate_h = 1.0 / ROPE_THETA ** (
        np.arange(0, head_dim // 2, 2, dtype=np.float32) / (head_dim // 2)
    )
    row_yxh = np.broadcast_to(np.arange(y)[:, None, None] * rate_h, (y, x, len(rate_h)))
    column_yxh = np.broadcast_to(np.arange(x)[None, :, None] * rate_h, (y, x, len(rate_h)))
    return np.concatenate([row_yxh, column_yxh], axis=-1).astype(np.float32)[:, :, None]


def _attend(
    q: Float[Array, "U y x N H"],
    k: Float[Array, "U y x N H"],
    v: Float[Array, "U y x N H"],
    *,
    window: tuple[int, int],
) -> Float[Array, "U y x N H"]:
    """Every patch sees its window; windows at the bottom and right are smaller where they must."""
    _, y, x, _, H = q.shape
    keep_WS = _cut(np.ones((1, y, x, 1), bool), window)[0, ..., 0]
    q, k, v = (_cut(array, window) for array in (q, k, v))
    wide = layers.wide(q).dtype
    score_UWNTS = jnp.einsum("UWTNH,UWSNH->UWNTS", q, k, preferred_element_type=wide)
    score_UWNTS = jnp.where(keep_WS[:, None, None], score_UWNTS / math.sqrt(H), -1e30)
    weight_UWNTS = jax.nn.softmax(score_UWNTS, axis=-1).astype(v.dtype)
    o_UWTNH = jnp.einsum("UWNTS,UWSNH->UWTNH", weight_UWNTS, v)
    return _joined(o_UWTNH, (y, x), window)


def _cut(array: Any, window: tuple[int, int]) -> Any:
    """[U, y, x, ...] -> [U, windows, patches of a window, ...]; zeros fill the last windows up."""
    (y, x), (a, b) = array.shape[1:3], window
    m, n = -(-y // a), -(-x // b)
    numpy = np if isinstance(array, np.ndarray) else jnp
    rest = array.shape[3:]
    array = numpy.pad(array, ((0, 0), (0, m * a - y), (0, n * b - x), *((0, 0) for _ in rest)))
    array = array.reshape(-1, m, a, n, b, *rest).swapaxes(2, 3)
    return array.reshape(-1, m * n, a * b, *rest)


def _joined(array: Array, grid: tuple[int, int], window: tuple[int, int]) -> Array:
    """Undoes _cut."""
    (y, x), (a, b) = grid, window
    m, n = -(-y // a), -(-x // b)
    rest = array.shape[3:]
    array = array.reshape(-1, m, n, a, b, *rest).swapaxes(2, 3)
    return array.reshape(-1, m * a, n * b, *rest)[:, :y, :x]
