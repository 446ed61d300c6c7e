"""What a run writes down: one JSON line a step, time by phase, and a progress line for people."""

import contextlib
import importlib.util
import json
import math
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from tensorboardX import SummaryWriter
from tqdm import tqdm

from longrl_jax import processes
from longrl_jax.platform import disk_error

WAY_OUT = "make room, and run the same command again: the run goes on where it was"
EVALUATION = "evaluation/"
"""Before the names of an evaluation's scores, where they stand beside those of the steps."""


class Phases:
    """Seconds spent in each named phase of a step, and what else is counted in it; time outside
    every phase is `other`."""

    def __init__(self):
        self._seconds: dict[str, float] = {}
        self._counts: dict[str, int] = {}
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

    def count(self, name: str, number: int) -> None:
        """Adds to a counter; one that was ever named reads 0 in a step without it."""
        self._counts[name] = self._counts.get(name, 0) + number

    def take(self) -> dict[str, float]:
        """Returns `time/<phase>_s` since the last call, `time/other_s`, `time/step_s`, counters.

        Seconds are this process's, counters those of all processes, which must all call it.
        """
        now_s = time.perf_counter()
        step_s = now_s - self._started_s
        times = {f"time/{name}_s": seconds for name, seconds in self._seconds.items()}
        times["time/other_s"] = max(0.0, step_s - sum(self._seconds.values()))
        times["time/step_s"] = step_s
        counts = processes.added({name: (number, 0) for name, number in self._counts.items()})
        values = times | {name: number for name, (number, _) in counts.items()}
        self._seconds, self._started_s = {}, now_s
        self._counts = dict.fromkeys(self._counts, 0)
        return values


class RunLog:
    """Owner of a run folder's metrics.jsonl, evaluations.jsonl and rollouts.jsonl, of TensorBoard's
    and W&B's copies of the numbers, and of the progress bar; a context.

    In a run of many processes the first one's writes and shows; the others' do nothing.
    """

    def __init__(
        self, folder: Path, num_steps: int, *, name: str, first_step: int = 0, wandb: str = ""
    ):
        """first_step: the last one that the files hold. wandb: project; empty: no W&B.

        TensorBoard's files are written anew from the lines that are there, so that a run which goes
        on shows every step once.
        """
        self._writes = processes.is_first()
        self._bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=name,
            unit="step",
            dynamic_ncols=True,
            disable=not self._writes,
        )
        if not self._writes:
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        self._board = SummaryWriter(str(folder / "tensorboard"), flush_secs=10)
        for file, prefix in (("metrics.jsonl", ""), ("evaluations.jsonl", EVALUATION)):
            if (folder / file).exists():
                for line in (folder / file).open(encoding="utf-8"):
                    self._draw(json.loads(line), prefix)
        self._wandb = _open_wandb(folder, wandb) if wandb else None

    def step(self, step: int, values: Mapping[str, Any], *, shown: tuple[str, ...] = ()) -> None:
        """Writes one step; `shown` names the values that stand beside the progress bar."""
        if not self._writes:
            return
        (row,) = self._append("metrics.jsonl", [{"step": step} | dict(values)])
        self._show(row, "")
        self._bar.set_postfix({k: f"{values[k]:.4g}" for k in shown if k in values})
        self._bar.update()

    def evaluation(self, step: int, scores: Mapping[str, float]) -> None:
        """Writes the scores of one evaluation."""
        if not self._writes:
            return
        (row,) = self._append("evaluations.jsonl", [{"step": step} | dict(scores)])
        self._show(row, EVALUATION)

    def rollouts(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Writes sampled answers, so that a person can read what the policy says."""
        if not self._writes:
            return
        self._append("rollouts.jsonl", [{"step": step} | row for row in rows])

    def _append(self, name: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        plain = [_plain(row) for row in rows]
        try:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(row) + "\n" for row in plain)
        except OSError as error:
            raise disk_error(error, self._folder / name, WAY_OUT) from error
        return plain

    def _show(self, row: Mapping[str, Any], prefix: str) -> None:
        self._draw(row, prefix)
        if self._wandb is not None:  # steps that it has already (a replay) it leaves as they are
            self._wandb.log(_scalars(row, prefix), step=row["step"])

    def _draw(self, row: Mapping[str, Any], prefix: str) -> None:
        for name, value in _scalars(row, prefix).items():
            self._board.add_scalar(name, value, row["step"])

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()
        if not self._writes:
            return
        self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def check_wandb(project: str) -> None:
    """Raises ValueError if a project is named and the wandb package is not there."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ValueError(
            f"run.wandb={project!r} needs the package wandb: pip install 'longrl_jax[wandb]'; "
            "or leave run.wandb empty"
        )


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


def _scalars(row: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Returns what a curve can be drawn of; a null (NaN, infinity) is a gap."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
    return {prefix + name: value for name, value in numbers.items()}


def _open_wandb(folder: Path, project: str) -> Any:
    """Starts the W&B run of a folder, or goes on with it: its id stays in wandb_id.txt."""
    import wandb  # an extra: only who names a project needs it

    path = folder / "wandb_id.txt"
    if not path.exists():
        path.write_text(uuid.uuid4().hex + "\n")
    resolved = folder / "resolved.yaml"
    return wandb.init(
        project=project,
        name=folder.name,
        id=path.read_text().strip(),
        resume="allow",
        dir=str(folder),
        config=yaml.safe_load(resolved.read_text()) if resolved.exists() else None,
    )
