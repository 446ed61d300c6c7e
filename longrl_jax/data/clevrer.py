"""Questions of CLEVRER: a JSON array of scenes.

Source: chuangg/CLEVRER (executor/run_mc.py) and public loaders: scene_index, video_filename and
questions: question_id, question, question_type; a descriptive one has a short text as `answer`, the
others (explanatory, predictive, counterfactual) choices, each with its own `answer`, correct or
wrong. Any number of choices may be correct.
"""

import functools
import re
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import LETTERS, RecordError, Records, shown
from longrl_jax.data.rows import JsonArray
from longrl_jax.options import ANY_NUMBER
from longrl_jax.types import Example, MediaFile

DESCRIPTIVE = "descriptive"
VIDEO = re.compile(r"video_(\d{5})\.mp4")
PARTS = ((10_000, "video_train"), (15_000, "video_validation"), (20_000, "video_test"))
"""Numbers of films below which -> their folder."""


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. Film video_10003.mp4 is looked for in root/videos,
    root/video_10000-11000, and root/video_validation/video_10000-11000."""
    root = Path(root)
    return Records(JsonArray(root, file, _questions), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    """Turns one question of a scene, as `_questions` gives it, into an Example."""
    row = fields.need_object(row, where)
    film = fields.text(row, "video_filename", where)
    kind = fields.text(row, "question_type", where)
    question = fields.text(row, "question", where)
    if kind == DESCRIPTIVE:
        answer = fields.text(row, "answer", where)
    else:
        choices, right = _choices(row.get("choices"), where)
        question = fields.with_options(f"{question} {ANY_NUMBER}", choices)
        answer = ", ".join(right) or "none"
    return Example(
        id=f"{film.removesuffix('.mp4')}-{fields.identifier(row, 'question_id', where)}",
        question=question,
        answer=answer,
        kind=kind,
        media=(MediaFile(kind="video", path=_path(film, root, where)),),
        tags=fields.tags(subtype=fields.label(row, "question_subtype", where)),
    )


def _choices(value: Any, where: str) -> tuple[list[str], list[str]]:
    """Returns the texts of the choices and the letters of the correct ones."""
    if not isinstance(value, list) or not value or not all(isinstance(x, dict) for x in value):
        raise RecordError(where, f"choices={shown(value)} must be a list of objects")
    if len(value) > len(LETTERS):
        raise RecordError(where, f"choices has {len(value)}; {len(LETTERS)} have a letter")
    texts = [fields.text(choice, "choice", where) for choice in value]
    for choice in value:
        if choice.get("answer") not in ("correct", "wrong"):
            raise RecordError(
                where, f"answer={shown(choice.get('answer'))} of a choice must be correct or wrong"
            )
    right = [letter for letter, x in zip(LETTERS, value, strict=False) if x["answer"] == "correct"]
    return texts, right


def _path(film: str, root: Path, where: str) -> str:
    match = VIDEO.fullmatch(film)
    if match is None:
        raise RecordError(where, f"video_filename={shown(film)} must be like video_10003.mp4")
    number = int(match[1])
    low = number // 1000 * 1000
    folder = f"video_{low:05d}-{low + 1000:05d}"
    part = next((name for end, name in PARTS if number < end), PARTS[-1][1])
    paths = [f"videos/{film}", f"{folder}/{film}", f"{part}/{folder}/{film}"]
    return fields.first_file("video_filename", paths, root, where)


def _questions(tree: Any) -> list[Any]:
    """Returns the questions of a scene, each with the name of its film."""
    asked = tree.get("questions") if isinstance(tree, dict) else None
    if not isinstance(asked, list):
        return [tree]
    film = tree.get("video_filename")
    return [
        {**question, "video_filename": film} if isinstance(question, dict) else question
        for question in asked
    ]
