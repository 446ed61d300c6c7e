"""Questions of VNBench: VNBench-main-4try.json, an array.

Source: joez17/VideoNIAH (README, llava_examples/model_video_niah.py, evaluation_utils.py) and VILA
llava/eval/vnbench.py: video, question, options (four, texts or numbers), gt, gt_option (the letter
of gt), length, type (e.g. ret_edit1, ord_insert2, cnt_edit2), try (0 to 3: the same question with
its options rotated, right only if all four are).
"""

import functools
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import RecordError, Records
from longrl_jax.data.video_mme import letter, rows_of
from longrl_jax.types import Example, MediaFile

TASKS = {"ret": "retrieval", "ord": "ordering", "cnt": "counting"}
"""How a type begins -> what it asks for."""
COLUMNS = ("video", "question", "options", "gt", "gt_option", "length", "type", "try")
ROUND = "question"
"""Tag that the rotations of one question share."""


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The film is root/VIDEO, whether or not its path begins with a slash."""
    root = Path(root)
    return Records(rows_of(root, file, COLUMNS), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    row = fields.need_object(row, where)
    given = row.get("options")
    numbers = isinstance(given, list) and all(type(x) is int for x in given)
    options = fields.options_of([str(x) for x in given] if numbers else given, "options", where)
    if "gt_option" in row:
        answer = letter(row, "gt_option", len(options), where)
    else:
        answer = _place_of(fields.identifier(row, "gt", where), options, where)
    kind = fields.text(row, "type", where)
    film = fields.text(row, "video", where).lstrip("/")
    fields.check_inside("video", film, root, where)
    asked = f"{Path(film).stem}_{kind}"
    return Example(
        id=f"{asked}_{fields.identifier(row, 'try', where)}",
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=answer,
        kind=kind,
        media=(MediaFile(kind="video", path=film),),
        tags=fields.tags(task=TASKS.get(kind[:3], ""), **{ROUND: asked}),
    )


def _place_of(right: str, options: list[str], where: str) -> str:
    if options.count(right) != 1:
        raise RecordError(where, f"gt={right!r} must be one of the options {options}")
    return fields.LETTERS[options.index(right)]
