"""Questions of STAR: a JSON array.

Source: csbobby/STAR_Benchmark (README, code/) and public loaders: question_id (its first word is
the type: Interaction, Sequence, Prediction, Feasibility), question, video_id, start and end in
seconds, choices of {choice_id, choice}, and `answer`, the text of one of them. Programs and graphs
are left alone.
"""

import functools
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import LETTERS, RecordError, Records, shown
from longrl_jax.data.rows import JsonArray
from longrl_jax.types import Example, MediaFile

CLIPS, FILMS = "star_clips", "Charades_v1_480"


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The clip of question Q is root/star_clips/Q.mp4, cut from start to end, or,
    without it, the whole film root/Charades_v1_480/VIDEO_ID.mp4; see docs/data.md."""
    root = Path(root)
    return Records(JsonArray(root, file), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    """Turns an element into an Example; start and end are tags, in seconds."""
    row = fields.need_object(row, where)
    name = fields.text(row, "question_id", where)
    options = _options(row.get("choices"), where)
    answer = fields.text(row, "answer", where)
    if options.count(answer) != 1:
        raise RecordError(
            where, f"answer={shown(answer)} must be one of the choices, {shown(options)}"
        )
    paths = [f"{CLIPS}/{name}.mp4", f"{FILMS}/{fields.text(row, 'video_id', where)}.mp4"]
    path = fields.first_file("video_id", paths, root, where)
    return Example(
        id=name,
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=LETTERS[options.index(answer)],
        kind=name.partition("_")[0],
        media=(MediaFile(kind="video", path=path),),
        tags=fields.tags(start=_seconds(row, "start", where), end=_seconds(row, "end", where)),
    )


def _options(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, dict) for choice in value):
        raise RecordError(where, f"choices={shown(value)} must be a list of objects")
    return fields.options_of([choice.get("choice") for choice in value], "choices", where)


def _seconds(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name)
    if value is None:
        return ""
    if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
        raise RecordError(where, f"{name}={shown(value)} must be a time in seconds")
    return str(value)
