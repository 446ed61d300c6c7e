"""What a run writes down: one JSON line a step, time by phase, and a progress line for people."""

import contextlib
import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm


class Phases:
    """Seconds spent in each named phase of a step; time outside every phase is `other`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._started_s = time.perf_counter()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - started_s)

    def add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def take(self) -> dict[str, float]:
        """Returns `time/<phase>_s` since the last call, `time/other_s` and `time/step_s`."""
        now_s = time.perf_counter()
        step_s = now_s - self._started_s
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        times["time/other_s"] = max(0.0, step_s - sum(self._seconds.values()))
        times["time/step_s"] = step_s
        self._seconds, self._started_s = {}, now_s
        return times


class RunLog:
    """Owner of a run folder's metrics.jsonl, evaluations.jsonl and rollouts.jsonl, and of the
    progress bar; a context."""

    def __init__(self, folder: Path, num_steps: int, *, name: str):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._bar = tqdm(total=num_steps, desc=name, unit="step", dynamic_ncols=True)

    def step(self, step: int, values: Mapping[str, Any], *, shown: tuple[str, ...] = ()) -> None:
        """Writes one step; `shown` names the values that stand beside the progress bar."""
        self._append("metrics.jsonl", [{"step": step} | dict(values)])
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in shown if k in values})
        self._bar.update()

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes the scores of one evaluation."""
        self._append("evaluations.jsonl", [{"step": step} | dict(scores)])

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes sampled answers, so that a person can read what the policy says."""
        self._append("rollouts.jsonl", [{"step": step} | row for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> None:
        with (self._folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(_plain(row)) + "\n" for row in rows)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()


def averages(stats: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
    """Turns (sum, count) statistics into means; a count of 0 gives nan."""
    means = {}
    for name, (total, count) in stats.items():
        means[name] = float(total) / float(count) if float(count) else math.nan
    return means


def _plain(value: Any) -> Any:
    """Turns numpy numbers into Python's, and what JSON has no number for (NaN, inf) into null."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, str | int | None):
        return value
    number = float(value)
    return number if math.isfinite(number) else None
