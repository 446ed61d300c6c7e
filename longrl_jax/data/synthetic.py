"""Synthetic long-video questions: real H.264 files whose answers need the frames, by seed.

    python -m longrl_jax.data.synthetic data/tiny --clips 300 --validation 80
    python -m longrl_jax.data.synthetic data/hour --clips 2 --validation 0 --minutes 60

What happens in a film, and what is asked about it, is in data/stories.py: coloured visitors cross
the field, then a white walker heads for a pad, and the film stops before it is there. With
--minutes a film has one such scene after another, and only the last one answers its questions.
"""

import argparse
import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from longrl_jax.data import prompts
from longrl_jax.data.longvideo_reason import to_record
from longrl_jax.data.stories import (
    CAPTION_SECONDS,
    CHOICE_KINDS,
    COLORS,
    FPS,
    FREE_KINDS,
    KINDS,
    LETTERS,
    NUM_FRAMES,
    Story,
    Visitor,
    ask,
    lesson_caption,
    lesson_looking,
    lesson_naming,
    lesson_options,
    lesson_told,
    make_story,
)
from longrl_jax.types import Example, MediaFile

SPLITS = ("train", "validation")
LESSONS = ("options", "told", "naming", "looking", "captions", "grounding")
"""Files of lessons beside train.jsonl; grounding.jsonl mixes looking, told and train."""
LOOKING_PER_CLIP = 4
HASTY = dict.fromkeys(CHOICE_KINDS, 0.3) | dict.fromkeys(FREE_KINDS, 0.7)
"""Share of a kind's training questions whose written reasoning guesses, as people's and models' do.
Fine-tuning imitates both ways, the more frequent one when it is greedy; rewards tell which is right
more often."""

SIZE = 64
"""Pixels along a side of every film."""
WALKER_COLOR = (250, 250, 250)
PAD_SIZE = SIZE // 8
VISITOR_RADIUS, WALKER_RADIUS = 0.15 * SIZE, 0.08 * SIZE
MAX_OFFSET = 0.08 * SIZE
"""How far from the middle line a visitor may cross, so that it stays clear of the pads."""
WALKER_REACH = 0.7
"""Share of its way to the pad that the walker has gone in the last frame."""
NOISE = 3.0
"""Standard deviation of the pixel noise, of 255."""
MAX_CLIPS = 100_000  # five digits name a film
MIN_MINUTES, MAX_MINUTES = 2, 600
"""Of a film with more than one scene."""


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a data set; a mistake of the user's is one line, not a trace."""
    args = _parser().parse_args(argv)
    try:
        write_dataset(
            args.folder,
            clips=args.clips,
            validation=args.validation,
            lessons=args.lessons,
            careful=args.careful,
            minutes=args.minutes,
            seed=args.seed,
        )
    except ValueError as error:
        sys.exit(f"synthetic: {error}")
    sys.stdout.write(
        f"{args.folder}: {args.clips} films with {args.clips * len(KINDS)} questions to train on, "
        f"{args.validation} with {args.validation * len(KINDS)} held out\n"
    )


