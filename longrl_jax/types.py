"""The records that cross the borders between parts, and the legend of dimension letters.

A batch row is a *group row* (docs/design.md): `[shared prefix | branch 1 | ... | branch R]`. The
prompt of R samples is computed once; every branch starts with its own copy of the prompt's tail.

Letters, in array names (`logp_BA`) and in jaxtyping annotations:
    B rows            T tokens of a row     A answer slots of a row (positions that have a logit)
    S keys            D model width         C width of a stored media feature
    N query heads     K key/value heads     H head dim       V vocabulary
    G groups          R samples of a group  F frames         P tokens of a prompt
    L layers          M media tokens of one medium
A lower-case letter is the part of that dimension that one device holds.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaFile:
    """An image or a video that a record asks about."""

    kind: str
    """image or video."""
    path: str
    """Under data.root."""
    at: int = 0
    """Character of the question that it stands before; 0: before all words."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Example:
    """One question of a data set, as its file says it; nothing is decoded yet."""

    id: str
    question: str
    """The question, with its options inline ("A. ..." lines) where it is multiple choice."""
    answer: str
    """The reference answer: a letter, a number or free text."""
    kind: str = ""
    """Category that results are reported by, e.g. temporal, goal, plot, spatial."""
    media: tuple[MediaFile, ...] = ()
    """In the order in which they stand, `at` ascending; empty for a text-only question."""
    reasoning: str = ""
    """Reference reasoning without tags; the target of CoT-SFT."""

    @property
    def about(self) -> str:
        """Paths of the media, joined by " + ": results of questions with equal ones are kin."""
        return " + ".join(file.path for file in self.media)


