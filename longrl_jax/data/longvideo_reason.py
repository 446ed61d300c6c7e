"""Records of LongVideo-Reason, and of our own plain form, read from JSON lines by index.

Source: the card of LongVideo-Reason/longvideo-reason (fields problem_id, problem, data_type,
problem_type, reasoning, videos, answer). The plain form has the names of types.Example: id,
question, answer, kind, reasoning, tags (an object of texts), subtitles (a path), with video,
videos, image or images for the media, and span ([start, end] in seconds) for a part of one video.
Other fields are left alone. Media stand where the question
says <image> and <video>, as in Long-RL and EasyR1 (verl/utils/dataset.py), or all before its words.
"""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.types import Example, MediaFile

NAMES = {
    "id": ("id", "problem_id"),
    "question": ("question", "problem", "prompt"),
    "answer": ("answer",),
    "kind": ("kind", "problem_type"),
    "reasoning": ("reasoning",),
}
"""Field of Example -> the names it may have in a line; two of them at once are refused."""
REQUIRED = ("id", "question", "answer")
MEDIA_NAMES = {"image": ("image", "images"), "video": ("video", "videos")}
"""Kind of medium -> the names of its field: one path or a list of them. Without placeholders images
stand before videos."""
PLACEHOLDER = re.compile(r"<(image|video)>")
MEDIA_TYPES = ("image", "video", "text")
"""Values of LongVideo-Reason's data_type that we can read."""
ANSWER = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
REASONING = re.compile(r"\s*<think>(.*?)</think>\s*(?:<answer>.*</answer>\s*)?", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")
SHOWN_CHARACTERS = 80


class RecordError(ValueError):
    """A line of a data set that cannot be used."""

    def __init__(self, where: str, message: str):
        super().__init__(where, message)  # both: an exception is pickled by its arguments
        self.where = where
        """File and line, e.g. train.jsonl:12."""
        self.message = message

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class Records:
    """Random access into a file of JSON lines; holds offsets, never records, and no open file."""

    def __init__(self, root: Path, file: str):
        path = root / file
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"the data file {file!r} lies outside data.root={root}; move it there")
        if not path.is_file():
            raise ValueError(f"there is no data file {path}; set data.root and the file under it")
        self._root, self._file = root, file
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

    def __getitem__(self, index: int) -> Example:
        """Reads one line; raises RecordError that names file, line, field, value and the wish."""
        with (self._root / self._file).open("rb") as stream:
            stream.seek(self._offsets[index])
            line = stream.readline()
        return parse(line, root=self._root, where=self.where(index))

    def where(self, index: int) -> str:
        """Returns file:line of a record, the line as an editor counts."""
        return f"{self._file}:{self._lines[index]}"

    def __repr__(self) -> str:
        return f"Records({str(self._root / self._file)!r}, {len(self)} records)"


def open_records(root: Path, file: str) -> Records:
    """Opens root/file; every image and video of it must lie under root."""
    return Records(Path(root), file)


def parse(line: bytes, *, root: Path, where: str) -> Example:
    """Turns one line into an Example; `where` (file:line) is what an error is named by."""
    try:
        tree = json.loads(line, object_pairs_hook=functools.partial(_unique, where))
    except RecordError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8 and endless brackets, too
        raise RecordError(where, f"not JSON ({error}); write one JSON object a line") from None
    if not isinstance(tree, dict):
        raise RecordError(where, f"{_shown(tree)} is not a JSON object of named fields")
    texts = {field: _text(tree, field, where) for field in NAMES}
    for field in REQUIRED:
        if not texts[field].strip():
            raise RecordError(
                where, f"{field}={_shown(texts[field])} is empty; it must say something"
            )
    texts["answer"] = _untagged_answer(texts["answer"], where)
    texts["reasoning"] = _untagged_reasoning(texts["reasoning"], where)
    files = {kind: _paths(tree, kind, root, where) for kind in MEDIA_NAMES}
    media_type = tree.get("data_type")
    if media_type is not None and media_type not in MEDIA_TYPES:
        raise RecordError(
            where, f"data_type={_shown(media_type)} must be one of {', '.join(MEDIA_TYPES)}"
        )
    if media_type in files and not files[media_type]:
        raise RecordError(
            where,
            f"data_type={media_type!r}, but {media_type} is missing; name its file in "
            f"{media_type}s",
        )
    question, media = _placed(texts.pop("question"), files, where)
    media = _with_span(media, tree.get("span"), where)
    return Example(
        **texts,
        question=question,
        media=media,
        tags=_tags(tree.get("tags"), where),
        subtitles=_subtitles(tree.get("subtitles"), root, where),
    )


def to_record(example: Example) -> dict[str, Any]:
    """Returns the plain form of a record, which `parse` turns into the same Example."""
    words, pieces, used = example.question, [], 0
    if any(file.at for file in example.media) or len(example.media) > 1:
        for file in example.media:
            pieces += [words[used : file.at], f"<{file.kind}>"]
            used = file.at
    tree: dict[str, Any] = {
        "id": example.id,
        "question": "".join([*pieces, words[used:]]),
        "answer": example.answer,
        "kind": example.kind,
    }
    for kind, (one, many) in MEDIA_NAMES.items():
        paths = [file.path for file in example.media if file.kind == kind]
        if paths:
            tree |= {one: paths[0]} if len(paths) == 1 else {many: paths}
    spans = [file.span_s for file in example.media if file.span_s]
    if spans:
        tree["span"] = list(spans[0])
    tree["reasoning"] = example.reasoning
    if example.tags:
        tree["tags"] = dict(example.tags)
    if example.subtitles:
        tree["subtitles"] = example.subtitles
    return tree


