"""A run's rollout engines: made by config, fed as one. Imports vLLM only where it runs inline."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from longrl_jax.config import RolloutConfig
from longrl_jax.types import Sample
from rollout_bridge import weight_sync
from rollout_bridge.weight_sync import Named, layers

X = TypeVar("X")
MIN_TEMPERATURE = 0.01
"""vLLM samples at this temperature where a lower one is asked for; 0 is greedy."""


@dataclasses.dataclass(frozen=True)
class EngineMedia:
    """An image or a video of a prompt, for an engine that has no tower of its own."""

    kind: str
    """image or video."""
    offset: int
    """Of its first media token."""
    grid: tuple[int, int, int]
    """Time, height and width, in media tokens."""
    unit_s: float
    """Seconds from one step of the grid's time to the next."""
    features: Any
    """[M, D], M = product of the grid: what stands at its tokens."""


@dataclasses.dataclass(frozen=True)
class MediaPrompt:
    """A prompt whose positions follow from its media: tokens, and what stands at media tokens."""

    tokens: Any
    """Integers [P], every media token in its place."""
    media: tuple[EngineMedia, ...]


class EngineError(RuntimeError):
    """An engine that died or cannot go on; the message names it, how it ended and a way out.

    Where the engine is a process of its own, the note (__notes__) is the trace from there.
    """


class Engine(Protocol):
    """What VllmEngine (inline) and WorkerEngine (own process) have in common."""

    name: str
    own_process: bool
    version: int | None
    shapes: dict[str, tuple[int, ...]]

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        num_samples: int,
        temperature: float,
        max_tokens: int,
        seeds: Sequence[int],
    ) -> list[tuple[Sample, ...]]: ...

    def sync(self, weights: Iterable[Named], version: int) -> None: ...

    def start_sync(self) -> None: ...

    def load(self, layer: Sequence[Named]) -> None: ...

    def finish_sync(self, version: int) -> None: ...

    def prefix_cache_stats(self) -> dict[str, int]: ...

    def close(self) -> None: ...


def make_engines(
    llm_dir: Path | str,
    cfg: RolloutConfig,
    *,
    seed: int,
    banned_tokens: Sequence[int] = (),
    stop_tokens: Sequence[int] = (),
) -> list[Engine]:
    """Starts cfg.replicas engines on the checkpoint in llm_dir (config.json and safetensors)."""
    settings: dict[str, Any] = {
        "cfg": cfg,
        "seed": seed,
        "banned_tokens": tuple(banned_tokens),
        "stop_tokens": tuple(stop_tokens),
    }
    engines: list[Any] = []
    try:
        for replica in range(cfg.replicas):
            if cfg.process == "worker":
                from rollout_bridge.worker import WorkerEngine

                engines.append(WorkerEngine(llm_dir, replica=replica, wait=False, **settings))
            else:
                from rollout_bridge.vllm_engine import VllmEngine

                engines.append(VllmEngine(llm_dir, **settings))
        if cfg.process == "worker":
            for engine in engines:
                engine.wait_ready()
    except BaseException:
        for engine in engines:
            engine.close()
        raise
    return engines


