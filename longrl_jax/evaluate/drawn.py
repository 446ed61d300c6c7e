"""Answers on disk as they come: what an engine has said is never asked of it again.

An append-only file of JSON lines, each with the CRC-32 of its rest. The answers to a batch are
written and synced together and count together: a batch that was cut off is asked again as a whole,
so that the engine sees the batches of an unbroken evaluation.
"""

import json
import os
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from longrl_jax import platform, run_folder

Row = dict[str, Any]
Key = tuple[str, int]
"""Id of the question and number of the answer."""
HEAD = '{"check": "%08x", '
HEAD_BYTES = len(HEAD % 0)


class DrawnLog:
    """Owner of one mode's file of answers, that of an evaluation which was cut off or a new one."""

    def __init__(self, path: Path):
        """Raises ValueError, with file and line, for damage that no kill explains."""
        self.path = path
        self.rows: dict[Key, Row] = {}
        """All answers that are on disk."""
        try:
            run_folder.make_folder(path.parent)
            content = path.read_bytes() if path.exists() else b""
            rows, self._size = _whole_batches(path, content)
            self._file = path.open("ab", buffering=0)
            if len(content) > self._size:
                os.truncate(path, self._size)
            run_folder.sync_folder(path.parent)
        except OSError as error:
            raise platform.disk_error(error, path, "choose another --out") from error
        self.rows = {(row["id"], row["sample"]): row for row in rows}

    def add(self, rows: Sequence[Row]) -> None:
        """Appends the answers to a batch; they are on disk, all of them, when this returns."""
        lines = [_line(row | {"left": len(rows) - i}) for i, row in enumerate(rows, start=1)]
        content = memoryview(b"".join(lines))
        try:
            while content:
                content = content[self._file.write(content) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            raise platform.disk_error(
                error, self.path, "free some, and the same command goes on after the last batch"
            ) from error
        self.rows |= {(row["id"], row["sample"]): row for row in rows}

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def _line(row: Row) -> bytes:
    rest = json.dumps(row)[1:]
    return f"{HEAD % zlib.crc32(rest.encode())}{rest}\n".encode()


def _whole_batches(path: Path, content: bytes) -> tuple[list[Row], int]:
    """Returns the answers to the batches that are whole, and the bytes that they take.

    A kill or a crash leaves one batch at the end in pieces, perhaps not in order; a bad line before
    that is damage.
    """
    rows: list[Row] = []
    counted, size, place, bad = 0, 0, 0, 0
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        place += len(line)
        row = _read(line)
        left = -1 if row is None else row.pop("left")
        if row is None:
            bad = bad or number
        elif not bad:
            rows.append(row)
            if left == 0:
                counted, size = len(rows), place
        elif left == 0 and place < len(content):
            raise ValueError(
                f"{path}:{bad} is damaged: its checksum is wrong; remove the line, and its "
                "question is asked again"
            )
    return rows[:counted], size


def _read(line: bytes) -> Row | None:
    """Returns what a line says; None for one that is torn or altered."""
    rest = line[HEAD_BYTES:-1]
    if not line.endswith(b"\n") or line[:HEAD_BYTES] != (HEAD % zlib.crc32(rest)).encode():
        return None
    return json.loads(b"{" + rest)
