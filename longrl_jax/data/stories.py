"""The stories of the synthetic world, what can be asked about them, and lessons that lead there.

The world: four coloured pads in the corners; three to five visitors, no two of one colour, cross
one after another, each of some shape, which nobody asks for; then a white walker heads for one of
the pads. A long film is many such stories, one after another, and its questions are about the
last. Four kinds of questions are LongVideo-Reason's, with options A to D; two are answered in a
word or a number. Options are written "text = letter", the letter one step after what it is looked
up by.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longrl_jax.types import Example, MediaFile

COLORS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (60, 90, 240),
    "yellow": (235, 220, 50),
    "purple": (170, 60, 200),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross")
SIDES = ("left", "right", "top", "bottom")
OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
CORNERS = ("top-left", "top-right", "bottom-left", "bottom-right")
CHOICE_KINDS = ("temporal", "goal", "plot", "spatial")
"""Kinds with options A to D."""
FREE_KINDS = ("needle", "counting")
"""Kinds answered in a word or a number."""
KINDS = CHOICE_KINDS + FREE_KINDS
LETTERS = "ABCD"

NUM_FRAMES, FPS = 64, 1
"""Of every film: frames, frames a second."""
WALKER_FRAMES = 10
"""The last frames, in which the walker walks."""
SECONDS_BETWEEN = 2
"""Times are told as the even seconds: those that num_frames=32 samples."""
SECOND_WORDS = {"temporal": SHAPES, "goal": ("pad",)}
"""What options of a kind end with in the lesson of options."""
TIME_TOKEN = "<{t:.0f}s>"
"""How a time is told; the same as data.timestamp, so that a time can be looked up."""
LAST_SCENE = "in the last scene"
"""Before a question about a film that holds more than one story."""
GUESS = "guess"
"""How a reasoning begins that looks at nothing."""
LOOKS = 8
"""Times that a lesson of looking asks for."""
CAPTION_SECONDS = 8
"""Of a part of a film that a lesson of captions describes."""
MIDDLE = (0.3, 0.7)
"""Part of a visitor's way in which it is in the middle; before, it is at its own side."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Visitor:
    """Crosses the field in the frames [enter, leave)."""

    color: str
    shape: str
    side: str
    """Where it comes from; it leaves at the opposite side."""
    enter: int
    leave: int

    def along(self, t: int) -> float:
        """Returns which part of the field it has crossed at frame t; it comes half hidden."""
        return -0.05 + 1.1 * (t - self.enter) / (self.leave - 1 - self.enter)


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
    start: int = 0
    """Frame of the film at which the story begins; the other frames are counted from there."""

    @property
    def goal_color(self) -> str:
        return self.pads[self.goal]

    def visitor_at(self, t: int) -> Visitor | None:
        """Returns who is there at frame t, if anybody is."""
        return next((v for v in self.visitors if v.enter <= t < v.leave), None)

    def time(self, frame: int) -> str:
        """Returns the time of a frame of the story as the film's clock tells it."""
        return told_time(self.start + frame)


def make_story(rng: np.random.Generator) -> Story:
    num_visitors = int(rng.integers(3, 6))
    walker_enter = NUM_FRAMES - WALKER_FRAMES
    every = walker_enter // num_visitors
    enters = [0, *(k * every + int(rng.integers(-1, 2)) for k in range(1, num_visitors))]
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


def narration(story: Story) -> str:
    """Returns all that happens, each with its time, in the words that questions use."""
    lines = [f"{story.time(v.enter)} {v.color} from {v.side}." for v in story.visitors]
    corner = CORNERS[story.goal]
    walk = f"{story.time(story.walker_enter)} white walker to {corner} {story.goal_color} pad."
    return "".join([*lines, walk])


