"""Image files: their size, and their pixels as the reference processors read them.

Like video.py it imports nothing of ours: a decoder process loads it by its path. Source:
transformers image_utils.load_image: turned as EXIF says, then RGB; of an animation the first
picture.
"""

import contextlib
import io
import os
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

MAX_PIXELS = 2**26
"""Most pixels of a file, 201 MB as RGB: some kilobytes can ask for thousands of times as many."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
"""What Pillow is let open. It knows formats that run other programs (EPS)."""
DEEP_MODES = ("I", "F")
"""Beginnings of Pillow's modes of over 8 bits a channel, which its RGB cuts off at 255."""


class Unusable(Exception):
    """(kind, what is wrong): a key of video.KINDS, and words that follow the file's name."""


def probe(path: str) -> tuple[int, int]:
    """Returns height and width, in pixels, as shown. Raises Unusable."""
    with _open(path) as image:
        turned = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)  # EXIF's Orientation
        width, height = image.size[::-1] if turned else image.size
    return height, width


def read(
    path: str,
    *,
    size: tuple[int, int],
    scales: Sequence[tuple[int, int]],
    stored: tuple[int, int] | None,
) -> np.ndarray:
    """Returns uint8 [tiles, H, W, 3]: types.View's tiles of the scales, one by one; without scales
    the whole picture, resized to `size`. stored: height and width that it must have."""
    from PIL import Image, ImageOps

    with _open(path) as opened:
        image = ImageOps.exif_transpose(opened).convert("RGB")
    if stored is not None and image.size[::-1] != stored:
        what = "shows {} x {} px, not {} x {} as when it was measured"
        raise Unusable("corrupt", what.format(*image.size[::-1], *stored))
    tiles = []
    for height, width in scales or (size,):
        resized = image.resize((width, height), Image.Resampling.BICUBIC)
        tiles.append(_cut(np.asarray(resized), size))
    return np.concatenate(tiles)


def write_png(path: str | os.PathLike[str], picture: np.ndarray) -> None:
    """picture: uint8 [H, W, 3]."""
    from PIL import Image

    Image.fromarray(picture).save(path, "PNG")


def jpeg(picture: np.ndarray, *, quality: int) -> bytes:
    """Returns a JPEG file; picture: uint8 [H, W, 3]; quality: 1 to 95, as Pillow has it."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", quality=quality)
    return file.getvalue()


def _cut(picture_YX3: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns the tiles of a picture, row by row."""
    height, width = size
    tiles_RHCW3 = picture_YX3.reshape(-1, height, picture_YX3.shape[1] // width, width, 3)
    return tiles_RHCW3.swapaxes(1, 2).reshape(-1, height, width, 3)


@contextlib.contextmanager
def _open(path: str) -> Iterator[Any]:
    """Opens a file by its content, whatever its name ends in; all that goes wrong is Unusable."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata, and of sizes that we check
            with Image.open(path, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    what = f"has {image.height} x {image.width} px, over {MAX_PIXELS} in all"
                    raise Unusable("too_large", what)
                if image.mode.startswith(DEEP_MODES):
                    raise Unusable("deep", f"has over 8 bits a channel (mode {image.mode})")
                yield image
    except Unusable:
        raise
    except UnidentifiedImageError:
        raise Unusable("no_image", f"is no picture in {', '.join(FORMATS)}") from None
    except Image.DecompressionBombError:
        raise Unusable("too_large", f"has over {MAX_PIXELS} px in all") from None
    except Exception as error:  # damaged files raise nearly anything, SyntaxError too
        raise Unusable("corrupt", f"cannot be decoded ({error})") from error
