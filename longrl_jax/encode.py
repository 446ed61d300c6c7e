"""Media to embeddings: every file is decoded and encoded once, over the mesh, through the store.

Source: MR-SP stage 1 (arXiv:2507.07966 section 4): the frames of a video are split evenly over the
devices, each runs the vision tower on its part. What is stored is the output of the deepest frozen
stage, one row a media token, so a hit needs no decoding and the projector can still be trained.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import UInt8

from longrl_jax.data import video
from longrl_jax.sharding import rules
from longrl_jax.types import Media, Prompt, View
from rollout_bridge import video_cache

CHUNK_FRAMES = 64
"""Most frames of one call of the tower, rounded up to a multiple of the devices."""
FEW_FRAMES = 8
"""The same of the only other shape: stills and ends of films would pay for CHUNK_FRAMES."""
MAX_WAITING = 64
"""Most images that wait for others of their size, to be encoded together."""
COUNTERS = DECODED, ENCODED = "media/decoded_frames", "media/encoded_frames"
"""What `embed` counts; 0 while the store holds every video that is asked about."""


@dataclasses.dataclass(frozen=True)
class Encoder:
    """The frozen part of a backbone on the mesh."""

    encode: Callable[[np.ndarray, View], jax.Array]
    """uint8 [F, H, W, 3] of a view -> [F / unit_frames, n, C], F one of its chunk sizes."""
    chunk_sizes: Callable[[View], tuple[int, ...]]
    """Numbers of frames that the tower is compiled for, smallest first."""
    width: int
    """C: numbers of one stored row."""
    dtype: np.dtype
    stage: str
    """Name of the deepest frozen stage: packed or projected."""
    digest: str
    """Of every weight that the stage applies, and of what else its numbers depend on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watch:
    """Who is told of the work on media while it is done."""

    clock: Callable[[str, float], None] = lambda phase, seconds: None
    """Of the seconds spent waiting for the decoder (decode) and the devices (encode)."""
    count: Callable[[str, int], None] = lambda counter, frames: None
    """Of frames (COUNTERS) that came from a decoder and that went through the tower; an image
    counts as its unit's."""
    stored: Callable[[Media], None] = lambda medium: None
    """Of a medium whose entry is whole and on disk."""


def make_encoder(
    graphdef: nnx.GraphDef,
    frozen: nnx.State,
    trained: nnx.State,
    *,
    stage: str,
    width: int,
    dtype: Any,
    mesh: jax.sharding.Mesh,
    digest: str,
    chunk_frames: int = CHUNK_FRAMES,
) -> Encoder:
    """Compiles the frozen stages for two numbers of frames, split over all devices but tensor.

    Every view that occurs is compiled anew, where the size of frames follows the file's each size.

    frozen and trained together hold every parameter of the model that graphdef describes; of the
    trained only the shapes are used, since an update replaces their arrays.
    """
    run = make_program(graphdef, trained, stage=stage, dtype=dtype)

    def encode(frames_FHW3: np.ndarray, view: View) -> jax.Array:
        with jax.set_mesh(mesh):
            return run(frozen, jnp.asarray(frames_FHW3), view)

    sizes = functools.partial(chunk_sizes, mesh, chunk_frames=chunk_frames)
    return Encoder(encode, sizes, width, np.dtype(dtype), stage, digest)


