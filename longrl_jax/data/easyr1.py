"""Questions about images, and text math, in EasyR1's form: parquet or JSON lines.

Source: hiyouga/EasyR1 (verl/utils/dataset.py, examples/config.yaml: prompt_key problem, answer_key
answer, image_key images): problem, answer, and images, each {bytes, path}, bytes alone or a path.
So are BUAADreamer/clevr_count_70k, hiyouga/geometry3k and hiyouga/math12k. There is no id: it is
the place in the file.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrl_jax.data import longvideo_reason, parquet, unpacked
from longrl_jax.data.fields import RecordError, Records, Rows, need_object, shown
from longrl_jax.data.rows import JsonLines
from longrl_jax.types import Example

COLUMNS = ("id", "problem", "prompt", "question", "answer", "images", "image", "videos")


def open_image_qa(root: Path, file: str) -> Records:
    """Opens root/file, all of whose questions must have an image. Images that stand in it are taken
    out when they are read, into root/unpacked, by their content."""
    return _open(root, file, with_images=True)


def open_text_math(root: Path, file: str) -> Records:
    """Opens root/file, none of whose questions may have an image."""
    return _open(root, file, with_images=False)


def to_example(row: Any, *, with_images: bool, root: Path, where: str) -> Example:
    """Turns a row into an Example; what stands in it by its bytes is written to a file."""
    tree = dict(need_object(row, where))
    if not {"id", "problem_id"} & tree.keys():
        tree["id"] = where
    for name in ("images", "image"):
        value = tree.get(name)
        if value is not None:
            images = value if isinstance(value, list) else [value]
            tree[name] = [_path(image, root, where) for image in images]
    example = longvideo_reason.to_example(tree, root=root, where=where)
    if with_images != bool(example.media):
        wish = "name one in images" if with_images else "read it as data.source=image_qa"
        raise RecordError(
            where, f"the question {shown(example.question)} has {len(example.media)} images; {wish}"
        )
    return example


def _open(root: Path, file: str, *, with_images: bool) -> Records:
    root = Path(root)
    if parquet.is_parquet(root, file):
        rows: Rows = parquet.Parquet(root, file, COLUMNS)
    else:
        rows = JsonLines(root, file)
    return Records(rows, functools.partial(to_example, with_images=with_images, root=root))


def _path(image: Any, root: Path, where: str) -> Any:
    """Returns the path of an image, taken out of the file if it stands in it."""
    content = image.get("bytes") if isinstance(image, Mapping) else image
    if isinstance(content, bytes):
        return unpacked.image_file(content, root, where)
    if isinstance(image, Mapping) and content is None:
        return image.get("path")
    return image
