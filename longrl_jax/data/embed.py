"""Encodes every image and video of a data set into the embedding store, before any training.

python -m longrl_jax.data.embed CONFIG.yaml [section.key=value ...] [--dry-run | --check]
"""

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longrl_jax import config, encode, platform, processes
from longrl_jax.data import SOURCES, loader, mixing, video
from longrl_jax.data.refused import RefusedLog
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions
from longrl_jax.train import COMPILE_CACHE, check_names, leave_the_others
from longrl_jax.types import Example, Media, Prompt
from rollout_bridge import VideoStore
from rollout_bridge.video_cache import HEADER_BYTES, MISSING

EPILOG = """\
examples:
  python -m longrl_jax.data.embed configs/tiny_cpu_grpo.yaml --dry-run
  python -m longrl_jax.data.embed configs/tiny_cpu_grpo.yaml
  python -m longrl_jax.data.embed configs/tiny_cpu_grpo.yaml --check
  srun python -m longrl_jax.data.embed configs/NAME.yaml mesh.processes=2

What is encoded is every medium of data.train and data.validation that a training with this config
would ask about, with the vision tower of model.path (and its projector, where model.frozen names
it), into store.path. Training then decodes nothing: media/decoded_frames is 0 in every step.

An entry is found by what it is made of: the content of the file, the sampling (data.num_frames,
data.fps), the decoder, the sizes, the weights. Another of these makes another entry; nothing stale
is ever taken, and nothing needs to be deleted by hand.

Before the first frame is decoded the size is said and compared with store.max_gib and the disk: a
store that is too small would lose the first films before it has the last.

A run that was stopped, however, goes on when the same command is given again. Several runs may
share a store. Several processes (mesh.processes, as in training) share the films evenly by frames;
they must see one store.path.

--check reads no pixels: it says which entries are missing, damaged (checksum) or of another shape.
--repair is the run that also compares the checksums, and encodes what is damaged anew.

Files that cannot be used do not stop it: they are listed in OUT/refused.jsonl, with reasons.
--check and --dry-run keep that list; --check names such entries "refused before".
exit status: 0 all is there; 3 all is there but what was refused; 1 an error, or --check found
entries that are missing or damaged; 2 a mistyped option
"""
BATCH_MEDIA = 64
"""Media that are handed to the decoder processes at once; between two batches the store is asked
again, so that runs which share it seldom encode a film twice."""
REFUSED_STATUS = 3
SHOWN_PROBLEMS = 20


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the store must hold for a record; travels between processes as a list."""

    name: str
    """In the store."""
    path: str
    kind: str
    """image or video."""
    num_frames: int
    num_tokens: int
    size_bytes: int
    file: str
    """Data file of the first record that asks for it."""
    record: int
    """Number of that record."""
    place: int
    """Among the media of that record."""
    problem: str
    """What is wrong with the store's entry; empty: nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a run; the rest is the config's."""

    out: Path
    check: bool = False
    dry_run: bool = False
    repair: bool = False


@dataclasses.dataclass(frozen=True)
class Work:
    """What the parts of a run share."""

    cfg: config.Config
    encoder: encode.Encoder
    store: VideoStore
    refused: RefusedLog
    files: Mapping[str, tuple[Any, Callable[[Example], Prompt]]]
    """Data file -> its records, and how they are asked, in training and in evaluation."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs; a mistake of the user's is one line. The exit status: EPILOG."""
    args = _parser().parse_intermixed_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        out = args.out or Path(cfg.run.dir) / "embed"
        plan = Plan(out=out, check=args.check, dry_run=args.dry_run, repair=args.repair)
        platform.prepare(cfg.mesh, compilation_cache=str(COMPILE_CACHE))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"longrl_jax.data.embed: {error}")
    try:
        try:
            check_names(cfg)
            status = run(cfg, plan)
        except (ValueError, OSError) as error:
            sys.exit(f"longrl_jax.data.embed: {error}")
    except BaseException as error:
        if cfg.mesh.processes > 1:
            leave_the_others(error)
        raise
    sys.exit(status)


