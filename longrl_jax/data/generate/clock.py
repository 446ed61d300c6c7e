"""Times of a film as people write them: 0:07, 12:30, 1:02:03."""

import math
import re

REST_S = 0.25
"""What a second is not begun for: a film of 30.03 s ends at 0:30."""
TIME = re.compile(r"(?:(\d+):)?(\d{1,3}):([0-5]\d)(?:\.\d+)?")


def told(time_s: float) -> str:
    """Returns h:mm:ss or m:ss, the fraction of a second cut off."""
    minutes, seconds = divmod(math.floor(time_s + 1e-6), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def span(start_s: float, end_s: float) -> str:
    """Returns "[0:10 - 0:20]"."""
    start, end = bounds(start_s, end_s)
    return f"[{start} - {end}]"


def bounds(start_s: float, end_s: float) -> tuple[str, str]:
    """Returns two times, one after the other, that hold the whole span but for REST_S at most."""
    last = max(math.ceil(end_s - REST_S), math.floor(start_s) + 1)
    return told(start_s), told(last)


def seconds(text: str) -> float:
    """Reads h:mm:ss, m:ss or seconds; raises ValueError."""
    match = TIME.fullmatch(text.strip())
    if match:
        hours, minutes, rest = match.groups()
        return int(hours or 0) * 3600 + int(minutes) * 60 + int(rest)
    plain = re.fullmatch(r"(\d+(?:\.\d+)?)\s*s?", text.strip())
    if not plain:
        raise ValueError(f"{text!r} is no time such as 0:07, 12:30 or 1:02:03")
    return float(plain[1])
