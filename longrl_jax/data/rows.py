"""Rows of text files by number: JSON lines, a JSON array or object, CSV.

JSON files are read by offset: a container holds numbers, never records, and no open file, so it
travels to worker processes in little space.
"""

import csv
import functools
import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.data.fields import SHOWN_CHARACTERS, RecordError, data_file

SPACE = re.compile(r"[ \t\n\r]*")
BOM = b"\xef\xbb\xbf"


class JsonLines:
    """One JSON object a line; blank lines do not count."""

    def __init__(self, root: Path, file: str):
        path = data_file(root, file)
        self._path, self._file = path, file
        offsets, lines = [], []
        with path.open("rb") as stream:
            start = 0
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    offsets.append(start)
                    lines.append(number)
                start += len(line)
        if not offsets:
            raise ValueError(f"{path} holds no records; write one JSON object a line")
        self._offsets = np.array(offsets, np.int64)
        self._lines = np.array(lines, np.int64)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> Any:
        with self._path.open("rb") as stream:
            stream.seek(self._offsets[index])
            line = stream.readline()
        return from_json(line, self.where(index), "write one JSON object a line")

    def where(self, index: int) -> str:
        return f"{self._file}:{self._lines[index]}"


class JsonArray:
    """The elements of a JSON array, or the values of a JSON object, each of which is one row or,
    by `split`, several.

    The file is parsed once when it is opened, at some 50 MB/s and with twice its size in memory, to
    find where its elements stand; one that is not JSON as a whole is refused as a whole.
    """

    def __init__(self, root: Path, file: str, split: Callable[[Any], Sequence[Any]] | None = None):
        """split: element -> its rows; it takes whatever an element is and does not raise."""
        self._path, self._file, self._split = data_file(root, file), file, split
        spans, names, rows = [], [], []
        for number, (start, end, name, value) in enumerate(_elements(self._path)):
            spans.append((start, end))
            names.append(number if name is None else name[:SHOWN_CHARACTERS])  # all take as much
            count = 1 if split is None else len(split(value))
            rows += [(number, part, count) for part in range(count)]
        if not rows:
            raise ValueError(f"{self._path} holds no records; is it the right file?")
        self._spans = np.array(spans, np.int64)
        self._names = np.array(names)
        self._rows = np.array(rows, np.int64)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Any:
        number, part, _ = self._rows[index]
        start, end = self._spans[number]
        with self._path.open("rb") as stream:
            stream.seek(start)
            value = from_json(stream.read(end - start), self.where(index), "mend the file")
        return value if self._split is None else self._split(value)[part]

    def where(self, index: int) -> str:
        """file[element], from 0 or by its name, and /row, from 0, where an element is several."""
        number, part, count = self._rows[index]
        return f"{self._file}[{self._names[number]}]" + (f"/{part}" if count > 1 else "")


class Csv:
    """Rows of a CSV file with a header, as texts by column; they stay in memory."""

    def __init__(self, root: Path, file: str, columns: Sequence[str]):
        """columns: those that must be there."""
        path = data_file(root, file)
        self._file = file
        self._rows: list[tuple[int, list[str]]] = []
        try:
            with path.open(encoding="utf-8-sig", newline="") as stream:
                reader = csv.reader(stream)
                self._columns = next(reader, [])
                last = reader.line_num
                for cells in reader:
                    if cells:
                        self._rows.append((last + 1, cells))
                    last = reader.line_num
        except (UnicodeDecodeError, csv.Error) as error:
            raise ValueError(f"{path} is no CSV file in UTF-8 ({error}); fetch it again") from None
        if missing := [name for name in columns if name not in self._columns]:
            raise ValueError(
                f"{path} has no column {', '.join(missing)}; its first line says "
                f"{', '.join(self._columns)[:200]!r}"
            )
        if not self._rows:
            raise ValueError(f"{path} holds no records; is it the right file?")

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, str]:
        cells = self._rows[index][1]
        if len(cells) != len(self._columns):
            raise RecordError(
                self.where(index),
                f"{len(cells)} cells for {len(self._columns)} columns; put cells with commas in "
                "quotes",
            )
        return dict(zip(self._columns, cells, strict=True))

    def where(self, index: int) -> str:
        return f"{self._file}:{self._rows[index][0]}"


def from_json(text: bytes, where: str, wish: str) -> Any:
    """Returns the value of a JSON text; raises RecordError for a field that stands twice, too."""
    try:
        return json.loads(text, object_pairs_hook=functools.partial(_unique, where))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8 and endless brackets, too
        raise RecordError(where, f"not JSON ({error}); {wish}") from None


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; Python alone would keep the last of two fields of one name."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise RecordError(where, f"the field {double!r} stands twice; keep one")
    return tree


def _elements(path: Path) -> Iterator[tuple[int, int, str | None, Any]]:
    """Yields the bytes (start, end), the name in an object, and the value of every element."""
    content = path.read_bytes()
    skipped = len(BOM) if content.startswith(BOM) else 0
    text = content.decode("latin-1")  # a character a byte, so that places in it are offsets
    del content
    decoder = json.JSONDecoder()

    def space(at: int) -> int:
        return SPACE.match(text, at).end()  # type: ignore[union-attr]

    def expect(characters: str, at: int) -> str:
        if text[at : at + 1] not in tuple(characters):
            raise json.JSONDecodeError(f"expected {' or '.join(characters)}", text, at)
        return text[at]

    try:
        at = space(skipped)
        closing = {"[": "]", "{": "}"}[expect("[{", at)]
        at = space(at + 1)
        while text[at : at + 1] != closing:
            name = None
            if closing == "}":
                name, at = decoder.raw_decode(text, at)
                if not isinstance(name, str):
                    raise json.JSONDecodeError("expected a name", text, at)
                name = name.encode("latin-1", "replace").decode("utf-8", "replace")
                expect(":", at := space(at))
                at = space(at + 1)
            value, end = decoder.raw_decode(text, at)
            yield at, end, name, value
            at = space(end)
            if expect(f",{closing}", at) == ",":
                at = space(at + 1)
                if text[at : at + 1] == closing:
                    raise json.JSONDecodeError("expected an element", text, at)
        if space(at + 1) != len(text):
            raise json.JSONDecodeError("expected the end of the file", text, space(at + 1))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}:{error.lineno}: not a JSON array or object ({error.msg}, column "
            f"{error.colno}); fetch the file again"
        ) from None
    except RecursionError:
        raise ValueError(f"{path} is nested without end; fetch the file again") from None
