"""The journal of paid requests: replies by the digest of what was asked, on disk before they count.

A file of JSON lines that only grows. A line is {"sha256": S, "record": R}, where S is the SHA-256
of the bytes of R. A process that is killed leaves at most one torn line, the last: it is cut off.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, BinaryIO, Self

from longrl_jax.platform import disk_error

BEFORE, BETWEEN, AFTER = b'{"sha256": "', b'", "record": ', b"}\n"
WAY_OUT = "make room, and give the same command again: what the journal holds is not asked again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reply:
    """What a model answered."""

    text: str
    finish_reason: str
    """stop, or length where it ends at max_tokens."""
    prompt_tokens: int
    """As the server counts; 0 where it does not say."""
    completion_tokens: int
    seconds: float
    """From the request that got it, to the reply."""
    tries: int
    """Requests that were sent for it, from 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failure:
    """Why there is no reply, after every try."""

    reason: str
    tries: int
    reached: bool = True
    """Whether the server answered anything at all."""
    passing: bool = False
    """Whether the last try met trouble of the server (429, 500, a time-out, a body that is no
    reply), not a refusal or a reply that will not do: another time it may go well."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Totals:
    """What the requests of a journal took."""

    replies: int = 0
    refused: int = 0
    """Replies that were paid for and are of no use (cut off, not of the schema): asked again."""
    failures: int = 0
    unmetered: int = 0
    """Replies, useful or not, whose tokens the server did not say: they lack in the two below; usd
    has what they may have cost (Request.most_prompt_tokens)."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    usd: float = 0.0
    """By the prices of the config that each was asked with."""
    seconds: float = 0.0
    """Of all replies, those at the same time counted each."""


class Journal:
    """Owner of the file while requests are asked; a context. A second process is refused."""

    def __init__(self, path: Path):
        self.path = path
        self._file: BinaryIO | None = None
        self._size = 0

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            _sync_folder(self.path.parent)
        except OSError as error:
            raise disk_error(error, self.path, "name another journal") from error
        file = os.fdopen(handle, "r+b", buffering=0)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked ones lack it
        except (BlockingIOError, PermissionError):  # POSIX allows either
            file.close()
            raise ValueError(
                f"the journal {self.path} is in use by another process; wait for it, or name "
                "another journal (what both ask would be paid twice)"
            ) from None
        self._size = _whole_size(file)
        file.truncate(self._size)
        self._file = file
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def replies(self, keys: Set[str]) -> dict[str, Reply]:
        """Returns the replies that the journal holds to what these digests say; the newest of each.

        Raises ValueError that names a line which is damaged.
        """
        found = {}
        for record in records(self.path):
            if record["kind"] == "reply" and record["key"] in keys:
                fields = {f.name: record[f.name] for f in dataclasses.fields(Reply)}
                found[record["key"]] = Reply(**fields)
        return found

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes a record; it is on disk when this returns.

        Raises OSError, in words, if the disk takes no more; the file then ends where it did before.
        """
        assert self._file is not None, "open the journal first (with)"
        body = json.dumps({**record, "time": round(time.time(), 3)}, allow_nan=False).encode()
        digest = hashlib.sha256(body).hexdigest().encode()
        line = b"".join((BEFORE, digest, BETWEEN, body, AFTER))
        try:
            self._file.seek(self._size)
            rest = memoryview(line)
            while rest:
                rest = rest[self._file.write(rest) :]
            os.fsync(self._file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self._size)
            raise disk_error(error, self.path, WAY_OUT) from error
        self._size += len(line)


def records(path: Path) -> Iterator[dict[str, Any]]:
    """Yields every whole record of a journal, in order; a torn last line is left out.

    Raises ValueError that names a line which is damaged.
    """
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            start = len(BEFORE) + 64 + len(BETWEEN)
            body = line[start : -len(AFTER)]
            digest = hashlib.sha256(body).hexdigest().encode()
            if line != b"".join((BEFORE, digest, BETWEEN, body, AFTER)):
                raise ValueError(
                    f"line {number} of the journal {path} is damaged: its checksum is wrong; put "
                    "the file back, or remove that line (sed -i "
                    f"{number}d) and what it was paid for is asked again"
                )
            yield json.loads(body)


def spent(journal: Path) -> Totals:
    """Adds up what a journal's requests took; all zero where there is no such file."""
    if not journal.exists():
        return Totals()
    sums: dict[str, Any] = dataclasses.asdict(Totals())
    names = {"reply": "replies", "refused": "refused", "failure": "failures"}
    for record in records(journal):
        sums[names[record["kind"]]] += 1
        if record["kind"] != "failure":
            sums["unmetered"] += not record["metered"]
            for name in ("prompt_tokens", "completion_tokens", "usd", "seconds"):
                sums[name] += record[name]
    return Totals(**sums)


def _whole_size(file: BinaryIO) -> int:
    """Returns the size of a file up to the end of its last whole line."""
    size = position = file.seek(0, os.SEEK_END)
    block = 2**16
    while position:
        position = max(0, position - block)
        file.seek(position)
        tail = file.read(min(block, size - position))
        newline = tail.rfind(b"\n")
        if newline >= 0:
            return position + newline + 1
    return 0


def _sync_folder(path: Path) -> None:
    """Puts the names in a folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
