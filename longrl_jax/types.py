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
import math
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
    span_s: tuple[float, float] | None = None
    """Part of a video that is asked about, in seconds from its first frame, as if the file were cut
    to it (and times are told from there); None: all of it."""


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
    tags: tuple[tuple[str, str], ...] = ()
    """(name, value) of what results are reported by beside `kind`, e.g. ("duration", "long")."""
    subtitles: str = ""
    """Path, under data.root, of the film's subtitles; empty: none are known."""
    source: str = ""
    """Name of the entry of data.mix that it comes from; empty: of the only source."""

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
    all tiles are the unit, or each is one. Empty: the image itself, resized to `size`, unit_frames
    times."""
    pools: tuple[tuple[int, int, int], ...] = ()
    """Inputs, rows and columns of tokens that become one by their mean. The tokens of a medium
    follow pool by pool; the stored rows unit by unit (`order`). Empty: as the tower gives them."""
    pool_tokens: tuple[int, ...] = ()
    """Media tokens of a pooled frame, for each of several pools."""
    cost: int = 1
    """Pictures that the tower sees of one input."""

    @property
    def inputs(self) -> int:
        """Inputs of the tower that an image is."""
        height, width = self.size
        tiles = sum((y // height) * (x // width) for y, x in self.scales)
        return tiles or self.unit_frames

    @property
    def unit_tokens(self) -> tuple[tuple[int, int], ...]:
        """(how often, how many) media tokens stand together in a unit, for each of its pools."""
        if len(self.pools) < 2:
            return ((1, self.grid[0] * self.grid[1]),)
        times = (self.unit_frames // t for t, _, _ in self.pools)
        return tuple(zip(times, self.pool_tokens, strict=True))

    def order(self, num_units: int) -> "np.ndarray | None":
        """Returns the stored row of every media token; None where they stand in that order."""
        if len(self.pools) < 2:
            return None
        unit = self.grid[0] * self.grid[1]
        rows, start = np.arange(num_units * unit).reshape(num_units, unit), 0
        parts = []
        for times, count in self.unit_tokens:
            parts.append(rows[:, start : start + times * count].reshape(-1))
            start += times * count
        return np.concatenate(parts)


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
    """Text after every unit, embedded from the model's own table; empty: none."""
    opening: str = ""
    """The same before every unit."""
    ending: str = ""
    """The same after a video, of every pool size."""
    image_texts: tuple[str, str] | None = None
    """`opening` and `separator` of an image; None: the same."""
    tile_text: str = ""
    """Text of the prompt after every tile of an image whose tiles are units of their own."""
    around: tuple[str, str] = ("", "")
    """Texts before and after the tokens of a medium."""
    unit_frames: int = 1
    """View.unit_frames, of a video only where it is not pooled."""
    pixels: tuple[int, int] | None = None
    """Fewest and most pixels of a frame, whose size then follows the video's; None: image_size."""
    image_pixels: tuple[int, int] | None = None
    """The same of an image; given where `pixels` is."""
    resize: "Callable[[int, int, int, int], tuple[int, int]] | None" = None
    """(height, width, *pixels) -> height and width that pictures are resized to; with `pixels`."""
    image_view: "Callable[[int, int], View] | None" = None
    """(height, width) -> the View of a prompt's only image, where it is cut into tiles; None: an
    image is laid out as a frame, as each of several is."""
    video_pools: "Callable[[int], tuple[tuple[int, int, int], ...]] | None" = None
    """Number of frames of a video -> View.pools; None: none."""
    cost: int = 1
    """View.cost of a frame."""
    positions: "Callable[[int, Sequence[Media]], tuple[np.ndarray, int]] | None" = None
    """(tokens of a prompt, its media) -> Prompt.rope_pos and next_rope_pos; None: 0, 1, 2, ..."""
    media_apart: bool = False
    """The engine takes tokens and media features apart, since its positions need the grids."""

    def image(self, height: int, width: int, num_images: int = 1) -> View:
        """Returns what an image of this size becomes, num_images of them in the prompt."""
        if self.image_view is not None and num_images == 1:
            return self.image_view(height, width)
        return self._view(height, width, self.image_pixels)

    def video(self, height: int, width: int, num_frames: int) -> View:
        """Returns what a video becomes whose frames have this size, num_frames of them sampled."""
        view = self._view(height, width, self.pixels)
        pools = () if self.video_pools is None else self.video_pools(num_frames)
        if not pools:
            return view
        unit, (rows, columns) = math.lcm(*(t for t, _, _ in pools)), view.grid
        grids = [(rows // h, columns // w) for _, h, w in pools]
        view = dataclasses.replace(view, unit_frames=unit, grid=grids[0], pools=pools)
        if len(pools) == 1:
            return view
        tokens = tuple(h * w for h, w in grids)
        sums = (unit // t * n for (t, _, _), n in zip(pools, tokens, strict=True))
        return dataclasses.replace(view, grid=(1, sum(sums)), pool_tokens=tokens)

    def _view(self, height: int, width: int, pixels: tuple[int, int] | None) -> View:
        if pixels is None or self.resize is None:
            size, grid = self.image_size, self.grid
        else:
            size = self.resize(height, width, *pixels)
            grid = size[0] // self.image_size[0], size[1] // self.image_size[1]
        return View(size=size, grid=grid, unit_frames=self.unit_frames, cost=self.cost)


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
