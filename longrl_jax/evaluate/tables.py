"""Scores as lines for people."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl_jax import scores
from longrl_jax.evaluate.plan import ANSWERS, SCORES, Found
from longrl_jax.scores import ALL, Row

HEAD = "scores x 100 (95 % interval)"
BASELINES = ("one_letter", "one_answer", "chance")


def table(found: Found) -> str:
    """Returns one evaluation: all modes by part, then modes and baselines by kind and tag."""
    columns = _columns(found)
    parts = parts_of(found)
    rows = [["", "n", *parts]]
    for title, (mode, tail) in columns.items():
        by_part = found["modes"][mode].get(ALL, {})
        cells = [by_part.get(part + tail) for part in parts]
        counts = [str(cell["n"]) for cell in cells if cell is not None]
        if counts:
            rows.append([title, counts[0], *(_cell(cell) for cell in cells)])
    for name, by_kind in found["baselines"].items():
        cells = [by_kind.get(ALL) if scores.is_right(part) else None for part in parts]
        if by_kind:
            row = [name.replace("_", " "), str(by_kind[ALL]["n"]), *(_cell(c) for c in cells)]
            rows.append(row)
    lines = [_title(found), HEAD, *_aligned(rows)]
    for part in filter(scores.is_right, parts):
        lines += ["", part, *_aligned(_by_kind(found, part, columns))]
    return "\n".join([*lines, *_remarks(found)])


def side_by_side(found: Mapping[str, Found], folders: Mapping[str, Path]) -> str:
    """Returns several evaluations: greedy scores by kind and tag, one column each; and, where two
    differ in thinking alone, what thinking adds, question by question."""
    blocks = []
    for part in dict.fromkeys(part for one in found.values() for part in parts_of(one)):
        if not scores.is_right(part):
            continue
        greedy = {name: one["modes"]["greedy"] for name, one in found.items()}
        kinds = dict.fromkeys(kind for by_kind in greedy.values() for kind in by_kind)
        gains = _gains(folders, part)
        rows = [["", *found, *gains]]
        for kind in kinds:
            cells = [_cell(by_kind.get(kind, {}).get(part)) for by_kind in greedy.values()]
            cells += [_difference(by_kind.get(kind)) for by_kind in gains.values()]
            rows.append([f"  {kind}" if kind != ALL else kind, *cells])
        blocks += ["", f"greedy, {part}", *_aligned(rows)]
    return "\n".join([HEAD, *blocks])


def compared(after: Path, before: Path) -> str:
    """Returns what one evaluation scores above another one, question by question, in every mode and
    accuracy that both have. Raises ValueError where there is none, or other questions."""
    modes = [path.stem for path in sorted((after / ANSWERS).glob("*.jsonl"))]
    modes = [mode for mode in modes if (before / ANSWERS / f"{mode}.jsonl").is_file()]
    if not modes:
        raise ValueError(
            f"{after} and {before} hold no mode that both were asked in; name two folders of "
            "python -m longrl_jax.evaluate"
        )
    lines = [f"{after} minus {before}", "points (95 % interval of the paired difference)"]
    both = [{m: _judged_parts(folder, m) for m in modes} for folder in (after, before)]
    parts = dict.fromkeys(part for judged in both[0].values() for part in judged)
    for part in filter(scores.is_right, parts):
        shared = [m for m in modes if all(part in judged[m] for judged in both)]
        if not shared:
            continue
        by_mode = {
            m: scores.difference(after, before, mode=m, part=part, read=read_answers)
            for m in shared
        }
        kinds = dict.fromkeys(kind for by_kind in by_mode.values() for kind in by_kind)
        rows = [["", "n", *(mode.replace("_", " ") for mode in shared)]]
        for kind in kinds:
            cells = [by_kind.get(kind) for by_kind in by_mode.values()]
            count = next(cell["n"] for cell in cells if cell is not None)
            rows.append(
                [f"  {kind}" if kind != ALL else kind, str(count), *map(_difference, cells)]
            )
        lines += ["", part, *_aligned(rows)]
    return "\n".join(lines)


def read_answers(folder: Path | str, mode: str) -> dict[str, list[Row]]:
    """Returns {question: its judged answers} of an evaluation, counted as its scores count them:
    all rotations of one question as one (benchmarks.joined)."""
    path = Path(folder) / SCORES
    name = json.loads(path.read_text()).get("benchmark") if path.is_file() else ""
    if not name:
        return scores.read_answers(folder, mode)
    from longrl_jax import benchmarks  # here: it brings rewards, which take seconds

    return benchmarks.read_answers(folder, mode, name)


def parts_of(found: Found) -> list[str]:
    """Returns the parts of the greedy scores: a benchmark's scorers first, accuracies next."""
    scorers = [f"{name}/{scores.CORRECT}" for name in found["judged_by"]["scorers"]]
    others = [part for part in found["modes"]["greedy"].get(ALL, {}) if part not in scorers]
    return scorers + sorted(others, key=lambda part: (not scores.is_right(part), part))


