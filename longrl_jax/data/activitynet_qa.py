"""Open questions of ActivityNet-QA: parquet as on the hub, or its rows as JSON; and the published
pair of files, test_q.json beside test_a.json.

Source: MILVLG/activitynet-qa (dataset/*_q.json: video_name, question, question_id; *_a.json:
answer, type, question_id) and lmms-eval tasks/activitynetqa, which reads lmms-lab/ActivityNetQA.
Questions are written without a capital and without a mark; both are added, as there.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from longrl_jax.data import fields, parquet
from longrl_jax.data.fields import RecordError, Records, Rows
from longrl_jax.data.rows import JsonArray
from longrl_jax.data.video_mme import rows_of
from longrl_jax.types import Example, MediaFile

COLUMNS = ("video_name", "question", "question_id", "answer", "type")
TYPES = {
    **{"0": "motion", "1": "spatial relation", "2": "temporal relation", "3": "yes/no"},
    **{"4": "color", "5": "object", "6": "location", "7": "number", "8": "other"},
}
"""Type -> its name in arXiv:1906.02467 (table 2: 3 to 8 are kinds of free questions)."""
ENDINGS = ("mkv", "webm", "mp4")
QUESTIONS, ANSWERS = "_q.json", "_a.json"


@dataclasses.dataclass(frozen=True)
class _Answered:
    """Questions, each with the fields of its answer."""

    questions: Rows
    answers: dict[str, dict[str, Any]]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        row = fields.need_object(self.questions[index], where)
        name = fields.identifier(row, "question_id", where)
        if name not in self.answers:
            raise RecordError(where, f"question_id={name!r} has no answer in the file of answers")
        return {**self.answers[name], **row}

    def where(self, index: int) -> str:
        return self.questions.where(index)


def open_records(root: Path, file: str) -> Records:
    """Opens root/file, NAME_q.json with NAME_a.json beside it. The film of video V is
    root/all_test/v_V.mp4 (or .webm, .mkv)."""
    root = Path(root)
    rows = rows_of(root, file, COLUMNS)
    if file.endswith(QUESTIONS) and not parquet.is_parquet(root, file):
        rows = _Answered(rows, _answers(root, file.removesuffix(QUESTIONS) + ANSWERS))
    return Records(rows, functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    row = fields.need_object(row, where)
    film = fields.text(row, "video_name", where)
    question = fields.text(row, "question", where).capitalize().rstrip("?") + "?"
    kind = fields.label(row, "type", where)
    paths = [f"all_test/v_{film}.{ending}" for ending in ENDINGS]
    return Example(
        id=fields.identifier(row, "question_id", where),
        question=question,
        answer=fields.identifier(row, "answer", where),
        kind=TYPES.get(kind, kind),
        media=(MediaFile(kind="video", path=fields.first_file("video_name", paths, root, where)),),
    )


def _answers(root: Path, file: str) -> dict[str, dict[str, Any]]:
    rows = JsonArray(root, file)
    found: dict[str, dict[str, Any]] = {}
    for i in range(len(rows)):
        row = fields.need_object(rows[i], rows.where(i))
        name = fields.identifier(row, "question_id", rows.where(i))
        if name in found:
            raise RecordError(rows.where(i), f"question_id={name!r} stands twice; keep one")
        found[name] = row
    return found
