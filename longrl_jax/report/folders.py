"""What a run folder holds, read with care: a run may be unfinished, stopped or cut off mid-line."""

import dataclasses
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run folder's small files; a missing one is empty here."""

    folder: Path
    config: Row
    """resolved.yaml, nested."""
    config_text: str
    metrics: list[Row]
    """By step, every step once: the last line about a step counts."""
    evaluations: list[Row]
    refused: list[Row]
    scores: dict[str, Row]
    """Path of a folder under evaluate/ -> its scores.json."""
    sweeps: dict[str, Row]
    """Likewise -> its sweep.json."""
    start_evaluation: Row
    """Last evaluation of the run whose export this run started from; empty if there is none."""
    error: str
    """error.txt."""
    problems: tuple[str, ...]
    """What could not be read, in words."""

    def setting(self, key: str, default: Any = "") -> Any:
        """Returns the value of a dotted key of the config."""
        value: Any = self.config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return default
            value = value[part]
        return value

    @property
    def last_step(self) -> int:
        """Last step of metrics.jsonl; 0 before the first."""
        return self.metrics[-1]["step"] if self.metrics else 0


def read(folder: Path) -> Run:
    """Reads a run folder; raises ValueError if it is none."""
    if not (folder / "resolved.yaml").is_file() and not (folder / "metrics.jsonl").is_file():
        raise ValueError(
            f"{folder} is no run folder: it has neither resolved.yaml nor metrics.jsonl; give the "
            "run.dir of a training"
        )
    problems: list[str] = []
    config_text = _text(folder / "resolved.yaml")
    config = _yaml(folder / "resolved.yaml", config_text, problems)
    run = Run(
        folder=folder,
        config=config,
        config_text=config_text,
        metrics=_by_step(rows(folder / "metrics.jsonl", problems)),
        evaluations=_by_step(rows(folder / "evaluations.jsonl", problems)),
        refused=list(rows(folder / "refused.jsonl", problems)),
        scores=_trees(folder, "scores.json", "modes", dict, problems),
        sweeps=_trees(folder, "sweep.json", "points", list, problems),
        start_evaluation={},
        error=_text(folder / "error.txt").strip(),
        problems=(),
    )
    start = _start_evaluation(run, problems)
    return dataclasses.replace(run, start_evaluation=start, problems=tuple(problems))


def rows(path: Path, problems: list[str]) -> Iterator[Row]:
    """Yields the objects of a file of JSON lines; counts what is no object into `problems`."""
    if not path.is_file():
        return
    bad = 0
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if isinstance(row, dict):
                yield row
            else:
                bad += 1
    if bad:
        lines = "line" if bad == 1 else "lines"
        problems.append(f"{path}: {bad} {lines} cut off or not a JSON object, left out")


def number(value: Any) -> float:
    """Returns a number of JSON as a float; null, text and infinities are nan."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    return float(value) if math.isfinite(value) else math.nan


def column(table: Sequence[Row], key: str) -> np.ndarray:
    """Returns float64 [rows]: the numbers under `key`, nan where there is none."""
    return np.array([number(row.get(key)) for row in table])


def short_names(paths: Sequence[Path]) -> list[str]:
    """Returns the shortest distinct names of run folders."""
    if len(paths) == 1:
        return [paths[0].name or str(paths[0])]
    full = [path.resolve() for path in paths]
    shared = Path(os.path.commonpath(full))
    names = [str(path.relative_to(shared)) for path in full]
    last = {Path(name).parts[-1:] for name in names}
    if len(last) == 1 and all(
        len(Path(name).parts) > 1 for name in names
    ):  # seed0/grpo, seed1/grpo
        names = [str(Path(name).parent) for name in names]
    return names


def _by_step(table: Iterator[Row]) -> list[Row]:
    by_step = {row["step"]: row for row in table if type(row.get("step")) is int}
    return [by_step[step] for step in sorted(by_step)]


def _start_evaluation(run: Run, problems: list[str]) -> Row:
    """Finds the last scores of RUN0 for a run that starts from RUN0/export, if they compare."""
    folder = Path(str(run.setting("model.path"))).parent
    if not run.evaluations or not (folder / "evaluations.jsonl").is_file():
        return {}
    config = _yaml(folder / "resolved.yaml", _text(folder / "resolved.yaml"), problems)
    before = _by_step(rows(folder / "evaluations.jsonl", problems))
    data, questions = config.get("data"), run.evaluations[0].get("questions")
    same_file = isinstance(data, dict) and all(
        data.get(key) == run.setting(f"data.{key}") for key in ("root", "validation")
    )
    comparable = before and same_file and before[-1].get("questions") == questions
    return before[-1] if comparable else {}


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""


def _yaml(path: Path, text: str, problems: list[str]) -> Row:
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        problems.append(f"{path}: not YAML ({str(error).splitlines()[0]})")
        return {}
    return tree if isinstance(tree, dict) else {}


def _trees(folder: Path, name: str, field: str, kind: type, problems: list[str]) -> dict[str, Row]:
    """Reads every file of a name below evaluate/ whose field is of this kind and not empty."""
    found = {}
    for path in sorted(folder.glob(f"evaluate/**/{name}")):
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            problems.append(f"{path}: not JSON ({error})")
            continue
        if isinstance(tree, dict) and isinstance(tree.get(field), kind):
            if tree[field]:  # else an evaluation that has only begun
                found[path.parent.relative_to(folder / "evaluate").as_posix()] = tree
        else:
            problems.append(f"{path}: has no {field}, left out")
    return found
