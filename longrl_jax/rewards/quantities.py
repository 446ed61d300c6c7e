r"""Numbers with units, as people and models write them.

    42   -3.5   1,234.5   .5   1e-3   1.5 x 10^3   3/4   1 1/2   \frac{3}{4}   1{,}234   $5
    three   twenty-five   2 million   45%   45 percent   3 min   1 h 5 min   1h5min   5 km
    1:05   1:02:03

Digits may be of any script. A comma groups thousands and nothing else: "3,5" is no number, nor are
"1.2.3" and "A4". A clock (m:ss, h:mm:ss) is a time. A word that is no known unit is passed over.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

MAX_LETTERS = 1000
"""A longer text has no quantities: an answer that is a number is short."""
KINDS = {
    "%": {"%": 0.01, "percent": 0.01, "per cent": 0.01, "pct": 0.01},
    "time": {
        "ms": 0.001, "millisecond": 0.001, "s": 1.0, "sec": 1.0, "second": 1.0, "min": 60.0,
        "minute": 60.0, "h": 3600.0, "hr": 3600.0, "hour": 3600.0, "day": 86400.0,
        "week": 604800.0,
    },
    "length": {
        "mm": 0.001, "millimeter": 0.001, "millimetre": 0.001, "cm": 0.01, "centimeter": 0.01,
        "centimetre": 0.01, "m": 1.0, "meter": 1.0, "metre": 1.0, "km": 1000.0,
        "kilometer": 1000.0, "kilometre": 1000.0, "inch": 0.0254, "inche": 0.0254, "ft": 0.3048,
        "foot": 0.3048, "feet": 0.3048, "yard": 0.9144, "mile": 1609.344,
    },
    "mass": {
        "mg": 1e-6, "g": 0.001, "gram": 0.001, "kg": 1.0, "kilogram": 1.0, "lb": 0.45359237,
        "ounce": 0.028349523125, "oz": 0.028349523125, "ton": 1000.0, "tonne": 1000.0,
    },
}  # fmt: skip
"""What units are multiples of: nothing, seconds, metres, kilograms. A final s is taken off."""
TIMES = {"hundred": 1e2, "thousand": 1e3, "million": 1e6, "billion": 1e9}
ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
WORDS = {word: i for i, word in enumerate(ONES)} | {w: 10 * i for i, w in enumerate(TENS, 2)}

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|\.\d+"
_END = r"(?![.,]?\d)"
_TENS_ONES = rf"(?:{'|'.join(TENS)})(?:[-\s](?:{'|'.join(ONES[1:10])}))?"
_NUMBER = rf"""
    (?P<clock>(?:\d+:)?\d{{1,2}}:\d{{2}}(?:\.\d+)?)(?![:\d]) |
    (?:(?P<whole>\d+)\s+)?(?P<over>\d+)\s?/\s?(?P<under>\d+){_END} |
    (?P<digits>{_DIGITS})(?:e(?P<exponent>[-+]?\d+))?{_END}
        (?:\s?(?:x|\*|\u00d7)\s?10\^(?P<power>[-+]?\d+))? |
    (?P<words>{_TENS_ONES}|{"|".join(sorted(ONES, key=len, reverse=True))})\b
"""
_TAIL = rf"""
    (?:\s?(?P<times>{"|".join(TIMES)})\b)?
    (?:\s?(?P<unit>per\scent\b|%|[a-z]+))?
