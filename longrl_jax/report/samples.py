"""Answers of the policy as a person reads them: question, frames, all answers of the group."""

import base64
import dataclasses
import io
import itertools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from longrl_jax.config import DataConfig
from longrl_jax.data import SOURCES, mixing, video
from longrl_jax.data.longvideo_reason import RecordError
from longrl_jax.records import build
from longrl_jax.report import folders
from longrl_jax.types import Example

NUM_FRAMES = 8
FRAME_HEIGHT = 96
"""In pixels; a smaller video keeps its own height."""
DECODE_TIMEOUT_S = 30.0
MAX_CHARACTERS = 5000
"""Of one answer or question."""
NUM_VALIDATION = 4
TRAINING = None
"""Stands for the training records, where a file of others is meant."""
Key = tuple[str, str]
"""Source of a mix, and id."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer; text in two parts, so that the answer proper can stand out."""

    reasoning: str
    final: str
    notes: str
    advantage: float
    strength: float
    """Size of the advantage, or of the reward's distance from 1/2, for a colour: -1 to 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """A question, what the policy saw, and all that it answered."""

    title: str
    id: str
    kind: str
    question: str
    missing_question: str
    """Why there is no question; empty if there is one."""
    reference: str
    frames: list[tuple[str, str]]
    """(data URI, time in the video or name of the image)."""
    missing_frames: str
    answers: list[Answer]


def groups(run: folders.Run, *, per_step: int) -> list[Group]:
    """Returns groups of the first and of the last step, then answers of the last evaluation.

    Questions and videos come from the data set that the config names, looked up by id.
    """
    problems: list[str] = []  # a line cut off here is named by whoever reads the file as a whole
    wanted: list[tuple[str, str | None, list[folders.Row]]] = []
    for name, step_rows in _ends(folders.rows(run.folder / "rollouts.jsonl", problems)):
        for rows in _chosen(step_rows, per_step):
            wanted.append((name, TRAINING, rows))
    if per_step > 1 or not wanted:
        answers = list(folders.rows(run.folder / "evaluation_answers.jsonl", problems))
        for rows in _some_of_each(answers, NUM_VALIDATION):
            wanted.append(("Validation", str(run.setting("data.validation")), rows))
    examples = {}
    for file in dict.fromkeys(file for _, file, _ in wanted):
        ids = {_key(rows[0]) for _, used, rows in wanted if used == file}
        examples[file] = _examples(run, file, ids)
    shown = []
    with video.DecoderPool(1, timeout_s=DECODE_TIMEOUT_S) as pool:
        for name, file, rows in wanted:
            found = examples[file].get(_key(rows[0]))
            shown.append(_group(run, name, rows, found, pool))
    return shown


def frame_strip(
    path: Path, *, num_frames: int, fps: float, decoder: str, pool: video.DecoderPool
) -> list[tuple[str, str]]:
    """Returns up to NUM_FRAMES of the frames that a policy with this sampling saw, as data URIs.

    Raises video.VideoError.
    """
    about = video.probe(path, decoder=decoder)
    times_s = video.frame_times(about.duration_s, num_frames=num_frames, fps=fps)
    places = np.unique(np.linspace(0, len(times_s) - 1, NUM_FRAMES).round().astype(int))
    picked_s = tuple(times_s[i] for i in places)
    height = min(FRAME_HEIGHT, about.height)
    size = height, max(1, round(about.width * height / about.height))
    job = video.Job(path=str(path), times_s=picked_s, size=size, decoder=decoder)
    return list(zip(_pictures(job, pool), map(_clock, picked_s), strict=True))


def thumbnail(path: Path, *, pool: video.DecoderPool) -> tuple[str, str]:
    """Returns an image as a data URI, and its name. Raises video.VideoError."""
    about = video.probe_image(path)
    height = min(FRAME_HEIGHT, about[0])
    size = height, max(1, round(about[1] * height / about[0]))
    job = video.Job(path=str(path), times_s=(0.0,), size=size, decoder="image")
    return _pictures(job, pool)[0], path.name


def _pictures(job: video.Job, pool: video.DecoderPool) -> list[str]:
    pictures: list[str] = []
    for item in pool.decode([job], chunk=NUM_FRAMES):
        if isinstance(item, video.Failed):
            raise item.error
        pictures += map(_jpeg, item.frames)
    return pictures


def _ends(rows: Iterator[folders.Row]) -> list[tuple[str, list[folders.Row]]]:
    """Returns the rows of the first and of the last step, reading the file once."""
    first: list[folders.Row] = []
    last: list[folders.Row] = []
    for row in rows:
        if not first or row.get("step") == first[0].get("step"):
            first.append(row)
        elif not last or row.get("step") == last[0].get("step"):
            last.append(row)
        else:
            last = [row]
    return [(f"Step {step[0].get('step')}", step) for step in (first, last) if step]


def _chosen(rows: Sequence[folders.Row], count: int) -> list[list[folders.Row]]:
    """Returns `count` groups of a step: of different kinds, with answers that differ, if it can."""
    by_id = [list(same) for _, same in itertools.groupby(rows, key=lambda row: row.get("id"))]
    by_id.sort(key=lambda same: not any(folders.number(r.get("advantage")) > 0 for r in same))
    fresh: list[list[folders.Row]] = []
    again: list[list[folders.Row]] = []
    kinds: set[str] = set()
    for same in by_id:
        kind = str(same[0].get("kind"))
        (again if kind in kinds else fresh).append(same)
        kinds.add(kind)
    return (fresh + again)[:count]


def _some_of_each(rows: Sequence[folders.Row], count: int) -> list[list[folders.Row]]:
    """Returns `count` validation answers, right and wrong ones in turn, kinds spread."""
    right = [row for row in rows if _reward(row) >= 1]
    wrong = [row for row in rows if _reward(row) < 1]
    picked: list[folders.Row] = []
    for same in (right, wrong):
        kinds: set[str] = set()
        for row in same:
            if str(row.get("kind")) not in kinds and len(kinds) < count // 2:
                kinds.add(str(row.get("kind")))
                picked.append(row)
    return [[row] for row in picked]


def _key(row: folders.Row) -> Key:
    return str(row.get("source", "")), str(row.get("id"))


def _examples(run: folders.Run, file: str | None, ids: set[Key]) -> dict[Key, Example]:
    """Looks records up; those that are not found, or not readable, are not returned."""
    known = {field.name for field in dataclasses.fields(DataConfig)}
    settings = {k: v for k, v in dict(run.setting("data", {})).items() if k in known}
    try:
        data = build(DataConfig, settings)
        if file is TRAINING:
            records = mixing.open_training(data)
        elif file:
            records = SOURCES[data.source](Path(data.root), file)
        else:
            return {}
    except (ValueError, KeyError):  # the data have moved; every group says so
        return {}
    found: dict[Key, Example] = {}
    for index in range(len(records)):
        try:
            example = records[index]
        except RecordError:
            continue
        if (key := (example.source, example.id)) in ids:
            found[key] = example
            if len(found) == len(ids):
                break
    return found


def _group(
    run: folders.Run,
    name: str,
    rows: Sequence[folders.Row],
    example: Example | None,
    pool: video.DecoderPool,
) -> Group:
    root = Path(str(run.setting("data.root")))
    frames: list[tuple[str, str]] = []
    missing_frames, missing_question = "", ""
    if example is None:
        missing_question = f"The data set under {root} no longer has this record."
    for file in example.media if example else ():
        try:
            if file.kind == "image":
                frames.append(thumbnail(root / file.path, pool=pool))
            else:
                frames += frame_strip(
                    root / file.path,
                    num_frames=int(run.setting("data.num_frames", 64)),
                    fps=float(run.setting("data.fps", 0.0)),
                    decoder=str(run.setting("data.decoder", "pyav")),
                    pool=pool,
                )
        except (ValueError, TypeError) as error:  # VideoError, or a setting cut off in the file
            missing_frames = f"No frames: {error}"
    return Group(
        title=name,
        id=str(rows[0].get("id")),
        kind=str(rows[0].get("kind") or ""),
        question=_shortened(example.question) if example else "",
        missing_question=missing_question,
        reference=str(rows[0].get("answer", "")),
        frames=frames,
        missing_frames=missing_frames,
        answers=[_answer(row) for row in rows],
    )


def _answer(row: folders.Row) -> Answer:
    text = _shortened(str(row.get("text", "")))
    reasoning, tag, final = text.partition("<answer>")
    reward, advantage = _reward(row), folders.number(row.get("advantage"))
    notes = [f"reward {reward:.2f}" if math.isfinite(reward) else "reward invalid"]
    if math.isfinite(advantage):
        notes.append(f"advantage {advantage:+.2f}")
    if row.get("finish_reason") not in (None, "stop"):
        notes.append(f"ended by {row['finish_reason']}")
    judged = row.get("reward")
    if isinstance(judged, dict):
        notes.extend(
            f"{part.rsplit('/', 1)[-1]} {folders.number(value):g}"
            for part, value in judged.items()
            if part != "total"
        )
    by_reward = 2 * reward - 1 if math.isfinite(reward) else 0.0
    strength = advantage if math.isfinite(advantage) else by_reward
    return Answer(
        reasoning=reasoning,
        final=tag + final,
        notes=", ".join(notes),
        advantage=advantage,
        strength=float(np.clip(strength, -1, 1)),
    )


def _reward(row: folders.Row) -> float:
    judged = row.get("reward")
    return folders.number(judged.get("total")) if isinstance(judged, dict) else math.nan


def _shortened(text: str) -> str:
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} ... ({len(text) - MAX_CHARACTERS} characters more)"


def _jpeg(frame: UInt8[np.ndarray, "H W 3"]) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=80)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _clock(time_s: float) -> str:
    if time_s < 60:
        return f"{time_s:.1f} s"
    minutes, seconds = divmod(int(time_s), 60)
    return (
        f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"
        if minutes >= 60
        else f"{minutes}:{seconds:02d}"
    )
