"""Which groups of a step share a row, and how long rows are: pure functions of the step's groups.

Two or more groups of one row are its *segments*, which do not see each other. Lengths come from few
sizes, and packed rows in few numbers, since the update is compiled anew for every other shape.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from longrl_jax.types import Prompt, Rollout

QUARTERS = 4
"""Packed rows have so many lengths, up to batch.max_row_tokens."""
Row = list[list[int]]
"""Its segments, each the indices of the rollouts that share its prefix."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Packed:
    """As many groups share a row as fit into it."""

    rows_per_pass: int
    """Rows that a process computes at a time: the rows of a step are this number times 1, 2, 4, ...
    where that is fewer than without packing, and passes that stay empty are skipped."""
    num_sequences: int
    """Most samples of a step in one process."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RowShape:
    """What all rows of a step have in common."""

    prefix_tokens: int = 0
    """Most tokens of a row's shared prefixes; packed: of those that stand there whole."""
    branch_tokens: int = 0
    """Most tokens of a row's branches."""
    row_tokens: int = 0
    """Most tokens of a row."""
    num_rows: int = 0
    """Most rows of a process that have a token."""
    num_sequences: int = 0
    """Most samples of a row."""
    rope_dims: tuple[int, ...] = ()
    """Of a token's rope_pos: () or (3,)."""
    width: int = 0
    """C of the stored features; 0: text only."""
    dtype: str = ""
    """Of the stored features."""


def common_shape(shapes: Sequence[RowShape]) -> RowShape:
    """Returns the least shape that rows of all these shapes fit in."""
    known = [(shape.width, shape.dtype) for shape in shapes if shape.width]
    if len(set(known)) > 1:
        raise ValueError(f"features differ in width or type: {sorted(set(known))}")
    width, dtype = known[0] if known else (0, "")
    most = {
        name: max(getattr(shape, name) for shape in shapes)
        for name in (
            "prefix_tokens",
            "branch_tokens",
            "row_tokens",
            "num_rows",
            "num_sequences",
            "rope_dims",
        )
    }
    return RowShape(width=width, dtype=dtype, **most)


def shape_of(
    rows: Sequence[Row],
    rollouts: Sequence[Rollout],
    features: Sequence[np.ndarray | None],
    packed: Packed | None = None,
) -> RowShape:
    """Returns the least shape that fits these rows; features are those of make_batch."""
    known = [(x.shape[1], str(x.dtype)) for x in features if x is not None]
    shapes = [RowShape(num_rows=len(rows))]
    shapes += [RowShape(width=width, dtype=dtype) for width, dtype in known]
    shapes += [RowShape(rope_dims=rollout.prompt.rope_pos.shape[1:]) for rollout in rollouts]
    for row in rows:
        groups = [[rollouts[i] for i in segment] for segment in row]
        prefixes = [shared_prefix([group.prompt for group in segment]) for segment in groups]
        tokens = [row_tokens(segment) for segment in groups]
        whole = [
            length
            for length, segment in zip(prefixes, groups, strict=True)
            if packed is None or not _may_be_cut(segment)
        ]
        shape = RowShape(
            prefix_tokens=sum(whole),
            branch_tokens=sum(tokens) - sum(prefixes),
            row_tokens=sum(tokens),
            num_sequences=sum(len(group.samples) for segment in groups for group in segment),
        )
        shapes.append(shape)
    return common_shape(shapes)


