"""Synthetic long-video questions: real H.264 files whose answers need the frames, by seed.

    python -m longrl_jax.data.synthetic data/tiny --clips 160 --validation 32

The world: four coloured pads in the corners; three to five visitors, no two of one colour, cross
one after another; then a white walker heads for one of the pads, and the film stops before it is
there. Questions are of LongVideo-Reason's four kinds. Options are written "text = letter": a tiny
model learns that look-up, but not "letter ) text" (each letter after its text is one step away).
"""

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from tqdm import tqdm

from longrl_jax.data import prompts
from longrl_jax.types import Example

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 50),
    "purple": (170, 60, 200),
    "orange": (245, 140, 30),
}
WALKER_COLOR = (250, 250, 250)
SHAPES = ("circle", "square", "triangle", "cross")
SIDES = ("left", "right", "top", "bottom")
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
KINDS = ("temporal", "goal", "plot", "spatial")
LETTERS = "ABCD"
SPLITS = ("train", "validation")

NUM_FRAMES, SIZE, FPS = 64, 64, 1
"""Of every film: frames, pixels along a side, frames a second."""
FRAMES_PER_TIME_WORD = 2
"""t0 to t31 name the pairs of frames."""
WALKER_FRAMES = 10
"""The last frames, in which the walker walks."""
PAD_SIZE = SIZE // 8
VISITOR_RADIUS, WALKER_RADIUS = 0.13 * SIZE, 0.08 * SIZE
MAX_OFFSET = 0.15 * SIZE
"""How far from the middle line a visitor may cross, so that it stays clear of the pads."""
WALKER_REACH = 0.7
"""Share of its way to the pad that the walker has gone in the last frame."""
NOISE = 3.0
"""Standard deviation of the pixel noise, of 255."""
MAX_CLIPS = 100_000  # five digits name a film


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visitor:
    """Crosses the field in the frames [enter, leave)."""

    color: str
    shape: str
    side: str
    """Where it comes from; it leaves at the opposite side."""
    enter: int
    leave: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """What happens in a film."""

    visitors: tuple[Visitor, ...]
    """In the order that they come."""
    pads: tuple[str, ...]
    """Colour of the pad in each of CORNERS."""
    goal: int
    """Index of the walker's pad."""
    walker_enter: int
    """First frame of the walker, which stays to the end."""

    @property
    def goal_color(self) -> str:
        return self.pads[self.goal]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a data set; a mistake of the user's is one line, not a trace."""
    args = _parser().parse_args(argv)
    try:
        write_dataset(args.folder, clips=args.clips, validation=args.validation, seed=args.seed)
    except ValueError as error:
        sys.exit(f"synthetic: {error}")
    sys.stdout.write(
        f"{args.folder}: {args.clips} films with {args.clips * len(KINDS)} questions to train on, "
        f"{args.validation} with {args.validation * len(KINDS)} held out\n"
    )


def write_dataset(folder: Path, *, clips: int, validation: int, seed: int) -> None:
    """Writes videos/NNNNN.mp4, train.jsonl, validation.jsonl (other films) and corpus.txt.

    train.jsonl comes last: where it exists, everything else is whole. The held-out films do not
    depend on the number of training films, nor the other way round.
    """
    if clips < 1 or validation < 0 or clips + validation > MAX_CLIPS:
        raise ValueError(
            f"--clips {clips} --validation {validation}: make it at least 1 film to train on, 0 "
            f"held out, and at most {MAX_CLIPS} in all"
        )
    if seed < 0:
        raise ValueError(f"--seed {seed} must be 0 or more")
    if (folder / "train.jsonl").exists():
        raise ValueError(f"{folder} already holds a data set; delete it or name another folder")
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[Example]] = {split: [] for split in SPLITS}
    jobs = [("train", i, i) for i in range(clips)]
    jobs += [("validation", i, clips + i) for i in range(validation)]
    for split, index, number in tqdm(jobs, desc="films", unit="film", dynamic_ncols=True):
        story, frames_FHW3, asked = make_clip(seed, split, index)
        path = f"videos/{number:05d}.mp4"
        write_video(folder / path, frames_FHW3)
        splits[split] += [dataclasses.replace(example, video=path) for example in asked]
    (folder / "corpus.txt").write_text("".join(corpus(splits["train"])), encoding="utf-8")
    for split in ("validation", "train"):
        _write_records(folder / f"{split}.jsonl", splits[split])


