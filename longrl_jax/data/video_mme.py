"""Questions of Video-MME: parquet as on the hub, or its rows as JSON (an array, or lines).

Source: lmms-eval tasks/videomme (videomme.yaml, utils.py), which reads lmms-lab/Video-MME:
question_id, videoID, duration (short, medium, long), domain, sub_category, task_type, question,
options (four, each with its letter), answer (a letter). Films lie in data/, subtitles in subtitle/.
"""

import functools
from pathlib import Path
from typing import Any

from longrl_jax.data import fields, parquet
from longrl_jax.data.fields import RecordError, Records, Rows
from longrl_jax.data.rows import JsonArray, JsonLines
from longrl_jax.options import split_options
from longrl_jax.types import Example, MediaFile

LABELS = ("duration", "domain", "sub_category", "task_type")
COLUMNS = ("question_id", "videoID", *LABELS, "question", "options", "answer")
ENDINGS = ("mkv", "MP4", "mp4")


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The film of video V is root/data/V.mp4 (or .MP4, .mkv), and its subtitles,
    if there are any, root/subtitle/V.srt."""
    root = Path(root)
    return Records(rows_of(root, file, COLUMNS), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    row = fields.need_object(row, where)
    film = fields.text(row, "videoID", where)
    lettered = fields.options_of(row.get("options"), "options", where)
    options = split_options("\n".join(lettered))[1]
    if len(options) != len(lettered):
        raise RecordError(
            where, f"options={fields.shown(lettered)} must begin with their letters, 'A. ...'"
        )
    labels = {name: fields.label(row, name, where) for name in LABELS}
    told = f"subtitle/{film}.srt"
    fields.check_inside("videoID", told, root, where)
    paths = [f"data/{film}.{ending}" for ending in ENDINGS]
    return Example(
        id=fields.identifier(row, "question_id", where),
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=letter(row, "answer", len(options), where),
        kind=labels.pop("task_type"),
        media=(MediaFile(kind="video", path=fields.first_file("videoID", paths, root, where)),),
        tags=fields.tags(**labels),
        subtitles=told if fields.is_there(root / told) else "",
    )


def rows_of(root: Path, file: str, columns: tuple[str, ...]) -> Rows:
    """Opens a table of a benchmark: parquet, a JSON array or JSON lines, by its name."""
    if parquet.is_parquet(root, file):
        return parquet.Parquet(root, file, columns)
    return JsonLines(root, file) if file.endswith(".jsonl") else JsonArray(root, file)


def letter(row: dict[str, Any], name: str, num_options: int, where: str) -> str:
    """Returns a field that must be the letter of one of so many options."""
    value = fields.text(row, name, where)
    letters = fields.LETTERS[:num_options]
    if len(value) != 1 or value not in letters:
        raise RecordError(where, f"{name}={value!r} must be a letter, A to {letters[-1]}")
    return value
