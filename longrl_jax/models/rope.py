"""Rotary positions: the angles of a head's pairs, and the scalings that published configs use."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longrl_jax.models import hf_files
from longrl_jax.models.layers import wide


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Pairs that turn less than low_freq_factor times in the first length turn `factor` times
    slower. Source: transformers modeling_rope_utils.py, _compute_llama3_parameters."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """Source: arXiv:2309.00071 section 3; transformers modeling_rope_utils.py."""

    factor: float
    original_max_position_embeddings: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """Of cosine and sine; None: 0.1 ln(factor) + 1."""


Scaling = Llama3 | Yarn | None
SCALINGS: dict[str, type[Llama3] | type[Yarn]] = {"llama3": Llama3, "yarn": Yarn}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """What a config.json says of the rotation."""

    theta: float
    scaling: Scaling = None
    sections: tuple[int, ...] = ()
    """Of M-RoPE (arXiv:2409.12191 section 2.1): how many of a head's pairs turn with the first,
    second, ... number of a position; positions of one number: all with that."""


def parse_rope(tree: Mapping[str, Any], *, where: str) -> Rope:
    """Reads the rotation from a config.json, in the words of transformers 4 (rope_theta and
    rope_scaling) or 5 (rope_parameters); a field that we would have to ignore is refused by name.
    """
    name = "rope_parameters" if tree.get("rope_parameters") else "rope_scaling"
    fields = dict(hf_files.part(tree, name, where))
    theta = hf_files.positive_float({**tree, **fields}, "rope_theta", 1e4, where)
    kind = fields.get("rope_type", fields.get("type", "default"))
    for key in ("rope_type", "type", "rope_theta"):
        fields.pop(key, None)
    given = {key: value for key, value in fields.items() if value is not None}
    if kind == "default":
        known, scaling = [], None
    elif isinstance(kind, str) and kind in SCALINGS:
        record = SCALINGS[kind]
        required = [f.name for f in dataclasses.fields(record) if f.default is dataclasses.MISSING]
        if lacking := [f for f in required if f not in given]:
            raise ValueError(f"{where}: {name}.{lacking[0]} is missing, {kind!r} scaling needs it")
        known = [f.name for f in dataclasses.fields(record)]
        inside = f"{where}: {name}"
        numbers = {f: hf_files.positive_float(given, f, 0, inside) for f in known if f in given}
        scaling = record(**numbers)
        if isinstance(scaling, Llama3) and scaling.high_freq_factor <= scaling.low_freq_factor:
            raise ValueError(
                f"{inside}: high_freq_factor={scaling.high_freq_factor:g} must be over "
                f"low_freq_factor={scaling.low_freq_factor:g}"
            )
    else:
        raise ValueError(
            f"{where}: {name}.rope_type={kind!r} is not supported, only default, "
            f"{', '.join(SCALINGS)} are"
        )
    if odd := sorted(set(given) - set(known)):
        raise ValueError(
            f"{where}: {name}.{odd[0]}={given[odd[0]]!r} is not supported with rope_type={kind!r}"
        )
    return Rope(theta=theta, scaling=scaling)


def rates(
    rope: Rope, head_dim: int, dtype: DTypeLike = np.float32
) -> tuple[Float[np.ndarray, " h"], float]:
    """Returns the angle a token of each of the h = head_dim / 2 pairs, and a factor of cosine and
    sine. Computed on the host in `dtype`, as torch does."""
    half = head_dim // 2
    rate_h = 1.0 / rope.theta ** (np.arange(half, dtype=dtype) / half)
    if isinstance(rope.scaling, Llama3):
        return _llama3(rope.scaling, rate_h), 1.0
    if isinstance(rope.scaling, Yarn):
        return _yarn(rope.scaling, rope.theta, rate_h)
    return rate_h, 1.0


def rotate(
    x: Float[Array, "B T N H"], rope_pos: Int[Array, "B T *axes"], rope: Rope
) -> Float[Array, "B T N H"]:
    """Rotary embedding on halves (arXiv:2104.09864, in the layout of transformers)."""
    dtype = wide(x).dtype
    rate_h, factor = rates(rope, x.shape[-1], dtype)
    pos_BTh = rope_pos[..., None]
    if rope_pos.ndim == 3:
        pos_BTh = rope_pos[..., np.repeat(np.arange(len(rope.sections)), rope.sections)]
    angle_BTh = pos_BTh.astype(dtype) * rate_h  # exact up to 2**24 tokens
    return rotate_by(x, angle_BTh[..., None, :], factor)


def rotate_by(
    x: Float[Array, "... H"], angle: Float[Array, "... h"], factor: float = 1.0
) -> Float[Array, "... H"]:
    """Turns the pairs (i, i + H/2) of x by angle i, and makes them `factor` times as long."""
    y = wide(x)
    half = x.shape[-1] // 2
    cos, sin = factor * jnp.cos(angle), factor * jnp.sin(angle)
    first, second = y[..., :half], y[..., half:]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


def _llama3(cfg: Llama3, rate_h: np.ndarray) -> np.ndarray:
    turns_h = cfg.original_max_position_embeddings * rate_h / (2 * math.pi)
    low, high = cfg.low_freq_factor, cfg.high_freq_factor
    kept_h = np.clip((turns_h - low) / (high - low), 0, 1)  # share that is not slowed down
    return (rate_h * (kept_h + (1 - kept_h) / cfg.factor)).astype(rate_h.dtype)


def _yarn(cfg: Yarn, theta: float, rate_h: np.ndarray) -> tuple[np.ndarray, float]:
    half = len(rate_h)

    def pair_of(turns: float) -> float:
        """Number of the pair, as a fraction, that turns so often in the first length."""
        length = cfg.original_max_position_embeddings / (2 * math.pi)
        return half * math.log(length / turns) / math.log(theta)

    low = max(math.floor(pair_of(cfg.beta_fast)), 0)
    high = min(math.ceil(pair_of(cfg.beta_slow)), 2 * half - 1)
    slowed_h = np.clip((np.arange(half) - low) / max(high - low, 1e-3), 0, 1)
    factor = cfg.attention_factor
    if factor is None:
        factor = 0.1 * math.log(cfg.factor) + 1 if cfg.factor > 1 else 1.0
    scaled_h = rate_h * ((1 - slowed_h) + slowed_h / cfg.factor)
    return scaled_h.astype(rate_h.dtype), factor
