"""The plain parts of the page: who the run is, key numbers, time, refused records, files."""

import dataclasses
import datetime
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from longrl_jax.report import evaluations, folders, svg

FILES = {
    "resolved.yaml": "every setting; a valid config: train it again with this file",
    "metrics.jsonl": "a line of numbers for every step",
    "evaluations.jsonl": "validation scores, a line for each evaluation",
    "evaluation.json": "scores of the last evaluation",
    "evaluation_answers.jsonl": "every answer of the last evaluation",
    "rollouts.jsonl": "every answer that was learned from, its reward and advantage",
    "refused.jsonl": "records that could not be used, and why",
    "error.txt": "what stopped the run",
    "checkpoints": "states to resume from",
    "journal": "rollouts of steps that no checkpoint holds yet",
    "tensorboard": "the same numbers: tensorboard --logdir RUN/tensorboard",
    "wandb": "the same numbers, for Weights & Biases",
    "finished.json": "all steps are done",
    "evaluate": "results of python -m longrl_jax.evaluate",
    "export": "the trained model, for transformers, vLLM and convert",
    "report.html": "this page",
}
"""Entry of a run folder -> what it is."""
MAX_REFUSED_ROWS = 40
ARROW = " \N{RIGHTWARDS ARROW} "


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """Who a run is and how it stands."""

    name: str
    folder: str
    state: str
    mood: str
    """up (finished), down (stopped by an error) or nothing (running or interrupted)."""
    error: tuple[str, ...]
    """First and last line of error.txt."""
    facts: list[tuple[str, str]]
    command: str
    config_text: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """A key number."""

    title: str
    values: list[tuple[int, str]]
    """(run's place, text)."""
    note: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds by phase."""

    svg: Markup
    rows: list[tuple[int, str, str, str, float]]
    """Colour (-1: the faint one), phase, total, seconds a step, share of the whole (0 to 1)."""
    total: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Refused:
    """Records that were left out."""

    count: int
    kinds: list[tuple[str, int]]
    rows: list[folders.Row]
    hidden: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """A file or folder of a run."""

    name: str
    size: str
    meaning: str


def header(run: folders.Run, name: str) -> Header:
    """Says what the run is, and whether it ended as it was meant to."""
    wanted, done = int(run.setting("run.num_steps", 0) or 0), run.last_step
    lines = [line for line in run.error.splitlines() if line.strip()]
    finished = (run.folder / "finished.json").exists() or (wanted and done >= wanted)
    if finished and not lines:
        state, mood = f"finished, {done} steps", "up"
    elif lines:
        state, mood = f"stopped by an error after step {done} of {wanted}", "down"
    else:
        state, mood = f"step {done} of {wanted or '?'}: running, or interrupted", ""
    files = [run.folder / part for part in ("resolved.yaml", "metrics.jsonl")]
    dates = [_date(path) for path in files if path.exists()]
    facts = [
        ("Stage", str(run.setting("stage"))),
        ("Starts from", str(run.setting("model.path"))),
        ("Data", _data(run)),
        ("A step", _step_size(run)),
        ("Seed", str(run.setting("seed"))),
        ("Written", " to ".join(dict.fromkeys(dates))),
    ]
    return Header(
        name=name,
        folder=str(run.folder),
        state=state,
        mood=mood,
        error=tuple(dict.fromkeys([lines[0], lines[-1]])) if lines else (),
        facts=[(key, value) for key, value in facts if value.strip(" ,")],
        command=f"python -m longrl_jax.train {run.folder}/resolved.yaml run.dir=NEW_FOLDER",
        config_text=run.config_text,
    )


def _data(run: folders.Run) -> str:
    mix = run.setting("data.mix") or [{"file": run.setting("data.train")}]
    files = [f"{part.get('root', '')}/{part.get('file', '')}".strip("/") for part in mix]
    return ", ".join([str(run.setting("data.root")), *files])


def differences(runs: Sequence[folders.Run]) -> evaluations.Table | None:
    """Lists the settings that the runs do not share."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for settings in flat for key in settings)
    rows = []
    for key in keys:
        values = [str(settings.get(key, "(none)")) for settings in flat]
        if len(set(values)) > 1:
            rows.append((key, [evaluations.Cell(text=value) for value in values]))
    if not rows:
        return None
    names = folders.short_names([run.folder for run in runs])
    return evaluations.Table(title="What differs", headings=["", *names], rows=rows)


def cards(runs: Sequence[folders.Run]) -> list[Card]:
    """Returns the key numbers; a card that no run can fill is left out."""
    makers = {
        "Validation accuracy": lambda run: _validation(run, "accuracy"),
        "Validation format": lambda run: _validation(run, "format"),
        "Reward, sampled": lambda run: _first_last(run, "reward/total", percent=False),
        "Accuracy, sampled": lambda run: _first_last(run, _part_key(run, "accuracy"), percent=True),
        "Loss": lambda run: _first_last(run, "loss", percent=False),
        "Largest engine/learner gap": lambda run: _largest(run, "gap/max"),
        "Seconds a step": _step_seconds,
        "Refused records": lambda run: str(len(run.refused)),
    }
    notes = {
        "Validation accuracy": "greedy, before and after",
        "Reward, sampled": "mean of the first and of the last tenth of the steps",
        "Largest engine/learner gap": "in log-probability, over all tokens of the run",
        "Seconds a step": "median",
    }
    made = []
    for title, maker in makers.items():
        values = [(place, text) for place, run in enumerate(runs) if (text := maker(run))]
        if values:
            made.append(Card(title=title, values=values, note=notes.get(title, "")))
    return made


