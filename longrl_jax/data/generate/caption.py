"""A caption of every clip: its frames go to a server as JPEGs, or as a checkpoint's embeddings."""

import base64
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.chat import Failure, Request
from longrl_jax.data import image, video
from longrl_jax.data.generate import clock, replies, texts, work
from longrl_jax.data.generate.settings import CaptionConfig, GenerateConfig
from longrl_jax.data.generate.work import Item

TEXTS = ("caption",)
CLIPS_AT_ONCE = 32
"""Clips of a film whose pictures are in memory together: 70 MB at 8 frames of 448 px."""
CLIPS_PER_JOB = 8
"""Clips that one decoder process reads one after another."""
MakeRequests = Callable[[Item, list[list[float]]], list[Request]]
"""(film, clips of it) -> a request for each; raises video.VideoError."""


def steps(
    film: str, before: list[Item], cfg: GenerateConfig, make_requests: MakeRequests
) -> Generator[Any, Any, Any]:
    """Returns (a caption a clip, rejects)."""
    items, rejects = [], []
    for about in before:
        for first in range(0, len(about["clips"]), CLIPS_AT_ONCE):
            clips = about["clips"][first : first + CLIPS_AT_ONCE]
            try:
                requests = make_requests(about, clips)
            except video.VideoError as error:  # half a story would be asked about as if it were all
                return [], [work.reject(f"film: {error.kind}", str(error))]
            for (start_s, end_s), reply in zip(clips, (yield requests), strict=True):
                said = "" if isinstance(reply, Failure) else replies.words(reply.text)
                if said and reply.finish_reason == "length":
                    said = replies.whole_sentences(said)
                if said:
                    items.append({"start_s": start_s, "end_s": end_s, "text": said})
                    continue
                failed = isinstance(reply, Failure)
                why = reply.reason if failed else f"no sentence in {cfg.caption.max_tokens} tokens"
                reason = "caption: no reply" if failed else "caption: too long"
                rejects.append(work.reject(reason, why, clip=[start_s, end_s]))
    return items, rejects


def picture_requests(cfg: GenerateConfig, pool: video.DecoderPool) -> MakeRequests:
    """Returns the requests of a server that takes pictures."""

    def make(about: Item, clips: list[list[float]]) -> list[Request]:
        path = Path(cfg.videos) / about["film"]
        frames = clip_frames(path, about, clips, cfg.caption, pool)
        return [
            Request(
                messages=({"role": "user", "content": _content(clip, pictures, cfg)},),
                temperature=cfg.caption.temperature,
                max_tokens=cfg.caption.max_tokens,
                seed=cfg.seed,
                name="caption",
            )
            for clip, pictures in zip(clips, frames, strict=True)
        ]

    return make


def clip_frames(
    path: Path,
    about: Item,
    clips: list[list[float]],
    cfg: CaptionConfig,
    pool: video.DecoderPool,
) -> list[np.ndarray]:
    """Returns uint8 [frames, H, W, 3] of every clip; raises VideoError."""
    shrink = min(1.0, cfg.frame_px / max(about["height"], about["width"]))
    size = (max(1, round(about["height"] * shrink)), max(1, round(about["width"] * shrink)))
    jobs = [
        video.Job(
            path=str(path),
            times_s=tuple(
                time_s
                for clip in clips[first : first + CLIPS_PER_JOB]
                for time_s in frame_times(clip, cfg.frames)
            ),
            size=size,
            decoder="pyav",
        )
        for first in range(0, len(clips), CLIPS_PER_JOB)
    ]
    found: dict[int, np.ndarray] = {}
    for item in pool.decode(jobs, chunk=cfg.frames):
        if isinstance(item, video.Failed):
            raise item.error
        found[item.job_index * CLIPS_PER_JOB + item.first_frame // cfg.frames] = item.frames
    return [found[i] for i in range(len(clips))]


def frame_times(clip: list[float], num_frames: int) -> Iterator[float]:
    """Yields the times, in seconds of the film, at the starts of equal slices of a clip."""
    start_s, end_s = clip
    for i in range(num_frames):
        yield start_s + i * (end_s - start_s) / num_frames


def _content(clip: list[float], pictures: np.ndarray, cfg: GenerateConfig) -> list[Item]:
    start, end = clock.bounds(*clip)
    asked = texts.fill("caption", cfg.texts, frames=len(pictures), start=start, end=end)
    parts: list[Item] = [{"type": "text", "text": asked}]
    for time_s, picture in zip(frame_times(clip, len(pictures)), pictures, strict=True):
        data = base64.b64encode(image.jpeg(picture, quality=cfg.caption.jpeg_quality)).decode()
        parts.append({"type": "text", "text": clock.told(time_s)})
        parts.append({"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{data}"}})
    return parts