def _unique(where: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Builds an object; Python alone would keep the last of two fields of one name."""
    tree = dict(pairs)
    if len(tree) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise RecordError(where, f"the field {double!r} stands twice; keep one")
    return tree


def _text(tree: dict[str, Any], field: str, where: str) -> str:
    """Returns a field's text under whichever of its names the line uses; "" if it may lack."""
    found = [name for name in NAMES[field] if name in tree]
    if len(found) > 1:
        raise RecordError(where, f"{' and '.join(found)} both give the {field}; keep one")
    if not found:
        if field in REQUIRED:
            raise RecordError(where, f"no {field}; name it {' or '.join(NAMES[field])}")
        return ""
    value = tree[found[0]]
    if field == "id" and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is None and field not in REQUIRED:
        return ""
    if not isinstance(value, str):
        wish = "text or a whole number" if field == "id" else "text"
        raise RecordError(where, f"{found[0]}={_shown(value)} must be {wish}")
    try:
        value.encode()
    except UnicodeEncodeError:  # half a surrogate pair, which tokenizers and file systems refuse
        raise RecordError(where, f"{found[0]}={_shown(value)} must be valid Unicode") from None
    return value


def _untagged_answer(answer: str, where: str) -> str:
    match = ANSWER.fullmatch(answer)
    inner = (match[1] if match else answer).strip()
    if TAG.search(inner) or not inner:
        raise RecordError(
            where, f"answer={_shown(answer)} must be <answer>X</answer>, or X without any tag"
        )
    return inner


def _untagged_reasoning(reasoning: str, where: str) -> str:
    match = REASONING.fullmatch(reasoning)
    inner = (match[1] if match else reasoning).strip()
    if TAG.search(inner):
        raise RecordError(
            where,
            f"reasoning={_shown(reasoning)} must be <think>...</think>, or text without any tag",
        )
    return inner


def _paths(tree: dict[str, Any], kind: str, root: Path, where: str) -> list[str]:
    """Returns the paths of a record's images or videos, each of which stays in root."""
    found = [name for name in MEDIA_NAMES[kind] if name in tree]
    if len(found) > 1:
        raise RecordError(where, f"{' and '.join(found)} both give the {kind}; keep one")
    value = tree[found[0]] if found else None
    if value is None or value == "":
        return []
    paths = value if isinstance(value, list) else [value]
    if not all(isinstance(path, str) and path for path in paths):
        raise RecordError(
            where, f"{found[0]}={_shown(value)} must be a path, as text, or a list of paths"
        )
    for path in paths:
        _check_inside(kind, path, root, where)
    return paths


def _check_inside(field: str, path: str, root: Path, where: str) -> None:
    try:
        inside = (root / path).resolve().is_relative_to(root.resolve())
    except (ValueError, OSError, RuntimeError):  # a zero byte, a long name, a circle of links
        inside = False
    if Path(path).is_absolute() or not inside:
        raise RecordError(
            where,
            f"{field}={_shown(path)} must be a relative path that stays in {root}, links followed",
        )


def _with_span(media: tuple[MediaFile, ...], value: Any, where: str) -> tuple[MediaFile, ...]:
    """Gives a record's only video the part of it that is asked about."""
    if value is None:
        return media
    numbers = value if isinstance(value, list) else []
    good = len(numbers) == 2 and all(type(x) in (int, float) for x in numbers)
    if not good or not 0 <= numbers[0] < numbers[1] < math.inf:
        raise RecordError(
            where, f"span={_shown(value)} must be [start, end], in seconds, 0 <= start < end"
        )
    if sum(file.kind == "video" for file in media) != 1:
        raise RecordError(where, "span is a part of one video; the record has none, or several")
    span_s = (float(numbers[0]), float(numbers[1]))
    return tuple(
        dataclasses.replace(file, span_s=span_s) if file.kind == "video" else file for file in media
    )


def _subtitles(value: Any, root: Path, where: str) -> str:
    if value is None or value == "":
        return ""
    if not isinstance(value, str):
        raise RecordError(where, f"subtitles={_shown(value)} must be a path, as text")
    _check_inside("subtitles", value, root, where)
    return value


def _tags(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise RecordError(where, f"tags={_shown(value)} must be an object of texts by name")
    return tuple(value.items())


def _placed(
    question: str, files: dict[str, list[str]], where: str
) -> tuple[str, tuple[MediaFile, ...]]:
    """Takes the placeholders out of a question; returns its words and what stands where in them."""
    kinds = [match[1] for match in PLACEHOLDER.finditer(question)]
    if not kinds:
        all_before = [MediaFile(kind=k, path=path) for k, paths in files.items() for path in paths]
        return question, tuple(all_before)
    for kind, paths in files.items():
        if kinds.count(kind) != len(paths):
            raise RecordError(
                where,
                f"the question says <{kind}> {kinds.count(kind)} times, but {kind} names "
                f"{len(paths)} files; make them equal",
            )
    words, media = "", []
    left = {kind: iter(paths) for kind, paths in files.items()}
    for i, text in enumerate(PLACEHOLDER.split(question)):  # words and kinds take turns
        if i % 2:
            media.append(MediaFile(kind=text, path=next(left[text]), at=len(words)))
        else:
            words += text
    if not words.strip():
        raise RecordError(where, f"question={_shown(question)} has no words; it must ask something")
    return words, tuple(media)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."
