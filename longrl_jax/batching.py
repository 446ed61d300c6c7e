"""Rollouts to a Batch: group rows, branches, the order of tokens, buckets, and places on the mesh.

A row holds one or more *segments*, each `[shared prefix | branch 1 | ... | branch R]`. A branch is
the prompt's tail (what the row does not share, at least the last token) and the sampled tokens but
the last one, which predicts nothing. Positions, causality and visibility are data (types.Batch), so
that tokens may stand anywhere in a row: ORDERS.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Float, Shaped

from longrl_jax import packing
from longrl_jax.config import pick
from longrl_jax.sharding import spec
from longrl_jax.types import Batch, Prompt, Rollout

TOKEN_FIELDS = ("tokens", "is_media", "order", "branch", "segment", "rope_pos")
SLOT_FIELDS = ("targets", "loss_mask", "sequence", "advantage", "engine_logps")
DTYPES: dict[str, Any] = dict.fromkeys((*TOKEN_FIELDS, *SLOT_FIELDS), np.int32) | {
    "is_media": bool,
    "loss_mask": bool,
    "advantage": np.float32,
    "engine_logps": np.float32,
}


Columns = dict[str, np.ndarray]
"""A value of every token of a piece of a row, by field; `feature_row`: -1 where none stands."""


class Pieces(NamedTuple):
    """What a row holds, before it has an order."""

    prefixes: Columns
    branches: Columns
    samples: dict[int, list[np.ndarray]]
    """Of each rollout: the places among the branches' that predict a token of each sample."""


@dataclasses.dataclass(frozen=True)
class Index:
    """Where every sampled token of every rollout went, to read arrays [B, A] back."""

    rows: tuple[int, ...]
    """Row of each rollout."""
    slots: tuple[tuple[np.ndarray, ...], ...]
    """Answer slots of the tokens of each sample of each rollout, in order."""
    num_tokens: int = 0
    """Of all rows, without padding."""
    num_places: int = 0
    """For tokens and padding, in rows that are computed."""

    def per_sample(self, array_BA: Shaped[np.ndarray, "*passes B A"]) -> list[list[np.ndarray]]:
        """Returns [rollout][sample] -> values of its tokens; [passes, rows, A] is understood."""
        flat_BA = np.asarray(array_BA).reshape(-1, array_BA.shape[-1])
        return [
            [flat_BA[row, slots] for slots in samples]
            for row, samples in zip(self.rows, self.slots, strict=True)
        ]


def make_batch(
    rollouts: Sequence[Rollout],
    *,
    features: Sequence[np.ndarray | None],
    advantages: Sequence[Float[np.ndarray, " R"] | Sequence[np.ndarray]],
    num_rows: int,
    num_shards: int,
    smallest_bucket: int,
    max_row_tokens: int,
    groups_per_row: int = 1,
    share_videos: bool = True,
    order: str = "spread",
    agree: Callable[[packing.RowShape], packing.RowShape] | None = None,
    packed: packing.Packed | None = None,
) -> tuple[Batch, Index]:
    """Lays rollouts out in num_rows rows; rows that stay empty are padding.

    features: for each rollout the stored rows of its media tokens, in order [M, C]. Rollouts with
    the same media share their common prefix in one segment where share_videos and that saves
    tokens (worth it where fewer tokens in all mean fewer rows); up to groups_per_row segments
    share a row. advantages: of every sample a number, or an array of one for each of its tokens.
    Both parts of a row (prefixes, branches) are padded to `bucket`s, so that few shapes occur.
    `order` is a name in ORDERS. agree: where other processes hold rows of the same step, returns a
    shape that fits all; there may be no rollouts here then. packed: fill rows whatever
    groups_per_row says; num_rows is the most then, and packing.sizes the lengths.
    """
    place_in = pick(ORDERS, order, "order")
    if not rollouts and agree is None:
        raise ValueError("make_batch got no rollouts")
    _check(rollouts, features, advantages, max_row_tokens)
    segments = (
        packing.segments_of(rollouts, max_row_tokens)
        if share_videos
        else [[i] for i in range(len(rollouts))]
    )
    rows = packing.pack(
        segments,
        rollouts,
        max_row_tokens,
        groups_per_row=0 if packed else groups_per_row,
        multiple=packed.rows_per_pass if packed else 1,
    )
    if len(rows) > num_rows:
        raise ValueError(
            f"{len(rollouts)} groups need {len(rows)} rows, but num_rows={num_rows}; "
            "raise num_rows or groups_per_row"
        )
    shape = packing.shape_of(rows, rollouts, features, packed)
    if agree is not None:
        shape = agree(shape)
    num_computed, num_sequences = num_rows, shape.num_sequences
    if packed is not None:
        num_rows, num_computed = packing.packed_rows(shape, packed, num_rows)
        num_sequences = packed.num_sequences
    p, a = packing.sizes(
        shape,
        num_shards=num_shards,
        smallest_bucket=smallest_bucket,
        max_row_tokens=max_row_tokens,
        packed=packed,
    )
    arrays = _zeros(num_rows, num_shards * (p + a), num_shards * a, shape.rope_dims)
    stored = None
    if shape.width:
        stored = np.zeros((*arrays["tokens"].shape, shape.width), np.dtype(shape.dtype))
    of_rollout: dict[int, tuple[int, list[np.ndarray]]] = {}
    for b, row in enumerate(rows):
        pieces = _row(row, rollouts, advantages, p * num_shards)
        at_p, at_a = (
            place_in(np.arange(len(part["tokens"])), size, num_shards)
            for part, size in ((pieces.prefixes, p), (pieces.branches, a))
        )
        _fill(arrays, stored, b, pieces, (at_p, at_a), (p, a), features)
        for i, predicting in pieces.samples.items():
            of_rollout[i] = b, [at_a[slots] for slots in predicting]
    where = [of_rollout[i] for i in range(len(rollouts))]
    index = Index(
        rows=tuple(b for b, _ in where),
        slots=tuple(tuple(s) for _, s in where),
        num_tokens=int(np.count_nonzero(arrays["segment"])),
        num_places=num_computed * arrays["tokens"].shape[1],
    )
    batch = Batch(**arrays, features=stored, num_shards=num_shards, num_sequences=num_sequences)
    return batch, index