def times(run: folders.Run) -> Times | None:
    """Adds up time/<phase>_s of every step; the biggest phase has the first colour."""
    keys = dict.fromkeys(key for row in run.metrics for key in row)
    names = [k for k in keys if k.startswith("time/") and k.endswith("_s") and k != "time/step_s"]
    if not names:
        return None
    seconds = {name: np.nan_to_num(folders.column(run.metrics, name)) for name in names}
    names.sort(key=lambda name: (name == "time/other_s", -seconds[name].sum()))
    seconds_NK = np.stack([seconds[name] for name in names], axis=1)
    total_s = float(seconds_NK.sum())
    faint = names.index("time/other_s") if "time/other_s" in names else -1
    steps = np.array([row["step"] for row in run.metrics])
    rows = []
    for k, name in enumerate(names):
        phase_s = float(seconds_NK[:, k].sum())
        phase = name.removeprefix("time/").removesuffix("_s")
        a_step_s = phase_s / len(steps)
        a_step = f"{a_step_s:.2f} s" if a_step_s >= 0.005 else "under 0.01 s"
        share = phase_s / max(total_s, 1e-9)
        rows.append(
            (-1 if k == faint else k % svg.NUM_COLOURS, phase, duration(phase_s), a_step, share)
        )
    bars = svg.stacked_bars(steps, seconds_NK, label="seconds of every step", last_first=faint)
    return Times(svg=bars, rows=rows, total=duration(total_s))


def refused(run: folders.Run) -> Refused:
    """Counts refused records by kind and keeps the first rows."""
    kinds = Counter(str(row.get("kind") or row.get("type") or "other") for row in run.refused)
    shown = run.refused[:MAX_REFUSED_ROWS]
    names = ("step", "id", "video", "kind", "message")
    return Refused(
        count=len(run.refused),
        kinds=kinds.most_common(),
        rows=[{name: str(row.get(name, "")) for name in names} for row in shown],
        hidden=len(run.refused) - len(shown),
    )


def files(run: folders.Run) -> list[Entry]:
    """Lists what lies in the folder, and the checkpoints that are kept."""
    entries = []
    for path in sorted(run.folder.iterdir()):
        meaning = FILES.get(path.name, "")
        name = path.name + "/" * path.is_dir()
        if meaning or path.is_file():
            entries.append(Entry(name=name, size=_size(path), meaning=meaning))
        if path.name == "checkpoints" and path.is_dir():
            inner = sorted(path.iterdir(), key=lambda p: (len(p.name), p.name))  # 2 before 10
            metric = str(run.setting("run.best_metric"))
            entries.extend(
                Entry(name=f"checkpoints/{p.name}", size=_size(p), meaning=_checkpoint(p, metric))
                for p in inner
            )
    return entries


def duration(seconds: float) -> str:
    """Returns seconds as a person says them."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _step_size(run: folders.Run) -> str:
    groups, samples = run.setting("batch.groups"), run.setting("rollout.num_samples")
    if groups == "":
        return ""
    return (
        f"{groups} questions x {samples} answers"
        if run.setting("stage") != "sft"
        else (f"{groups} reference answers")
    )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= (
            _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return flat


def _part_key(run: folders.Run, word: str) -> str:
    """Returns the first reward part that ends in `word`, as metrics.jsonl calls it."""
    keys = (key for row in run.metrics[:1] for key in row)
    return next((k for k in keys if k.startswith("reward/") and k.endswith(f"/{word}")), "")


def _first_last(run: folders.Run, key: str, *, percent: bool) -> str:
    values = folders.column(run.metrics, key)
    values = values[np.isfinite(values)]
    if not len(values):
        return ""
    tenth = math.ceil(len(values) / 10)
    ends = [values[:tenth].mean(), values[-tenth:].mean()]
    shown = [_percent(v) if percent else svg.short(float(f"{v:.3g}")) for v in ends]
    return ARROW.join(shown) + " %" * percent


def _validation(run: folders.Run, word: str) -> str:
    ends = evaluations.before_and_after(run)
    keys = (k for _, row in ends for k in row)
    key = next((k for k in keys if k.endswith(f"/{word}") and k.count("/") == 1), "")
    values = [folders.number(row.get(key)) for _, row in ends]
    shown = [_percent(value) for value in values if math.isfinite(value)]
    return ARROW.join(shown) + " %" if shown else ""


def _percent(value: float) -> str:
    return f"{100 * value:.1f}".removesuffix(".0")


def _largest(run: folders.Run, key: str) -> str:
    values = folders.column(run.metrics, key)
    values = values[np.isfinite(values)]
    return f"{values.max():.1e}" if len(values) else ""


def _step_seconds(run: folders.Run) -> str:
    values = folders.column(run.metrics, "time/step_s")
    values = values[np.isfinite(values)]
    return f"{np.median(values):.3g}" if len(values) else ""


def _date(path: Path) -> str:
    moment = datetime.datetime.fromtimestamp(path.stat().st_mtime, datetime.UTC)
    return moment.strftime("%Y-%m-%d %H:%M UTC")


def _checkpoint(path: Path, metric: str) -> str:
    """Says when a checkpoint was made and, if it knows, what it scores."""
    try:
        meta = json.loads((path / "meta.json").read_text())
    except (OSError, ValueError):
        return _date(path)
    known = meta.get("scores") if isinstance(meta, dict) else None
    score = folders.number(known.get(metric)) if isinstance(known, dict) else math.nan
    return _date(path) + (f", {metric} {score:.3f}" if math.isfinite(score) else "")


def _size(path: Path) -> str:
    paths = path.rglob("*") if path.is_dir() else [path]
    size_bytes = sum(p.stat().st_size for p in paths if p.is_file())
    for unit in ("bytes", "KiB", "MiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "bytes" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024  # type: ignore[assignment]
    return f"{size_bytes:.1f} GiB"
