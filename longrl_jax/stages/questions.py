"""The questions of every step: read by index, tokenized, their videos embedded; bad ones refused.

A refused record is counted, written to refused.jsonl and leaves its place empty.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longrl_jax import encode, processes
from longrl_jax.config import Config, DataConfig, pick
from longrl_jax.data import SOURCES, loader, mixing, prompts, subtitles
from longrl_jax.data.longvideo_reason import RecordError
from longrl_jax.data.refused import RefusedLog
from longrl_jax.data.video import DecoderPool
from longrl_jax.data.wording import Words
from longrl_jax.metrics import Phases
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Example, MediaFile, Prompt
from rollout_bridge import VideoStore

MAX_EMPTY_STEPS = 3
"""Steps in a row without a single usable record after which a run stops: the data are wrong."""

Embed = Callable[[Sequence[Prompt], int], tuple[list[Prompt], list[np.ndarray | None]]]


def training(
    cfg: Config, policy: Policy, refused: RefusedLog, *, first_step: int = 0
) -> Iterator[tuple[int, list[Prompt]]]:
    """Yields (step, this process's prompts) of every step after first_step, numbered from 1."""
    count = cfg.run.num_steps - first_step
    with contextlib.closing(
        slices(cfg, policy, refused.add, first=first_step, count=count)
    ) as stream:
        yield from enumerate(stream, start=first_step + 1)


def slices(
    cfg: Config, policy: Policy, on_refused: loader.OnRefused, *, first: int, count: int
) -> Generator[list[Prompt], None, None]:
    """Yields this process's prompts of the slices of batch.groups records after the first ones.

    on_refused is told of a refused record with the number of its slice, from 1, for a step.
    """
    source = mixing.open_training(cfg.data)
    if (said := mixing.shares(source)) and processes.is_first():
        tqdm.write(said)
    steps = loader.prompts(
        source,
        prompt_encoder(
            cfg, policy, num_samples=cfg.rollout.num_samples, with_target=cfg.stage != "grpo"
        ),
        seed=cfg.seed,
        groups=cfg.batch.groups,
        first_step=first,
        num_steps=count,
        workers=cfg.data.loader_workers,
        on_refused=on_refused,
        part=processes.part(cfg.batch.groups),
    )
    with contextlib.closing(steps):
        for asked in steps:
            yield [prompt for prompt in asked if prompt is not None]


def validation(cfg: Config, policy: Policy, refused: RefusedLog) -> list[Prompt]:
    """Returns the first run.eval_examples prompts of data.validation; none without such a file.

    In a run of many processes: this one's part of them, which may be empty. Raises ValueError if
    not one of them all can be asked, and if two have the same id.
    """
    if not cfg.data.validation:
        return []
    source = pick(SOURCES, cfg.data.source, "data.source")(Path(cfg.data.root), cfg.data.validation)
    count = min(cfg.run.eval_examples, len(source))
    refuse_repeated_ids(source, count)
    indices = tqdm(
        processes.part(count),
        desc="held-out records",
        unit="record",
        leave=False,
        delay=2.0,  # hours of video are read once for their digest; a few records take no time
    )
    encode_prompt = prompt_encoder(cfg, policy, num_samples=1)
    asked = loader.prompts_at(source, encode_prompt, indices, on_refused=refused.add)
    kept = [prompt for prompt in asked if prompt is not None]
    if not processes.place_of(len(kept))[1]:
        raise ValueError(
            f"every one of {count} records of {cfg.data.validation} was refused; the reasons "
            f"are in {refused.path}"
        )
    return kept


def refuse_repeated_ids(source: Any, count: int) -> None:
    """Raises ValueError if two of the first `count` records have one id: answers are found by it.

    source: one of longrl_jax.data.SOURCES. Records that cannot be read are left to who asks them.
    """
    first: dict[str, int] = {}
    for index in range(count):
        try:
            name = source[index].id
        except RecordError:
            continue
        if first.setdefault(name, index) != index:
            raise ValueError(
                f"{source.where(first[name])} and {source.where(index)} have the same id {name!r}; "
                "answers to held-out questions are found by their ids: change one of the two"
            )


def prompt_encoder(
    cfg: Config, policy: Policy, *, num_samples: int, with_target: bool = False
) -> Callable[[Example], Prompt]:
    """Returns `example -> Prompt` of this checkpoint and this config; it travels to workers.

    It refuses what leaves no room for num_samples answers; with_target: for the reference answer
    (SFT) instead.
    """
    encode_prompt = functools.partial(
        _asked,
        data=cfg.data,
        tokenizer=policy.tokenizer,
        layout=policy.layout,
        num_frames=cfg.data.num_frames,
        fps=cfg.data.fps,
        decoder=cfg.data.decoder,
        root=Path(cfg.data.root),
        timestamp=cfg.data.timestamp,
        words=Words(
            wording=cfg.data.wording,
            template_file=cfg.data.template_file,
            subtitles=cfg.data.subtitles,
        ),
    )
    if with_target:
        return functools.partial(
            _with_target,
            encode_prompt=encode_prompt,
            tokenizer=policy.tokenizer,
            data=cfg.data,
            max_row_tokens=cfg.batch.max_row_tokens,
        )
    most = min(
        cfg.rollout.max_model_len - cfg.rollout.max_tokens,
        cfg.batch.max_row_tokens + 1 - num_samples * cfg.rollout.max_tokens,
    )
    return functools.partial(_with_room, encode_prompt=encode_prompt, max_prompt_tokens=most)


def without_video(cfg: Config, policy: Policy, asked: Sequence[Prompt]) -> list[Prompt]:
    """Returns the questions about media with the media left out, and the words that ask to watch.

    Empty for a text-only model or data set. What a policy scores here it knows without looking.
    """
    encode_prompt = prompt_encoder(cfg, policy, num_samples=1)
    return [
        encode_prompt(dataclasses.replace(prompt.example, media=()))
        for prompt in asked
        if prompt.media
    ]


def with_other_video(
    cfg: Config, policy: Policy, asked: Sequence[Prompt], refused: RefusedLog
) -> list[Prompt]:
    """Returns the questions about media, each asked of other questions' videos and images, with
    the subtitles of these.

    Which ones is drawn by the seed; questions on one film share the other film, and a film is never
    its own other, however many files hold it and whatever part of it is asked about. Of the other
    film that part is shown which its own first question is about. Questions with a medium of a kind
    that there are fewer than two of are left out. What no longer fits (a longer film) is refused.
    """
    other: dict[str, str] = {}
    files: dict[str, MediaFile] = {}
    asked_of: dict[str, Example] = {}
    names = {
        id(prompt): [f"{m.kind} {prompts.content_digest(Path(m.path))}" for m in prompt.media]
        for prompt in asked
    }
    for kind in ("image", "video"):
        of_kind: dict[str, MediaFile] = {}
        for prompt in asked:
            for name, file in zip(names[id(prompt)], prompt.example.media, strict=True):
                if file.kind == kind:
                    of_kind.setdefault(name, file)
                    asked_of.setdefault(name, prompt.example)
        files |= of_kind
        other |= other_films(list(of_kind), seed=cfg.seed)
    encode_prompt = prompt_encoder(cfg, policy, num_samples=1)
    shown = []
    for prompt in asked:
        films = names[id(prompt)]
        if films and all(name in other for name in films):
            media = tuple(
                dataclasses.replace(files[other[name]], at=file.at)
                for name, file in zip(films, prompt.example.media, strict=True)
            )
            example = dataclasses.replace(prompt.example, media=media)
            videos = [n for n, m in zip(films, media, strict=True) if m.kind == "video"]
            if videos:
                example = subtitles.exchanged(example, asked_of[other[videos[0]]])
            try:
                shown.append(encode_prompt(example))
            except ValueError as error:
                refused.add(example, error, step=0)
    return shown


def other_films(films: Sequence[str], *, seed: int) -> dict[str, str]:
    """Returns for each of these distinct films another one, each used once; {} for fewer than two.

    The films in random order, each followed by the next, the last by the first: no film can follow
    itself.
    """
    assert len(set(films)) == len(films), "a film that is listed twice could follow itself"
    if len(films) < 2:
        return {}
    order = np.random.default_rng(seed).permutation(len(films))
    return {films[i]: films[j] for i, j in zip(order, np.roll(order, -1), strict=True)}


@contextlib.contextmanager
def open_embedder(
    cfg: Config, encoder: encode.Encoder | None, refused: RefusedLog, phases: Phases
) -> Iterator[Embed]:
    """Yields embed(asked, step) -> (prompts whose videos could be read, their features [M, C]).

    Owns the decoder processes and the handle on the store for as long as the context lasts.
    """
    for part in cfg.data.mix:
        phases.count(f"data/{part.name}", 0)
    if encoder is None:
        yield functools.partial(
            _counted, lambda asked, _: (list(asked), [None] * len(asked)), phases
        )
        return
    with contextlib.ExitStack() as stack:
        store = VideoStore(cfg.store.path, int(cfg.store.max_gib * 2**30))
        stack.callback(store.close)
        pool = stack.enter_context(
            DecoderPool(cfg.data.decoder_processes, timeout_s=cfg.data.decode_timeout_s)
        )
        known_bad: dict[str, Any] = {}
        for counter in encode.COUNTERS:
            phases.count(counter, 0)  # so that a step which finds all in the store says so
        embed = functools.partial(
            _embed, encoder, store, pool, cfg.data.decoder, refused, phases, known_bad
        )
        yield functools.partial(_counted, embed, phases)


def count_empty(num_groups: int, empty_steps: int, refused: RefusedLog) -> int:
    """Returns how many steps in a row had no group, this one counted; too many stop the run.

    num_groups: of all processes.
    """
    if num_groups:
        return 0
    if empty_steps + 1 == MAX_EMPTY_STEPS:
        raise ValueError(
            f"every record of {MAX_EMPTY_STEPS} steps in a row was refused; the reasons are in "
            f"{refused.path}. Check data.root, data.train and data.num_frames"
        )
    return empty_steps + 1


def refused_by_source(cfg: Config, refused: RefusedLog) -> dict[str, int]:
    """Returns `refused/<name>` of every source of data.mix, as of the last settle."""
    return {f"refused/{part.name}": refused.by_source.get(part.name, 0) for part in cfg.data.mix}


def _counted(
    embed: Embed, phases: Phases, asked: Sequence[Prompt], step: int
) -> tuple[list[Prompt], list[np.ndarray | None]]:
    """Counts the questions of each source of a mix that a step asks, as `data/<name>`."""
    kept, features = embed(asked, step)
    for prompt in kept:
        if step and prompt.example.source:
            phases.count(f"data/{prompt.example.source}", 1)
    return kept, features


def _embed(
    encoder: encode.Encoder,
    store: VideoStore,
    pool: DecoderPool,
    decoder: str,
    refused: RefusedLog,
    phases: Phases,
    known_bad: dict[str, Any],
    asked: Sequence[Prompt],
    step: int,
) -> tuple[list[Prompt], list[np.ndarray | None]]:
    """known_bad: media that failed before in this run; a time-out is not waited for twice."""
    fresh = [p for p in asked if not any(m.key in known_bad for m in p.media)]
    features, bad = encode.embed(
        encoder, fresh, store, pool, decoder=decoder, clock=phases.add, count=phases.count
    )
    known_bad |= bad
    kept = []
    for prompt in asked:
        errors = [known_bad[m.key] for m in prompt.media if m.key in known_bad]
        if errors:
            refused.add(prompt.example, errors[0], step=step)
        else:
            kept.append(prompt)
    return kept, [encode.features_of(prompt, features) for prompt in kept]


def _asked(example: Example, *, data: DataConfig, **how: Any) -> Prompt:
    """Lays out a question in the form that its source asks for."""
    return prompts.encode_prompt(example, template=mixing.template_of(data, example), **how)


def _with_room(
    example: Example, *, encode_prompt: Callable[[Example], Prompt], max_prompt_tokens: int
) -> Prompt:
    """Refuses a prompt that leaves no room for its answers, before its video is decoded."""
    prompt = encode_prompt(example)
    if len(prompt.tokens) > max_prompt_tokens:
        raise ValueError(
            f"the prompt of {example.id!r} has {len(prompt.tokens)} tokens, but only "
            f"{max_prompt_tokens} leave room for the answers; raise rollout.max_model_len and "
            "batch.max_row_tokens, or lower data.num_frames or rollout.max_tokens"
        )
    return prompt


def _with_target(
    example: Example,
    *,
    encode_prompt: Callable[[Example], Prompt],
    tokenizer: Any,
    data: DataConfig,
    max_row_tokens: int,
) -> Prompt:
    """Refuses a prompt without a reference answer, or with one that is too long."""
    text = prompts.target_text(example, mixing.template_of(data, example))
    target = prompts.answer_tokens(text, tokenizer)
    prompt = encode_prompt(example)
    num_tokens = len(prompt.tokens) + len(target) - 1
    if num_tokens > max_row_tokens:
        raise ValueError(
            f"prompt and reference answer of {example.id!r} take {num_tokens} tokens, over "
            f"batch.max_row_tokens={max_row_tokens}; raise that, or lower data.num_frames"
        )
    return prompt
