"""Questions of LongVideoBench: lvb_val.json (an array), or parquet as on the hub.

Source: longvideobench/LongVideoBench (longvideobench_dataset.py) and lmms-eval
tasks/longvideobench/utils.py: id, video_path, subtitle_path, question, candidates (in parquet
option0 to option4, "N/A" where there are fewer), correct_choice (from 0), duration_group (15, 60,
600, 3600: at most so many seconds), question_category, topic_category, level, duration (seconds),
starting_timestamp_for_subtitles. Films lie in videos/, subtitles in subtitles/.
"""

import functools
import math
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import RecordError, Records
from longrl_jax.data.subtitles import LENGTH, START
from longrl_jax.data.video_mme import rows_of
from longrl_jax.types import Example, MediaFile

OPTIONS = tuple(f"option{i}" for i in range(5))
NO_OPTION = "N/A"
TIMES = {START: "starting_timestamp_for_subtitles", LENGTH: "duration"}
COLUMNS = (
    *("id", "video_path", "subtitle_path", "question", "candidates", *OPTIONS, "correct_choice"),
    *("duration_group", "question_category", "topic_category", "level", *TIMES.values()),
)


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The film is root/videos/VIDEO_PATH; its subtitles, if they are there,
    root/subtitles/SUBTITLE_PATH, and times in them count from the start of the longer film that it
    was cut out of."""
    root = Path(root)
    return Records(rows_of(root, file, COLUMNS), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    row = fields.need_object(row, where)
    candidates = row.get("candidates")
    if candidates is None:
        candidates = [row[name] for name in OPTIONS if row.get(name, NO_OPTION) != NO_OPTION]
    options = fields.options_of(candidates, "candidates", where)
    film = f"videos/{fields.text(row, 'video_path', where)}"
    fields.check_inside("video_path", film, root, where)
    told = ""
    if row.get("subtitle_path"):
        told = f"subtitles/{fields.text(row, 'subtitle_path', where)}"
        fields.check_inside("subtitle_path", told, root, where)
        told = told if fields.is_there(root / told) else ""
    times = {tag: _seconds(row, name, where) for tag, name in TIMES.items()} if told else {}
    return Example(
        id=fields.identifier(row, "id", where),
        question=fields.with_options(fields.text(row, "question", where), options),
        answer=fields.letter_of(row, "correct_choice", len(options), where),
        kind=fields.label(row, "question_category", where),
        media=(MediaFile(kind="video", path=film),),
        tags=fields.tags(
            duration_group=fields.label(row, "duration_group", where),
            topic_category=fields.label(row, "topic_category", where),
            level=fields.label(row, "level", where),
            **times,
        ),
        subtitles=told,
    )


def _seconds(row: dict[str, Any], name: str, where: str) -> str:
    value = row.get(name, 0.0)
    right = isinstance(value, int | float) and not isinstance(value, bool)
    if not right or not (math.isfinite(value) and value >= 0):
        raise RecordError(where, f"{name}={fields.shown(value)} must be seconds, 0 or more")
    return repr(float(value))
