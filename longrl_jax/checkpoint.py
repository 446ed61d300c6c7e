"""Checkpoints of the trained state: whole or absent, and read back onto any mesh.

RUN/checkpoints/step_00000040/ holds Orbax's arrays (state/) and meta.json: the digest of every
file, and what the run knew at that step. The folder gets its name when all of it is on disk.
Frozen parameters are not saved: they are those of model.path, whose digest is.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from longrl_jax import processes
from longrl_jax.run_folder import FORMAT, META, make_folder, metas, sync_folder, write_synced
from longrl_jax.step import TrainState

HASH_THREADS = 8


def save(folder: Path, state: TrainState, *, step: int, about: Mapping[str, Any]) -> Path:
    """Writes the checkpoint of a step into a run's checkpoints/; it is on disk on return.

    about: what meta.json says beside the step. Raises ValueError if the disk does not take it;
    nothing half-written is left then, and earlier checkpoints stay. All processes of a run must
    call it; each writes its part of the arrays, the first one the rest.
    """
    final, partial = folder / f"step_{step:08d}", folder / f".step_{step:08d}.partial"

    def write_meta() -> None:
        files = _digests(partial, sync=True)
        meta = {"format": FORMAT, "step": step, "files": files} | dict(about)
        write_synced(partial / META, json.dumps(meta, indent=1).encode() + b"\n")

    processes.first(lambda: _make_partial(partial))
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save((partial / "state").absolute(), _named(state))
            checkpointer.wait_until_finished()
        processes.first(write_meta)
    except (OSError, ValueError) as error:  # tensorstore says ValueError for a full disk
        if processes.is_first():
            shutil.rmtree(partial, ignore_errors=True)
        raise ValueError(
            f"the checkpoint of step {step} cannot be written to {folder}: {error}; make room, and "
            "run the same command again to go on from the checkpoint before it"
        ) from error
    processes.first(lambda: _publish(partial, final))
    return final


def _make_partial(partial: Path) -> None:
    make_folder(partial.parent)
    sweep(partial.parent)
    partial.mkdir()


def _publish(partial: Path, final: Path) -> None:
    if final.exists():  # an earlier one of this step, which its owner has gone back behind
        shutil.rmtree(final)
    partial.rename(final)
    sync_folder(final.parent)
    sync_folder(final.parent.parent)  # its own name: who made it may have been killed before that


def restore(path: Path, state: TrainState) -> TrainState:
    """Returns the trained state of a checkpoint, laid out over the devices as `state` is.

    The trained arrays of `state` are deleted, so that memory holds one of the two at a time. Raises
    ValueError for a damaged checkpoint and for one of another model or optimizer. The number of
    processes that wrote it does not matter.
    """
    damaged = processes.first(lambda: _damaged(path))
    if damaged:
        raise ValueError(
            f"{path} is damaged: {', '.join(damaged[:3])} is not what was written; remove {path} "
            "to go on from the checkpoint before it"
        )
    named = _named(state)
    wanted = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in named.items()
    }
    tree = jax.tree.structure(_trained(state))
    for x in named.values():
        x.delete()
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore((path / "state").absolute(), wanted)
    except ValueError as error:
        raise ValueError(f"{path} is of another model or optimizer: {error}") from None
    trained = jax.tree.unflatten(tree, [arrays[name] for name in wanted])
    return TrainState(frozen=state.frozen, **trained)


def _damaged(path: Path) -> list[str]:
    files = json.loads((path / META).read_text())["files"]
    have = _digests(path)
    have.pop(META, None)
    return sorted(name for name in have | files if have.get(name) != files.get(name))


def prune(folder: Path, *, keep: int, best_metric: str = "") -> None:
    """Removes all but the newest `keep` checkpoints and the best one by a score, if named."""
    found = metas(folder.parent)
    best = best_of([meta for _, meta in found], best_metric)
    for path, meta in found[: max(len(found) - keep, 0)]:
        if meta is not best:
            doomed = path.with_name(f".{path.name}.partial")  # else half of it might be found
            path.rename(doomed)
            shutil.rmtree(doomed)


def best_of(found: list[dict[str, Any]], metric: str) -> dict[str, Any] | None:
    """Returns the meta with the highest score, the earliest of equals; None without scores."""
    scored = [meta for meta in found if metric and metric in (meta.get("scores") or {})]
    return max(scored, key=lambda meta: meta["scores"][metric], default=None)


def sweep(folder: Path) -> None:
    """Removes what a killed run has left of a checkpoint."""
    for path in folder.glob(".step_*.partial"):
        shutil.rmtree(path)


def num_bytes(state: TrainState) -> int:
    """Returns the bytes of a checkpoint, before Orbax compresses it."""
    return sum(x.nbytes for x in jax.tree.leaves(_trained(state)))


def _trained(state: TrainState) -> dict[str, Any]:
    return {"params": state.params, "opt_state": state.opt_state, "step": state.step}


def _named(state: TrainState) -> dict[str, jax.Array]:
    """Returns {path: array}: names, so that no class of ours or Flax's is part of the format."""
    rows, _ = jax.tree_util.tree_flatten_with_path(_trained(state))
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in rows}
    assert len(named) == len(rows), "two arrays of the state have the same path"
    return named


def _digests(folder: Path, *, sync: bool = False) -> dict[str, str]:
    """Returns {relative path: SHA-256} of all files below; sync: and puts them on disk."""

    def digest(path: Path) -> str:
        with path.open("rb") as file:
            if sync:
                os.fsync(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest()

    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    if sync:
        for path in (p for p in folder.rglob("*") if p.is_dir()):
            sync_folder(path)
    with ThreadPoolExecutor(HASH_THREADS) as pool:  # hashing releases the interpreter's lock
        sums = list(pool.map(digest, paths))
    return {str(p.relative_to(folder)): s for p, s in zip(paths, sums, strict=True)}
