"""Records of LongVideo-Reason, and of our own plain form: JSON lines or parquet.

Source: the card of LongVideo-Reason/longvideo-reason (fields problem_id, problem, data_type,
problem_type, reasoning, videos, answer). The plain form has the names of types.Example: id,
question, answer, kind, reasoning, tags (an object of texts), subtitles (a path), with video,
videos, image or images for the media, and span ([start, end] in seconds) for a part of one video.
Other fields are left alone. Media stand where the question
says <image> and <video>, as in Long-RL and EasyR1 (verl/utils/dataset.py), or all before its words.
"""

import dataclasses
import functools
import itertools
import math
import re
from pathlib import Path
from typing import Any

from longrl_jax.data import parquet
from longrl_jax.data.fields import (
    RecordError,
    Records,
    Rows,
    check_inside,
    check_unicode,
    need_object,
    shown,
)
from longrl_jax.data.rows import JsonLines
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
COLUMNS = (
    *itertools.chain(*NAMES.values(), *MEDIA_NAMES.values()),
    *("data_type", "span", "tags", "subtitles"),
)
"""Columns of a parquet file that are read."""
PLACEHOLDER = re.compile(r"<(image|video)>")
MEDIA_TYPES = ("image", "video", "text")
"""Values of LongVideo-Reason's data_type that we can read."""
ANSWER = re.compile(r"\s*<answer>(.*)</answer>\s*", re.DOTALL)
REASONING = re.compile(r"\s*<think>(.*?)</think>\s*(?:<answer>.*</answer>\s*)?", re.DOTALL)
TAG = re.compile(r"</?(?:think|answer)>")


def open_records(root: Path, file: str) -> Records:
    """Opens root/file: JSON lines, or a parquet file, a pattern of them or a folder with its shards
    (`parquet.shards`); every image and video must lie under root."""
    root = Path(root)
    if parquet.is_parquet(root, file):
        rows: Rows = parquet.Parquet(root, file, COLUMNS)
    else:
        rows = JsonLines(root, file)
    return Records(rows, functools.partial(to_example, root=root))


def to_example(tree: Any, *, root: Path, where: str) -> Example:
    """Turns a row into an Example; `where` (file:line) is what an error is named by."""
    tree = need_object(tree, where)
    texts = {field: _text(tree, field, where) for field in NAMES}
    for field in REQUIRED:
        if not texts[field].strip():
            raise RecordError(
                where, f"{field}={shown(texts[field])} is empty; it must say something"
            )
    texts["answer"] = _untagged_answer(texts["answer"], where)
    texts["reasoning"] = _untagged_reasoning(texts["reasoning"], where)
    files = {kind: _paths(tree, kind, root, where) for kind in MEDIA_NAMES}
    media_type = tree.get("data_type")
    if media_type is not None and media_type not in MEDIA_TYPES:
        raise RecordError(
            where, f"data_type={shown(media_type)} must be one of {', '.join(MEDIA_TYPES)}"
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
    """Returns the plain form of a record, which `to_example` turns into the same Example."""
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
        raise RecordError(where, f"{found[0]}={shown(value)} must be {wish}")
    check_unicode(found[0], value, where)
    return value


def _untagged_answer(answer: str, where: str) -> str:
    match = ANSWER.fullmatch(answer)
    inner = (match[1] if match else answer).strip()
    if TAG.search(inner) or not inner:
        raise RecordError(
            where, f"answer={shown(answer)} must be <answer>X</answer>, or X without any tag"
        )
    return inner


def _untagged_reasoning(reasoning: str, where: str) -> str:
    match = REASONING.fullmatch(reasoning)
    inner = (match[1] if match else reasoning).strip()
    if TAG.search(inner):
        raise RecordError(
            where,
            f"reasoning={shown(reasoning)} must be <think>...</think>, or text without any tag",
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
            where, f"{found[0]}={shown(value)} must be a path, as text, or a list of paths"
        )
    for path in paths:
        check_inside(kind, path, root, where)
    return paths


def _with_span(media: tuple[MediaFile, ...], value: Any, where: str) -> tuple[MediaFile, ...]:
    """Gives a record's only video the part of it that is asked about."""
    if value is None:
        return media
    numbers = value if isinstance(value, list) else []
    good = len(numbers) == 2 and all(type(x) in (int, float) for x in numbers)
    if not good or not 0 <= numbers[0] < numbers[1] < math.inf:
        raise RecordError(
            where, f"span={shown(value)} must be [start, end], in seconds, 0 <= start < end"
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
        raise RecordError(where, f"subtitles={shown(value)} must be a path, as text")
    check_inside("subtitles", value, root, where)
    return value


def _tags(value: Any, where: str) -> tuple[tuple[str, str], ...]:
    if value is None:
        return ()
    said = value.items() if isinstance(value, dict) else [("tags", value)]
    tags = tuple((name, text) for name, text in said if text is not None)  # None: as parquet lacks
    if not isinstance(value, dict) or not all(isinstance(text, str) for _, text in tags):
        raise RecordError(where, f"tags={shown(value)} must be an object of texts by name")
    for name, text in tags:
        check_unicode("tags", f"{name} {text}", where)
    return tags


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
        raise RecordError(where, f"question={shown(question)} has no words; it must ask something")
    return words, tuple(media)
