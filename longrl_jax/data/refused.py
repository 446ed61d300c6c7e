"""The list of refused records: a bad record is named, counted and left out, never replaced."""

import json
from pathlib import Path
from typing import Self

from longrl_jax.types import Example


class RefusedLog:
    """Owner of a run's refused.jsonl; every row is on disk as soon as it is added."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        if self.path.exists():
            rows = [json.loads(line) for line in self.path.open(encoding="utf-8")]
        self._of_evaluations = {(r["id"], r["message"]) for r in rows if r["step"] == 0}
        self._file = self.path.open("a", encoding="utf-8")
        self.count = len(rows)
        """Rows of the file: a run that goes on counts on."""

    def add(self, record: Example | str, error: ValueError, *, step: int) -> None:
        """Writes one row: step, id, video, type and kind of the error, message.

        record: the Example, or the id of a record that could not be read. step: 1 is the first
        update, 0 stands for records of an evaluation, which are listed once a run, however often
        it evaluates or is started again. kind is what a VideoError calls its cause.
        """
        row = {
            "step": step,
            "id": record.id if isinstance(record, Example) else record,
            "video": record.video if isinstance(record, Example) else "",
            "type": type(error).__name__,
            "kind": getattr(error, "kind", ""),
            "message": str(error),
        }
        if step == 0:
            if (row["id"], row["message"]) in self._of_evaluations:
                return
            self._of_evaluations.add((row["id"], row["message"]))
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        self.count += 1

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
