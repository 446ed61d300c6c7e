"""S2 against torch: resizing, tiles, and whole encoders written down from the description."""

import dataclasses
import itertools

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from tiny_models import VISION_WIDTH, WIDTH, write_vila
from torch.nn.functional import interpolate

from longrl_jax import models
from longrl_jax.models import s2, vila

ATOL = 2e-5  # float32 sums of up to 288 products, in another order; states are of order 1
DYNAMIC = {"dynamic_s2": True, "s2_scales": "32,64", "image_aspect_ratio": "dynamic_s2"}
FIXED = {"s2": True, "s2_scales": "32,64,96", "s2_max_split_size": 32}


@pytest.mark.parametrize("size", [(5, 7), (8, 8), (16, 3), (24, 32), (8, 12)], ids=str)
@pytest.mark.parametrize("mode", ["area", "bicubic"])
def test_resizing_equals_torch(rng, mode, size):
    x = rng.standard_normal((2, 8, 12, 3)).astype(np.float32)
    options = {"align_corners": False} if mode == "bicubic" else {}
    want = interpolate(torch.tensor(x).permute(0, 3, 1, 2), size=size, mode=mode, **options)
    got = getattr(s2, mode)(jnp.asarray(x), size)
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=ATOL)


def test_bfloat16_states_are_averaged_in_float32():
    """1,024 ones: a bfloat16 sum of ones stops at 256."""
    x = jnp.ones((1, 32, 32, 1), jnp.bfloat16)
    assert s2.area(x, (1, 1)).dtype == jnp.bfloat16
    np.testing.assert_array_equal(s2.area(x, (1, 1)).astype(np.float32), 1)


def test_tiles_are_cut_in_reading_order_and_put_back():
    x = jnp.arange(24.0).reshape(1, 4, 6, 1)
    tiles = s2.split(x, (2, 3))[..., 0]
    np.testing.assert_array_equal(tiles[1], [[2, 3], [8, 9]])
    np.testing.assert_array_equal(tiles[3], [[12, 13], [18, 19]])
    np.testing.assert_array_equal(s2.merge(s2.split(x, (2, 3)), (2, 3)), x)


def grid_by_loop(height: int, width: int, fewest: int, most: int, tile: int) -> tuple[int, int]:
    """Every shape (columns, rows) by number of tiles; the first of the least difference, later ones
    of the same difference where the image is large."""
    shapes = sorted(
        {(i, j) for i, j in itertools.product(range(1, most + 1), repeat=2)},
        key=lambda s: s[0] * s[1],
    )
    shapes = [s for s in shapes if fewest <= s[0] * s[1] <= most]
    least = min(abs(width / height - i / j) for i, j in shapes)
    near = [s for s in shapes if abs(width / height - s[0] / s[1]) == least]
    kept = near[0]
    for i, j in near[1:]:
        if width * height > tile * tile * i * j / 2:
            kept = (i, j)
    return kept[1], kept[0]


def test_grid_of_an_image_equals_the_loop():
    rng = np.random.default_rng(0)
    sizes = [*rng.integers(20, 4000, (200, 2)).tolist(), [448, 448], [1344, 1344], [900, 1200]]
    for (height, width), (fewest, most) in itertools.product(sizes, [(1, 12), (9, 12), (1, 6)]):
        got = s2.closest_grid(height, width, fewest=fewest, most=most, tile=448)
        assert got == grid_by_loop(height, width, fewest, most, 448), (height, width)


def test_grids_of_common_images():
    """9 to 12 tiles, as NVILA's last scale: a square, 4:3, 16:9, a page, a strip."""
    sizes = [(500, 500), (480, 640), (1080, 1920), (1754, 1240), (100, 2000)]
    grids = [s2.closest_grid(h, w, fewest=9, most=12, tile=448) for h, w in sizes]
    assert grids == [(3, 3), (3, 4), (3, 4), (4, 3), (1, 12)]


