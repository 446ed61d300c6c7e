"""Reward of questions that ask when: how much do the spans of time overlap?

Source: temporal intersection over union, arXiv:1705.02101 section 4.2 (IoU, "R@1, IoU=0.5"). Spans
are read as people and models write them:

    1:05-1:20   00:01:05 - 00:01:20   1:05 to 1:20   between 1:05 and 1:20   [65, 80]   65s - 80s
    from 65 to 80 seconds   1 to 2 minutes   1 min 5 s until 1 min 20 s   {"start": 65, "end": 80}

and several, "1:05-1:20, 2:00-2:10" (their union counts). Bare numbers are seconds, or of the unit
that the other end has. What does not pair up is no span.
"""

import re
from collections.abc import Sequence

from longrl_jax.rewards import answers
from longrl_jax.rewards.quantities import Quantity, plain, quantities
from longrl_jax.types import Scored

HIT = 0.5
"""The overlap from which a span counts as found, the field's usual one."""
BETWEEN = re.compile(
    r"[\s\"'\])}]*(?:-|->|\u2013|\u2014|\u2192|~|,|to|until|till|through|and)"
    r"[\s\"'\[({]*(?:end(?:_time|_s)?[\s\"':=]*)?",
    re.IGNORECASE,
)
MINUTES = re.compile(r"(\d)\s?m\b")
"""In a time that is no length."""
Span = tuple[float, float]


def reward(items: Sequence[Scored]) -> list[dict[str, float] | None]:
    """Returns `iou` (0 to 1), also as `total`, and `hit` (1 from HIT on).

    None where the reference is no span. An answer that is none has 0.
    """
    results: list[dict[str, float] | None] = []
    for item in items:
        wanted = spans(item.example.answer)
        if not wanted:
            results.append(None)
            continue
        overlap = iou(spans(answers.given(item)), wanted)
        results.append({"total": overlap, "iou": overlap, "hit": float(overlap >= HIT)})
    return results


def spans(text: str) -> list[Span]:
    """Returns (start, end) in seconds of every span of a text, merged and in order; [] if one thing
    in it is none."""
    text = MINUTES.sub(r"\1 min", plain(text))
    text = re.sub(r"(?<=\d),(?=\d)", ", ", text)  # no thousands here: [65,80]
    times = quantities(text, signed=False)
    if not times or len(times) % 2 or any(time.kind not in ("", "time") for time in times):
        return []
    found = []
    for first, last in zip(times[::2], times[1::2], strict=True):
        between = text[first.end : last.start]
        negative = text[: first.start].endswith("-")
        if negative or not BETWEEN.fullmatch(between):
            return []
        start, end = _seconds(first, last), _seconds(last, first)
        if start >= end:
            return []
        found.append((start, end))
    return _merged(found)


def iou(given: Sequence[Span], wanted: Sequence[Span]) -> float:
    """Returns the length of what is in both over the length of what is in either; both merged."""
    both, i, j = 0.0, 0, 0
    while i < len(given) and j < len(wanted):
        both += max(0.0, min(given[i][1], wanted[j][1]) - max(given[i][0], wanted[j][0]))
        if given[i][1] < wanted[j][1]:
            i += 1
        else:
            j += 1
    either = sum(end - start for start, end in (*given, *wanted)) - both
    return both / either if either else 0.0


def _seconds(time: Quantity, other: Quantity) -> float:
    """A bare number has the unit of the other end."""
    return time.value if time.kind else time.number * (other.factor if other.kind else 1.0)


def _merged(found: list[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in sorted(found):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged
