"""Whether a run folder can be gone on with, and from where. Reads no array and needs no JAX.

A run may end at any moment. What it has written then is of two kinds: files that are whole or
absent (checkpoints, journal), and logs that only grow. A checkpoint says how long every log was
when it was made; going on from it cuts them to that length, so each step stands in them once.
"""

import dataclasses
import errno
import fcntl
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from longrl_jax import config

LOGS = ("metrics.jsonl", "rollouts.jsonl", "evaluations.jsonl", "refused.jsonl")
CHECKPOINTS, JOURNAL, FINISHED = "checkpoints", "journal", "finished.json"
META = "meta.json"
FORMAT = 1
FREE = (
    "mesh.",
    "attention.",
    "store.",
    "batch.rows_per_pass",
    "model.remat",
    "data.decoder_processes",
    "data.decode_timeout_s",
    "data.loader_workers",
    "rollout.process",
    "rollout.python",
    "rollout.replicas",
    "rollout.tensor_parallel",
    "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization",
    "judge.base_url",
    "judge.api_key_env",
    "judge.concurrency",
    "judge.requests_per_minute",
    "judge.timeout_s",
    "judge.max_tries",
    "judge.usd_per_million_",
    "run.dir",
    "run.eval_every",
    "run.export",
    "run.checkpoint_every",
    "run.keep",
    "run.best_metric",
    "run.wandb",
)
"""Config keys, or sections, that a run may go on without: they change where and how fast things are
computed, at most the order of a sum. run.num_steps is free while the schedule is constant."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Point:
    """Where a run goes on."""

    step: int = 0
    """Last step whose outcome is kept; 0: from the start."""
    checkpoint: Path | None = None
    """Folder of the checkpoint; None: the model of model.path."""
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """meta.json of the checkpoint."""
    journaled: tuple[int, ...] = ()
    """Later steps whose rollouts and rewards are on disk."""


def find(folder: Path, tree: Mapping[str, Any]) -> Point:
    """Returns where the run of a folder goes on; step 0 where nothing has been computed yet.

    tree: the config, as dataclasses.asdict gives it. Raises ValueError for a finished run, and for
    one that was started with a config which gives other numbers: it names the keys.
    """
    saved = metas(folder)
    journaled = journaled_steps(folder)
    if not (saved or journaled or (folder / "metrics.jsonl").exists()):
        return Point()
    resolved = folder / "resolved.yaml"
    if not resolved.exists():
        raise _another(folder, "it has steps, but no resolved.yaml that says of what")
    try:
        old = dataclasses.asdict(config.load(resolved))
    except ValueError as error:
        raise _another(folder, f"its resolved.yaml is no config any more ({error})") from None
    keys = differing_keys(old, tree)
    if keys:
        raise _another(folder, f"it was started with another {', '.join(keys)}")
    num_steps = tree["run"]["num_steps"]
    finished = folder / FINISHED
    if finished.exists() and json.loads(finished.read_text())["step"] >= num_steps:
        more = "raise run.num_steps to go on, or " if saved and _may_grow(tree) else ""
        raise _another(folder, f"it is finished ({num_steps} steps); {more}")
    if not saved:
        if finished.exists():
            raise _another(folder, "it is finished, and has no checkpoint to go on from")
        _check_start_over(folder, tree, journaled)
        return Point(journaled=journaled)
    path, meta = saved[-1]
    if meta["step"] > num_steps:
        raise _another(folder, f"it is at step {meta['step']}, past run.num_steps={num_steps}")
    later = tuple(number for number in journaled if number > meta["step"])
    return Point(step=meta["step"], checkpoint=path, meta=meta, journaled=later)


def _check_start_over(folder: Path, tree: Mapping[str, Any], journaled: tuple[int, ...]) -> None:
    """Raises ValueError where starting over, without a checkpoint, would lose what was computed."""
    sampled, done = (_steps_of(folder / name) for name in ("rollouts.jsonl", "metrics.jsonl"))
    if sampled and (not journaled or journaled[0] > sampled[0]):
        raise _another(
            folder, f"its checkpoints are gone, and step {sampled[0]} is in no journal either"
        )
    every = tree["run"]["checkpoint_every"]
    if tree["stage"] == "sft" and done and 0 < every < done[-1]:
        raise _another(folder, f"it is at step {done[-1]}, but its checkpoints are gone")


def _steps_of(log: Path) -> list[int]:
    """Returns the steps of the whole lines of a log, in order."""
    if not log.exists():
        return []
    lines = [line for line in log.read_text(encoding="utf-8").splitlines(True) if line[-1] == "\n"]
    return [int(json.loads(line)["step"]) for line in lines]


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Returns the keys, as section.key, in which two configs differ and that change numbers."""
    a, b = flat(old), flat(new)
    free = FREE + (("run.num_steps",) if _may_grow(old) and _may_grow(new) else ())
    return [k for k in sorted(a | b) if a.get(k) != b.get(k) and not k.startswith(free)]


def describe(folder: Path, point: Point, num_steps: int) -> str:
    """Returns the line that says where a run goes on."""
    steps = f"{len(point.journaled)} later steps are" if point.journaled else "no later step is"
    where = f" from {point.checkpoint}" if point.checkpoint else ", from the model of model.path"
    return (
        f"{folder} goes on after step {point.step} of {num_steps}{where}; {steps} in its journal "
        "and will not be sampled again"
    )


def cut_logs(folder: Path, point: Point) -> None:
    """Cuts every log to what it held at the point. Cutting twice is cutting once."""
    lengths = point.meta.get("logs", {})
    for name in LOGS:
        path, length = folder / name, int(lengths.get(name, 0))
        size = path.stat().st_size if path.exists() else 0
        if size < length:
            raise ValueError(
                f"{path} has {size} bytes, but {length} at the checkpoint of step {point.step}: it "
                f"was cut or moved away; put it back, or remove {point.checkpoint} to go on from "
                "an earlier one"
            )
        if path.exists():
            os.truncate(path, length)  # one call: a kill leaves the old length or the new
    if point.checkpoint is None:
        (folder / FINISHED).unlink(missing_ok=True)
    for path in folder.glob("error*.txt"):
        path.unlink(missing_ok=True)


def log_lengths(folder: Path) -> dict[str, int]:
    """Returns the bytes of every log, all of which are on disk when this returns."""
    lengths = {}
    for name in LOGS:
        if (folder / name).exists():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
                lengths[name] = os.fstat(file.fileno()).st_size
    return lengths


def metas(folder: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns (checkpoint folder, its meta.json) of a run, the oldest first."""
    found = []
    for path in sorted((folder / CHECKPOINTS).glob("step_*")):
        try:
            meta = json.loads((path / META).read_text())
            known = meta["format"] == FORMAT and isinstance(meta["step"], int)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path / META} cannot be read ({error!r}); remove {path} to go on from the "
                "checkpoint before it"
            ) from None
        if not known:
            raise ValueError(f"{path} was written by another version of longrl_jax; use that one")
        found.append((path, meta))
    return found


def journaled_steps(folder: Path) -> tuple[int, ...]:
    """Returns the steps whose rollouts and rewards are in a run's journal."""
    paths = (folder / JOURNAL).glob("step_*.journal")
    return tuple(sorted({step_of_journal(path) for path in paths}))


def step_of_journal(path: Path) -> int:
    """Returns the step of a journal file, step_<step>.journal or step_<step>_<try>.journal."""
    return int(path.stem.split("_")[1])


def mark_finished(folder: Path, step: int) -> None:
    """Says that nothing is left to do after `step`."""
    write_synced(folder / FINISHED, json.dumps({"step": step}).encode() + b"\n")


def lock(folder: Path) -> TextIO:
    """Takes the folder for this process until the returned file is closed, or the process ends.

    Raises ValueError if another process has it.
    """
    file = (folder / ".lock").open("a")  # ends with the process, killed or not
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of the process: forked ones lack it
    except (BlockingIOError, PermissionError):  # POSIX allows either
        file.close()
        raise ValueError(
            f"run.dir={folder} is in use by another process; wait for it, or choose another folder"
        ) from None
    return file


def write_synced(path: Path, content: bytes) -> None:
    """Writes a file that is whole or absent, and on disk when this returns."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)
    sync_folder(path.parent)


def append_synced(path: Path, content: bytes) -> None:
    """Adds to the end of a file; it is on disk when this returns. A file that takes only a part of
    it is cut to its old length."""
    with path.open("ab", buffering=0) as file:
        before = file.tell()
        try:
            if file.write(content) < len(content):
                raise OSError(errno.ENOSPC, "No space left on device")
            os.fsync(file.fileno())
        except OSError:
            file.truncate(before)
            raise
    if not before:
        sync_folder(path.parent)


def make_folder(path: Path) -> None:
    """Makes a folder and those above it; the names of all that are new are on disk on return."""
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in new:
        sync_folder(folder.parent)


def sync_folder(path: Path) -> None:
    """Puts the names in a folder on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def num_bytes(path: Path) -> int:
    """Returns the bytes of a file, or of all files below a folder; 0 if there is none."""
    return sum(p.stat().st_size for p in (path, *path.rglob("*")) if p.is_file())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """The most that a part of a run will take on disk at a time."""

    what: str
    """As a person reads it, e.g. 3 checkpoints."""
    size_bytes: int
    name: str = ""
    """File or folder in the run folder that holds it; what is there already is credited. Empty: new
    in every case."""


def check_disk(folder: Path, needs: Sequence[Need]) -> None:
    """Raises ValueError if the disk cannot take what a run has still to write."""
    make_folder(folder)
    have = sum(min(num_bytes(folder / need.name), need.size_bytes) for need in needs if need.name)
    free, needed = shutil.disk_usage(folder).free, sum(need.size_bytes for need in needs)
    if needed - have > free:
        parts = ", ".join(f"{need.what} {_gib(need.size_bytes)}" for need in needs)
        there = f", of which {_gib(have)} are there" if have else ""
        raise ValueError(
            f"run.dir={folder} will need up to {_gib(needed)} ({parts}){there}, its disk has "
            f"{_gib(free)} left; free some, choose a run.dir on another disk, or lower run.keep or "
            "run.checkpoint_every"
        )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _another(folder: Path, why: str) -> ValueError:
    sentence = why if why.endswith("or ") else f"{why}; "
    return ValueError(
        f"run.dir={folder} holds another run: {sentence}choose another folder, e.g. "
        f"run.dir={folder}_2, or move that one away"
    )


def _may_grow(tree: Mapping[str, Any]) -> bool:
    return tree["optimizer"]["schedule"] == "constant"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {section.key: value} of a config."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found