def run(cfg: config.Config, plan: Plan) -> int:
    """Fills or checks the store; returns the exit status. All processes must call it."""
    policy, state = opened.open_policy(cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    if encoder is None:
        raise ValueError(f"model.path={cfg.model.path} takes text only: there is nothing to encode")
    with contextlib.ExitStack() as stack:
        store = VideoStore(cfg.store.path, int(cfg.store.max_gib * 2**30))
        stack.callback(store.close)
        check_shared(store.path)
        if processes.is_first() and not (plan.check or plan.dry_run):
            (plan.out / "refused.jsonl").unlink(missing_ok=True)  # every run finds them anew
        refused = stack.enter_context(RefusedLog(plan.out / "refused.jsonl"))
        work = Work(cfg, encoder, store, refused, files_of(cfg, policy))
        mine, entries = needed(work, read=plan.check or plan.repair)
        refused.settle()
        known = refused_before(entries, refused.path) if plan.check else {}
        _say(report(work, entries, plan, known))
        if plan.check:
            num_left = sum(bool(e.problem) and e.name not in known for e in entries)
            if processes.gather(num_left)[0]:  # the first process has the list
                return 1
            return REFUSED_STATUS if any(entry.problem for entry in entries) else 0
        processes.first(lambda: check_room(store, entries))
        if plan.dry_run:
            return 0
        started_s = time.perf_counter()
        bad, num_stored, num_frames = fill(work, mine, entries)
        num_refused = refused.settle()
        seconds = time.perf_counter() - started_s
        _say(f"encoded   {num_stored:,} files, {num_frames:,} frames, in {seconds:.1f} s")
        lost = [e for e in entries if e.name not in bad and _look(work, e, read=False)]
        if lost:
            raise ValueError(
                f"{len(lost)} entries left {store.path} while others were written, {lost[0].path} "
                "among them: another run fills it beyond store.max_gib; raise that for both"
            )
        if num_refused:
            _say(f"{num_refused} records or files were refused; the reasons are in {refused.path}")
        return REFUSED_STATUS if num_refused else 0


def needed(work: Work, *, read: bool) -> tuple[dict[str, Media], list[Entry]]:
    """Returns this process's media by the names of their entries, and the entries that all
    processes' records need, each once, in the order of the data files.

    Every process reads its part of the records; what cannot be asked is refused as in training.
    read: compares the checksums of the entries that are there.
    """
    media: dict[str, Media] = {}
    entries: list[list[Any]] = []
    for file, (source, _) in work.files.items():
        part = processes.part(len(source))
        bar = tqdm(part, desc=file, unit="record", delay=2.0, disable=not processes.is_first())
        for index in bar:
            for place, m in enumerate(_media_of(work, file, index)):
                name = encode.entry_name(work.encoder, m)
                if name in media:
                    continue
                media[name] = m
                size = m.num_tokens * work.encoder.width * work.encoder.dtype.itemsize
                entry = Entry(
                    name=name,
                    path=m.path,
                    kind=m.kind,
                    num_frames=len(m.times_s),
                    num_tokens=m.num_tokens,
                    size_bytes=HEADER_BYTES + size,
                    file=file,
                    record=index,
                    place=place,
                    problem="",
                )
                problem = _look(work, entry, read=read) or ""
                entries.append([*dataclasses.astuple(entry)[:-1], problem])
    found: dict[str, Entry] = {}
    for row in processes.joined(entries):
        entry = Entry(*row)
        found.setdefault(entry.name, entry)
    order = {file: number for number, file in enumerate(work.files)}
    return media, sorted(found.values(), key=lambda e: (order[e.file], e.record, e.place))


def refused_before(entries: Sequence[Entry], path: Path) -> dict[str, str]:
    """Returns why files were refused, by the name of their missing entry, from a refused.jsonl."""
    missing: dict[str, list[str]] = {}
    for entry in entries:
        if entry.problem == MISSING:
            missing.setdefault(entry.path, []).append(entry.name)
    found: dict[str, str] = {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for row in map(json.loads, lines):
        words = row["message"].split(" ") if row["kind"] else []
        for count in range(1, len(words)):  # the file's path comes first, and may have blanks
            for name in missing.get(" ".join(words[:count]), ()):
                found[name] = " ".join(words[count:])
    return found


def report(work: Work, entries: Sequence[Entry], plan: Plan, known: Mapping[str, str]) -> str:
    """Returns what is needed, what of it is there, and, for --check, what is wrong by name.

    known: of refused_before.
    """
    broken = [e for e in entries if e.problem not in ("", MISSING)]
    there = [e for e in entries if not e.problem]
    store, max_gib = work.store.path, work.store.max_bytes / 2**30
    lines = [
        f"needed    {_sizes(entries)}",
        f"in store  {_sizes(there)}  ({store}, store.max_gib={max_gib:.4g})",
    ]
    if broken and not plan.check:
        lines.append(f"damaged   {len(broken)}, which will be encoded anew")
    if work.refused.count:
        lines.append(f"refused   {work.refused.count} records, see {work.refused.path}")
    if plan.check:
        problems = [e for e in entries if e.problem]
        for e in problems[:SHOWN_PROBLEMS]:
            if e.name in known:
                lines.append(f"{e.path}: refused before: {known[e.name]}")
            else:
                lines.append(f"{e.path}: {e.problem} ({store / e.name}.emb)")
        if len(problems) > SHOWN_PROBLEMS:
            lines.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
        num_left = len(problems) - len(known)
        what = f"{num_left} of {len(entries)} entries are missing or damaged"
        way_out = "python -m longrl_jax.data.embed CONFIG --repair encodes them"
        whole = "every entry is there and whole"
        if known:
            whole += (
                f", but {len(known)} that was refused before; a run without --check tries again"
            )
        lines.append(f"{what}: {way_out}" if num_left else whole)
    return "\n".join(lines)


def check_room(store: VideoStore, entries: Sequence[Entry]) -> None:
    """Raises ValueError if the entries do not fit the store's bound, or what is missing of them the
    disk."""
    total = sum(e.size_bytes for e in entries)
    missing = [e.size_bytes for e in entries if e.problem]
    if total > store.max_bytes:
        raise ValueError(
            f"the entries need {_gib(total)}, over store.max_gib={store.max_bytes / 2**30:.4g}: "
            "the first would be deleted before the last are made. Set store.max_gib="
            f"{math.ceil(100 * total / 2**30) / 100}, or lower data.num_frames or data.fps"
        )
    if not missing:
        return
    grows = min(sum(missing), store.max_bytes - store.num_bytes())
    needs, free = max(grows, 0) + max(missing), shutil.disk_usage(store.path).free
    if needs > free:
        raise ValueError(
            f"store.path={store.path} needs {_gib(needs)} more (an entry is written before an old "
            f"one goes), its disk has {_gib(free)} left; free some, choose a store.path on another "
            "disk, or lower data.num_frames or data.fps"
        )


def check_shared(store: Path) -> None:
    """Raises ValueError where processes do not see the store of the first one."""
    if processes.count() == 1:
        return
    mark = store / f"seen_{uuid.uuid4().hex}"
    if processes.is_first():
        mark.touch()
    name = processes.gather(mark.name)[0]
    blind = [i for i, sees in enumerate(processes.gather((store / name).exists())) if not sees]
    if processes.is_first():
        mark.unlink()
    if blind:
        raise ValueError(
            f"store.path={store} of process 0 is not seen by processes {blind}; choose a folder "
            "that all hosts share"
        )


def fill(
    work: Work, mine: Mapping[str, Media], entries: Sequence[Entry]
) -> tuple[set[str], int, int]:
    """Encodes this process's share of what is missing or damaged.

    Returns, of all processes, the names whose files were refused, and the numbers of entries made
    and of frames encoded. mine: media that need no second look at their record.
    """
    for entry in entries:
        if not entry.problem:
            work.store.get(entry.name)  # used just now: other entries are deleted before it
    todo = [entry for entry in entries if entry.problem]
    whose = shares([entry.num_frames for entry in todo], processes.count())
    my_share = [e for e, owner in zip(todo, whose, strict=True) if owner == processes.index()]
    bad: list[str] = []
    cfg = work.cfg.data
    with (
        video.DecoderPool(cfg.decoder_processes, timeout_s=cfg.decode_timeout_s) as pool,
        _Bar(my_share) as bar,
    ):
        for start in range(0, len(my_share), BATCH_MEDIA):
            batch = my_share[start : start + BATCH_MEDIA]
            media: dict[str, Media] = {}
            for e in batch:
                if e.problem == MISSING and not _look(work, e, read=False):
                    continue  # another run has made it meanwhile
                media[e.name] = mine.get(e.name) or _media_of(work, e.file, e.record)[e.place]
            refused = _encode(work, media, pool, bar)
            for e in batch:
                if e.name in media and media[e.name].key in refused:
                    bad.append(e.name)
                    record = work.files[e.file][0][e.record]
                    work.refused.add(record, refused[media[e.name].key], step=0)
            bar.settle(batch)
    done = processes.added({"": (bar.num_stored, bar.num_frames)})[""]
    return set(processes.joined(bad)), int(done[0]), int(done[1])


def shares(num_frames: Sequence[int], num_processes: int) -> list[int]:
    """Returns which process encodes each medium: the longest first, each to who has least yet."""
    load = [0] * num_processes
    owner = [0] * len(num_frames)
    for i in sorted(range(len(num_frames)), key=lambda i: -num_frames[i]):
        owner[i] = load.index(min(load))
        load[owner[i]] += num_frames[i]
    return owner


class _Bar:
    """The progress of this process, in frames, with films and megabytes a second beside it."""

    def __init__(self, entries: Sequence[Entry]):
        self._bar = tqdm(
            total=sum(e.num_frames for e in entries),
            desc="encode",
            unit="frame",
            dynamic_ncols=True,
            disable=not (processes.is_first() and entries),
        )
        self.num_stored, self.num_frames = 0, 0
        self._num_files, self._settled, self._bytes = len(entries), 0, 0
        self._started_s = time.perf_counter()

    def frames(self, counter: str, number: int) -> None:
        if counter == encode.ENCODED:
            self.num_frames += number
            self._bar.update(number)

    def stored(self, size_bytes: int) -> None:
        self.num_stored += 1
        self._bytes += size_bytes
        rate = self._bytes / 1e6 / (time.perf_counter() - self._started_s)
        self._bar.set_postfix_str(
            f"{self.num_stored}/{self._num_files} files, {rate:.3g} MB/s", refresh=False
        )

    def settle(self, batch: Sequence[Entry]) -> None:
        """Counts the frames of a batch as done, those of refused files and others' work too."""
        self._settled += sum(e.num_frames for e in batch)
        self._bar.n = self._settled
        self._bar.refresh()

    def __enter__(self) -> "_Bar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def _encode(
    work: Work, media: Mapping[str, Media], pool: video.DecoderPool, bar: _Bar
) -> dict[str, video.VideoError]:
    row_bytes = work.encoder.width * work.encoder.dtype.itemsize

    def stored(m: Media) -> None:
        work.store.get(encode.entry_name(work.encoder, m))  # let go: a mapped file is an open one
        bar.stored(m.num_tokens * row_bytes)

    return encode.encode_media(
        work.encoder,
        list(media.values()),
        work.store,
        pool,
        decoder=work.cfg.data.decoder,
        watch=encode.Watch(count=bar.frames, stored=stored),
    )


def files_of(
    cfg: config.Config, policy: opened.Policy
) -> dict[str, tuple[Any, Callable[[Example], Prompt]]]:
    """Returns Work.files of a config."""
    train = questions.prompt_encoder(
        cfg, policy, num_samples=cfg.rollout.num_samples, with_target=cfg.stage != "grpo"
    )
    files = {cfg.data.train: (mixing.open_training(cfg.data), train)}
    if cfg.data.validation and (cfg.data.mix or cfg.data.validation != cfg.data.train):
        open_records = config.pick(SOURCES, cfg.data.source, "data.source")
        held_out = questions.prompt_encoder(cfg, policy, num_samples=1)
        found = open_records(Path(cfg.data.root), cfg.data.validation)
        files[cfg.data.validation] = (found, held_out)
    return files


def _media_of(work: Work, file: str, index: int) -> Sequence[Media]:
    """Returns the media of a record; none of one that is refused."""
    source, encode_prompt = work.files[file]
    asked = loader.prompts_at(source, encode_prompt, [index], on_refused=work.refused.add)
    return asked[0].media if asked[0] is not None else ()


def _look(work: Work, entry: Entry, *, read: bool) -> str | None:
    shape = entry.num_tokens, work.encoder.width
    return work.store.problem(entry.name, shape, work.encoder.dtype, read=read)


def _sizes(entries: Sequence[Entry]) -> str:
    images = sum(e.kind == "image" for e in entries)
    frames, tokens = sum(e.num_frames for e in entries), sum(e.num_tokens for e in entries)
    size = _gib(sum(e.size_bytes for e in entries))
    return (
        f"{len(entries) - images:,} films, {images:,} images: {frames:,} frames, {tokens:,} "
        f"tokens, {size}"
    )


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def _say(text: str) -> None:
    if processes.is_first():
        sys.stdout.write(f"{text}\n")
        sys.stdout.flush()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.embed",
        usage="python -m longrl_jax.data.embed CONFIG.yaml [section.key=value ...] [options]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, help="a file of configs/ or a run's resolved.yaml")
    add("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    add("--out", type=Path, metavar="DIR", help="folder of refused.jsonl (default: run.dir/embed)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="say what is missing or damaged, only")
    what.add_argument("--dry-run", action="store_true", help="say what would be encoded, only")
    what.add_argument("--repair", action="store_true", help="compare checksums, mend, and fill")
    return parser


if __name__ == "__main__":
    main()