def to_pixels(pictures: np.ndarray) -> torch.Tensor:
    """SigLIP's numbers, [N, 3, Y, X]."""
    return (torch.tensor(pictures).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def states_of(tower, pixels: torch.Tensor) -> torch.Tensor:
    """Hidden state -2 as a picture, [N, C, g, g]."""
    with torch.no_grad():
        x = tower(pixels, output_hidden_states=True).hidden_states[-2]
    side = round(x.shape[1] ** 0.5)
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


def pieces(x: torch.Tensor, rows: int, columns: int) -> list[torch.Tensor]:
    """The tiles of [N, C, Y, X] in reading order, each of all N."""
    bands = x.chunk(rows, dim=2)
    return [tile for band in bands for tile in band.chunk(columns, dim=3)]


def whole(tiles: list[torch.Tensor], rows: int, columns: int) -> torch.Tensor:
    bands = [torch.cat(tiles[r * columns : (r + 1) * columns], dim=3) for r in range(rows)]
    return torch.cat(bands, dim=2)


def fixed_twin(tower, pictures: np.ndarray, sizes, tile: int, output: int) -> torch.Tensor:
    """[F, n, W]: every picture at every size."""
    pixels, found = to_pixels(pictures), []
    for size in sizes:
        side = -(-size // tile)
        x = interpolate(pixels, size=(size, size), mode="bicubic")
        x = interpolate(x, size=(side * tile, side * tile), mode="bicubic")
        merged = whole([states_of(tower, t) for t in pieces(x, side, side)], side, side)
        kept = -(-size * merged.shape[2] // (side * tile))
        found.append(interpolate(merged, size=(kept, kept), mode="area"))
    at = found[output].shape[2:]
    joined = torch.cat([interpolate(x, size=at, mode="area") for x in found], dim=1)
    return joined.flatten(2).transpose(1, 2)


def dynamic_twin(parts, tiles: np.ndarray, blocks, output: int) -> torch.Tensor:
    """[tokens, D] of one image, whose tiles at the scales are blocks[i] = (rows, columns)."""
    states = states_of(parts["vision_tower"], to_pixels(tiles))
    found, used = [], 0
    for rows, columns in blocks:
        found.append(whole([x[None] for x in states[used : used + rows * columns]], rows, columns))
        used += rows * columns
    at = found[output].shape[2:]
    joined = torch.cat([interpolate(x, size=at, mode="area") for x in found], dim=1)
    rows, columns = blocks[output]
    cut = torch.cat(pieces(joined, rows, columns)).flatten(2).transpose(1, 2)
    with torch.no_grad():
        tokens = parts["mm_projector"](cut)  # [tiles, m, D]
    side = round(tokens.shape[1] ** 0.5)
    squares = tokens.transpose(1, 2).reshape(len(tokens), -1, side, side)
    return whole([x[None] for x in squares], rows, columns)[0].flatten(1).T


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        # as VILA1.5-3b-s2, which names no output: the first scale
        pytest.param({}, "mlp_downsample", id="first", marks=pytest.mark.slow),
        pytest.param(
            {"s2_resize_output_to_scale_idx": -1},
            "mlp_downsample_3x3_s2",
            id="last",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"s2_resize_output_to_scale_idx": 1, "s2_scales": "96,32,48"}, "mlp2x_gelu", id="odd"
        ),
    ],
)
def test_fixed_scales_equal_torch(tmp_path, rng, changes, kind):
    parts = write_vila(tmp_path / "v", kind=kind, num_scales=3, top=FIXED | changes)
    cfg, model = models.load(tmp_path / "v")
    frames = rng.integers(0, 256, (2, 96, 96, 3), dtype=np.uint8)
    scales = cfg.scales
    states = fixed_twin(parts["vision_tower"], frames, scales.sizes, 32, scales.output)
    with torch.no_grad():
        want = parts["mm_projector"](states).numpy()
    got = model.encode(jnp.asarray(frames), stage="projected")
    np.testing.assert_allclose(got, want, atol=ATOL)
    assert got.shape == (2, np.prod(vila.media_layout(cfg).grid), WIDTH)
    packed = model.encode(jnp.asarray(frames), stage="packed")
    assert packed.shape[-1] == vila.feature_width(cfg, "packed")
    np.testing.assert_allclose(model.projector(packed), want, atol=ATOL)