def make_clip(seed: int, split: str, index: int) -> tuple[Story, np.ndarray, list[Example]]:
    """Returns story, frames uint8 [F, SIZE, SIZE, 3] and one question of each kind.

    Depends on its arguments alone. Each of the four questions has another letter as its answer,
    and over four clips each kind has each letter once: "always B" is right one time in four.
    """
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    story = make_story(rng)
    frames_FHW3 = draw(story, rng)
    asked = [
        ask(story, kind, rng, letter=LETTERS[(index + k) % len(LETTERS)], id=f"{split}-{index}")
        for k, kind in enumerate(KINDS)
    ]
    return story, frames_FHW3, asked


def make_story(rng: np.random.Generator) -> Story:
    num_visitors = int(rng.integers(3, 6))
    walker_enter = NUM_FRAMES - WALKER_FRAMES
    every = walker_enter // num_visitors
    enters = [0, *(k * every + int(rng.integers(-2, 3)) for k in range(1, num_visitors))]
    leaves = [*(enter - 1 for enter in enters[1:]), walker_enter - 1]  # an empty frame between
    colors = rng.permutation(list(COLORS))[:num_visitors]
    visitors = [
        Visitor(
            color=str(color),
            shape=str(rng.choice(SHAPES)),
            side=str(rng.choice(SIDES)),
            enter=enter,
            leave=leave,
        )
        for color, enter, leave in zip(colors, enters, leaves, strict=True)
    ]
    return Story(
        visitors=tuple(visitors),
        pads=tuple(map(str, rng.permutation(list(COLORS))[: len(CORNERS)])),
        goal=int(rng.integers(len(CORNERS))),
        walker_enter=walker_enter,
    )


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
            frames_FHW3[t][_inside(visitor.shape, at, VISITOR_RADIUS)] = COLORS[visitor.color]
    for t in range(story.walker_enter, NUM_FRAMES):
        at = walker_place(story, t)
        frames_FHW3[t][_inside("circle", at, WALKER_RADIUS)] = WALKER_COLOR
    frames_FHW3 += rng.normal(0, NOISE, frames_FHW3.shape)
    return frames_FHW3.clip(0, 255).round().astype(np.uint8)


def visitor_place(visitor: Visitor, t: int, offset: float) -> tuple[float, float]:
    """Returns (y, x) in pixels at frame t; a visitor comes in and goes out half hidden."""
    share = (t - visitor.enter) / (visitor.leave - 1 - visitor.enter)
    along, across = (-0.05 + 1.1 * share) * SIZE, SIZE / 2 + offset
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


def narration(story: Story) -> str:
    """Returns all that happens, with its times, in the words that questions use."""
    lines = [f"{_time(v.enter)} {v.name} from {v.side} ." for v in story.visitors]
    corner = CORNERS[story.goal]
    walk = f"{_time(story.walker_enter)} white walker to {corner} {story.goal_color} pad ."
    return " ".join([*lines, walk])


def ask(story: Story, kind: str, rng: np.random.Generator, *, letter: str, id: str) -> Example:
    """Returns a question of a kind whose right option gets `letter`; the others are shuffled."""
    question, clause, right, wrong = ASKERS[kind](story, rng)
    options = [str(option) for option in rng.permutation(wrong)]
    options.insert(LETTERS.index(letter), right)
    listed = " ".join(f"{option} = {name}" for option, name in zip(options, LETTERS, strict=True))
    return Example(
        id=f"{id}-{kind}",
        question=f"{question} ? {listed}",
        answer=letter,
        kind=kind,
        reasoning=f"{narration(story)} {clause} {right} = {letter}",
    )


Asked = tuple[str, str, str, list[str]]
"""Question, first words of the conclusion, right option, three wrong options."""


