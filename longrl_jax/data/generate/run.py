"""Runs a stage over films: what still holds is left alone, the rest is asked together and kept.

A stage is a generator over rounds: it yields requests and gets their replies. Those of many films
go to the server at once. A film of which a request failed at the server is left for the next run;
its other replies are in the journal.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longrl_jax import chat
from longrl_jax.chat import Failure, Reply, Request
from longrl_jax.data import video
from longrl_jax.data.generate import (
    caption,
    merge,
    parse,
    question,
    replies,
    rewrite,
    split,
    texts,
    verify,
    work,
)
from longrl_jax.data.generate.budget import Budget
from longrl_jax.data.generate.settings import GenerateConfig, settings_of
from longrl_jax.data.generate.work import Item, Work

MOST_DECODERS = 4
DECODE_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """What a stage is made of."""

    steps: Callable[..., Any]
    """(film, items of needs[0], config, items of the other needs) -> generator of rounds, which
    returns (items, rejects)."""
    needs: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    check: Callable[[str], ValueError | None] | None = None
    """Of every reply; one that will not do is asked again."""
    films_at_once: int = 512


STAGES = {
    "split": Stage(steps=split.steps, films_at_once=1),
    "caption": Stage(
        steps=caption.steps,
        needs=("split",),
        texts=caption.TEXTS,
        check=replies.check_words,
        films_at_once=8,
    ),
    "merge": Stage(
        steps=merge.steps, needs=("caption",), texts=merge.TEXTS, check=replies.check_json
    ),
    "question": Stage(
        steps=question.steps, needs=("merge",), texts=question.TEXTS, check=replies.check_json
    ),
    "parse": Stage(steps=parse.steps, needs=("question", "merge", "split")),
    "rewrite": Stage(
        steps=rewrite.steps, needs=("parse",), texts=rewrite.TEXTS, check=replies.check_words
    ),
    "verify": Stage(
        steps=verify.steps,
        needs=("rewrite", "merge"),
        texts=verify.TEXTS,
        check=replies.check_json,
    ),
}
"""In the order in which they run; `package` follows them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of a stage came to, over all films."""

    done: int = 0
    """Films done now."""
    held: int = 0
    """Films whose work still holds."""
    items: int = 0
    rejects: int = 0
    waiting: tuple[str, ...] = ()
    """Films of which a request failed at the server."""
    why: str = ""
    """Of the first of them."""
    not_ready: int = 0
    """Films that a stage before has not done."""
    seconds: float = 0.0


def run_stage(
    cfg: GenerateConfig, name: str, films: Sequence[str], *, give_up: bool = False
) -> Outcome:
    """Does a stage for all films that it can be done for.

    give_up: requests that the server failed are taken as rejected, instead of left for the next
    run. Raises ValueError where nothing can go on: a server that refuses, `max_usd`; OSError where
    the disk takes no more. What came before is kept.
    """
    started_s = time.perf_counter()
    stage, out = STAGES[name], Path(cfg.out)
    todo, works, not_ready = [], [], 0
    for film in films:
        needs = [work_of(cfg, other, film) for other in stage.needs]
        if any(need is None for need in needs):
            not_ready += 1
            continue
        key = _key(cfg, name, film, [need.items for need in needs if need])
        found = work.read(out, name, film, key)
        if found is None:
            todo.append((film, key, [list(need.items) for need in needs if need]))
        else:
            works.append(found)
    held, waiting, why = len(works), [], ""
    budget = Budget(cfg.max_usd - spent(cfg).usd)
    with contextlib.ExitStack() as stack:
        steps = _with_tools(cfg, name, stack) if todo else stage.steps
        bar = stack.enter_context(
            tqdm(total=len(todo), desc=name, unit="film", dynamic_ncols=True, disable=not todo)
        )
        for journal, group in _groups(cfg, name, todo):
            ask = functools.partial(_ask, cfg, name, budget, journal)
            for film, key, ended in _drive(steps, cfg, group, ask, give_up=give_up):
                bar.update()
                if isinstance(ended, Failure):
                    waiting.append(film)
                    why = why or ended.reason
                    continue
                items, rejects = ended
                made = Work(film=film, key=key, items=tuple(items), rejects=tuple(rejects))
                work.write(out, name, made)
                works.append(made)
    return Outcome(
        done=len(works) - held,
        held=held,
        items=sum(len(made.items) for made in works),
        rejects=sum(len(made.rejects) for made in works),
        waiting=tuple(waiting),
        why=why,
        not_ready=not_ready,
        seconds=time.perf_counter() - started_s,
    )


def work_of(cfg: GenerateConfig, name: str, film: str) -> Work | None:
    """Returns what a stage made of a film, if it holds for this config and the stages before."""
    needs = [work_of(cfg, other, film) for other in STAGES[name].needs]
    if any(need is None for need in needs):
        return None
    key = _key(cfg, name, film, [need.items for need in needs if need])
    return work.read(Path(cfg.out), name, film, key)


def journals(cfg: GenerateConfig, name: str) -> list[Path]:
    """Returns the files that hold what a stage was answered."""
    folder = Path(cfg.out) / "journal"
    return sorted([*folder.glob(f"{name}.jsonl"), *folder.glob(f"{name}/*.jsonl")])


def spent(cfg: GenerateConfig, names: Sequence[str] = tuple(STAGES)) -> chat.Totals:
    """Returns what stages took by their journals."""
    totals = [chat.spent(path) for name in names for path in journals(cfg, name)]
    fields = [field.name for field in dataclasses.fields(chat.Totals)]
    return chat.Totals(**{f: sum(getattr(total, f) for total in totals) for f in fields})


def write_rejects(cfg: GenerateConfig, films: Sequence[str]) -> None:
    """Writes OUT/rejects.jsonl: all that was left out so far, stage after stage, with reasons."""
    rows = [
        {"stage": name, "film": film} | row
        for name in STAGES
        for film in films
        if (made := work_of(cfg, name, film)) is not None
        for row in made.rejects
    ]
    work.write_lines(Path(cfg.out) / "rejects.jsonl", rows)


def _key(cfg: GenerateConfig, name: str, film: str, before: Any) -> str:
    told = texts.digest(STAGES[name].texts, cfg.texts)
    if name == "split":
        before = split.identity(Path(cfg.videos), film)
    if name == "caption" and cfg.caption.checkpoint:
        told += _identity(cfg.caption.checkpoint)
    return work.key_of(name, settings_of(cfg, name), told, before)


def _identity(folder: str) -> str:
    """Returns a digest of the names, sizes and times of a checkpoint's files; bytes may be many."""
    digest = hashlib.sha256()
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _with_tools(cfg: GenerateConfig, name: str, stack: contextlib.ExitStack) -> Callable[..., Any]:
    """Returns a stage's steps with what they work with, open until the stack closes."""
    if name != "caption":
        return STAGES[name].steps
    pool = stack.enter_context(
        video.DecoderPool(min(MOST_DECODERS, os.cpu_count() or 1), timeout_s=DECODE_TIMEOUT_S)
    )
    if cfg.caption.checkpoint:
        from longrl_jax.data.generate import captioner  # it brings JAX

        make = stack.enter_context(captioner.open_requests(cfg, pool))
    else:
        make = caption.picture_requests(cfg, pool)
    return functools.partial(caption.steps, make_requests=make)


