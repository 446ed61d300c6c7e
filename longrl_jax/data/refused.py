"""The list of refused records: a bad record is named, counted and left out, never replaced."""

import json
from pathlib import Path
from typing import Any, Self, TextIO

from longrl_jax import processes
from longrl_jax.types import Example


class RefusedLog:
    """Owner of a run's refused.jsonl; every row is on disk as soon as it is added.

    In a run of many processes the first one owns the file; the rows of the others get there by
    `settle`, which all of them call.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._untold: list[dict[str, Any]] = []
        self.count = 0
        """Rows of the file: a run that goes on counts on. Elsewhere than in the first process it is
        as of the last `settle`."""
        self.by_source: dict[str, int] = {}
        """The same of each source of a mix, by name; of all processes in the first one."""
        self._file: TextIO | None = None
        if not processes.is_first():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = []
        if self.path.exists():
            rows = [json.loads(line) for line in self.path.open(encoding="utf-8")]
        self._of_evaluations = {(r["id"], r["message"]) for r in rows if r["step"] == 0}
        self._file = self.path.open("a", encoding="utf-8")
        self.count = len(rows)
        for row in rows:
            self._count_source(row)

    def add(self, record: Example | str, error: ValueError, *, step: int) -> None:
        """Writes one row: step, id, video, type and kind of the error, message, source (of a mix).

        record: the Example, or the id of a record that could not be read. step: 1 is the first
        update, 0 stands for records of an evaluation, which are listed once a run, however often
        it evaluates or is started again. kind is what a VideoError calls its cause.
        """
        row = {
            "step": step,
            "id": record.id if isinstance(record, Example) else record,
            "video": record.about if isinstance(record, Example) else "",
            "type": type(error).__name__,
            "kind": getattr(error, "kind", ""),
            "message": str(error),
        }
        source = record.source if isinstance(record, Example) else getattr(error, "source", "")
        if source:
            row["source"] = source
        if self._file is None:
            self._untold.append(row)
        else:
            self._write(row, self._file)

    def settle(self) -> int:
        """Writes down what other processes have refused since the last call; returns `count`."""
        told = processes.joined(self._untold)
        self._untold = []
        if self._file is not None:
            for row in told:
                self._write(row, self._file)
        self.count = processes.gather(self.count)[0]
        return self.count

    def _write(self, row: dict[str, Any], file: TextIO) -> None:
        if row["step"] == 0:
            if (row["id"], row["message"]) in self._of_evaluations:
                return
            self._of_evaluations.add((row["id"], row["message"]))
        file.write(json.dumps(row) + "\n")
        file.flush()
        self.count += 1
        self._count_source(row)

    def _count_source(self, row: dict[str, Any]) -> None:
        if name := row.get("source"):
            self.by_source[name] = self.by_source.get(name, 0) + 1

    def close(self) -> None:
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()