"""
_FLAGS = re.IGNORECASE | re.VERBOSE
SIGNED = re.compile(rf"(?<![\w.])(?<!\d,)(?P<sign>[-+])?(?:{_NUMBER}){_TAIL}", _FLAGS)
UNSIGNED = re.compile(rf"(?<![\w.])(?<!\d,)(?P<sign>)(?:{_NUMBER}){_TAIL}", _FLAGS)
LATEX = (
    (re.compile(r"\\[dt]?frac\{(\d+)\}\{(\d+)\}"), r" \1/\2 "),
    (re.compile(r"\\(?:text|mathrm|mbox)\{([^{}]*)\}"), r" \1 "),
    (re.compile(r"\\(?:times|cdot)\b"), "x"),
    (re.compile(r"\^\{([-+]?\d+)\}"), r"^\1"),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\pm\b"), "+-"),
    (re.compile(r"\\[,;:! ]|[$\u20ac\u00a3\u00a5\\]"), " "),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantity:
    """A number as it is written, and what its unit makes of it."""

    number: float
    factor: float
    """The number times this is in the basic unit of its kind."""
    kind: str
    """Of KINDS; empty: it has no unit that we know."""
    start: int
    """Where it stands in the text that it was found in."""
    end: int

    @property
    def value(self) -> float:
        return self.number * self.factor


def plain(text: str) -> str:
    """Returns a text without LaTeX, with ASCII signs and spaces."""
    for pattern, instead in LATEX:
        text = pattern.sub(instead, text)
    text = re.sub(r"(?<=\d)[\u00a0\u2009\u202f](?=\d{3})", ",", text)  # 1 234 with a thin space
    text = re.sub(r"(?<=\d)(h|hr|min|m|s)(?=\d)", r"\1 ", text)  # 1h5min
    return text.replace("\u2212", "-").replace("\u00b1", "+-")


def quantities(text: str, *, signed: bool = True) -> list[Quantity]:
    """Returns the quantities of a `plain` text, in order; parts of one ("1 h 5 min") as one.

    signed: whether a minus belongs to a number.
    """
    if len(text) > MAX_LETTERS:
        return []
    found: list[Quantity] = []
    smallest = math.inf
    for one in _scan(text, SIGNED if signed else UNSIGNED):
        last = found[-1] if found else None
        if (
            last is not None
            and one.kind == last.kind != ""
            and one.kind != "%"
            and one.factor < smallest
            and one.value < smallest
            and re.fullmatch(r",?\s*(?:and\s+)?", text[last.end : one.start])
        ):
            together = (last.value + one.value) / last.factor
            found[-1] = dataclasses.replace(last, number=together, end=one.end)
        else:
            found.append(one)
        smallest = one.factor
    return found if all(math.isfinite(one.value) for one in found) else []


def same(a: Quantity, b: Quantity, tolerance: float) -> bool:
    """Whether two quantities are equal, as numbers of b, to the tolerance.

    A unit that one of them leaves out is taken to be the other's; 45% is also 0.45.
    """
    if a.kind and b.kind:
        return a.kind == b.kind and abs(a.value / b.factor - b.number) <= tolerance
    if abs(a.number - b.number) <= tolerance:
        return True
    return "%" in (a.kind, b.kind) and abs(a.value / b.factor - b.number) <= tolerance


def _scan(text: str, pattern: re.Pattern[str]) -> Iterator[Quantity]:
    for match in pattern.finditer(text):
        number = _number(match)
        if match["times"]:
            number *= TIMES[match["times"].casefold()]
        if match["sign"] == "-":
            number = -number
        word = match["unit"] or ""
        factor, kind = (1.0, "time") if match["clock"] else _unit(word)
        passed_over = word and (match["clock"] or not kind)
        end = match.start("unit") if passed_over else match.end()
        yield Quantity(number=number, factor=factor, kind=kind, start=match.start(), end=end)


def _number(match: re.Match[str]) -> float:
    if match["clock"]:
        seconds = 0.0
        for part in match["clock"].split(":"):
            seconds = seconds * 60 + float(part)
        return seconds
    if match["under"]:
        under = float(match["under"])
        return float(match["whole"] or 0) + float(match["over"]) / under if under else math.nan
    if match["words"]:
        return float(sum(WORDS[word] for word in re.split(r"[-\s]", match["words"].casefold())))
    digits = match["digits"].replace(",", "")
    exponent = int(match["exponent"] or 0) + int(match["power"] or 0)
    return float(f"{digits}e{exponent}")


def _unit(word: str) -> tuple[float, str]:
    """Returns (factor, kind) of a unit; (1, "") for any other word."""
    name = word if len(word) == 1 else re.sub(r"\s", " ", word.casefold())
    for kind, units in KINDS.items():
        for form in (name, name.removesuffix("s")):
            if form in units:
                return units[form], kind
    return 1.0, ""
