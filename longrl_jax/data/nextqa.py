"""Questions of NExT-QA, multiple choice and open-ended: CSV, or parquet as on the hub.

Source: doc-doc/NExT-QA and doc-doc/NExT-OE (dataset/nextqa/*.csv, dataloader/sample_loader.py):
video, frame_count, width, height, question, answer, qid, type; with multiple choice a0 to a4, and
`answer` is the number of the right one. qid counts within a video.
"""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longrl_jax.data import fields, parquet
from longrl_jax.data.fields import Records, Rows
from longrl_jax.data.rows import Csv
from longrl_jax.types import Example, MediaFile

COLUMNS = ("video", "question", "answer", "qid", "type")
OPTIONS = ("a0", "a1", "a2", "a3", "a4")
GROUPS = {"C": "causal", "T": "temporal", "D": "descriptive"}
"""First letter of a type -> the group that results are reported by."""
MAP = "map_vid_vidorID.json"
"""File beside the questions: video -> its path in VidOR, without the ending."""
VIDEOS = "NExTVideo"


def open_records(root: Path, file: str) -> Records:
    """Opens root/file. The film of video V is root/NExTVideo/V.mp4, or root/NExTVideo/MAP[V].mp4
    with the map_vid_vidorID.json that lies beside the file."""
    root = Path(root)
    if parquet.is_parquet(root, file):
        rows: Rows = parquet.Parquet(root, file, (*COLUMNS, *OPTIONS))
    else:
        rows = Csv(root, file, COLUMNS)
    folder = Path(file) if (root / file).is_dir() else Path(file).parent
    names = _names(root, folder / MAP)
    return Records(rows, functools.partial(to_example, root=root, names=names))


def to_example(
    row: Mapping[str, Any], *, names: Mapping[str, str], root: Path, where: str
) -> Example:
    """names: video -> path without the ending; a video that it lacks has its own name."""
    film = fields.identifier(row, "video", where)
    question = fields.text(row, "question", where)
    if any(name in row for name in OPTIONS):
        options = fields.options_of([row.get(name) for name in OPTIONS], "a0 to a4", where)
        question = fields.with_options(question, options)
        answer = fields.letter_of(row, "answer", len(options), where)
    else:
        answer = fields.text(row, "answer", where)
    kind = fields.text(row, "type", where)
    paths = [f"{VIDEOS}/{name}.mp4" for name in (film, names.get(film, film))]
    return Example(
        id=f"{film}-{fields.identifier(row, 'qid', where)}",
        question=question,
        answer=answer,
        kind=GROUPS.get(kind[0], kind),
        media=(MediaFile(kind="video", path=fields.first_file("video", paths, root, where)),),
        tags=fields.tags(type=kind),
    )


def _names(root: Path, file: Path) -> dict[str, str]:
    """Reads the map of videos; empty without the file."""
    if not (root / file).is_file():
        return {}
    path = fields.data_file(root, str(file))
    try:
        names = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
        raise ValueError(f"{path} must be an object of paths by video; fetch it again")
    return names