def generate_all(
    engines: Sequence[Engine],
    prompts: Sequence[Any],
    *,
    num_samples: int,
    temperature: float,
    max_tokens: int,
    seeds: Sequence[int],
) -> list[tuple[Sample, ...]]:
    """Spreads prompts over the engines in turn (a group never splits); results in prompt order."""
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a prompt")
    num = len(engines)

    def part(index: int) -> list[tuple[Sample, ...]]:
        if not prompts[index::num]:
            return []
        return engines[index].generate(
            prompts[index::num],
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
            seeds=seeds[index::num],
        )

    parts = _each(engines, part)
    return [parts[i % num][i // num] for i in range(len(prompts))]


def sync_all(engines: Sequence[Engine], weights: Iterable[Named], version: int) -> None:
    """Replaces the weights of all engines from one pass over `weights`, one layer at a time.

    `weights` must be complete and layer after layer (weight_sync.layers). A list is checked whole
    before anything is sent; of a stream, each layer before it is sent. Where a stream breaks off,
    the engines refuse to generate until the next complete push.
    """
    shapes, target = engines[0].shapes, engines[0].name
    if isinstance(weights, Sequence):
        for _ in layers(weights, shapes, target=target):
            pass
    _each(engines, lambda i: engines[i].start_sync())
    for layer in layers(weights, shapes, target=target):
        _each(engines, lambda i, layer=layer: engines[i].load(layer))  # type: ignore[misc]
    _each(engines, lambda i: engines[i].finish_sync(version))


def check_request(
    prompts: Sequence[Any],
    seeds: Sequence[int],
    *,
    hidden_and_vocab: tuple[int, int],
    max_model_len: int,
    num_samples: int,
    temperature: float,
    max_tokens: int,
) -> None:
    """Raises ValueError for a request that an engine would refuse or misread."""
    hidden, vocab = hidden_and_vocab
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(prompts)} prompts but {len(seeds)} seeds; give one seed a prompt")
    if temperature < MIN_TEMPERATURE and not (temperature == 0 and num_samples == 1):
        raise ValueError(
            f"temperature={temperature} with num_samples={num_samples}: it must be at least "
            f"{MIN_TEMPERATURE} (vLLM would raise it to that), or 0 (greedy) for one sample"
        )
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, MediaPrompt):
            _check_media(index, prompt, hidden)
            prompt = prompt.tokens
        if prompt.ndim not in (1, 2) or prompt.shape[0] == 0:
            raise ValueError(
                f"prompt {index} is {list(prompt.shape)}; give [P] tokens or [P, {hidden}]"
            )
        if prompt.ndim == 2 and prompt.shape[1] != hidden:
            raise ValueError(
                f"prompt {index} is {prompt.shape[1]} wide, the model {hidden}; was it embedded "
                "by another model?"
            )
        if (prompt.ndim == 2) != (str(prompt.dtype) in weight_sync.DTYPES):
            raise ValueError(
                f"prompt {index} is {prompt.dtype}{list(prompt.shape)}; tokens are integers, "
                f"embeddings one of {', '.join(weight_sync.DTYPES)}"
            )
        if prompt.ndim == 1 and not (prompt.min() >= 0 and prompt.max() < vocab):
            raise ValueError(
                f"prompt {index} has a token outside 0..{vocab - 1}, the model's vocabulary"
            )
        if prompt.shape[0] + max_tokens > max_model_len:
            raise ValueError(
                f"prompt {index} of {prompt.shape[0]} tokens and {max_tokens} new ones exceed "
                f"rollout.max_model_len={max_model_len}; raise it or shorten the prompt"
            )


def _check_media(index: int, prompt: MediaPrompt, hidden: int) -> None:
    """Raises ValueError for media that do not stand in the prompt as they say."""
    free = 0
    for medium in sorted(prompt.media, key=lambda m: m.offset):
        shape, num_tokens = tuple(medium.features.shape), math.prod(medium.grid)
        placed = prompt.tokens[medium.offset : medium.offset + num_tokens]
        if medium.kind not in ("image", "video") or (medium.kind == "image" and medium.grid[0] > 1):
            raise ValueError(
                f"prompt {index} holds a {medium.kind!r} of {medium.grid[0]} steps in time; media "
                "are images, of one step, and videos"
            )
        if medium.offset < free or len(placed) < num_tokens or len(set(placed.tolist())) != 1:
            raise ValueError(
                f"prompt {index}: {num_tokens} equal media tokens must stand at {medium.offset}, "
                f"behind the medium before it and inside its {len(prompt.tokens)} tokens"
            )
        if shape != (num_tokens, hidden) or str(medium.features.dtype) not in weight_sync.DTYPES:
            raise ValueError(
                f"prompt {index}: features are {medium.features.dtype}{list(shape)}, a grid of "
                f"{medium.grid} wants [{num_tokens}, {hidden}] in one of "
                f"{', '.join(weight_sync.DTYPES)}"
            )
        free = medium.offset + num_tokens


def to_arrays(prompts: Sequence[Any]) -> tuple[list[Any], list[list[dict[str, Any]] | None]]:
    """Returns the arrays of prompts, one after another, and what `from_arrays` must know."""
    arrays: list[Any] = []
    notes: list[list[dict[str, Any]] | None] = []
    for prompt in prompts:
        if not isinstance(prompt, MediaPrompt):
            arrays.append(prompt)
            notes.append(None)
            continue
        arrays += [prompt.tokens, *(m.features for m in prompt.media)]
        fields = ("kind", "offset", "grid", "unit_s")
        notes.append([{name: getattr(m, name) for name in fields} for m in prompt.media])
    return arrays, notes


def from_arrays(arrays: Sequence[Any], notes: Sequence[list[dict[str, Any]] | None]) -> list[Any]:
    """Undoes to_arrays."""
    left = iter(arrays)
    prompts: list[Any] = []
    for note in notes:
        tokens = next(left)
        if note is None:
            prompts.append(tokens)
        else:
            media = tuple(EngineMedia(**fields, features=next(left)) for fields in note)
            prompts.append(MediaPrompt(tokens, media))
    return prompts


def _each(engines: Sequence[Engine], call: Callable[[int], X]) -> list[X]:
    """Calls with every engine's index: at once where they are other processes, else in turn."""
    if len(engines) == 1 or not engines[0].own_process:
        return [call(index) for index in range(len(engines))]
    with ThreadPoolExecutor(len(engines)) as pool:
        return list(pool.map(call, range(len(engines))))
