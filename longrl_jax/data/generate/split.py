"""Films and their clips: when a film is shown by its own time stamps, cut into windows.

Times count from the first frame, as everywhere here (data/video.py). No file is written.
"""

import hashlib
from collections.abc import Generator
from pathlib import Path
from typing import Any

from longrl_jax.data import video
from longrl_jax.data.generate import work
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

SUFFIXES = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
    *(".ts", ".flv", ".wmv", ".ogv", ".3gp"),
)
REST_S = 1e-3
"""A rest that is no longer than the rounding of a container is no clip."""


def find_films(folder: Path) -> list[str]:
    """Returns the paths of all films under a folder, in order; hidden ones are left alone."""
    if not folder.is_dir():
        raise ValueError(f"videos={folder} is no folder; name the one that holds the films")
    found = [path.relative_to(folder) for path in folder.rglob("*")]
    films = sorted(
        path.as_posix()
        for path in found
        if path.suffix.lower() in SUFFIXES and not any(part.startswith(".") for part in path.parts)
    )
    if not films:
        raise ValueError(f"{folder} holds no film; known are {' '.join(SUFFIXES)}")
    return films


def identity(folder: Path, film: str) -> Any:
    """Returns what tells a file from another without reading it."""
    try:
        stat = (folder / film).stat()
    except OSError:
        return None
    return [film, stat.st_size, stat.st_mtime_ns]


def steps(film: str, before: Any, cfg: GenerateConfig) -> Generator[Any, Any, Any]:
    """Returns (one item: the film and its clips, rejects); asks nobody."""
    yield from ()
    root = Path(cfg.videos)
    path = root / film
    if not path.resolve().is_relative_to(root.resolve()):
        return [], [work.reject("film: outside", f"{film} is a link that leaves {root}")]
    if film.encode(errors="replace").decode() != film:
        return [], [work.reject("film: odd name", f"{film!r}: rename it; no record can name it")]
    try:
        shown = video.timeline(path)
    except video.VideoError as error:
        return [], [work.reject(f"film: {error.kind}", str(error))]
    with path.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    clips = windows(shown.end_s, clip_s=cfg.split.clip_s, min_clip_s=cfg.split.min_clip_s)
    item: Item = {
        "film": film,
        "sha256": content,
        "duration_s": round(shown.end_s, 3),
        "num_frames": len(shown.starts_s),
        "height": shown.height,
        "width": shown.width,
        "clips": clips,
    }
    return [item], []


def windows(end_s: float, *, clip_s: float, min_clip_s: float) -> list[list[float]]:
    """Returns [start, end] of every clip, in seconds; together they are the film.

    What is left behind the last whole clip is one of its own from min_clip_s on, else the last
    clip's end. A film that is shorter than a clip is one clip.
    """
    num_whole = max(1, int((end_s + REST_S) // clip_s))
    bounds = [clip_s * k for k in range(num_whole + 1)]
    rest_s = end_s - bounds[-1]
    if rest_s > REST_S and rest_s >= min_clip_s:
        bounds.append(end_s)
    else:
        bounds[-1] = end_s
    bounds = [round(bound_s, 3) for bound_s in bounds]
    return [list(pair) for pair in zip(bounds[:-1], bounds[1:], strict=True)]