def write_dataset(
    folder: Path,
    *,
    clips: int,
    validation: int,
    lessons: int = 0,
    careful: bool = False,
    minutes: int = 0,
    seed: int = 0,
) -> None:
    """Writes videos/NNNNN.mp4, train.jsonl, validation.jsonl (other films) and corpus.txt.

    careful: no reasoning of train.jsonl guesses. lessons: also writes so many text lessons each as
    options.jsonl and told.jsonl, and for each training film one as naming.jsonl, LOOKING_PER_CLIP
    as looking.jsonl and one for every CAPTION_SECONDS as captions.jsonl; grounding.jsonl mixes
    looking with some of told and train.
    minutes: of a film that has many scenes (make_film); 0: one scene.
    train.jsonl comes last: where it exists, all else is whole.
    The held-out films do not depend on the number of training films, nor the other way round.
    """
    if clips < 1 or validation < 0 or lessons < 0 or clips + validation > MAX_CLIPS:
        raise ValueError(
            f"--clips {clips} --validation {validation} --lessons {lessons}: make it at least 1 "
            f"film to train on, 0 held out, 0 lessons, and at most {MAX_CLIPS} films in all"
        )
    if minutes and not MIN_MINUTES <= minutes <= MAX_MINUTES:
        raise ValueError(
            f"--minutes {minutes} must be {MIN_MINUTES} to {MAX_MINUTES}, or 0 for films of one "
            "scene"
        )
    if minutes and lessons:
        raise ValueError(
            f"--lessons {lessons} are about films of one scene; leave --minutes {minutes} out"
        )
    if seed < 0:
        raise ValueError(f"--seed {seed} must be 0 or more")
    if (folder / "train.jsonl").exists():
        raise ValueError(f"{folder} already holds a data set; delete it or name another folder")
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    records: dict[str, list[Example]] = {name: [] for name in (*LESSONS, "validation", "train")}
    jobs = [("train", i, i) for i in range(clips)]
    jobs += [("validation", i, clips + i) for i in range(validation)]
    num_frames = minutes * 60 * FPS or NUM_FRAMES
    for split, index, number in tqdm(jobs, desc="films", unit="film", dynamic_ncols=True):
        story, frames, asked = make_film(seed, split, index, num_frames, careful=careful)
        path = f"videos/{number:05d}.mp4"
        write_video(folder / path, frames)
        film = (MediaFile(kind="video", path=path),)
        records[split] += [dataclasses.replace(example, media=film) for example in asked]
        if lessons and split == "train":
            for name, lesson in make_film_lessons(story, seed, index):
                parts = [dataclasses.replace(part, path=path) for part in lesson.media]
                records[name].append(dataclasses.replace(lesson, media=tuple(parts) or film))
    records |= make_text_lessons(seed, lessons)
    looking = records["looking"]
    mixed = [*looking, *records["told"][: len(looking) // 3], *records["train"][::2]]
    records["grounding"] = mixed if lessons else []
    learnt = [e for name in ("options", "told", "looking", "train") for e in records[name]]
    (folder / "corpus.txt").write_text("".join(corpus(learnt)), encoding="utf-8")
    for name, examples in records.items():
        if examples or name not in LESSONS:
            write_records(folder / f"{name}.jsonl", examples)


def make_film_lessons(story: Story, seed: int, index: int) -> Iterator[tuple[str, Example]]:
    """Yields (file, lesson) of a training film."""
    rng = np.random.default_rng([seed, len(SPLITS), index])
    yield "naming", lesson_naming(story, id=str(index))
    for i in range(LOOKING_PER_CLIP):
        yield "looking", lesson_looking(story, rng, id=f"{index}-{i}")
    for first in range(0, NUM_FRAMES, CAPTION_SECONDS * FPS):
        yield "captions", lesson_caption(story, first, id=str(index))


def make_text_lessons(seed: int, number: int) -> dict[str, list[Example]]:
    """Returns `number` lessons each of the options of a question and of told stories."""
    rngs = [np.random.default_rng([seed, len(SPLITS) + 1, i]) for i in range(number)]
    return {
        "options": [lesson_options(rng, id=str(i)) for i, rng in enumerate(rngs)],
        "told": [lesson_told(rng, id=str(i)) for i, rng in enumerate(rngs)],
    }


def make_film(
    seed: int, split: str, index: int, num_frames: int, *, careful: bool = False
) -> tuple[Story, Iterator[np.ndarray], list[Example]]:
    """Returns the last scene's story, the frames of all scenes and one question of each kind.

    Each scene is another story with the same colours, so that whoever looks at an earlier one has
    another answer at hand; of the first scene only the end fits in. Frames are drawn as they are
    asked for: a scene at a time is in memory.
    """
    start = num_frames - NUM_FRAMES
    story, last_FHW3, asked = make_clip(seed, split, index, careful=careful, start=start)

    def earlier() -> Iterator[np.ndarray]:
        num_scenes = -(-start // NUM_FRAMES)
        for scene in range(num_scenes):
            rng = np.random.default_rng([seed, SPLITS.index(split), index, 2, scene])
            yield from draw(make_story(rng), rng)

    skipped = -start % NUM_FRAMES
    return story, itertools.chain(itertools.islice(earlier(), skipped, None), last_FHW3), asked


def make_clip(
    seed: int, split: str, index: int, *, careful: bool = False, start: int = 0
) -> tuple[Story, np.ndarray, list[Example]]:
    """Returns story, frames uint8 [F, SIZE, SIZE, 3] and one question of each kind.

    start: frame of the film at which this, its last scene, begins.
    Depends on its arguments alone. Each question with options has another letter as its answer, and
    over four clips each kind has each letter once: "always B" is right one time in four.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    story = dataclasses.replace(make_story(rng), start=start)
    frames_FHW3 = draw(story, rng)
    luck = np.random.default_rng([seed, SPLITS.index(split), index, 1]).random(len(KINDS))
    asked = [
        ask(
            story,
            kind,
            rng,
            letter=LETTERS[(index + k) % len(LETTERS)],
            id=f"{split}-{index}",
            hasty=not careful and luck[k] < HASTY[kind],
        )
        for k, kind in enumerate(KINDS)
    ]
    return story, frames_FHW3, asked


def draw(story: Story, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [F, SIZE, SIZE, 3]; shade, waves, offsets and noise come from rng."""
    frames_FHW3 = _background(rng)
    for k, color in enumerate(story.pads):
        top, left = k // 2 * (SIZE - PAD_SIZE), k % 2 * (SIZE - PAD_SIZE)
        frames_FHW3[:, top : top + PAD_SIZE, left : left + PAD_SIZE] = COLORS[color]
    for visitor in story.visitors:
        offset = float(rng.uniform(-MAX_OFFSET, MAX_OFFSET))
        for t in range(visitor.enter, visitor.leave):
            at = visitor_place(visitor, t, offset)
            frames_FHW3[t][inside(visitor.shape, at, VISITOR_RADIUS)] = COLORS[visitor.color]
    for t in range(story.walker_enter, NUM_FRAMES):
        at = walker_place(story, t)
        frames_FHW3[t][inside("circle", at, WALKER_RADIUS)] = WALKER_COLOR
    frames_FHW3 += rng.normal(0, NOISE, frames_FHW3.shape)
    return frames_FHW3.clip(0, 255).round().astype(np.uint8)


def visitor_place(visitor: Visitor, t: int, offset: float) -> tuple[float, float]:
    """Returns (y, x) in pixels at frame t; a visitor comes in and goes out half hidden."""
    along, across = visitor.along(t) * SIZE, SIZE / 2 + offset
    return {
        "left": (across, along),
        "right": (across, SIZE - along),
        "top": (along, across),
        "bottom": (SIZE - along, across),
    }[visitor.side]


def walker_place(story: Story, t: int) -> tuple[float, float]:
    """Returns (y, x) in pixels at frame t, on the straight way from the middle to the pad."""
    middle, margin = SIZE / 2, PAD_SIZE / 2
    goal_y = margin if story.goal < 2 else SIZE - margin
    goal_x = margin if story.goal % 2 == 0 else SIZE - margin
    share = WALKER_REACH * (t - story.walker_enter) / (NUM_FRAMES - 1 - story.walker_enter)
    return middle + (goal_y - middle) * share, middle + (goal_x - middle) * share


def write_video(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Writes frames [SIZE, SIZE, 3] as H.264 in MP4, one thread, so that the same frames give the
    same file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height = stream.width = SIZE
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {
            "preset": "veryfast",
            "crf": "30",
            "g": "32",
            "x264-params": "mbtree=0",  # with it, the same frames give now one file, now another
        }
        for number, frame_HW3 in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def corpus(examples: Sequence[Example]) -> Iterator[str]:
    """Yields the conversations of SFT as plain text, for a tokenizer to learn from."""
    for example in examples:
        for template in ("think", "direct"):
            yield f"user\n{prompts.user_text(example, template)}\n"
            yield f"assistant\n{prompts.target_text(example, template)}\n"


def _background(rng: np.random.Generator) -> np.ndarray:
    """Returns float32 frames of one dark shade with faint upright waves."""
    shade = rng.integers(25, 70)
    phase = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.integers(1, 3) * np.arange(SIZE) / SIZE
    row_W = shade + 8 * np.sin(phase)
    return np.tile(row_W[:, None], (NUM_FRAMES, SIZE, 1, 3)).astype(np.float32)


def inside(
    shape: str, at: tuple[float, float], radius: float, size: tuple[int, int] = (SIZE, SIZE)
) -> np.ndarray:
    """Returns bool `size`: the pixels of a shape around `at`, (y, x)."""
    dy, dx = np.arange(size[0])[:, None] - at[0], np.arange(size[1])[None, :] - at[1]
    if shape == "circle":
        return dy**2 + dx**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(dy), abs(dx)) <= 0.85 * radius
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (dy >= 1.8 * abs(dx) - radius)
    assert shape == "cross"
    thin, long = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    return (thin <= 0.33 * radius) & (long <= radius)


def write_records(path: Path, examples: Sequence[Example]) -> None:
    """Writes one JSON line a record, whole or not at all."""
    partial = path.with_suffix(".partial")
    lines = [json.dumps(to_record(example)) + "\n" for example in examples]
    partial.write_text("".join(lines), encoding="utf-8")
    os.replace(partial, path)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.synthetic",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Then: data.root=FOLDER data.train=train.jsonl data.validation=validation.jsonl; "
        "FOLDER/corpus.txt is for `python -m longrl_jax.convert init --corpus`.",
    )
    parser.add_argument("folder", type=Path, help="new folder, e.g. data/tiny")
    parser.add_argument(
        "--clips",
        type=int,
        default=300,
        help=f"films to train on, {len(KINDS)} questions a film (default 300)",
    )
    parser.add_argument(
        "--validation", type=int, default=80, help="other films, held out (default 80)"
    )
    parser.add_argument(
        "--lessons",
        type=int,
        default=0,
        help="also write lessons for a model that knows nothing: this many each as options.jsonl "
        "and told.jsonl (text only), and some for each film as naming.jsonl and looking.jsonl "
        "(default 0: none)",
    )
    parser.add_argument(
        "--careful",
        action="store_true",
        help="every training question's reasoning looks at the film (default: it guesses in 30 %% "
        "of those with options and in 70 %% of the others, for GRPO to find out)",
    )
    parser.add_argument(
        "--minutes",
        type=int,
        default=0,
        help="length of a film, 60 for an hour: one scene after another, and questions about the "
        "last scene (default 0: one scene of 64 s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of everything: the same seed gives the same films and questions (default 0)",
    )
    return parser


if __name__ == "__main__":
    main()
