"""Multiple-choice questions of PerceptionTest: a JSON object of videos, or parquet as on the hub.

Source: google-deepmind/perception_test (README: metadata.video_id; mc_question: id, question,
options, answer_id, area, reasoning, tag). The hub's lmms-lab/PerceptionTest_Val has a row a
question, with video_name and question_id (lmms_eval/tasks/perceptiontest).
"""

import functools
from pathlib import Path
from typing import Any

from longrl_jax.data import fields, parquet
from longrl_jax.data.fields import Records, Rows
from longrl_jax.data.rows import JsonArray
from longrl_jax.types import Example, MediaFile

COLUMNS = (
    *("video_name", "question_id", "question", "options", "answer_id"),
    *("area", "reasoning", "tag"),
)


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The film of video V is root/videos/V.mp4."""
    root = Path(root)
    if parquet.is_parquet(root, file):
        rows: Rows = parquet.Parquet(root, file, COLUMNS)
    else:
        rows = JsonArray(root, file, _questions)
    return Records(rows, functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    """row: a question as on the hub, or as `_questions` gives it."""
    row = fields.need_object(row, where)
    name = "video_name" if "video_name" in row else "video_id"
    film = fields.text(row, name, where)
    options = fields.options_of(row.get("options"), "options", where)
    path = f"videos/{film}.mp4"
    fields.check_inside(name, path, root, where)
    return Example(
        id=f"{film}-{fields.identifier(row, 'question_id', where)}",
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=fields.letter_of(row, "answer_id", len(options), where),
        kind=fields.label(row, "area", where),
        media=(MediaFile(kind="video", path=path),),
        tags=fields.tags(
            reasoning=fields.label(row, "reasoning", where), tag=fields.label(row, "tag", where)
        ),
    )


def _questions(tree: Any) -> list[Any]:
    """Returns the questions about a video, each with the name of its film; there may be none."""
    if not isinstance(tree, dict) or not isinstance(tree.get("metadata"), dict):
        return [tree]
    asked = tree.get("mc_question", [])
    if not isinstance(asked, list):
        return [tree]
    film = tree["metadata"].get("video_id")
    return [
        {**question, "video_id": film, "question_id": question.get("id")}
        if isinstance(question, dict)
        else question
        for question in asked
    ]
