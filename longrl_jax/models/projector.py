"""VILA's projectors: from patch states of the tower to embeddings of the language model.

Source: NVlabs/VILA multimodal_projector/base_projector.py (types and order of the layers). A
projector is a parameterless pack (2x2 or 3x3 neighbours side by side) and a sequence of token-wise
layers, so the pack can be stored and the rest be trained.
"""

import dataclasses
import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from longrl_jax.models import layers
from longrl_jax.models.weights import Param

NORM_EPS = 1e-5
PACKED: dict[str, tuple[int, tuple[float, ...]]] = {
    "mlp_downsample": (2, ()),
    "mlp_downsample_2x2_fix": (2, ()),
    "mlp_downsample_3x3_fix": (3, (3,)),
    "mlp_downsample_3x3_s2": (3, (3, 1, 1 / 3)),
    "mlp_downsample_3x3_s2_new": (3, (4, 2, 1, 1 / 3)),
}
"""Kind -> side of the pack, and the widths between its input and the model's, in tower widths
(rounded down). The two 2x2 kinds are the same function."""
KINDS = f"identity, linear, mlpNx_gelu (N: a number), {', '.join(PACKED)}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Kind and widths of a projector."""

    kind: str
    """mm_projector_type of the checkpoint."""
    width_in: int
    """Width of the tower's states, those of all scales together (S2)."""
    width_out: int
    """Width of the language model."""


@dataclasses.dataclass(frozen=True)
class Step:
    """One parametrized layer; `gelu` says whether it is followed by an exact GELU."""

    name: str
    """Tensor name without .weight or .bias: layers.N, N the index in torch's sequence."""
    width_in: int
    width_out: int
    """0: a LayerNorm of width_in."""
    gelu: bool = False


def pack_size(kind: str) -> int:
    """Returns the side of the square of patches that becomes one token; refuses unknown kinds."""
    if kind in PACKED:
        return PACKED[kind][0]
    if kind in ("identity", "linear") or re.fullmatch(r"mlp[1-9]\d*x_gelu", kind):
        return 1
    raise ValueError(f"mm_projector_type={kind!r} is unknown; we know {KINDS}")


def pack(x: Float[Array, "F n C"], *, grid: int, size: int) -> Float[Array, "F m W"]:
    """Puts size x size neighbours side by side, row by row; W = size**2 * C.

    The grid is padded with zeros at the bottom and right. Source: DownSampleBlock.flat_square.
    """
    if size == 1:
        return x
    F, _, C = x.shape
    side = packed_side(grid, size)
    x_FyxC = x.reshape(F, grid, grid, C)
    extra = side * size - grid
    x_FyxC = jnp.pad(x_FyxC, ((0, 0), (0, extra), (0, extra), (0, 0)))
    x_FyaxbC = x_FyxC.reshape(F, side, size, side, size, C)
    return x_FyaxbC.transpose(0, 1, 3, 2, 4, 5).reshape(F, side * side, size * size * C)


def packed_side(grid: int, size: int) -> int:
    """Returns the tokens along one side after packing."""
    return -(-grid // size)


def steps(cfg: Config) -> tuple[Step, ...]:
    """Returns the parametrized layers of a projector, in order."""
    C, D = cfg.width_in, cfg.width_out
    pack_size(cfg.kind)  # refuses unknown kinds
    if cfg.kind == "identity":
        if C != D:
            raise ValueError(
                f"mm_projector_type='identity' hands a tower of width {C} to a model of width {D}"
            )
        return ()
    if cfg.kind == "linear":
        return (Step("layers", C, D),)
    if match := re.fullmatch(r"mlp(\d+)x_gelu", cfg.kind):
        depth = int(match[1])
        widths = [C] + [D] * depth
        return tuple(
            Step(f"layers.{2 * i}", widths[i], widths[i + 1], gelu=i < depth - 1)
            for i in range(depth)
        )
    size, factors = PACKED[cfg.kind]
    widths = [C * size**2, *(int(C * factor + 1e-6) for factor in factors)]
    out, index = [], 1  # 0 is the pack
    for width, following in zip(widths, [*widths[1:], D], strict=True):
        out.append(Step(f"layers.{index}", width, 0))
        out.append(Step(f"layers.{index + 1}", width, following, gelu=True))
        index += 3
    return (*out, Step(f"layers.{index}", D, D))


class Projector(nnx.Module):
    """The token-wise part of a projector; it takes packed rows."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        self.layers = nnx.Dict(
            {
                _key(step): (
                    layers.Linear(step.width_in, step.width_out, rngs=rngs)
                    if step.width_out
                    else layers.LayerNorm(step.width_in, eps=NORM_EPS)
                )
                for step in steps(cfg)
            }
        )

    def __call__(self, x: Float[Array, "... W"]) -> Float[Array, "... D"]:
        for step in steps(self.cfg):
            x = self.layers[_key(step)](x)
            if step.gelu:
                x = jax.nn.gelu(x, approximate=False)
        return x


def table(cfg: Config, *, hf: str) -> dict[str, Param]:
    """Returns the row of every parameter; `hf` stands before every Hugging Face name."""
    rows = {}
    for step in steps(cfg):
        path = f"projector.layers.{_key(step)}"
        if step.width_out:
            rows[f"{path}.kernel"] = Param(f"{hf}{step.name}.weight", ("embed", None), (1, 0))
        else:
            rows[f"{path}.scale"] = Param(f"{hf}{step.name}.weight", (None,))
        rows[f"{path}.bias"] = Param(f"{hf}{step.name}.bias", (None,))
    return rows


def _key(step: Step) -> str:
    """The index in torch's sequence; a lone layer is 0."""
    return step.name.partition(".")[2] or "0"
