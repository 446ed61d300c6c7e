"""One image at several scales (S2): sizes, tiles, resizing, and states put together.

Every scale is cut into tiles of the tower's size; the states of a scale's tiles are put back side
by side, resized to the grid of one scale and stacked along the channels.
Source: arXiv:2403.13043; bfshi/scaling_on_scales s2wrapper/core.py (fixed scales); NVlabs/VILA
mm_utils.dynamic_s2_preprocess and llava_arch.merge_features_for_dynamic_s2 (dynamic ones, whose
last scale follows the aspect of the image).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from longrl_jax.models.layers import wide

BICUBIC_A = -0.75
"""torch's; Pillow and jax.image have -0.5."""
Grid = tuple[int, int]
"""Rows and columns."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Sizes that an image is seen at."""

    sizes: tuple[int, ...]
    """Sides in pixels, ascending."""
    tile: int
    """Side of the tower's images, in pixels."""
    output: int
    """Index of the scale whose grid the states of all scales are resized to."""
    dynamic: bool
    """The last scale follows the aspect of an image, and video frames have the first scale only."""

    @property
    def blocks(self) -> tuple[Grid, ...]:
        """Tiles of a square image at every scale."""
        sides = [-(-size // self.tile) for size in self.sizes]
        return tuple((side, side) for side in sides)


def closest_grid(height: int, width: int, *, fewest: int, most: int, tile: int) -> Grid:
    """Returns the rows and columns of tiles, fewest to most in all, of the nearest aspect.

    Of equally near ones the last that the image has over half of the pixels for, in the order of
    their number of tiles. Source: NVlabs/VILA mm_utils.find_closest_aspect_ratio.
    """
    aspect, best, best_difference = width / height, (1, 1), float("inf")
    sides = range(1, most + 1)
    grids = [(r, c) for r in sides for c in sides if fewest <= r * c <= most]
    for rows, columns in sorted(grids, key=lambda grid: grid[0] * grid[1]):
        difference = abs(aspect - columns / rows)
        large = width * height > 0.5 * tile**2 * rows * columns
        if difference < best_difference or (difference == best_difference and large):
            best, best_difference = (rows, columns), difference
    return best


def split(x: Float[Array, "F Y X C"], blocks: Grid) -> Float[Array, "FN y x C"]:
    """Cuts arrays into rows * columns tiles in reading order, those of one array together."""
    F, Y, X, C = x.shape
    rows, columns = blocks
    x_FrycxC = x.reshape(F, rows, Y // rows, columns, X // columns, C)
    return x_FrycxC.transpose(0, 1, 3, 2, 4, 5).reshape(-1, Y // rows, X // columns, C)


def merge(x: Float[Array, "FN y x C"], blocks: Grid) -> Float[Array, "F Y X C"]:
    """Undoes `split`."""
    (rows, columns), (_, y, x_, C) = blocks, x.shape
    x_FrcyxC = x.reshape(-1, rows, columns, y, x_, C)
    return x_FrcyxC.transpose(0, 1, 3, 2, 4, 5).reshape(-1, rows * y, columns * x_, C)


def multiscale(
    pixels: Float[Array, "F Y X 3"],
    scales: Scales,
    tower: Callable[[Float[Array, "N y x 3"]], Float[Array, "N n C"]],
) -> Float[Array, "F P Q W"]:
    """Returns the states of square images at fixed scales; W = channels of all of them.

    Images are resized bicubically without smoothing, states by area, both in float32, as
    torch.nn.functional.interpolate does it.
    """
    states = []
    for size, blocks in zip(scales.sizes, scales.blocks, strict=True):
        whole = blocks[0] * scales.tile
        x = bicubic(bicubic(pixels, (size, size)), (whole, whole))
        x_FYXC = merge(square(tower(split(x, blocks))), blocks)
        side = -(-size * x_FYXC.shape[1] // whole)  # of a scale that is no multiple of the tile
        states.append(area(x_FYXC, (side, side)))
    return stack(states, scales.output)


def stack(states: Sequence[Float[Array, "F Y X C"]], output: int) -> Float[Array, "F P Q W"]:
    """Resizes every scale's states to the grid of the scale `output`; joins their channels."""
    grid = states[output].shape[1], states[output].shape[2]
    return jnp.concatenate([area(x, grid) for x in states], axis=-1)


def square(x: Float[Array, "N n C"]) -> Float[Array, "N g g C"]:
    """Gives patches in reading order their two dims back."""
    N, n, C = x.shape
    side = round(n**0.5)
    assert side**2 == n, f"{n} patches are no square"
    return x.reshape(N, side, side, C)


def area(x: Float[Array, "F Y X C"], size: Grid) -> Float[Array, "F P Q C"]:
    """Means over the cells that an output cell touches (interpolate's mode "area")."""
    return _resize(x, size, _area_weights)


def bicubic(x: Float[Array, "F Y X C"], size: Grid) -> Float[Array, "F P Q C"]:
    """interpolate's mode "bicubic", align_corners=False, antialias=False."""
    return _resize(x, size, _bicubic_weights)


def _resize(
    x: Float[Array, "F Y X C"], size: Grid, weights: Callable[[int, int], np.ndarray]
) -> Float[Array, "F P Q C"]:
    y = wide(x)
    for axis, (before, after) in enumerate(zip(x.shape[1:3], size, strict=True), start=1):
        if before != after:
            w = jnp.asarray(weights(before, after), y.dtype)
            # highest: GPUs would else round float32 to 10 bits
            y = jnp.moveaxis(
                jnp.tensordot(w, y, (1, axis), precision=jax.lax.Precision.HIGHEST), 0, axis
            )
    return y.astype(x.dtype)


def _area_weights(before: int, after: int) -> np.ndarray:
    """[after, before]."""
    weights = np.zeros((after, before))
    for i in range(after):
        cells = slice(i * before // after, -(-(i + 1) * before // after))
        weights[i, cells] = 1 / (cells.stop - cells.start)
    return weights


def _bicubic_weights(before: int, after: int) -> np.ndarray:
    """[after, before]; beyond the border stands the border's pixel."""
    weights = np.zeros((after, before))
    a = BICUBIC_A
    for i in range(after):
        place = (i + 0.5) * before / after - 0.5
        first = int(np.floor(place))
        for tap in range(first - 1, first + 3):
            d = abs(place - tap)
            near = (a + 2) * d**3 - (a + 3) * d**2 + 1
            far = a * (d**3 - 5 * d**2 + 8 * d - 4)
            weights[i, min(max(tap, 0), before - 1)] += near if d <= 1 else far
    return weights