def _ask_temporal(story: Story, rng: np.random.Generator) -> Asked:
    """Who came right before or after another? Wrong options are other visitors first, then some
    that never came; no colour twice, so that the options alone tell nothing."""
    i = int(rng.integers(len(story.visitors) - 1))
    known, right, word = story.visitors[i], story.visitors[i + 1], "after"
    if rng.integers(2):
        known, right, word = right, known, "before"
    wrong = [v.name for v in story.visitors if v not in (known, right)]
    absent = [color for color in COLORS if color not in {v.color for v in story.visitors}]
    strangers = [f"{color} {rng.choice(SHAPES)}" for color in rng.permutation(absent)]
    wrong = (wrong + strangers)[:3]
    question = f"which visitor came right {word} the {known.name}"
    return question, f"right {word} {known.name} is", right.name, wrong


def _ask_goal(story: Story, rng: np.random.Generator) -> Asked:
    wrong = [f"{color} pad" for color in story.pads if color != story.goal_color]
    right = f"{story.goal_color} pad"
    return "what is the white walker trying to reach", "walker wants", right, wrong


def _ask_plot(story: Story, rng: np.random.Generator) -> Asked:
    first = [v.color for v in story.visitors[:3]]
    others = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    chosen = rng.permutation(len(others))[:3]
    wrong = [" ".join(first[i] for i in others[k]) for k in chosen]
    question = "in which order do the first three visitors come"
    return question, "order is", " ".join(first), wrong


def _ask_spatial(story: Story, rng: np.random.Generator) -> Asked:
    visitor = story.visitors[int(rng.integers(len(story.visitors)))]
    wrong = [side for side in SIDES if side != visitor.side]
    question = f"from which side does the {visitor.name} come"
    return question, f"{visitor.name} from", visitor.side, wrong


ASKERS = {
    "temporal": _ask_temporal,
    "goal": _ask_goal,
    "plot": _ask_plot,
    "spatial": _ask_spatial,
}


def write_video(path: Path, frames_FHW3: np.ndarray) -> None:
    """Writes H.264 in MP4, one thread, so that the same frames give the same file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width = frames_FHW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1
        stream.options = {
            "preset": "veryfast",
            "crf": "30",
            "g": "32",
            "x264-params": "mbtree=0",  # with it, the same frames give now one file, now another
        }
        for number, frame_HW3 in enumerate(frames_FHW3):
            frame = av.VideoFrame.from_ndarray(frame_HW3, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, FPS)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def corpus(examples: Sequence[Example]) -> Iterator[str]:
    """Yields the conversations of SFT as plain text, for a tokenizer to learn from."""
    for example in examples:
        for template in prompts.INSTRUCTIONS:
            yield f"user\n{prompts.user_text(example, template)}\n"
            yield f"assistant\n{prompts.target_text(example, template)}\n"


def _background(rng: np.random.Generator) -> np.ndarray:
    """Returns float32 frames of one dark shade with faint upright waves."""
    shade = rng.integers(25, 70)
    phase = rng.uniform(0, 2 * np.pi) + 2 * np.pi * rng.integers(1, 3) * np.arange(SIZE) / SIZE
    row_W = shade + 8 * np.sin(phase)
    return np.tile(row_W[:, None], (NUM_FRAMES, SIZE, 1, 3)).astype(np.float32)


def _inside(shape: str, at: tuple[float, float], radius: float) -> np.ndarray:
    """Returns bool [SIZE, SIZE]: the pixels of a shape around `at`."""
    pixel = np.arange(SIZE)
    dy, dx = pixel[:, None] - at[0], pixel[None, :] - at[1]
    if shape == "circle":
        return dy**2 + dx**2 <= radius**2
    if shape == "square":
        return np.maximum(abs(dy), abs(dx)) <= 0.85 * radius
    if shape == "triangle":
        return (dy <= 0.8 * radius) & (dy >= 1.8 * abs(dx) - radius)
    assert shape == "cross"
    thin, long = np.minimum(abs(dy), abs(dx)), np.maximum(abs(dy), abs(dx))
    return (thin <= 0.33 * radius) & (long <= radius)


def _time(frame: int) -> str:
    return f"t{frame // FRAMES_PER_TIME_WORD}"


def _write_records(path: Path, examples: Sequence[Example]) -> None:
    """Writes one JSON line a record, whole or not at all."""
    partial = path.with_suffix(".partial")
    lines = [json.dumps(dataclasses.asdict(example)) + "\n" for example in examples]
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
        default=160,
        help="films to train on, one question of each kind a film (default 160)",
    )
    parser.add_argument(
        "--validation", type=int, default=32, help="other films, held out (default 32)"
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
