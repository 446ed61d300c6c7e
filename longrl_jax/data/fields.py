"""What the formats share: how a field of a record is read, and how a bad one is refused.

A format is a container of rows (JSON lines or an array: rows.py; parquet: parquet.py) and a
function row -> Example; `Records` joins the two.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from longrl_jax.types import Example

SHOWN_CHARACTERS = 80
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class RecordError(ValueError):
    """A record of a data set that cannot be used."""

    def __init__(self, where: str, message: str):
        super().__init__(where, message)  # both: an exception is pickled by its arguments
        self.where = where
        """File and line, e.g. train.jsonl:12, or file and place, from 0, e.g. train.json[11]."""
        self.message = message
        self.source = ""
        """Which entry of data.mix it is of; empty: of the only source."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Rows(Protocol):
    """Rows of a file by number; one that cannot be read raises RecordError."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...

    def where(self, index: int) -> str: ...


@dataclasses.dataclass(frozen=True)
class Records:
    """Random access to the examples of a file; travels to worker processes without them."""

    rows: Rows
    to_example: Callable[..., Example]
    """Called as to_example(row, where=...); raises RecordError."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        """Raises RecordError that names file, place, field, value and the wish."""
        return self.to_example(self.rows[index], where=self.where(index))

    def where(self, index: int) -> str:
        """Returns where a record stands: file:line as an editor counts, or file[place] from 0."""
        return self.rows.where(index)


def shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


def need_object(tree: Any, where: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        raise RecordError(where, f"{shown(tree)} is not a JSON object of named fields")
    return tree


def text(tree: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a field that must be a text that says something, stripped."""
    value = tree.get(name)
    if value is None:
        raise RecordError(where, f"no {name}; it must be a text")
    if not isinstance(value, str):
        raise RecordError(where, f"{name}={shown(value)} must be text")
    check_unicode(name, value, where)
    if not value.strip():
        raise RecordError(where, f"{name}={shown(value)} is empty; it must say something")
    return value.strip()


def label(tree: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a field that may lack, or be a text, a whole number or a list of texts, as text."""
    value = tree.get(name)
    if value is None:
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if not isinstance(value, str):
        raise RecordError(where, f"{name}={shown(value)} must be text or a whole number")
    check_unicode(name, value, where)
    return value.strip()


def identifier(tree: Mapping[str, Any], name: str, where: str) -> str:
    """Returns a field that must be a text or a whole number, as text."""
    found = label(tree, name, where)
    if not found:
        raise RecordError(where, f"no {name}; it must be text or a whole number")
    return found


def tags(**values: str) -> tuple[tuple[str, str], ...]:
    """Returns those that say something, as Example.tags."""
    return tuple((name, value) for name, value in values.items() if value)


def check_unicode(name: str, value: str, where: str) -> None:
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which tokenizers and file systems refuse
        raise RecordError(where, f"{name}={shown(value)} must be valid Unicode") from None


def with_options(question: str, options: Sequence[str]) -> str:
    """Returns a question and its options as LongVideo-Reason writes them: "A. ..." lines."""
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([question, *lines])


def options_of(value: Any, name: str, where: str) -> list[str]:
    """Returns a list of 2 to 26 texts that all say something."""
    if not isinstance(value, list) or not all(isinstance(x, str) and x.strip() for x in value):
        raise RecordError(where, f"{name}={shown(value)} must be a list of texts")
    if not 2 <= len(value) <= len(LETTERS):
        raise RecordError(
            where, f"{name} has {len(value)} options; 2 to {len(LETTERS)} can be told by letter"
        )
    for option in value:
        check_unicode(name, option, where)
    return [option.strip() for option in value]


def letter_of(tree: Mapping[str, Any], name: str, num_options: int, where: str) -> str:
    """Returns the letter of the option that a field numbers from 0."""
    value = tree.get(name)
    if isinstance(value, str) and value.strip().isdecimal():  # a csv file knows only texts
        value = int(value)
    if value is None or value == "":
        raise RecordError(where, f"no {name}; a test set without its answers cannot be used")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < num_options:
        raise RecordError(where, f"{name}={shown(value)} must be 0 to {num_options - 1}")
    return LETTERS[value]


def check_inside(name: str, path: str, root: Path, where: str) -> None:
    """Raises RecordError unless a path stays under root, links followed."""
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError):  # a zero byte, a long name, a circle of links
        inside = False
    if Path(path).is_absolute() or not inside:
        raise RecordError(
            where,
            f"{name}={shown(path)} must be a relative path that stays in {root}, links followed",
        )


def first_file(name: str, paths: Sequence[str], root: Path, where: str) -> str:
    """Returns the first of several paths that is there, else the last, which is then missed by
    name; all must stay under root."""
    for path in paths:
        check_inside(name, path, root, where)
    return next((path for path in paths if is_there(root / path)), paths[-1])


def is_there(path: Path) -> bool:
    """Whether a path leads to a file; one that no file system takes (too long a name) does not."""
    try:
        return path.is_file()
    except OSError:
        return False


def data_file(root: Path, file: str) -> Path:
    """Returns root/file; raises ValueError if it lies elsewhere or is not there."""
    path = root / file
    if not path.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"the data file {file!r} lies outside data.root={root}; move it there")
    if not path.is_file():
        raise ValueError(f"there is no data file {path}; set data.root and the file under it")
    return path
