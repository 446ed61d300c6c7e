"""A training run that kills itself: killed_run.py CONFIG POINT VISIT.

Ends its process with SIGKILL, as a cluster or `kill -9` does, at the VISIT-th time that it comes to
POINT; the product code knows nothing of it. POINT "none" runs to the end.
"""

import os
import signal
import sys
from pathlib import Path

from longrl_jax import config, platform, train

COMPILE_CACHE = Path(__file__).parents[2] / "cache" / "jax"


class Bomb:
    """Kills this process at the n-th call."""

    def __init__(self, visit: int):
        self.left = visit

    def __call__(self) -> None:
        self.left -= 1
        if self.left == 0:
            sys.stdout.flush()
            os.kill(os.getpid(), signal.SIGKILL)


def before(owner, name: str, bomb: Bomb) -> None:
    """Makes owner.name come to the bomb whenever it is called."""
    inner = getattr(owner, name)

    def wrapped(*args, **kwargs):
        bomb()
        return inner(*args, **kwargs)

    setattr(owner, name, wrapped)


def after(owner, name: str, bomb: Bomb) -> None:
    """The same when it has returned."""
    inner = getattr(owner, name)

    def wrapped(*args, **kwargs):
        result = inner(*args, **kwargs)
        bomb()
        return result

    setattr(owner, name, wrapped)


def decoding(bomb: Bomb) -> None:
    """Some frames of a film have come from the decoder, and are not encoded yet."""
    from longrl_jax import encode

    before(encode, "encode_chunk", bomb)


def embedding(bomb: Bomb) -> None:
    """Half of a film's features are in the store's file."""
    from rollout_bridge import video_cache

    write = video_cache.EntryWriter.write

    def half(self, chunk):
        write(self, chunk[: len(chunk) // 2])
        self._file.flush()
        bomb()
        write(self, chunk[len(chunk) // 2 :])

    video_cache.EntryWriter.write = half


def rollout(bomb: Bomb) -> None:
    """The engine has drawn some tokens of the answers."""
    from rollout_bridge import vllm_engine

    before(vllm_engine.BannedTokens, "apply", bomb)


def push(bomb: Bomb) -> None:
    """The engine has the new weights and still the prefix cache of the old ones."""
    import vllm

    before(vllm.LLM, "reset_prefix_cache", bomb)


def journal(bomb: Bomb) -> None:
    """Half of a journal file is written, under its temporary name."""
    from longrl_jax import journal, run_folder

    write = run_folder.write_synced

    def half(path, content):
        if path.suffix == ".journal":
            path.with_name(f".{path.name}.partial").write_bytes(content[: len(content) // 2])
            bomb()
        write(path, content)

    journal.run_folder.write_synced = half


def journaled(bomb: Bomb) -> None:
    """Rollouts and rewards are on disk, the update has not begun."""
    from longrl_jax import journal

    after(journal, "write", bomb)


def update(bomb: Bomb) -> None:
    """The update is made, nothing of it is pushed or logged."""
    from longrl_jax import step

    after(step.TrainStep, "__call__", bomb)


def log(bomb: Bomb) -> None:
    """Half of a line of metrics.jsonl is written."""
    from longrl_jax.metrics import RunLog

    append = RunLog._append

    def half(self, name, rows):
        if name == "metrics.jsonl":
            with (self._folder / name).open("a") as file:
                file.write('{"step": 3, "lo')
            bomb()
            with (self._folder / name).open("r+") as file:
                text = file.read()
                file.seek(0)
                file.truncate()
                file.write(text.removesuffix('{"step": 3, "lo'))
        return append(self, name, rows)

    RunLog._append = half


def arrays(bomb: Bomb) -> None:
    """A checkpoint's arrays are written, its meta.json is not."""
    from longrl_jax import checkpoint

    before(checkpoint, "_digests", bomb)


def checkpointed(bomb: Bomb) -> None:
    """A checkpoint is whole; older ones and the journal of its steps are still there."""
    from longrl_jax import checkpoint

    after(checkpoint, "save", bomb)


def resume(bomb: Bomb) -> None:
    """The logs are cut, the state is not restored."""
    from longrl_jax import run_folder

    after(run_folder, "cut_logs", bomb)


def export(bomb: Bomb) -> None:
    """The last checkpoint is made, the export half written."""
    from longrl_jax import models

    before(models.hf_files, "write_tensors", bomb)


def judging(bomb: Bomb) -> None:
    """A verdict of the judge is on disk, others of the step are not asked for yet."""
    from longrl_jax.chat.journal import Journal

    after(Journal, "append", bomb)


def count_spaces(items):
    """A reward that a random policy varies in, so that there is something to learn."""
    return [{"total": item.text.count(" ") / max(len(item.text), 1)} for item in items]


def parity(items):
    """Half of all pairs of answers differ in it: dynamic sampling drops half of such groups."""
    odd = [float(sum(map(ord, item.text)) % 2) for item in items]
    return [{"total": 2 * x - 1, "odd": x} for x in odd]


POINTS = {
    point.__name__: point
    for point in (
        decoding,
        embedding,
        rollout,
        push,
        journal,
        journaled,
        update,
        log,
        arrays,
        checkpointed,
        resume,
        export,
    )
}


def main() -> None:
    path, point, visit = sys.argv[1:]
    cfg = config.load(path)
    train.COMPILE_CACHE = COMPILE_CACHE
    platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
    from longrl_jax import rewards

    rewards.REWARDS |= {"spaces": count_spaces, "parity": parity}
    if point != "none":
        (POINTS | {"judging": judging})[point](Bomb(int(visit)))
    platform.prepare_vllm = lambda _: None  # it is prepared, and vLLM may be imported, already
    train.main([path])


if __name__ == "__main__":
    main()