def chunk_sizes(
    mesh: jax.sharding.Mesh, view: View, *, chunk_frames: int = CHUNK_FRAMES
) -> tuple[int, ...]:
    """Returns the numbers of frames that the tower is compiled for, smallest first: whole units for
    every device. chunk_frames: pictures that the tower sees at a time."""
    split = mesh.devices.size // mesh.shape["tensor"] * view.unit_frames
    chunk_frames = max(1, chunk_frames // view.cost)
    few = min(FEW_FRAMES, chunk_frames)
    return tuple(sorted({-(-size // split) * split for size in (few, chunk_frames)}))


def make_program(graphdef: nnx.GraphDef, trained: nnx.State, *, stage: str, dtype: Any) -> Any:
    """Returns the jitted (frozen, uint8 frames [F, H, W, 3], their view) -> features [U, n, C] of
    make_encoder; to be called inside jax.set_mesh."""
    shapes = jax.eval_shape(lambda: trained)

    @functools.partial(jax.jit, static_argnums=2)
    def run(frozen: nnx.State, frames_FHW3: jax.Array, view: View) -> jax.Array:
        unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)  # no part of `stage`
        model = nnx.merge(graphdef, frozen, unused)
        frames_FHW3 = rules.constrain(frames_FHW3, "frames", None, None, None)
        features_UnC = model.encode(frames_FHW3, view=view, stage=stage, compute_dtype=dtype)
        return rules.constrain(features_UnC.astype(dtype), "frames", None, None)

    return run


def embed(
    encoder: Encoder,
    prompts: Sequence[Prompt],
    store: video_cache.VideoStore,
    pool: video.DecoderPool,
    *,
    decoder: str,
    clock: Callable[[str, float], None] = lambda phase, seconds: None,
    count: Callable[[str, int], None] = lambda counter, frames: None,
) -> tuple[dict[str, np.ndarray], dict[str, video.VideoError]]:
    """Returns {Media.key: memory-mapped features [M, C]} and {Media.key: why it was refused}.

    A key that the store holds decodes nothing; the others are for `encode_media`. clock, count: as
    in Watch.
    """
    media = {m.key: m for prompt in prompts for m in prompt.media}
    names = {key: entry_name(encoder, m) for key, m in media.items()}
    found = {key: store.get(name) for key, name in names.items()}
    missing = [media[key] for key, value in found.items() if value is None]
    watch = Watch(clock=clock, count=count)
    refused = encode_media(encoder, missing, store, pool, decoder=decoder, watch=watch)
    for m in missing:
        if m.key not in refused:
            found[m.key] = store.get(names[m.key])
    features = {key: value for key, value in found.items() if value is not None}
    lost = set(media) - set(features) - set(refused)
    assert not lost, f"entries {sorted(lost)} left the store as soon as they were written"
    return features, refused


def entry_name(encoder: Encoder, medium: Media) -> str:
    """Returns the name, in the store, of what the encoder makes of a medium."""
    shape = medium.num_tokens, encoder.width
    return video_cache.entry_key(medium.key, encoder.digest, encoder.stage, encoder.dtype, shape)


def encode_media(
    encoder: Encoder,
    media: Sequence[Media],
    store: video_cache.VideoStore,
    pool: video.DecoderPool,
    *,
    decoder: str,
    watch: Watch,
) -> dict[str, video.VideoError]:
    """Encodes media into the store, whatever it holds; returns {Media.key: why it was refused}.

    The pool's processes decode while the devices encode, in the order that chunks arrive. `decoder`
    is for videos. A refused file leaves nothing in the store, however much of it could be read.
    """
    jobs = [job_of(m, decoder) for m in media]
    chunks = [  # an image comes whole
        m.view.inputs if m.kind == "image" else encoder.chunk_sizes(m.view)[-1] for m in media
    ]
    refused: dict[str, video.VideoError] = {}
    writers: dict[int, video_cache.EntryWriter] = {}
    images: dict[View, list[tuple[Media, np.ndarray]]] = {}
    write_images = functools.partial(_write_images, encoder, store, watch)
    started_s = time.perf_counter()
    try:
        for item in pool.decode(jobs, chunk=chunks):
            decoded_s = time.perf_counter()
            watch.clock("decode", decoded_s - started_s)
            m, i = media[item.job_index], item.job_index
            if isinstance(item, video.Failed):
                refused[m.key] = item.error
                if i in writers:
                    writers.pop(i).discard()
            elif m.kind == "image":
                watch.count(DECODED, len(item.frames))
                waiting = images.setdefault(m.view, [])
                waiting.append((m, item.frames))
                if (len(waiting) + 1) * m.view.inputs > encoder.chunk_sizes(m.view)[0]:
                    write_images(images.pop(m.view))
                if sum(map(len, images.values())) >= MAX_WAITING:
                    write_images(images.pop(max(images, key=lambda view: len(images[view]))))
            else:
                if i not in writers:
                    shape = (m.num_tokens, encoder.width)
                    writers[i] = store.writer(entry_name(encoder, m), shape, encoder.dtype)
                watch.count(DECODED, len(item.frames))
                writers[i].write(encode_chunk(encoder, item.frames, m.view))
                watch.count(ENCODED, len(item.frames))
                if item.first_frame + len(item.frames) == len(m.times_s):
                    writers.pop(i).publish()
                    watch.stored(m)
            started_s = time.perf_counter()
            watch.clock("encode", started_s - decoded_s)
        decoded_s = time.perf_counter()
        watch.clock("decode", decoded_s - started_s)
        for together in images.values():
            write_images(together)
        watch.clock("encode", time.perf_counter() - decoded_s)
        assert not writers, f"{len(writers)} files ended early without an error"
    finally:
        for writer in writers.values():
            writer.discard()
    return refused


def encode_chunk(encoder: Encoder, frames: UInt8[np.ndarray, "F Y X 3"], view: View) -> np.ndarray:
    """Encodes at most a chunk of frames of one file, whole units; returns [U * n, C].

    They are padded to one of the shapes. No frame of padding reaches the joined array, and a device
    that got nothing else is not read.
    """
    F, unit = len(frames), view.unit_frames
    assert F % unit == 0, f"{F} frames are no whole units of {unit}"
    size = next(size for size in encoder.chunk_sizes(view) if size >= F)
    padded = np.zeros((size, *frames.shape[1:]), np.uint8)
    padded[:F] = frames
    padded_UnC, U = encoder.encode(padded, view), F // unit
    features_UnC = np.empty((U, *padded_UnC.shape[1:]), padded_UnC.dtype)
    for part in padded_UnC.addressable_shards:
        rows = range(size // unit)[part.index[0]]
        if part.replica_id == 0 and rows.start < U:
            features_UnC[rows.start : rows.stop] = np.asarray(part.data)[: U - rows.start]
    return features_UnC.reshape(-1, features_UnC.shape[-1])


def job_of(medium: Media, decoder: str) -> video.Job:
    """Returns what a decoder process is asked for; decoder: of videos."""
    return video.Job(
        path=medium.path,
        times_s=medium.times_s,
        size=medium.view.size,
        decoder="image" if medium.kind == "image" else decoder,
        scales=medium.view.scales,
        stored=medium.stored,
    )


def features_of(prompt: Prompt, features: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Returns the rows of a prompt's media tokens in order [M, C]; None for a text-only prompt."""
    if not prompt.media:
        return None
    parts = []
    for m in prompt.media:
        order = m.view.order(m.grid[0])
        parts.append(features[m.key] if order is None else features[m.key][order])
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _write_images(
    encoder: Encoder,
    store: video_cache.VideoStore,
    watch: Watch,
    images: Sequence[tuple[Media, np.ndarray]],
) -> None:
    """Encodes the frames of images of one view together, and stores each."""
    view = images[0][0].view
    frames, most = np.concatenate([frames for _, frames in images]), encoder.chunk_sizes(view)[-1]
    chunks = [frames[i : i + most] for i in range(0, len(frames), most)]
    features_MC = np.concatenate([encode_chunk(encoder, chunk, view) for chunk in chunks])
    for (m, _), rows in zip(images, np.split(features_MC, len(images)), strict=True):
        with store.writer(entry_name(encoder, m), rows.shape, encoder.dtype) as writer:
            writer.write(rows)
        watch.stored(m)
    watch.count(ENCODED, len(frames))