@dataclasses.dataclass(frozen=True, kw_only=True)
class View:
    """What the vision tower gets of an image or a video, and how many tokens come of it."""

    size: tuple[int, int]
    """Height and width, in pixels, of one input of the tower: a frame, an image, a tile of it."""
    grid: tuple[int, int]
    """Height and width, in media tokens, of what unit_frames inputs become."""
    unit_frames: int = 1
    """Inputs that share their tokens. A video whose frames do not fill the last unit repeats its
    last frame; an image is one unit."""
    scales: tuple[tuple[int, int], ...] = ()
    """Heights and widths that an image is resized to, each cut into tiles of `size`, row by row;
    all tiles are the unit. Empty: the image itself, resized to `size`, unit_frames times."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MediaLayout:
    """What a backbone makes of media, so that prompts can be laid out without the model."""

    image_size: tuple[int, int]
    """Height and width, in pixels, that pictures are resized to; with `pixels`: of one token."""
    grid: tuple[int, int]
    """Height and width of a picture of image_size, in media tokens."""
    media_token: str
    """Token that stands where a feature of a video goes."""
    image_token: str = ""
    """The same of an image; empty: media_token."""
    separator: str
    """Text (one token) after every unit, embedded from the model's own table; empty: none."""
    around: tuple[str, str] = ("", "")
    """Texts before and after the tokens of a medium."""
    unit_frames: int = 1
    """View.unit_frames of an image, and of a video where video_unit is None."""
    pixels: tuple[int, int] | None = None
    """Fewest and most pixels of a frame, whose size then follows the video's; None: image_size."""
    image_pixels: tuple[int, int] | None = None
    """The same of an image; given where `pixels` is."""
    resize: "Callable[[int, int, int, int], tuple[int, int]] | None" = None
    """(height, width, *pixels) -> height and width that pictures are resized to; with `pixels`."""
    image_view: "Callable[[int, int], View] | None" = None
    """(height, width) -> an image's View, where tiles of it are encoded together; None: an image is
    laid out as a frame."""
    video_unit: "Callable[[int], int] | None" = None
    """Number of frames of a video -> View.unit_frames, where it depends on that."""
    positions: "Callable[[int, Sequence[Media]], tuple[np.ndarray, int]] | None" = None
    """(tokens of a prompt, its media) -> Prompt.rope_pos and next_rope_pos; None: 0, 1, 2, ..."""
    media_apart: bool = False
    """The engine takes tokens and media features apart, since its positions need the grids."""

    def image(self, height: int, width: int) -> View:
        """Returns what an image of this size becomes."""
        if self.image_view is not None:
            return self.image_view(height, width)
        return self._view(height, width, self.image_pixels, self.unit_frames)

    def video(self, height: int, width: int, num_frames: int) -> View:
        """Returns what a video becomes whose frames have this size, num_frames of them sampled."""
        unit = self.unit_frames if self.video_unit is None else self.video_unit(num_frames)
        return self._view(height, width, self.pixels, unit)

    def _view(
        self, height: int, width: int, pixels: tuple[int, int] | None, unit_frames: int
    ) -> View:
        if pixels is None or self.resize is None:
            return View(size=self.image_size, grid=self.grid, unit_frames=unit_frames)
        size = self.resize(height, width, *pixels)
        rows, columns = (a // b for a, b in zip(size, self.image_size, strict=True))
        return View(size=size, grid=(rows, columns), unit_frames=unit_frames)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Media:
    """One image, video or audio clip of a prompt, and where its tokens stand."""

    kind: str
    """image, video or audio."""
    path: str
    """Absolute path of the file."""
    key: str
    """Digest of the content, the requested sampling, the preprocessing and the decoder."""
    grid: tuple[int, int, int]
    """Time, height and width, in tokens."""
    view: View
    """What the tower gets of it; grid[1:] is that of the view."""
    times_s: tuple[float, ...]
    """Requested time of every frame, in seconds from the start; of an image 0 for every input of
    the tower."""
    num_tokens: int
    """Media tokens (t * h * w), without separators such as the token that ends a unit."""
    offset: int
    """Index of the first media token in Prompt.tokens."""
    unit_s: float = 1.0
    """Seconds from one step of the grid's time to the next."""
    stored: tuple[int, int] | None = None
    """Height and width that the file says, where the view follows them: pictures must have them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Prompt:
    """A tokenized question; media positions hold the media token's id."""

    example: Example
    tokens: np.ndarray
    """int32 [P]."""
    is_media: np.ndarray
    """bool [P]: positions that take a media feature, in the order of `media`."""
    rope_pos: np.ndarray
    """int32 [P], or [P, 3] for M-RoPE."""
    next_rope_pos: int
    """Where the first sampled token rotates."""
    media: tuple[Media, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """One answer of the engine."""

    tokens: np.ndarray
    """int32 [n], the end-of-turn token included where it was sampled."""
    logps: np.ndarray
    """float32 [n]: log p of each token under the engine's distribution at training temperature."""
    finish_reason: str
    """stop or length."""
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollout:
    """A group: one prompt, its R samples and the policy that drew them."""

    prompt: Prompt
    samples: tuple[Sample, ...]
    policy_version: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored:
    """What a reward function sees of one sample."""

    example: Example
    text: str
    num_tokens: int
    finish_reason: str
    template: str = "think"
    """data.template that the question was asked with: the form that was asked for."""
    max_tokens: int = 0
    """rollout.max_tokens: the longest answer that could be given."""
    overlong_tokens: int = 0
    """rollout.overlong_tokens: how many of these are punished."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Batch:
    """Group rows on the mesh. T = num_shards * t; the last A / num_shards tokens of every shard are
    the answer slots (branch tokens), all tokens before them shared prefixes or padding."""

    tokens: Any
    """int32 [B, T]."""
    is_media: Any
    """bool [B, T]: the token's embedding is a media feature."""
    features: Any
    """[B, T, C] stored media features at their tokens (0 elsewhere), or None for text only."""
    order: Any
    """int32 [B, T]: index in its own sequence; causality only."""
    branch: Any
    """int32 [B, T]: 0 = shared prefix, r = r-th branch of the segment."""
    segment: Any
    """int32 [B, T]: which group of the row; 0 = padding."""
    rope_pos: Any
    """int32 [B, T] or [B, T, 3]: rotation only."""
    targets: Any
    """int32 [B, A]: the token that each answer slot predicts."""
    loss_mask: Any
    """bool [B, A]: slots that predict a sampled token."""
    sequence: Any
    """int32 [B, A]: which of its row's samples a slot belongs to, from 0."""
    advantage: Any
    """float32 [B, A]."""
    engine_logps: Any
    """float32 [B, A]: what the engine said of the target when it drew it; 0 where masked."""
    num_shards: int = 1
    """Parts that T is split into (mesh axis seq); static."""
    num_sequences: int = 1
    """Most samples of a row; static."""


BATCH_META = ["num_shards", "num_sequences"]


jax.tree_util.register_dataclass(
    Batch,
    data_fields=[f.name for f in dataclasses.fields(Batch) if f.name not in BATCH_META],
    meta_fields=BATCH_META,
)

Stats = Mapping[str, tuple[Any, Any]]
"""Name -> (sum, count), so that parts of a batch add up exactly."""
