"""Makes a small data set of pictures: coloured shapes in PNG files, and questions about them.

    python -m longrl_jax.data.scenes data/scenes

In the manner of CLEVR (arXiv:1612.06890), whose counting questions Long-RL trains on: how many
things there are, how many of one colour or shape, and which colour the only thing of a shape has.
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from longrl_jax.data import synthetic
from longrl_jax.data.image import write_png
from longrl_jax.data.stories import COLORS, SHAPES
from longrl_jax.types import Example, MediaFile

SPLITS = ("train", "validation")
KINDS = ("how_many", "of_colour", "of_shape", "which_colour")
SIZES = ((64, 64), (64, 96), (96, 64))
"""Heights and widths of pictures, in pixels, that are drawn from."""
CELL = 32
"""Pixels along a side of the cell that holds one thing at most."""
RADIUS = 12
"""Of a thing, in pixels."""
NUM_COLORS = 3
"""That a picture draws from: with all six, most counts of a colour would be 0 or 1."""
SHADE = (25, 70)
"""Grey of the background, drawn from this range."""
MAX_IMAGES = 100_000  # five digits name a picture


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """One shape of a picture."""

    color: str
    shape: str
    at: tuple[float, float]
    """(y, x) of its middle, in pixels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """All that a picture shows, row by row."""

    size: tuple[int, int]
    palette: tuple[str, ...]
    """Colours that the things may have."""
    things: tuple[Thing, ...]


def main(argv: Sequence[str] | None = None) -> None:
    """Writes a data set; a mistake of the user's is one line, not a trace."""
    args = _parser().parse_args(argv)
    try:
        write_dataset(args.folder, images=args.images, validation=args.validation, seed=args.seed)
    except ValueError as error:
        sys.exit(f"scenes: {error}")
    sys.stdout.write(
        f"{args.folder}: {args.images} pictures with {args.images * len(KINDS)} questions to train "
        f"on, {args.validation} with {args.validation * len(KINDS)} held out\n"
    )


def write_dataset(folder: Path, *, images: int, validation: int, seed: int = 0) -> None:
    """Writes images/NNNNN.png, train.jsonl, validation.jsonl (other pictures) and corpus.txt.

    train.jsonl comes last: where it exists, all else is whole.
    """
    if images < 1 or validation < 0 or images + validation > MAX_IMAGES:
        raise ValueError(
            f"--images {images} --validation {validation}: make it at least 1 picture to train on, "
            f"0 held out, and at most {MAX_IMAGES} in all"
        )
    if seed < 0:
        raise ValueError(f"--seed {seed} must be 0 or more")
    if (folder / "train.jsonl").exists():
        raise ValueError(f"{folder} already holds a data set; delete it or name another folder")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records: dict[str, list[Example]] = {"validation": [], "train": []}
    jobs = [("train", i, i) for i in range(images)]
    jobs += [("validation", i, images + i) for i in range(validation)]
    for split, index, number in tqdm(jobs, desc="pictures", unit="picture", dynamic_ncols=True):
        scene, picture, asked = make_picture(seed, split, index)
        path = f"images/{number:05d}.png"
        write_png(folder / path, picture)
        medium = (MediaFile(kind="image", path=path),)
        records[split] += [dataclasses.replace(example, media=medium) for example in asked]
    text = "".join(synthetic.corpus(records["train"]))
    (folder / "corpus.txt").write_text(text, encoding="utf-8")
    for name, examples in records.items():
        synthetic.write_records(folder / f"{name}.jsonl", examples)


def make_picture(seed: int, split: str, index: int) -> tuple[Scene, np.ndarray, list[Example]]:
    """Returns scene, picture uint8 [H, W, 3] and one question of each kind; of its arguments."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    scene = make_scene(rng)
    asked = [ask(scene, kind, rng, id=f"{split}-{index}") for kind in KINDS]
    return scene, draw(scene, rng), asked


def make_scene(rng: np.random.Generator) -> Scene:
    """Draws a size, then any number of things from one to a thing in every cell.

    One of them at least is the only one of its shape, so that its colour can be asked for.
    """
    size = SIZES[rng.integers(len(SIZES))]
    rows, columns = (side // CELL for side in size)
    cells = np.sort(rng.permutation(rows * columns)[: rng.integers(1, rows * columns + 1)])
    single, *others = map(str, rng.permutation(SHAPES))
    shapes = [single, *map(str, rng.choice(others, len(cells) - 1))]
    shapes = [shapes[i] for i in rng.permutation(len(cells))]
    palette = tuple(map(str, rng.permutation(list(COLORS))[:NUM_COLORS]))
    return Scene(
        size=size,
        palette=palette,
        things=tuple(
            Thing(
                color=str(rng.choice(palette)),
                shape=shape,
                at=((cell // columns + 0.5) * CELL, (cell % columns + 0.5) * CELL),
            )
            for cell, shape in zip(cells.tolist(), shapes, strict=True)
        ),
    )


def draw(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """Returns uint8 [H, W, 3]; shade and noise come from rng."""
    picture_YX3 = np.full((*scene.size, 3), rng.integers(*SHADE), np.float32)
    for thing in scene.things:
        where = synthetic.inside(thing.shape, thing.at, RADIUS, size=scene.size)
        picture_YX3[where] = COLORS[thing.color]
    picture_YX3 += rng.normal(0, synthetic.NOISE, picture_YX3.shape)
    return picture_YX3.clip(0, 255).round().astype(np.uint8)


def ask(scene: Scene, kind: str, rng: np.random.Generator, *, id: str) -> Example:
    """Returns a question of a kind; the reasoning names the things and says the answer."""
    things, color, shape = scene.things, str(rng.choice(scene.palette)), str(rng.choice(SHAPES))
    if kind == "how_many":
        question, answer = "how many things are there", str(len(things))
    elif kind == "of_colour":
        question = f"how many things are {color}"
        answer = str(sum(thing.color == color for thing in things))
    elif kind == "of_shape":
        question = f"how many things are a {shape}"
        answer = str(sum(thing.shape == shape for thing in things))
    else:
        assert kind == "which_colour"
        shapes = [thing.shape for thing in things]
        single = [thing for thing in things if shapes.count(thing.shape) == 1]
        thing = single[rng.integers(len(single))]
        question, answer = f"what colour is the {thing.shape}", thing.color
    seen = ", ".join(f"{thing.color} {thing.shape}" for thing in things)
    return Example(
        id=f"{id}-{kind}",
        question=f"{question} ?",
        answer=answer,
        kind=kind,
        reasoning=f"{seen}. {answer}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.scenes",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Then: data.root=FOLDER data.train=train.jsonl data.validation=validation.jsonl; "
        "FOLDER/corpus.txt is for `python -m longrl_jax.convert init --corpus`.",
    )
    parser.add_argument("folder", type=Path, help="new folder, e.g. data/scenes")
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help=f"pictures to train on, {len(KINDS)} questions a picture (default 1000)",
    )
    parser.add_argument(
        "--validation", type=int, default=100, help="other pictures, held out (default 100)"
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="of everything: the same seed gives the same pictures and questions (default 0)",
    )
    return parser


if __name__ == "__main__":
    main()