@pytest.mark.parametrize("stage", vila.STAGES)
@pytest.mark.parametrize(
    ("grid", "output", "kind"),
    [
        ((2, 3), -1, "mlp_downsample"),
        pytest.param((4, 1), -1, "mlp_downsample_3x3_s2", marks=pytest.mark.slow),
        pytest.param((2, 2), 0, "mlp_downsample_3x3_s2_new", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_an_image_at_dynamic_scales_equals_torch(tmp_path, rng, grid, output, kind, stage):
    top = DYNAMIC | {"s2_resize_output_to_scale_idx": output}
    parts = write_vila(tmp_path / "v", kind=kind, num_scales=2, top=top)
    cfg, model = models.load(tmp_path / "v")
    cfg = dataclasses.replace(cfg, tiles=(1, grid[0] * grid[1]))
    view = vila.image_view(cfg, 320 * grid[0], 320 * grid[1])
    assert view.scales == ((32, 32), (32 * grid[0], 32 * grid[1]))
    tiles = rng.integers(0, 256, (2, view.inputs, 32, 32, 3), dtype=np.uint8)
    want = [dynamic_twin(parts, image, [(1, 1), grid], output).numpy() for image in tiles]
    got = model.encode(jnp.asarray(tiles.reshape(-1, 32, 32, 3)), view=view, stage=stage)
    assert got.shape == (2, np.prod(view.grid), vila.feature_width(cfg, stage))
    if stage == "packed":
        got = model.projector(got)
    np.testing.assert_allclose(got, want, atol=ATOL)


@pytest.mark.slow
def test_three_dynamic_scales_equal_torch(tmp_path, rng):
    """NVILA-8B's: 448, 896, 1344, here 32, 64, 96."""
    top = DYNAMIC | {"s2_scales": "32,64,96", "s2_resize_output_to_scale_idx": -1}
    parts = write_vila(tmp_path / "v", kind="mlp_downsample", num_scales=3, top=top)
    cfg, model = models.load(tmp_path / "v")
    view = vila.image_view(cfg, 480, 640)
    assert (view.inputs, view.grid) == (1 + 4 + 12, (3 * 2, 4 * 2))
    tiles = rng.integers(0, 256, (view.inputs, 32, 32, 3), dtype=np.uint8)
    want = dynamic_twin(parts, tiles, [(1, 1), (2, 2), (3, 4)], -1).numpy()
    got = model.encode(jnp.asarray(tiles), view=view, stage="projected")[0]
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_a_films_frame_has_one_scale_that_stands_for_all(tmp_path, rng):
    """Published: frames come without block sizes, and their states are repeated over channels."""
    parts = write_vila(tmp_path / "v", kind="mlp_downsample", num_scales=2, top=DYNAMIC)
    _, model = models.load(tmp_path / "v")
    frames = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    states = states_of(parts["vision_tower"], to_pixels(frames)).flatten(2).transpose(1, 2)
    with torch.no_grad():
        want = parts["mm_projector"](states.repeat(1, 1, 2)).numpy()
    got = model.encode(jnp.asarray(frames), stage="projected")
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_scales_change_what_stored_features_are_called(tmp_path):
    write_vila(tmp_path / "v", kind="mlp_downsample", num_scales=2, top=DYNAMIC)
    cfg, _ = models.load(tmp_path / "v")
    other = dataclasses.replace(cfg, scales=dataclasses.replace(cfg.scales, output=1))
    first = dataclasses.replace(cfg, drop_first=True)
    assert len({vila.stage_identity(c, "packed") for c in (cfg, other, first)}) == 3
    assert cfg.projector.width_in == 2 * VISION_WIDTH