def split_passes(batch: Batch, rows_per_pass: int) -> Batch:
    """Turns [B, ...] into [passes, rows_per_pass, ...]; 0: one pass with all rows."""
    num_rows = len(batch.tokens)
    rows_per_pass = rows_per_pass or num_rows
    if num_rows % rows_per_pass:
        raise ValueError(
            f"{num_rows} rows are not a multiple of batch.rows_per_pass={rows_per_pass}"
        )
    return jax.tree.map(lambda x: x.reshape(-1, rows_per_pass, *x.shape[1:]), batch)


def place(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Puts a batch, with or without a leading dim of passes, onto the mesh.

    Where the mesh is of many processes each one gives the rows of its own devices, equally many;
    the rows of process 0 come first.
    """
    if batch.num_shards != mesh.shape["seq"]:
        raise ValueError(
            f"the batch is laid out for {batch.num_shards} shards, but mesh.seq="
            f"{mesh.shape['seq']}; call make_batch with num_shards=mesh.seq"
        )
    num_processes = mesh.size // mesh.local_mesh.size
    num_rows = batch.tokens.shape[-2] * num_processes
    split = mesh.shape["data"] * mesh.shape["fsdp"]
    if num_rows % split:
        raise ValueError(
            f"{num_rows} rows do not split over mesh.data * mesh.fsdp = {split} devices; call "
            "make_batch with more num_rows, which adds rows of padding"
        )
    rows_dim = batch.tokens.ndim - 2

    def put(x: np.ndarray, sharding: NamedSharding) -> jax.Array:
        shape = (*x.shape[:rows_dim], num_rows, *x.shape[rows_dim + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch, shardings(batch, mesh))


def local_rows(x_nBA: jax.Array) -> np.ndarray:
    """Returns the rows that this process has placed of an array of passes (dim 1), as `place` takes
    them. They lie next to each other, each whole, on its own devices."""
    spans = [shard.index[1].indices(x_nBA.shape[1]) for shard in x_nBA.addressable_shards]
    first, last = min(start for start, _, _ in spans), max(stop for _, stop, _ in spans)
    mine = np.empty((len(x_nBA), last - first, *x_nBA.shape[2:]), x_nBA.dtype)
    for shard, (start, stop, _) in zip(x_nBA.addressable_shards, spans, strict=True):
        passes, _, *rest = shard.index
        mine[(passes, slice(start - first, stop - first), *rest)] = shard.data
    return mine


def with_advantages(
    batch: Batch, index: Index, advantages: Sequence[Sequence[np.ndarray]]
) -> Batch:
    """Returns placed passes with another advantage of every token: [rollout][sample] -> [n]."""
    mine = np.zeros_like(local_rows(batch.advantage))
    flat = mine.reshape(-1, mine.shape[-1])
    for row, samples, values in zip(index.rows, index.slots, advantages, strict=True):
        for slots, value in zip(samples, values, strict=True):
            flat[row, slots] = value
    where = batch.advantage.sharding
    placed = jax.make_array_from_process_local_data(where, mine, batch.advantage.shape)
    return dataclasses.replace(batch, advantage=placed)


def shardings(batch: Batch, mesh: jax.sharding.Mesh) -> Batch:
    """Returns where `place` puts every array of a batch (its leaves may be shapes alone)."""
    lead = (None,) * (batch.tokens.ndim - 2)

    def of(x: Any) -> NamedSharding:
        dims = (*lead, "batch", "tokens")
        return NamedSharding(mesh, spec(*dims, *(None,) * (x.ndim - len(dims))))

    return jax.tree.map(of, batch)


def _contiguous(i: np.ndarray, size: int, num_shards: int) -> np.ndarray:
    """Fills one shard after the other."""
    return i


def _zigzag(i: np.ndarray, size: int, num_shards: int) -> np.ndarray:
    """Gives shard d the chunks d and 2n-1-d, so that causal work is equal."""
    if size % 2:
        raise ValueError(f"order 'zigzag' halves a shard, but it has {size} tokens; make it even")
    chunk, offset = np.divmod(i, size // 2)
    late = chunk >= num_shards
    shard = np.where(late, 2 * num_shards - 1 - chunk, chunk)
    return shard * size + late * (size // 2) + offset


def _spread(i: np.ndarray, size: int, num_shards: int) -> np.ndarray:
    """Deals tokens out like cards (arXiv:2311.09431): equal work, and equal padding."""
    return i % num_shards * size + i // num_shards


ORDERS: dict[str, Callable[[np.ndarray, int, int], np.ndarray]] = {
    "contiguous": _contiguous,
    "zigzag": _zigzag,
    "spread": _spread,
}
"""(token, tokens a shard, shards) -> place among size * num_shards."""


def _check(
    rollouts: Sequence[Rollout],
    features: Sequence[np.ndarray | None],
    advantages: Sequence[Float[np.ndarray, " R"] | Sequence[np.ndarray]],
    max_row_tokens: int,
) -> None:
    for rollout, rows, advantage in zip(rollouts, features, advantages, strict=True):
        prompt, name = rollout.prompt, rollout.prompt.example.id
        num_media, num_rows = int(prompt.is_media.sum()), 0 if rows is None else len(rows)
        if num_media != num_rows:
            raise ValueError(f"group {name!r}: {num_media} media tokens, but {num_rows} features")
        if prompt.is_media[-1]:
            raise ValueError(f"group {name!r}: the prompt ends in media; put a text token after it")
        if len(advantage) != len(rollout.samples):
            raise ValueError(
                f"group {name!r}: {len(rollout.samples)} samples, but {len(advantage)} advantages"
            )
        for sample in rollout.samples:
            if len(sample.logps) != len(sample.tokens):
                raise ValueError(
                    f"group {name!r}: a sample has {len(sample.tokens)} tokens, but "
                    f"{len(sample.logps)} engine logps; it needs one of each"
                )
        if packing.row_tokens([rollout]) > max_row_tokens:
            raise ValueError(
                f"group {name!r} takes {packing.row_tokens([rollout])} tokens of a row, over "
                f"batch.max_row_tokens={max_row_tokens}; raise that, or lower data.num_frames, "
                "rollout.num_samples or rollout.max_tokens"
            )


def _row(
    segments: packing.Row,
    rollouts: Sequence[Rollout],
    advantages: Sequence[Float[np.ndarray, " R"] | Sequence[np.ndarray]],
    room: int,
) -> Pieces:
    """Returns what a row holds; room: for prefixes."""
    prefixes: list[Columns] = []
    branches: list[Columns] = []
    samples: dict[int, list[np.ndarray]] = {}
    used = 0
    lengths = packing.prefix_lengths(segments, rollouts, room)
    for number, (segment, length) in enumerate(zip(segments, lengths, strict=True), start=1):
        prefixes.append(_prefix(rollouts[segment[0]].prompt, segment[0], length, number))
        branch = 0
        for i in segment:
            samples[i] = []
            for r in range(len(rollouts[i].samples)):
                branch += 1
                piece = _branch(rollouts[i], i, r, advantages[i][r], length)
                piece |= {"branch": np.full(len(piece["tokens"]), branch)}
                piece |= {"segment": np.full(len(piece["tokens"]), number)}
                piece |= {"sequence": np.full(len(piece["tokens"]), len(branches))}
                branches.append(piece)
                samples[i].append(used + np.flatnonzero(piece["loss_mask"]))
                used += len(piece["tokens"])
    return Pieces(_joined(prefixes), _joined(branches), samples)


def _prefix(prompt: Prompt, rollout: int, length: int, segment: int) -> Columns:
    return {
        "tokens": prompt.tokens[:length],
        "is_media": prompt.is_media[:length],
        "order": np.arange(length),
        "branch": np.zeros(length),
        "segment": np.full(length, segment),
        "rope_pos": prompt.rope_pos[:length],
        "rollout": np.full(length, rollout),
        "feature_row": _feature_rows(prompt)[:length],
    }


def _branch(
    rollout: Rollout, i: int, r: int, advantage: float | np.ndarray, length: int
) -> Columns:
    """The tail of the prompt and sample r but its last token; each predicts the token after it."""
    prompt, sample = rollout.prompt, rollout.samples[r]
    tail, num_tokens = len(prompt.tokens) - length, len(sample.tokens)
    num_inputs = tail + num_tokens - 1 if num_tokens else 0
    following = prompt.next_rope_pos + np.arange(max(num_tokens - 1, 0))
    if prompt.rope_pos.ndim == 2:
        following = np.repeat(following[:, None], prompt.rope_pos.shape[1], axis=1)
    text = np.concatenate([prompt.tokens[length:], sample.tokens])
    predicts = np.arange(num_inputs) >= tail - 1  # the others predict tokens of the prompt
    logps, worth = np.zeros((2, num_inputs), np.float32)
    logps[predicts] = sample.logps
    worth[predicts] = advantage

    def extended(values: np.ndarray, fill: Any) -> np.ndarray:
        return np.concatenate([values[length:], np.full(max(num_tokens - 1, 0), fill)])[:num_inputs]

    return {
        "tokens": text[:num_inputs],
        "is_media": extended(prompt.is_media, False),
        "order": length + np.arange(num_inputs),
        "rope_pos": np.concatenate([prompt.rope_pos[length:], following])[:num_inputs],
        "rollout": np.full(num_inputs, i),
        "feature_row": extended(_feature_rows(prompt), -1),
        "targets": np.where(predicts, text[1 : num_inputs + 1], 0),
        "loss_mask": predicts,
        "advantage": worth,
        "engine_logps": logps,
    }


def _feature_rows(prompt: Prompt) -> np.ndarray:
    return np.where(prompt.is_media, np.cumsum(prompt.is_media) - 1, -1)


def _joined(pieces: Sequence[Columns]) -> Columns:
    return {field: np.concatenate([piece[field] for piece in pieces]) for field in pieces[0]}


def _zeros(num_rows: int, T: int, A: int, rope_dims: tuple[int, ...]) -> Columns:
    """Empty rows: padding is segment 0, which no segment of a group sees."""
    arrays = {field: np.zeros((num_rows, T), DTYPES[field]) for field in TOKEN_FIELDS}
    arrays["rope_pos"] = np.zeros((num_rows, T, *rope_dims), np.int32)
    return arrays | {field: np.zeros((num_rows, A), DTYPES[field]) for field in SLOT_FIELDS}


def _fill(
    arrays: Columns,
    stored: np.ndarray | None,
    b: int,
    pieces: Pieces,
    places: tuple[np.ndarray, np.ndarray],
    sizes: tuple[int, int],
    features: Sequence[np.ndarray | None],
) -> None:
    """Writes row b. places: of prefixes and branches, each among their own; sizes: of these two
    parts of a shard."""
    (at_p, at_a), (p, a) = places, sizes
    for part, at_T in (
        (pieces.prefixes, at_p // max(p, 1) * (p + a) + at_p % max(p, 1)),
        (pieces.branches, at_a // a * (p + a) + p + at_a % a),
    ):
        for field in TOKEN_FIELDS:
            arrays[field][b, at_T] = part[field]
        _put_features(stored, b, at_T, part, features)
    for field in SLOT_FIELDS:
        arrays[field][b, at_a] = pieces.branches[field]


def _put_features(
    stored: np.ndarray | None,
    b: int,
    at_T: np.ndarray,
    piece: Columns,
    features: Sequence[np.ndarray | None],
) -> None:
    """Copies features to their tokens, rollout by rollout; a tail has copies of its own."""
    if stored is None:
        return
    for i in np.unique(piece["rollout"]):
        rows = features[int(i)]
        if rows is not None:
            here = (piece["rollout"] == i) & (piece["feature_row"] >= 0)
            stored[b, at_T[here]] = rows[piece["feature_row"][here]]
