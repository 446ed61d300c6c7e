"""How often a question is answered right, whether that keeps it, and for which stage."""

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longrl_jax.scores import ALL, kind_name

KEPT, TOO_EASY, TOO_HARD, INVALID = "kept", "too_easy", "too_hard", "invalid"
REASONS = KEPT, TOO_EASY, TOO_HARD, INVALID
"""What becomes of a question."""
ACCURACY = "/accuracy"
"""End of the reward part that is taken where --part names none."""

Row = dict[str, Any]
"""A judged question: id, kind, video, films (digests of its media), answer, rewards (of every
answer: parts by name, or None), finish_reasons."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bounds:
    """When a question is kept."""

    above: float = 0.0
    below: float = 1.0
    """Of the pass rate; neither is included."""
    right_from: float = 1.0
    """Least accuracy of a right answer."""
    min_valid: int = 1
    """Fewest judged answers."""
    part: str = ""
    """Reward part that says it; empty: the only accuracy."""

    def __post_init__(self):
        if not 0 <= self.above < self.below <= 1:
            raise ValueError(
                f"--above {self.above} and --below {self.below} must be 0 <= above < below <= 1"
            )


def verdict(row: Row, bounds: Bounds) -> dict[str, Any]:
    """Returns pass, k, valid, rate (None without a judged answer), kept and reason of a question.

    Raises ValueError if the reward part is not among its rewards.
    """
    judged = [parts for parts in row["rewards"] if parts is not None]
    part = bounds.part or _only_accuracy(judged)
    if judged and part not in judged[0]:
        raise ValueError(
            f"--part {part} is no part of the rewards; choose one of {', '.join(judged[0])}"
        )
    values = [parts[part] for parts in judged if parts[part] is not None]
    right, valid = sum(value >= bounds.right_from for value in values), len(values)
    rate = right / valid if valid else None
    if rate is None or valid < bounds.min_valid:
        reason = INVALID
    elif rate <= bounds.above:
        reason = TOO_HARD
    else:
        reason = TOO_EASY if rate >= bounds.below else KEPT
    return {
        "pass": right,
        "k": len(row["rewards"]),
        "valid": valid,
        "rate": rate,
        "kept": reason == KEPT,
        "reason": reason,
    }


def unjudged(row: Row) -> bool:
    """Whether a reward could not judge one of the answers."""
    return any(parts is None or None in parts.values() for parts in row["rewards"])


def split(
    films: Sequence[Sequence[str]], *, rl_share: float, by_film: bool, seed: int
) -> list[bool]:
    """Returns which records are for RL; the others are for SFT.

    films: digests of every record's media. By film: records that share one, through others too,
    stay together. Groups of records in random order: the first ones are SFT's, until its share is
    as near as a whole group allows.
    """
    group_of = _film_groups(films) if by_film else list(range(len(films)))
    sizes = collections.Counter(group_of)
    groups = sorted(sizes)
    order = np.random.default_rng(seed).permutation(len(groups))
    wanted, before, of_rl = (1 - rl_share) * len(films), 0, {}
    for i in order:
        group = groups[i]
        of_rl[group] = before + sizes[group] / 2 >= wanted
        before += sizes[group]
    return [of_rl[group] for group in group_of]


def counted(lines: Sequence[Mapping[str, Any]], num_samples: int) -> dict[str, dict[str, Any]]:
    """Returns {"all" or kind: how many have each reason, and how many of those kept and of those
    dropped have each pass rate, in num_samples-ths} of lines of questions.jsonl."""
    kinds: dict[str, list[Mapping[str, Any]]] = {ALL: list(lines)}
    for line in lines:
        kinds.setdefault(kind_name(line["kind"]), []).append(line)
    found = {}
    for kind in (ALL, *sorted(set(kinds) - {ALL})):
        bins = {"kept": [0] * (num_samples + 1), "dropped": [0] * (num_samples + 1)}
        for line in kinds[kind]:
            if line["reason"] != INVALID:
                place = round(line["rate"] * num_samples)
                bins["kept" if line["kept"] else "dropped"][place] += 1
        reasons = collections.Counter(line["reason"] for line in kinds[kind])
        found[kind] = {reason: reasons[reason] for reason in REASONS} | {"histogram": bins}
    return found


def _only_accuracy(judged: Sequence[Mapping[str, Any]]) -> str:
    if not judged:
        return ""
    found = [part for part in judged[0] if part.endswith(ACCURACY)]
    if len(found) != 1:
        raise ValueError(
            f"the rewards have {len(found)} accuracies; name with --part what says that an answer "
            f"is right, one of {', '.join(judged[0])}"
        )
    return found[0]


def _film_groups(films: Sequence[Sequence[str]]) -> list[int]:
    """Returns for every record the first record that it is joined to by films, itself at least."""
    above = list(range(len(films)))

    def top(i: int) -> int:
        while above[i] != i:
            above[i] = above[above[i]]
            i = above[i]
        return i

    first: dict[str, int] = {}
    for i, shown in enumerate(films):
        for film in shown:
            a, b = sorted((top(first.setdefault(film, i)), top(i)))
            above[b] = a
    return [top(i) for i in range(len(films))]