Todo = tuple[str, str, list[list[Item]]]
"""Film, key, items of every stage that it needs."""


def _groups(
    cfg: GenerateConfig, name: str, todo: list[Todo]
) -> Iterator[tuple[Path, Sequence[Todo]]]:
    """Yields films that are asked about together, and their journal.

    Captions are many: a journal is read at every call of chat.ask, so they have one for each of 256
    parts of the films; equal films share it.
    """
    folder, size = Path(cfg.out) / "journal", STAGES[name].films_at_once
    if name != "caption":
        for first in range(0, len(todo), size):
            yield folder / f"{name}.jsonl", todo[first : first + size]
        return

    def part(row: Todo) -> str:
        about = row[2][0]
        return about[0]["sha256"][:2] if about else "00"

    for shard, rows in itertools.groupby(sorted(todo, key=part), key=part):
        together = list(rows)
        for first in range(0, len(together), size):
            yield folder / name / f"{shard}.jsonl", together[first : first + size]


def _drive(
    steps: Callable[..., Any],
    cfg: GenerateConfig,
    group: Sequence[Todo],
    ask: Callable[[list[Request]], list[Reply | Failure]],
    *,
    give_up: bool,
) -> Iterator[tuple[str, str, Any]]:
    """Yields (film, key, (items, rejects) or the Failure that it waits for) of every film."""
    running = {}
    rounds: dict[str, list[Request]] = {}
    keys = {film: key for film, key, _ in group}
    for film, key, needs in group:
        running[film] = steps(film, needs[0] if needs else [], cfg, *needs[1:])
        try:
            rounds[film] = next(running[film])
        except StopIteration as stop:
            yield film, key, stop.value
    while rounds:
        flat = [request for requests in rounds.values() for request in requests]
        got = iter(ask(flat) if flat else [])
        answers = {film: [next(got) for _ in requests] for film, requests in rounds.items()}
        rounds = {}
        for film, replied in answers.items():
            failed = [x for x in replied if isinstance(x, Failure) and x.passing]
            if failed and not give_up:
                running[film].close()
                yield film, keys[film], failed[0]
                continue
            try:
                rounds[film] = running[film].send(replied)
            except StopIteration as stop:
                yield film, keys[film], stop.value


def _ask(
    cfg: GenerateConfig, name: str, budget: Budget, journal: Path, requests: list[Request]
) -> list[Reply | Failure]:
    section, frame_tokens = getattr(cfg, name), 0
    if name == "caption":  # a part is a frame, or, of a checkpoint, the whole turn
        frame_tokens = section.frame_tokens * (section.frames if section.checkpoint else 1)
    return budget.ask(
        requests,
        cfg.servers[section.server],
        frame_tokens=frame_tokens,
        journal=journal,
        check=STAGES[name].check,
        name=name,
    )