def sizes(
    shape: RowShape,
    *,
    num_shards: int,
    smallest_bucket: int,
    max_row_tokens: int,
    packed: Packed | None = None,
) -> tuple[int, int]:
    """Returns the tokens of a shard's two parts: prefixes, and answer slots.

    Each is a `bucket`. Packed, the slots are smallest_bucket times a power of two, and both
    together a quarter of max_row_tokens, or two, three, all four. Where prefixes that cannot be cut
    ask for more, they get as many sixteenths as they need, and a row may be that much longer.
    """
    least = -(-smallest_bucket // num_shards)
    prefix, branch, whole = (
        -(-tokens // num_shards)
        for tokens in (shape.prefix_tokens, shape.branch_tokens, shape.row_tokens)
    )
    if packed is None:
        return bucket(prefix, least), bucket(branch, least)
    slots = least
    while slots < branch:
        slots *= 2
    quarter = -(-max_row_tokens // (QUARTERS * num_shards))
    together = -(-whole // quarter) * quarter
    sixteenth = -(-quarter // 4)
    return max(together - slots, -(-prefix // sixteenth) * sixteenth), slots


def packed_rows(shape: RowShape, packed: Packed, most: int) -> tuple[int, int]:
    """Returns the rows that a process lays out, and how many of them are computed."""
    needed = -(-shape.num_rows // packed.rows_per_pass)
    passes = 1
    while passes < needed:
        passes *= 2
    rows = min(passes * packed.rows_per_pass, most)
    return rows, max(needed, 1) * packed.rows_per_pass


def bucket(num_tokens: int, smallest: int) -> int:
    """Returns the least of smallest * (1, 2, ... 8, 10, 12, 14, 16, 20, ...) that holds num_tokens.

    From 8 on there are four sizes an octave, so at most a quarter of a prompt's length is padding.
    """
    step = smallest
    while num_tokens > 8 * step:
        step *= 2
    return max(-(-num_tokens // step), 1) * step


def row_tokens(rollouts: Sequence[Rollout]) -> int:
    """Returns how many tokens rollouts that share one prefix take of a row, without padding."""
    prefix = shared_prefix([r.prompt for r in rollouts])
    tails = sum((len(r.prompt.tokens) - prefix - 1) * len(r.samples) for r in rollouts)
    return prefix + tails + sum(len(s.tokens) for r in rollouts for s in r.samples)


def shared_prefix(prompts: Sequence[Prompt]) -> int:
    """Length of the longest common start that leaves every prompt at least its last token."""
    first, length = prompts[0], min(len(p.tokens) for p in prompts) - 1
    for prompt in prompts[1:]:
        same = prompt.tokens[:length] == first.tokens[:length]
        same &= prompt.is_media[:length] == first.is_media[:length]
        moved = prompt.rope_pos[:length] != first.rope_pos[:length]
        same &= ~moved.any(axis=tuple(range(1, moved.ndim)))
        length = length if same.all() else int(np.argmin(same))
    return length


def prefix_lengths(row: Row, rollouts: Sequence[Rollout], room: int) -> list[int]:
    """Returns how many tokens of every segment's prefix stand among the prefixes of its row, which
    have room for so many. The rest stand before the answer, where that answer is the segment's only
    one: nobody else would have to see them."""
    groups = [[rollouts[i] for i in segment] for segment in row]
    lengths = [shared_prefix([group.prompt for group in segment]) for segment in groups]
    over = sum(lengths) - room
    for number in sorted(range(len(row)), key=lambda n: -lengths[n]):
        if over > 0 and _may_be_cut(groups[number]):
            cut = min(over, lengths[number])
            lengths[number] -= cut
            over -= cut
    assert over <= 0, f"prefixes need {over} tokens more than {room}"
    return lengths


def segments_of(rollouts: Sequence[Rollout], max_row_tokens: int) -> list[list[int]]:
    """Groups the rollouts that share a prefix; a prefix is shared where that saves tokens."""
    segments: list[list[int]] = []
    of_media: dict[tuple[str, ...], list[list[int]]] = {}
    for i, rollout in enumerate(rollouts):
        open_segments = of_media.setdefault(tuple(m.key for m in rollout.prompt.media), [])
        alone = row_tokens([rollout])
        for segment in open_segments:
            before = row_tokens([rollouts[j] for j in segment])
            together = row_tokens([rollouts[j] for j in [*segment, i]])
            if rollout.prompt.media and together < before + alone and together <= max_row_tokens:
                segment.append(i)
                break
        else:
            open_segments.append([i])
            segments.append(open_segments[-1])
    return segments


def pack(
    segments: Sequence[list[int]],
    rollouts: Sequence[Rollout],
    max_row_tokens: int,
    *,
    groups_per_row: int = 0,
    multiple: int = 1,
) -> list[Row]:
    """Puts segments into as few rows as first fit, the longest first, finds; 0: any number in one.

    multiple: where groups_per_row is 0, rows come in whole numbers of it. Then all of them are
    used: the longest segment not placed goes to the emptiest row, where all fit that way, and rows
    with the most work for attention come first, so that those computed together have alike.
    """
    size = [row_tokens([rollouts[i] for i in segment]) for segment in segments]
    order = list(range(len(segments)))
    if groups_per_row != 1:
        order.sort(key=lambda s: -size[s])
    most = groups_per_row or len(segments)
    placed, used = [list[int]() for _ in segments], np.zeros(len(segments), int)
    for s in order:
        row = next(
            r
            for r in range(len(placed))
            if not placed[r] or (len(placed[r]) < most and used[r] + size[s] <= max_row_tokens)
        )
        placed[row].append(s)
        used[row] += size[s]
    rows = [row for row in placed if row]
    if not groups_per_row:
        even = _evenly(order, size, -(-len(rows) // multiple) * multiple, max_row_tokens)
        rows = sorted(even or rows, key=lambda row: -sum(size[s] ** 2 for s in row))
    return [[segments[s] for s in row] for row in rows]


def _evenly(
    order: Sequence[int], size: Sequence[int], num_rows: int, max_row_tokens: int
) -> list[list[int]]:
    """Returns rows of near lengths; none where that needs longer ones."""
    rows, used = [list[int]() for _ in range(num_rows)], np.zeros(num_rows, int)
    for s in order:
        row = int(np.argmin(used))
        rows[row].append(s)
        used[row] += size[s]
    fits = not num_rows or used.max() <= max_row_tokens
    return [row for row in rows if row] if fits else []


def _may_be_cut(segment: Sequence[Rollout]) -> bool:
    return sum(len(group.samples) for group in segment) == 1