def _columns(found: Found) -> dict[str, tuple[str, str]]:
    """Returns {title: (mode, what follows a part's name)} of the modes that there are."""
    settings, modes = found["settings"], found["modes"]
    several = {"sampled": (settings["--samples"], scores.PASS)}
    several |= {"shuffled": (settings["--shuffles"], scores.EVERY)}
    columns: dict[str, tuple[str, str]] = {}
    for mode in modes:
        count, word = several.get(mode, (1, ""))
        if mode == "sampled":
            columns[f"mean@{count}"] = (mode, "")
        else:
            columns[mode.replace("_", " ")] = (mode, "")
        if count > 1:
            title = f"{word}@{count}" if mode == "sampled" else f"in all {count} orders"
            columns[title] = (mode, f"/{word}@{count}")
    return columns


def _by_kind(found: Found, part: str, columns: Mapping[str, tuple[str, str]]) -> list[list[str]]:
    modes, baselines = found["modes"], found["baselines"]
    rows = [["", "n", *columns, *(name.replace("_", " ") for name in baselines)]]
    for kind, parts in modes["greedy"].items():
        cells = [modes[mode].get(kind, {}).get(part + tail) for mode, tail in columns.values()]
        cells += [by_kind.get(kind) for by_kind in baselines.values()]
        count = str(parts[part]["n"]) if part in parts else "0"
        rows.append([kind if kind == ALL else f"  {kind}", count, *(_cell(c) for c in cells)])
    return rows


def _judged_parts(folder: Path, mode: str) -> dict[str, None]:
    questions = read_answers(folder, mode).values()
    return dict.fromkeys(part for rows in questions for part in scores.verdicts(rows[0]))


def _gains(folders: Mapping[str, Path], part: str) -> dict[str, dict[str, scores.Score]]:
    """Returns {"title": {kind: thinking minus direct}} of the pairs that differ in that alone."""
    gains = {}
    for name, folder in folders.items():
        words = name.split(", ")
        direct = ", ".join("direct" if word == "thinking" else word for word in words)
        if direct != name and direct in folders:
            rest = [word for word in words if word != "thinking"]
            title = ", ".join([*rest, "thinking - direct"])
            ours, theirs = (read_answers(f, "greedy") for f in (folder, folders[direct]))
            gains[title] = scores.gains(ours, theirs, part)
    return gains


def _title(found: Found) -> str:
    step = "" if found["step"] is None else f" (step {found['step']})"
    benchmark = f", {found['benchmark']}" if found["benchmark"] else ""
    questions = f"{found['questions']} questions, {found['refused']} refused"
    return f"{found['checkpoint']}{step}{benchmark}: {questions}"


def _remarks(found: Found) -> list[str]:
    remarks = [
        f"{part}, options shuffled minus greedy on the same questions: {_difference(score)}"
        for part, score in found["shuffled_minus_greedy"].items()
    ]
    remarks += [f"{mode} is left out: {why}" for mode, why in found["skipped"].items()]
    for mode, count in found["counts"].items():
        if count["answered"] < count["asked"]:
            remarks.append(f"{mode}: {count['answered']} of {count['asked']} could be asked")
        for name, number in count["unjudged"].items():
            remarks.append(
                f"{mode}: {name} could not judge {number} answers, which count in no score; the "
                "same command tries again"
            )
    return remarks


def _difference(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score['mean']:+.1f}"
    if score["low"] is None:
        return text
    return f"{text} ({100 * score['low']:+.0f} to {100 * score['high']:+.0f})"


def _cell(score: Mapping[str, Any] | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score['mean']:.1f}"
    if score.get("low") is not None:
        text += f" ({100 * score['low']:.0f}-{100 * score['high']:.0f})"
    return f"{text} {score['letter']}" if "letter" in score else text


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pads the cells of full rows to the widest of their column; a short row is a heading."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]
