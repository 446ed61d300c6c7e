"""What the stages leave: one file a film and stage, known by a digest of all that it depends on.

    OUT/work/<stage>/<film>.json   {"film", "key", "items", "rejects"}

A file is whole or not there. Its key is a digest of the stage's settings, its texts and the items
of the stage before, so a run that goes on takes what still holds, and after a change only what
depends on it is done anew. What a server was paid for is in the journals besides (chat.py).
"""

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

from longrl_jax import platform

FORMAT = 2
"""Raise it when the same inputs would give other items."""
Item = dict[str, Any]
"""Of what a stage makes: a clip, a caption, a story, a question; plain JSON."""
NO_UNICODE = "backslashreplace"
"""Of halves of surrogate pairs (a model's "\\ud83d", odd file names): so JSON has them, too."""
ROOM = "the work so far is kept: free some room and run the same command again"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Work:
    """What a stage has made of a film."""

    film: str
    """Path under GenerateConfig.videos."""
    key: str
    items: tuple[Item, ...]
    rejects: tuple[Item, ...]
    """What was left out, each with `reason` and, where a person needs it, `detail` and `what`."""


def digest(value: Any) -> str:
    """Returns a digest of plain JSON."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", NO_UNICODE)).hexdigest()


def key_of(stage: str, settings: dict[str, Any], texts: str, before: Any) -> str:
    """before: the items of the stage before; of the first stage what tells a file from another."""
    return digest([FORMAT, stage, settings, texts, before])


def reject(reason: str, detail: str = "", **what: Any) -> Item:
    """reason: a few fixed words, which are counted; detail: of this one."""
    return {"reason": reason} | ({"detail": detail} if detail else {}) | what


def read(out: Path, stage: str, film: str, key: str) -> Work | None:
    """Returns what is there of a film if it still holds, else None."""
    path = _path(out, stage, film)
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); delete it: it is made again, and what was paid for "
            "is in the journal"
        ) from None
    if tree.get("key") != key:
        return None
    return Work(
        film=tree["film"], key=key, items=tuple(tree["items"]), rejects=tuple(tree["rejects"])
    )


def write(out: Path, stage: str, work: Work) -> None:
    path = _path(out, stage, work.film)
    write_text(path, json.dumps(dataclasses.asdict(work), ensure_ascii=False, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file, whole or not at all. Raises OSError that says what to do."""
    write_bytes(path, text.encode("utf-8", NO_UNICODE))


def write_bytes(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise platform.disk_error(error, path, ROOM) from error


def write_lines(path: Path, rows: list[Item]) -> None:
    """Writes JSON lines."""
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def _path(out: Path, stage: str, film: str) -> Path:
    """The end of the path, for people, and a digest of all of it, since file names are short."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "_", film)[-60:]
    return out / "work" / stage / f"{name}.{digest(film)[:12]}.json"
