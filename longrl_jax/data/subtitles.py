"""Subtitles of a film: .srt and .vtt by pysubs2 (this is its one door), and LongVideoBench's .json.

Two ways to put them into a prompt. `shown`: the lines on the screen at the sampled times, as
Video-MME is asked (lmms-eval tasks/videomme, VILA llava/eval/lmms/tasks/videomme.py). `between`:
each line between the frames around its middle, as LongVideoBench is (its longvideobench_dataset.py,
lmms-eval tasks/longvideobench).
"""

import dataclasses
import functools
import html
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pysubs2

from longrl_jax.types import Example

START, LENGTH = "subtitles_start_s", "duration_s"
"""Tags of an Example: the second of the subtitles at which its film begins, and the film's length,
where a film was cut out of a longer one that the subtitles are of."""
FORMATS = {".srt": "srt", ".vtt": "vtt"}
MARKUP = re.compile(r"</?[a-zA-Z][^<>]*>")
MAX_BYTES = 2**24
"""Of a file; the subtitles of a day are smaller."""
MIN_SHOWN_S = 1.0
"""A line that is shown for less counts as shown that long around its middle (LongVideoBench)."""


@dataclasses.dataclass(frozen=True)
class Line:
    """What is said, and when, in seconds from the start of the film."""

    start_s: float
    end_s: float
    text: str


class SubtitleError(ValueError):
    """A file of subtitles that cannot be used; says which and why."""


def of_example(example: Example, root: Path) -> tuple[Line, ...]:
    """Returns the lines of an example's film, their times from its start; none without a file."""
    if not example.subtitles:
        return ()
    tags = dict(example.tags)
    try:
        start_s, length_s = float(tags.get(START, 0)), float(tags.get(LENGTH, "inf"))
    except ValueError as error:
        raise SubtitleError(
            f"tags of {example.id!r}: {START} and {LENGTH} must be seconds ({error})"
        ) from None
    return read(root / example.subtitles, start_s=start_s, length_s=length_s)


def exchanged(example: Example, other: Example) -> Example:
    """Returns an example with the subtitles of another one's film, as shown with that film."""
    tags = [(name, value) for name, value in example.tags if name not in (START, LENGTH)]
    tags += [(name, value) for name, value in other.tags if name in (START, LENGTH)]
    return dataclasses.replace(example, subtitles=other.subtitles, tags=tuple(tags))


@functools.lru_cache(maxsize=8)  # questions on one film stand together
def read(path: Path, *, start_s: float = 0.0, length_s: float = math.inf) -> tuple[Line, ...]:
    """Reads a file, in the order in which its lines stand; a text of several lines becomes one.

    Markup is taken out. start_s: taken off all times. length_s: where a line without an end ends.
    Raises SubtitleError for a file that is missing, no text in UTF-8, or without a single line.
    """
    text = _text(path)
    if not text.strip():
        return ()
    if path.suffix.lower() == ".json":
        lines = _from_json(path, text, length_s + start_s)
    elif path.suffix.lower() in FORMATS:
        lines = _from_text(path, text)
    else:
        raise SubtitleError(f"{path} must end in .srt, .vtt or .json; convert it")
    return tuple(Line(a - start_s, b - start_s, words) for a, b, words in lines if words)


def shown(lines: Sequence[Line], times_s: Sequence[float]) -> list[str]:
    """Returns the lines that are on the screen at one of these times, in their order, each once.

    A line is there from its start on, and not any more at its end.
    """
    return [x.text for x in lines if any(x.start_s <= t < x.end_s for t in times_s)]


def between(lines: Sequence[Line], times_s: Sequence[float]) -> list[tuple[int, str]]:
    """Returns (number of frames before it, line) of every line that a frame falls into.

    A line stands behind all frames up to its middle. It needs a frame after its start and before
    its end, or within half a second of its middle where it is shown for less than a second.
    """
    placed, before = [], 0
    for line in lines:
        middle_s = (line.start_s + line.end_s) / 2
        while before < len(times_s) and times_s[before] <= middle_s:
            before += 1
        start_s, end_s = line.start_s, line.end_s
        if end_s - start_s < MIN_SHOWN_S:
            start_s, end_s = middle_s - MIN_SHOWN_S / 2, middle_s + MIN_SHOWN_S / 2
        if any(start_s < t < end_s for t in times_s):
            placed.append((before, line.text))
    return placed


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_BYTES:
            raise SubtitleError(f"{path} is over {MAX_BYTES >> 20} MiB; is it a file of subtitles?")
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except OSError as error:
        raise SubtitleError(f"{path} cannot be read: {error.strerror}; fetch it again") from None
    except UnicodeDecodeError as error:
        raise SubtitleError(f"{path} is no text in UTF-8 ({error}); convert it") from None


def _from_text(path: Path, text: str) -> list[tuple[float, float, str]]:
    kind = FORMATS[path.suffix.lower()]
    try:
        events = pysubs2.SSAFile.from_string(text, format_=kind, keep_html_tags=True)
    except Exception as error:  # damaged files raise nearly anything
        raise SubtitleError(f"{path} is no {kind} file ({error}); fetch it again") from None
    lines = []
    for event in events:
        words = event.text.split("\\N\\N")[0]  # an empty line ends it; pysubs2 reads on to a NOTE
        words = _plain(words.replace("\\N", " "))
        words = html.unescape(words) if kind == "vtt" else words  # only there it is in the format
        lines.append((event.start / 1000, event.end / 1000, words))
    if not lines:
        raise SubtitleError(f"{path} holds no subtitles in the form of {kind}; fetch it again")
    for start_s, end_s, words in lines:
        if end_s < start_s:
            raise SubtitleError(f"{path}: {words[:40]!r} ends before it starts; mend its times")
    return lines


def _from_json(path: Path, text: str, end_of_all_s: float) -> list[tuple[float, float, str]]:
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SubtitleError(f"{path} is not JSON ({error}); fetch it again") from None
    if not isinstance(tree, list):
        raise SubtitleError(f"{path} must be a list of subtitles; fetch it again")
    return [_line(f"{path}[{i}]", item, end_of_all_s) for i, item in enumerate(tree)]


def _line(where: str, item: Any, end_of_all_s: float) -> tuple[float, float, str]:
    """Reads {start, end, line}, times as "h:m:s", or {timestamp: [s, s or null], text}."""
    try:
        if "timestamp" in item:
            start_s, end_s = item["timestamp"]
            words = item["text"]
            end_s = end_of_all_s if end_s is None else end_s
        else:
            start_s, end_s = _seconds(item["start"]), _seconds(item["end"])
            words = item["line"]
        start_s, end_s = float(start_s), float(end_s)
        if not 0 <= start_s <= end_s:
            raise ValueError(f"it lasts from {start_s} to {end_s} s")
        if not isinstance(words, str):
            raise ValueError(f"{words!r} is no text")
    except (KeyError, TypeError, ValueError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise SubtitleError(
            f"{where}={str(item)[:80]} is no subtitle ({why}); wanted is start, end and line, or "
            "timestamp and text"
        ) from None
    return start_s, end_s, _plain(words)


def _seconds(text: str) -> float:
    hours, minutes, seconds = text.split(":")
    return int(hours) * 3600 + int(minutes) * 60 + float(seconds)


def _plain(text: str) -> str:
    return " ".join(MARKUP.sub("", text).split())