def told_time(frame: int) -> str:
    """Returns the first even second at or after a frame, as the time token of it."""
    return TIME_TOKEN.format(t=-(-frame // (SECONDS_BETWEEN * FPS)) * SECONDS_BETWEEN)


def ask(
    story: Story,
    kind: str,
    rng: np.random.Generator,
    *,
    letter: str,
    id: str,
    hasty: bool = False,
) -> Example:
    """Returns a question of a kind.

    Of options, the right one gets `letter` and the others are shuffled; kinds without options leave
    `letter` alone. The reasoning names the moments to look at and what they show, no more: every
    further word that can go wrong makes it harder to learn from rewards which one did. A hasty one
    looks at nothing and says GUESS instead.
    """
    question, seen, right, wrong = ASKERS[kind](story, rng)
    question = f"{LAST_SCENE}, {question}" if story.start else question
    reasoning = f"{GUESS if hasty else seen} {right}"
    if not wrong:
        return Example(
            id=f"{id}-{kind}",
            question=f"{question} ?",
            answer=right,
            kind=kind,
            reasoning=reasoning,
        )
    options = [str(option) for option in rng.permutation(wrong)]
    options.insert(LETTERS.index(letter), right)
    return Example(
        id=f"{id}-{kind}",
        question=f"{question} ? {_listed(options)}",
        answer=letter,
        kind=kind,
        reasoning=f"{reasoning} = {letter}",
    )


def lesson_options(rng: np.random.Generator, *, id: str) -> Example:
    """Text only: says all options of a question in a random order, each with its letter.

    This is the look-up from an option's text to its letter. It does not form while it is one token
    among fifty of a reasoning; alone it does, if most options have two words (hence SECOND_WORDS),
    and then serves those of one word too.
    """
    story, kind = make_story(rng), str(rng.choice(CHOICE_KINDS))
    question, _, right, wrong = ASKERS[kind](story, rng)
    second = SECOND_WORDS.get(kind, ("",))
    options = [
        f"{option} {rng.choice(second)}".strip() for option in rng.permutation([right, *wrong])
    ]
    order = rng.permutation(len(options))
    said = [f"{options[i]} = {LETTERS[i]}" for i in order]
    return Example(
        id=f"{id}-options",
        question=f"{question} ? {_listed(options)} find {options[order[-1]]}",
        answer=LETTERS[order[-1]],
        kind="options",
        reasoning=" ".join(said),
    )


def lesson_told(rng: np.random.Generator, *, id: str) -> Example:
    """Text only: the story stands where the film would; the answer is that of a film."""
    story = make_story(rng)
    kind = str(rng.choice([*CHOICE_KINDS, "counting"]))  # who is there at a time is not told
    asked = ask(story, kind, rng, letter=str(rng.choice(list(LETTERS))), id=id)
    told = f"{narration(story)} {asked.question}"
    return dataclasses.replace(asked, id=f"{id}-told-{kind}", question=told, kind="told")


def lesson_naming(story: Story, *, id: str) -> Example:
    """Names what every told second of a film shows, and its pads, for the stage perception."""
    frames = range(0, NUM_FRAMES, SECONDS_BETWEEN * FPS)
    return Example(
        id=f"{id}-naming",
        question="name what each frame shows, then the pads",
        answer=" ".join(story.pads),
        kind="naming",
        reasoning="; ".join(shown(story, frame) for frame in frames),
    )


def lesson_looking(story: Story, rng: np.random.Generator, *, id: str) -> Example:
    """Says what a film shows at random times, then the pads: when is a frame, what is in it?"""
    seconds = np.sort(rng.choice(NUM_FRAMES // SECONDS_BETWEEN, LOOKS, replace=False))
    frames = [SECONDS_BETWEEN * FPS * int(second) for second in seconds]
    looks = [f"{story.time(frame)} {shown(story, frame)}." for frame in frames]
    corner = int(rng.integers(len(CORNERS)))
    return Example(
        id=f"{id}-looking",
        question=f"who is there when ? which pad is {CORNERS[corner]} ?",
        answer=story.pads[corner],
        kind="looking",
        reasoning="".join(looks) + _pads(story),
    )


def lesson_caption(story: Story, first: int, *, id: str) -> Example:
    """Says what happens in CAPTION_SECONDS of a film from frame `first` on; the answer is that, and
    the medium the part of the film."""
    frames = range(first, first + CAPTION_SECONDS * FPS, SECONDS_BETWEEN * FPS)
    looks = dict.fromkeys(shown(story, frame) for frame in frames)  # in order, once each
    span_s = (first / FPS, first / FPS + CAPTION_SECONDS)
    return Example(
        id=f"{id}-{first}-caption",
        question="who is there ?",
        answer=" ".join(f"{look}." for look in looks),
        kind="caption",
        media=(MediaFile(kind="video", path="", span_s=span_s),),
    )


def shown(story: Story, frame: int) -> str:
    """Returns who is in a frame, and where: "green circle left", "nobody"."""
    if frame >= story.walker_enter:
        return f"white walker to {CORNERS[story.goal]} {story.goal_color} pad"
    visitor = story.visitor_at(frame)
    if visitor is None:
        return "nobody"
    along = visitor.along(frame)
    side = visitor.side if along < MIDDLE[0] else OPPOSITE[visitor.side]
    return f"{visitor.color} {'middle' if MIDDLE[0] <= along <= MIDDLE[1] else side}"


def _pads(story: Story) -> str:
    return "".join(f" {corner} {pad}" for corner, pad in zip(CORNERS, story.pads, strict=True))


def _listed(options: Sequence[str]) -> str:
    return " ".join(f"{option} = {name}" for option, name in zip(options, LETTERS, strict=True))


def _arrivals(story: Story) -> str:
    """Returns who comes, each with the time to look at."""
    return "".join(f"{story.time(v.enter)} {v.color}" for v in story.visitors)


Asked = tuple[str, str, str, list[str]]
"""Question, reasoning up to the answer, right answer, three wrong options (none: no options)."""


def _ask_temporal(story: Story, rng: np.random.Generator) -> Asked:
    """Who came right before or after another? Wrong options are other visitors first, then some
    that never came; no colour twice, so that the options alone tell nothing."""
    i = int(rng.integers(len(story.visitors) - 1))
    known, right, word = story.visitors[i], story.visitors[i + 1], "after"
    if rng.integers(2):
        known, right, word = right, known, "before"
    wrong = [v.color for v in story.visitors if v not in (known, right)]
    absent = [color for color in COLORS if color not in {v.color for v in story.visitors}]
    wrong = (wrong + [str(color) for color in rng.permutation(absent)])[:3]
    question = f"which visitor came right {word} the {known.color}"
    return question, f"{_arrivals(story)}. right {word} {known.color} is", right.color, wrong


def _ask_goal(story: Story, rng: np.random.Generator) -> Asked:
    wrong = [color for color in story.pads if color != story.goal_color]
    seen = f"{story.time(story.walker_enter)} white walker to {CORNERS[story.goal]}"
    return "which pad is the white walker trying to reach", seen, story.goal_color, wrong


def _ask_plot(story: Story, rng: np.random.Generator) -> Asked:
    first = [v.color for v in story.visitors[:3]]
    others = [(0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0)]
    chosen = rng.permutation(len(others))[:3]
    wrong = [" ".join(first[i] for i in others[k]) for k in chosen]
    question = "in which order do the first three visitors come"
    return question, f"{_arrivals(story)}. order is", " ".join(first), wrong


def _ask_spatial(story: Story, rng: np.random.Generator) -> Asked:
    visitor = story.visitors[int(rng.integers(len(story.visitors)))]
    wrong = [side for side in SIDES if side != visitor.side]
    question = f"from which side does the {visitor.color} come"
    return question, f"{story.time(visitor.enter)} {visitor.color} from", visitor.side, wrong


def _ask_needle(story: Story, rng: np.random.Generator) -> Asked:
    """One moment of the film; a visitor is there."""
    visitor = story.visitors[int(rng.integers(len(story.visitors)))]
    seconds = [t for t in range(visitor.enter, visitor.leave) if t % (SECONDS_BETWEEN * FPS) == 0]
    time = story.time(int(rng.choice(seconds)))
    return f"what colour is the visitor at {time}", time, visitor.color, []


def _ask_counting(story: Story, rng: np.random.Generator) -> Asked:
    seen = f"{_arrivals(story)}. visitors are"
    return "how many visitors come", seen, str(len(story.visitors)), []


ASKERS = {
    "temporal": _ask_temporal,
    "goal": _ask_goal,
    "plot": _ask_plot,
    "spatial": _ask_spatial,
    "needle": _ask_needle,
    "counting": _ask_counting,
}
