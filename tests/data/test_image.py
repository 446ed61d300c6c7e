"""Image files: read as transformers reads them, bad ones refused by name."""

import itertools
import os

import clips
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from transformers.image_utils import load_image

from longrl_jax.data import image, video
from longrl_jax.models import qwen2_5_vl

SIZE = (24, 36)  # height and width that pictures are resized to


def picture(height=40, width=56, *, seed=0) -> np.ndarray:
    """A smooth picture with noise, uint8 [H, W, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    smooth = np.stack([3 * x, 5 * y, 2 * (x + y)], axis=-1) % 256
    return (smooth + rng.integers(0, 20, smooth.shape)).clip(0, 255).astype(np.uint8)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[0x0112] = orientation
    return tags


def saved(path, *, mode="RGB", **options):
    Image.fromarray(picture()).convert(mode).save(path, **options)
    return path


def of_kinds(folder) -> dict:
    """{what it is: path} of files that all show one picture."""
    found = {
        "PNG": saved(folder / "a.png"),
        "JPEG": saved(folder / "a.jpg", quality=90),
        "CMYK": saved(folder / "cmyk.jpg", mode="CMYK"),
        "WebP": saved(folder / "a.webp", lossless=True),
        "BMP": saved(folder / "a.bmp"),
        "TIFF": saved(folder / "a.tif"),
        "grey": saved(folder / "grey.png", mode="L"),
        "two colours": saved(folder / "bits.png", mode="1"),
        "a palette": saved(folder / "p.png", mode="P"),
        "another ending": saved(folder / "b.txt", format="PNG"),
    }
    see_through = Image.fromarray(picture()).convert("RGBA")
    see_through.putalpha(Image.fromarray(picture(seed=1)[..., 0]))
    see_through.save(folder / "rgba.png")
    see_through.convert("LA").save(folder / "la.png")
    see_through.convert("P").save(folder / "p_alpha.gif", transparency=3)
    found |= {name: folder / name for name in ("rgba.png", "la.png", "p_alpha.gif")}
    moving = [Image.fromarray(picture(seed=seed)) for seed in range(3)]
    for name in ("moving.gif", "moving.png", "moving.webp"):
        moving[0].save(folder / name, save_all=True, append_images=moving[1:])
        found[name] = folder / name
    for turn in range(1, 9):
        found[f"turned {turn}"] = saved(folder / f"turned{turn}.jpg", exif=exif(turn))
    found["turned PNG"] = saved(folder / "turned.png", exif=exif(6))
    return found


def test_pictures_are_those_that_transformers_reads(tmp_path):
    for name, path in of_kinds(tmp_path).items():
        want = load_image(str(path))
        height, width = image.probe(str(path))
        assert (width, height) == want.size, name
        stored = (height, width)
        (same,) = image.read(str(path), size=stored, scales=(), stored=stored)
        np.testing.assert_array_equal(same, np.asarray(want), err_msg=name)
        (resized,) = image.read(str(path), size=SIZE, scales=(), stored=None)
        want = np.asarray(want.resize(SIZE[::-1], Image.Resampling.BICUBIC))
        np.testing.assert_array_equal(resized, want, err_msg=name)


def test_tiles_are_cut_row_by_row_out_of_every_scale(tmp_path):
    path = saved(tmp_path / "a.png")
    scales = ((8, 8), (16, 24), (24, 16))
    got = image.read(str(path), size=(8, 8), scales=scales, stored=(40, 56))
    want = []
    for height, width in scales:
        resized = np.asarray(Image.open(path).resize((width, height), Image.Resampling.BICUBIC))
        for top, left in itertools.product(range(0, height, 8), range(0, width, 8)):
            want.append(resized[top : top + 8, left : left + 8])
    np.testing.assert_array_equal(got, want)
    times_s = (0.0,) * len(want)
    job = video.Job(path=str(path), times_s=times_s, size=(8, 8), decoder="image", scales=scales)
    np.testing.assert_array_equal(np.concatenate(list(video.read_frames(job, chunk=5))), want)


def bad_files(folder) -> dict:
    """{name: (kind of the error, piece of its message)}; the files are in folder."""
    whole = saved(folder / "whole.jpg").read_bytes()
    (folder / "half.jpg").write_bytes(whole[: len(whole) // 2])
    whole = saved(folder / "whole.png").read_bytes()
    (folder / "half.png").write_bytes(whole[: len(whole) // 2])
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    (folder / "flipped.png").write_bytes(flipped)
    (folder / "empty.png").write_bytes(b"")
    (folder / "text.png").write_text("this is no picture" * 10)
    (folder / "folder.png").mkdir()
    (folder / "program.eps").write_text(
        "%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n"
    )
    os.mkfifo(folder / "pipe.png")
    clips.make(folder / "film.mp4", num_frames=3)
    clips.bomb(folder / "bomb.png", 10_000, 7_000)
    clips.bomb(folder / "giant.png", 1_000_000, 1_000_000)
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (2**26 + 10), zip=True)
    saved(folder / "text_bomb.png", pnginfo=text)
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(folder / "deep.png")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(folder / "float.tif")
    return {
        "gone.png": ("missing", "does not exist"),
        "half.jpg": ("corrupt", "cannot be decoded"),
        "half.png": ("corrupt", "cannot be decoded"),
        "flipped.png": ("corrupt", "cannot be decoded"),
        "empty.png": ("empty", "0 bytes"),
        "text.png": ("no_image", "is no picture in PNG, JPEG"),
        "folder.png": ("unreadable", "not a regular file"),
        "program.eps": ("no_image", "is no picture"),
        "pipe.png": ("unreadable", "not a regular file"),
        "film.mp4": ("no_image", "is no picture"),
        "bomb.png": ("too_large", "has 7000 x 10000 px, over 67108864 in all; scale"),
        "giant.png": ("too_large", "over 67108864"),
        "text_bomb.png": ("corrupt", "cannot be decoded"),
        "deep.png": ("deep", "over 8 bits a channel (mode I;16)"),
        "float.tif": ("deep", "over 8 bits a channel (mode F)"),
    }


def test_bad_files_are_refused_by_name_and_cost_nothing_else(tmp_path):
    bad, good = bad_files(tmp_path), saved(tmp_path / "good.png")
    jobs = [
        video.Job(path=str(tmp_path / name), times_s=(0.0,), size=SIZE, decoder="image")
        for name in (*bad, good.name)
    ]
    with video.DecoderPool(1, timeout_s=30) as pool:
        items = {item.job_index: item for item in pool.decode(jobs, chunk=4)}
        assert len(pool._workers) == 1  # the same process to the end
    for i, (name, (kind, said)) in enumerate(bad.items()):
        error = items[i].error
        assert (error.kind, name in str(error), said in str(error)) == (kind, True, True), error
        if name not in ("half.jpg", "half.png", "flipped.png", "text_bomb.png"):  # header is fine
            with pytest.raises(video.VideoError) as caught:
                video.probe_image(tmp_path / name)
            assert caught.value.kind == kind
    want = np.asarray(Image.open(good).resize(SIZE[::-1], Image.Resampling.BICUBIC))
    np.testing.assert_array_equal(items[len(bad)].frames, want[None])


def test_images_and_films_come_out_of_one_pool(tmp_path):
    """Each with a chunk of its own; a still is as many frames as are asked for."""
    still, film = saved(tmp_path / "a.png"), clips.make(tmp_path / "film.mp4", num_frames=20)
    jobs = [
        video.Job(path=str(still), times_s=(0.0, 0.0), size=SIZE, decoder="image"),
        video.Job(
            path=str(film), times_s=tuple(i / 10 for i in range(20)), size=(32, 32), decoder="pyav"
        ),
        video.Job(path=str(still), times_s=(0.0,), size=(8, 8), decoder="image", stored=(40, 56)),
        video.Job(path=str(still), times_s=(0.0,), size=(8, 8), decoder="image", stored=(56, 40)),
    ]
    shapes, errors = {}, {}
    with video.DecoderPool(2, timeout_s=30) as pool:
        for item in pool.decode(jobs, chunk=[2, 8, 4, 4]):
            if isinstance(item, video.Failed):
                errors[item.job_index] = str(item.error)
            else:
                shapes.setdefault(item.job_index, []).append(item.frames.shape[:3])
    assert shapes == {0: [(2, *SIZE)], 1: [(8, 32, 32), (8, 32, 32), (4, 32, 32)], 2: [(1, 8, 8)]}
    assert list(errors) == [3] and "shows 40 x 56 px, not 56 x 40" in errors[3]


def test_a_version_is_named_for_the_key():
    assert "pillow" in video.decoder_version("image") and "av" not in video.decoder_version("image")


BOUNDS = {
    "published": qwen2_5_vl.IMAGE_PIXELS,
    "small": (4 * 784, 12 * 784),
    "large": (10_000, 10**6),
}


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("size", [(40, 56), (300, 20), (13, 17), (211, 467), (28, 28)])
def test_qwen_pictures_are_those_of_its_processor(tmp_path, size, bounds):
    """Pixel for pixel those of the Pillow processor; the patches are put together again."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    fewest, most = BOUNDS[bounds]
    path = tmp_path / "a.png"
    image.write_png(path, picture(*size))
    processor = Qwen2VLImageProcessorPil(
        size={"shortest_edge": fewest, "longest_edge": most},
        image_mean=list(qwen2_5_vl.IMAGE_MEAN),
        image_std=list(qwen2_5_vl.IMAGE_STD),
    )
    out = processor(load_image(str(path)), return_tensors="np")
    ((t, rows, columns),) = out["image_grid_thw"].tolist()
    patches = out["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    frames = patches.transpose(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, rows * 14, columns * 14, 3)
    height, width = qwen2_5_vl.smart_resize(*size, fewest, most, factor=28)
    (got,) = image.read(str(path), size=(height, width), scales=(), stored=size)
    assert t == 1
    np.testing.assert_array_equal(frames[0], frames[1])  # a unit of twice the same picture
    std, mean = np.array(qwen2_5_vl.IMAGE_STD), np.array(qwen2_5_vl.IMAGE_MEAN)
    shown = (frames[0] * std + mean) * 255
    np.testing.assert_allclose(shown, got, rtol=0, atol=1e-3)  # whole numbers through float32


def test_the_torch_processor_of_qwen_differs_by_its_own_resize(tmp_path):
    """It resizes tensors, which rounds otherwise: one or two of 255 on a few pixels."""
    from transformers import Qwen2VLImageProcessor

    path = tmp_path / "a.png"
    image.write_png(path, picture(211, 467))
    out = Qwen2VLImageProcessor(size={"shortest_edge": 3136, "longest_edge": 20 * 784})(
        load_image(str(path)), return_tensors="pt"
    )
    ((_, rows, columns),) = out["image_grid_thw"].tolist()
    patches = out["pixel_values"].reshape(rows // 2, columns // 2, 2, 2, 3, 2, 14, 14)
    frame = patches.permute(5, 0, 2, 6, 1, 3, 7, 4).reshape(2, rows * 14, columns * 14, 3)[0]
    shown = (frame * torch.tensor(qwen2_5_vl.IMAGE_STD) + torch.tensor(qwen2_5_vl.IMAGE_MEAN)) * 255
    size = (rows * 14, columns * 14)
    (got,) = image.read(str(path), size=size, scales=(), stored=None)
    off = np.abs(shown.numpy() - got)
    assert off.max() < 2.5 and off.mean() < 0.2


def test_vila_pictures_are_those_of_siglip(tmp_path):
    """Of any aspect, resized to the tower's square."""
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    path = tmp_path / "a.png"
    for size in ((40, 56), (224, 224), (13, 700)):
        image.write_png(path, picture(*size))
        processor = SiglipImageProcessorPil(size={"height": 56, "width": 56})
        (want,) = processor(load_image(str(path)), return_tensors="np")["pixel_values"]
        (got,) = image.read(str(path), size=(56, 56), scales=(), stored=None)
        shown = (want.transpose(1, 2, 0) * 0.5 + 0.5) * 255
        np.testing.assert_allclose(shown, got, rtol=0, atol=1e-3)
