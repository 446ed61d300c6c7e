"""Questions of STAR: a JSON array.

Source: csbobby/STAR_Benchmark (README, code/) and public loaders: question_id (its first word is
the type: Interaction, Sequence, Prediction, Feasibility), question, video_id, start and end in
seconds, choices of {choice_id, choice}, and `answer`, the text of one of them. A question is about
the film from start to end. Programs and graphs are left alone.
"""

import functools
import math
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import LETTERS, RecordError, Records, shown
from longrl_jax.data.rows import JsonArray
from longrl_jax.types import Example, MediaFile

FILMS = "Charades_v1_480"


def open_records(root: Path, file: str) -> Records:
    """Opens root/file, whose films are root/Charades_v1_480/VIDEO_ID.mp4; see docs/data.md."""
    root = Path(root)
    return Records(JsonArray(root, file), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    """Turns an element into an Example about the film from start to end."""
    row = fields.need_object(row, where)
    name = fields.text(row, "question_id", where)
    options = _options(row.get("choices"), where)
    answer = fields.text(row, "answer", where)
    if options.count(answer) != 1:
        raise RecordError(
            where, f"answer={shown(answer)} must be one of the choices, {shown(options)}"
        )
    path = f"{FILMS}/{fields.text(row, 'video_id', where)}.mp4"
    fields.check_inside("video_id", path, root, where)
    return Example(
        id=name,
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=LETTERS[options.index(answer)],
        kind=name.partition("_")[0],
        media=(MediaFile(kind="video", path=path, span_s=_span(row, where)),),
    )


def _options(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(choice, dict) for choice in value):
        raise RecordError(where, f"choices={shown(value)} must be a list of objects")
    return fields.options_of([choice.get("choice") for choice in value], "choices", where)


def _span(row: dict[str, Any], where: str) -> tuple[float, float] | None:
    """Returns start and end; None where neither is there."""
    numbers: list[Any] = [row.get("start"), row.get("end")]
    if numbers == [None, None]:
        return None
    for name, value in zip(("start", "end"), numbers, strict=True):
        if type(value) not in (int, float):
            raise RecordError(where, f"{name}={shown(value)} must be a time in seconds")
    start_s, end_s = map(float, numbers)
    if not 0 <= start_s < end_s < math.inf:
        raise RecordError(
            where, f"start={start_s} and end={end_s} must be seconds, 0 <= start < end"
        )
    return start_s, end_s
