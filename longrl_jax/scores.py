"""What a set of answers is worth: means by kind with 95 % intervals, baselines, differences.

A question is one draw from the questions that could have been asked, whatever the number of its
answers; questions on one film are not independent draws. Source: arXiv:2411.00640 (clustered
standard errors, paired differences of evaluations).
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, TypeVar

import numpy as np
from scipy import special

from longrl_jax.options import ANY_NUMBER, split_options
from longrl_jax.types import Example

X = TypeVar("X")
CONFIDENCE = 0.95
Z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
ALL = "all"
"""Name of the row that holds every kind; records of that kind are told from it as "all (kind)"."""
CORRECT = "accuracy"
"""Last word of the reward parts that pass@R is reported for."""

PASS, EVERY = "pass", "all"
"""Of several answers to a question: at least one is right (pass@R), every one is (all@R)."""

Row = dict[str, Any]
"""One judged answer: id, kind, video, reward (parts by name, None: could not be judged), and
perhaps tags, and scores (verdicts of a benchmark's scorers by name, None likewise)."""
Score = dict[str, float | None]
"""mean, low, high (None: one question has no interval) and n, the number of questions."""


def summary(
    questions: Sequence[Sequence[Row]], *, report_by: Sequence[str] = (), several: str = PASS
) -> dict[str, dict[str, Score]]:
    """Returns {"all", kind or "tag: value": {part: Score}} of the judged answers to each question.

    report_by: the tags. With several answers to a question, "<part>/pass@R" of an accuracy is the
    share of questions with at least one right answer among R (several="all": "<part>/all@R", with
    every answer right), where the part itself is their mean (mean@R). It is of the questions all of
    whose answers were judged: of the others nobody knows.
    """
    rows = [(rows, rows[0]["kind"], rows[0].get("tags", {})) for rows in questions]
    return {
        name: _parts(chosen, several)
        for name, chosen in _grouped(rows, report_by).items()
        if chosen
    }


def verdicts(row: Row) -> dict[str, float]:
    """Returns the parts of a judged answer: "<scorer>/accuracy" of a benchmark's scorers, then
    those of its rewards. What could not be judged is missing."""
    said = {f"{name}/{CORRECT}": value for name, value in row.get("scores", {}).items()}
    said |= row["reward"] or {}
    return {part: float(value) for part, value in said.items() if value is not None}


def unjudged(questions: Sequence[Sequence[Row]]) -> dict[str, int]:
    """Returns how many answers a scorer, or the rewards, could not judge, where there are any."""
    counts: dict[str, int] = defaultdict(int)
    for row in (row for rows in questions for row in rows):
        missing = [name for name, value in row.get("scores", {}).items() if value is None]
        for name in missing + ["rewards"] * (row["reward"] is None):
            counts[name] += 1
    return dict(counts)


def is_right(part: str) -> bool:
    """Whether a part says if an answer is right: kinds and baselines are shown for it."""
    return part.rpartition("/")[2] == CORRECT


def kind_name(kind: str) -> str:
    """Returns the name that a kind is reported by."""
    return f"{ALL} (kind)" if kind == ALL else kind or "other"


def interval(answers: Sequence[Sequence[float]], clusters: Sequence[str] = ()) -> Score:
    """Returns the mean over questions of the mean over their answers, with a 95 % interval.

    Values in [0, 1]: Wilson's interval for as many independent questions as would have the
    variance of this mean; that is their own number for one right or wrong answer each. Others: the
    normal interval. clusters: what each question is about; where several share one, the variance
    is the larger one of that over questions and that over clusters. Answers about one film alone
    have no interval: they say nothing about other films.
    """
    values = np.array([np.mean(a) for a in answers])
    n, mean = len(values), float(values.mean())
    num_films = len(set(clusters)) or n
    if num_films == 1 < n:
        return {"mean": mean, "low": None, "high": None, "n": n}
    drawn = [value for a in answers for value in a]
    bounded = all(0 <= value <= 1 for value in drawn)
    variance = _variance(values, clusters, ddof=0 if bounded else 1)
    if bounded:
        right_or_wrong = all(value in (0, 1) for value in drawn)
        most = len(drawn) if right_or_wrong else math.inf  # where every answer is a draw of its own
        low, high = wilson(mean, min(mean * (1 - mean) / variance, most) if variance else num_films)
    elif n < 2:
        return {"mean": mean, "low": None, "high": None, "n": n}
    else:
        low, high = mean - Z * math.sqrt(variance), mean + Z * math.sqrt(variance)
    return {"mean": mean, "low": low, "high": high, "n": n}


def wilson(share: float, count: float) -> tuple[float, float]:
    """Returns the score interval of a share of `count` draws. Source: E. B. Wilson, JASA 22, 1927.

    It stays in [0, 1] and has a width where the share is 0 or 1.
    """
    centre = (share + Z**2 / (2 * count)) / (1 + Z**2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + (Z / (2 * count)) ** 2) / (1 + Z**2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(
    a: Mapping[str, float], b: Mapping[str, float], clusters: Mapping[str, str] | None = None
) -> Score:
    """Returns mean(a - b) over the same questions, by id, with its 95 % t interval.

    What makes a question easy for both leaves the difference, so this is narrower than two
    intervals side by side. clusters: what each question is about, as in `interval`. Differences
    that are all equal have no interval. Raises ValueError where the questions are not the same.
    """
    only = sorted(set(a) ^ set(b))
    if only or not a:
        raise ValueError(_not_the_same(len(a), len(b), only))
    names = sorted(a)
    values = np.array([a[name] - b[name] for name in names])
    about = [clusters[name] for name in names] if clusters else []
    n, mean = len(values), float(values.mean())
    if n < 2 or not np.ptp(values) or len(set(about)) == 1:  # all alike: no spread to judge by
        return {"mean": mean, "low": None, "high": None, "n": n}
    free = max(1, (len(set(about)) if about else n) - 1)
    half = float(special.stdtrit(free, (1 + CONFIDENCE) / 2)) * math.sqrt(
        _variance(values, about, ddof=1)
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": n}


def difference(
    after: Path | str,
    before: Path | str,
    *,
    mode: str,
    part: str,
    read: Callable[[Path | str, str], dict[str, list[Row]]] | None = None,
) -> dict[str, Score]:
    """Returns {"all" or kind: paired difference} of two folders of `python -m longrl_jax.evaluate`.

    mode: e.g. greedy; part: of the rewards or a benchmark's scorers, e.g. video_qa/accuracy or
    official/accuracy. read: in place of read_answers.
    """
    ours, theirs = ((read or read_answers)(folder, mode) for folder in (after, before))
    wanted = [{name: rows[0].get("answer") for name, rows in x.items()} for x in (ours, theirs)]
    other = [name for name in ours if name in theirs and wanted[0][name] != wanted[1][name]]
    if other:
        raise ValueError(
            f"{after} and {before} know other answers to {len(other)} questions, e.g. "
            f"{other[0]!r}: their data sets differ; evaluate both on the same one"
        )
    only = sorted(set(ours) ^ set(theirs))
    if only:
        raise ValueError(_not_the_same(len(ours), len(theirs), only))
    found = gains(ours, theirs, part)
    if not found:
        known = {name: None for rows in ours.values() for name in verdicts(rows[0])}
        raise ValueError(f"{part!r} is no part of the scores; choose of {sorted(known)}")
    return found


def gains(
    ours: Mapping[str, Sequence[Row]], theirs: Mapping[str, Sequence[Row]], part: str
) -> dict[str, Score]:
    """Returns {"all" or kind: paired difference} over the questions that both have judged answers
    to, each by id with its answers; {} without any."""
    a, b = (_question_means(answers, part) for answers in (ours, theirs))
    films = {name: _cluster(rows[0]) for name, rows in ours.items()}
    no_tags: dict[str, str] = {}
    both = [(name, ours[name][0]["kind"], no_tags) for name in a if name in b]
    return {
        kind: paired_difference({n: a[n] for n in names}, {n: b[n] for n in names}, films)
        for kind, names in _grouped(both, ()).items()
        if names
    }


def read_answers(folder: Path | str, mode: str) -> dict[str, list[Row]]:
    """Returns {question id: its answers} of one mode from folder/answers/<mode>.jsonl."""
    path = Path(folder) / "answers" / f"{mode}.jsonl"
    if not path.is_file():
        raise ValueError(f"there is no {path}; python -m longrl_jax.evaluate writes it")
    found: dict[str, list[Row]] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(
                f"{path}:{number} is damaged; delete the file and give the command of that "
                "evaluation again: it is written anew, and nothing is asked again"
            ) from None
        rows = found.setdefault(row["id"], [])
        if row["sample"] != len(rows):
            raise ValueError(f"two questions of {path} have the id {row['id']!r}; rename one")
        rows.append(row)
    if not found:
        raise ValueError(f"{path} holds no answers")
    return found


def one_letter(examples: Sequence[Example], report_by: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what the best constant letter scores on multiple-choice questions, as {"all" or kind:
    {letter, mean, low, high, n, shares}}; {} without such questions.

    shares: of every letter. A kind's letter is its own best, which may be another one than overall.
    """
    choices = _by_kind(
        [e for e in examples if re.fullmatch("[A-Z]", e.answer) and ANY_NUMBER not in e.question],
        report_by,
    )
    return {kind: _best_letter(chosen) for kind, chosen in choices.items()}


def one_answer(examples: Sequence[Example], report_by: Sequence[str] = ()) -> dict[str, Any]:
    """Returns what the most frequent answer of each kind scores, free answers too, {"all" or kind:
    {mean, low, high, n}}: what a policy knows that has learned the answers, but not to look."""
    right = []
    for chosen in list(_by_kind(examples).values())[1:]:
        answers = [e.answer for e in chosen]
        best = max(sorted(set(answers)), key=answers.count)
        right += [(e, [float(e.answer == best)]) for e in chosen]
    kinds = _grouped([(pair, pair[0].kind, dict(pair[0].tags)) for pair in right], report_by)
    return {
        kind: dict(interval([v for _, v in pairs], _films(e for e, _ in pairs)))
        for kind, pairs in kinds.items()
        if pairs
    }


def chance(
    examples: Sequence[Example], report_by: Sequence[str] = (), rotations: int = 1
) -> dict[str, Any]:
    """Returns what guessing among the options scores, {"all" or kind: {mean, n}}.

    Only questions that list their options as capital letters from A on are counted; where any
    number of n options may be right (ANY_NUMBER), one guess of 2^n is. rotations: how many examples
    are one question, right only if all are.
    """
    choices = _by_kind([e for e in examples if _num_guesses(e)], report_by)
    return {
        kind: {
            "mean": float(np.mean([_num_guesses(e) ** -float(rotations) for e in chosen])),
            "n": len(chosen) // rotations,
        }
        for kind, chosen in choices.items()
    }


def num_options(example: Example) -> int:
    """Returns how many options a question lists; where they are no block of lines, how many of the
    letters A, B, ... stand alone in it, without a gap."""
    if listed := split_options(example.question)[1]:
        return len(listed)
    alone = set(re.findall(r"(?<!\w)[A-Z](?!\w)", example.question))
    count = 0
    while chr(ord("A") + count) in alone:
        count += 1
    return count if count > 1 else 0  # "A" alone is an article


def _num_guesses(example: Example) -> int:
    """How many answers a question leaves to a guess; 0: that is not known."""
    count = num_options(example)
    if ANY_NUMBER in example.question:
        return 2**count if count else 0
    known = re.fullmatch("[A-Z]", example.answer) and ord(example.answer) - ord("A") < count
    return count if known else 0


def _parts(questions: Sequence[Sequence[Row]], several: str) -> dict[str, Score]:
    """The Score of every part over these questions."""
    values: dict[str, list[tuple[list[float], str]]] = defaultdict(list)
    num_samples = max(len(rows) for rows in questions)
    chosen = {PASS: max, EVERY: min}[several]
    for rows in questions:
        judged: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            for part, value in verdicts(row).items():
                judged[part].append(value)
        for part, drawn in judged.items():
            values[part].append((drawn, _cluster(rows[0])))
            if num_samples > 1 and is_right(part) and len(drawn) == len(rows):
                name = f"{part}/{several}@{num_samples}"
                values[name].append(([chosen(drawn)], _cluster(rows[0])))
    return {
        part: interval([drawn for drawn, _ in pairs], [film for _, film in pairs])
        for part, pairs in sorted(values.items())
    }


def _cluster(row: Row) -> str:
    """What a question is about: its media, or itself."""
    return f"film {row['video']}" if row["video"] else f"question {row['id']}"


def _films(examples: Iterable[Example]) -> list[str]:
    return [_cluster({"video": e.about, "id": e.id}) for e in examples]


def _variance(values: np.ndarray, clusters: Sequence[str], *, ddof: int) -> float:
    """Of the mean of values: the larger of that over values and, if any is shared, over clusters.

    ddof=0 makes the variance of n right or wrong answers p (1 - p) / n exactly, as Wilson has it.
    """
    n = len(values)
    single = float(values.var(ddof=ddof)) / n if n > ddof else 0.0
    num_clusters = len(set(clusters))
    if not 1 < num_clusters < n:
        return single
    sums: dict[str, float] = defaultdict(float)
    for cluster, rest in zip(clusters, values - values.mean(), strict=True):
        sums[cluster] += float(rest)
    shared = sum(s**2 for s in sums.values()) / n**2 * num_clusters / (num_clusters - 1)
    return max(single, shared)


def _not_the_same(ours: int, theirs: int, only: Sequence[str]) -> str:
    return (
        f"{ours} and {theirs} questions are not the same ones ({len(only)} in one alone, e.g. "
        f"{only[:1]}); evaluate both on the same file with the same number of examples"
    )


def _question_means(answers: Mapping[str, Sequence[Row]], part: str) -> dict[str, float]:
    """Returns the mean of a part over the answers to each question that has a judged one."""
    judged = {name: [verdicts(row) for row in rows] for name, rows in answers.items()}
    values = {name: [v[part] for v in rows if part in v] for name, rows in judged.items()}
    return {name: float(np.mean(drawn)) for name, drawn in values.items() if drawn}


def _by_kind(
    examples: Sequence[Example], report_by: Sequence[str] = ()
) -> dict[str, list[Example]]:
    groups = _grouped([(e, e.kind, dict(e.tags)) for e in examples], report_by)
    return {name: chosen for name, chosen in groups.items() if chosen}


def _grouped(
    records: Sequence[tuple[X, str, Mapping[str, str]]], report_by: Sequence[str]
) -> dict[str, list[X]]:
    """Puts (record, kind, tags) under "all", its kind, and "<tag>: <value>" of every tag asked for.

    Kinds come in order, values of a tag as they come in the data.
    """
    kinds: dict[str, list[X]] = {}
    values: dict[str, dict[str, list[X]]] = {tag: {} for tag in report_by}
    for record, kind, tags in records:
        kinds.setdefault(kind_name(kind), []).append(record)
        for tag in report_by:
            if tag in tags:
                values[tag].setdefault(f"{tag}: {tags[tag]}", []).append(record)
    groups = {ALL: [record for record, _, _ in records]}
    groups |= {name: kinds[name] for name in sorted(kinds)}
    return groups | {name: rows for of_tag in values.values() for name, rows in of_tag.items()}


def _best_letter(chosen: Sequence[Example]) -> dict[str, Any]:
    answers = [e.answer for e in chosen]
    shares = {letter: answers.count(letter) / len(answers) for letter in sorted(set(answers))}
    letter = max(shares, key=lambda name: shares[name])
    score = interval([[float(answer == letter)] for answer in answers], _films(chosen))
    return {"letter": letter, **score, "shares": shares}
