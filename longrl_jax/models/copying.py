"""Copies of checkpoint folders: checked, in bounded memory, resumable, with digests.

No model is built: names, shapes and types are compared with the table by the headers of the files,
then the numbers pass by block after block.
"""

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from flax import nnx
from tqdm import tqdm

from longrl_jax import models
from longrl_jax.models import hf_files, weights
from longrl_jax.run_folder import write_synced

PLAN = "plan.json"
"""What an unfinished copy is of; the digests of its finished files stand beside it."""
HUB_RECORDS = ".cache/huggingface/download"
"""Where `hf download --local-dir` notes the commit, digest and time of every file."""
SUM_LINE = re.compile(r"([0-9a-f]{64}) [ *](.+)")
BAR_DELAY_S = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item:
    """A tensor on its way."""

    name: str
    source: hf_files.Stored
    spec: hf_files.Spec
    """As it is written, with its name inside its sub-folder."""
    twin: hf_files.Stored | None
    """The tensor that it must equal (the head of a tied model)."""
    ours: bool
    """Whether the model uses it; what it does not is passed on unread."""


def copy(
    folder: Path,
    out: Path,
    *,
    dtype: np.dtype | None = None,
    text_only: bool = False,
    shard_size_bytes: int = hf_files.SHARD_SIZE_BYTES,
) -> None:
    """Writes a checkpoint again, with SHA256SUMS: in other files, in another type, or the language
    model alone, as a plain folder of its own architecture.

    Tensors keep their types or get `dtype`; those that the model does not use keep theirs. After a
    kill the same call goes on: finished files whose digests hold are kept. Raises ValueError for
    whatever `models.load` would, and for a source that is not what its own digests say.
    """
    backbone = models.backbone_of(folder)
    items = _checked(folder, backbone, dtype)
    if digests(folder):
        verify(folder)
    folders = {sub: sub for sub in backbone.FOLDERS}
    if text_only:
        _check_text_only(folder, backbone)
        folders = {backbone.LLM_FOLDER: ""}
    parts = {into: _below(sub, items) for sub, into in folders.items()}
    texts = folders if text_only else {"": "", **folders}
    plan = {
        "source": _identity(folder),
        "dtype": str(dtype or ""),
        "text_only": text_only,
        "shard_size_bytes": shard_size_bytes,
    }

    def write(partial: Path) -> None:
        sums = _resume(partial, plan)
        total = sum(item.spec.size_bytes for part in parts.values() for item in part.values())
        with tqdm(total=total, desc=out.name, unit="B", unit_scale=True, delay=BAR_DELAY_S) as bar:
            try:
                for into, part in parts.items():
                    _write_tensors(partial, into, part, sums, bar, shard_size_bytes)
            except ValueError as error:
                raise ValueError(f"{folder}: {error}") from None
        models.copy_text_files(folder, partial, texts)
        if dtype is not None:
            models.set_dtype(partial, tuple(texts.values()), dtype)
        others = {_name(path, partial): path for path in partial.rglob("*") if path.is_file()}
        for name in others.keys() - sums.keys() - {PLAN, hf_files.SUMS}:
            sums[name] = _sha256(others[name])
        _write_sums(partial, sums)
        (partial / PLAN).unlink()

    models.write_whole(out, write, resumes=True)


def verify(folder: Path) -> int:
    """Reads every file that has a digest, in SHA256SUMS or the hub's records of a download, and
    returns how many agree; raises ValueError that names those that do not, are missing, or are
    tensors without a digest."""
    sums = digests(folder)
    if not sums:
        raise ValueError(
            f"{folder} has neither {hf_files.SUMS} (which `convert` writes) nor {HUB_RECORDS} "
            "(which `hf download --local-dir` writes); there is nothing to compare with"
        )
    missing = [name for name in sums if not (folder / name).is_file()]
    tensors = {_name(path, folder) for path in folder.rglob("*.safetensors")}
    unknown = sorted(tensors - sums.keys())
    sizes = [(folder / name).stat().st_size for name in sums.keys() - set(missing)]
    wrong = []
    with tqdm(
        total=sum(sizes), desc="digests", unit="B", unit_scale=True, delay=BAR_DELAY_S, leave=False
    ) as bar:
        for name in sums.keys() - set(missing):
            if _sha256(folder / name) != sums[name]:
                wrong.append(name)
            bar.update((folder / name).stat().st_size)
    for names, what in (
        (missing, "is missing"),
        (sorted(wrong), "is not what its digest says"),
        (unknown, "has no digest"),
    ):
        if names:
            raise ValueError(
                f"{folder / names[0]} {what} ({len(names)} of {len(sums)} files); download or "
                f"convert it again, or remove {hf_files.SUMS} if the change is yours"
            )
    return len(sums)


def digests(folder: Path) -> dict[str, str]:
    """Returns {relative path: SHA-256} of the files of a folder that somebody has noted."""
    found = {}
    for path in sorted((folder / HUB_RECORDS).rglob("*.metadata")):
        _, etag, *_ = [*path.read_text().splitlines(), "", ""]
        if re.fullmatch("[0-9a-f]{64}", etag):  # large files; the others' is git's
            found[_name(path, folder / HUB_RECORDS).removesuffix(".metadata")] = etag
    sums = folder / hf_files.SUMS
    for number, line in enumerate(sums.read_text().splitlines() if sums.exists() else (), start=1):
        match = SUM_LINE.fullmatch(line)
        name = Path(match[2]) if match else None
        if match is None or name is None or name.is_absolute() or ".." in name.parts:
            raise ValueError(f"{sums} line {number}: {line!r} is no digest of a file beside it")
        found[name.as_posix()] = match[1]  # ./a is a
    return found


def _checked(folder: Path, backbone: ModuleType, dtype: np.dtype | None) -> dict[str, Item]:
    """Returns the tensors of a checkpoint that fits its config."""
    cfg = backbone.read_config(folder)
    model = nnx.eval_shape(lambda: backbone.Model(cfg, rngs=nnx.Rngs(0)))
    table, tensors = backbone.table(cfg), hf_files.open_tensors(folder, backbone.FOLDERS)
    first_of = {row.copy: row.hf for row in table.values() if row.copy in tensors}
    try:
        rows = weights.check(nnx.state(model, nnx.Param), table, tensors, ignored=backbone.IGNORED)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    used = {*first_of, *(name for names in rows.values() for name in names)}
    return {
        name: Item(
            name=name,
            source=x,
            spec=hf_files.Spec(name, (name in used and dtype) or x.dtype, x.shape),
            twin=tensors[first_of[name]] if name in first_of else None,
            ours=name in used,
        )
        for name, x in tensors.items()
    }


def _check_text_only(folder: Path, backbone: ModuleType) -> None:
    if backbone.text_config(backbone.read_config(folder)).rope.sections:
        raise ValueError(
            f"{folder}: its language model has positions in three dims, which no text-only "
            "architecture has; export the whole"
        )


def _below(sub: str, items: Mapping[str, Item]) -> dict[str, Item]:
    """Returns the tensors of a sub-folder by their names in it."""
    start = f"{sub}/" if sub else ""
    found = {}
    for name, item in items.items():
        if name.startswith(start):
            spec = dataclasses.replace(item.spec, name=name.removeprefix(start))
            found[spec.name] = dataclasses.replace(item, spec=spec)
    return found


def _write_tensors(
    partial: Path,
    into: str,
    items: Mapping[str, Item],
    sums: dict[str, str],
    bar: Any,
    shard_size_bytes: int,
) -> None:
    """Writes the files of a sub-folder that are not in sums, and notes each one there."""
    folder = partial / into
    folder.mkdir(exist_ok=True)
    shards = hf_files.plan_shards((item.spec for item in items.values()), shard_size_bytes)
    for shard in shards:
        path = folder / shard.file
        if _name(path, partial) in sums:
            bar.update(shard.size_bytes)
            continue
        pieces = ((spec.name, _pieces(items[spec.name], bar)) for spec in shard.specs)
        hf_files.write_shard(path, shard.specs, pieces)
        sums[_name(path, partial)] = _sha256(path)
        _write_sums(partial, sums)
    hf_files.write_index(folder, shards)


def _pieces(item: Item, bar: Any) -> Iterator[np.ndarray]:
    name, dtype = item.name, item.spec.dtype
    for index in item.source.blocks():
        x = item.source[index]
        if item.ours:
            weights.check_finite(name, x)
        if item.twin is not None and not np.array_equal(x, item.twin[index]):
            raise weights.copy_differs(name, item.twin.name)
        if x.dtype != dtype:
            with np.errstate(over="ignore"):  # said below
                x = x.astype(dtype)
            if not np.isfinite(x).all():
                raise ValueError(f"{name} holds numbers that {dtype} cannot; choose another type")
        yield x
        bar.update(x.nbytes)


def _resume(partial: Path, plan: dict[str, Any]) -> dict[str, str]:
    """Returns the digests of the files that a killed call of the same plan has finished; leaves
    nothing else in the folder."""
    try:
        same = json.loads((partial / PLAN).read_text()) == plan
        noted = digests(partial)
    except (FileNotFoundError, ValueError):
        same, noted = False, {}
    kept = {}
    for name, digest in noted.items() if same else ():
        if (partial / name).is_file() and _sha256(partial / name) == digest:
            kept[name] = digest
    if kept:
        tqdm.write(f"going on: {len(kept)} finished files in {partial} are kept")
    staying = kept.keys() | ({PLAN, hf_files.SUMS} if same else set())
    for path in [p for p in partial.rglob("*") if p.is_file()]:
        if _name(path, partial) not in staying:
            path.unlink()
    _write_sums(partial, kept)
    write_synced(partial / PLAN, json.dumps(plan).encode())
    return kept


def _identity(folder: Path) -> list[list[Any]]:
    """Says which files a folder holds, so that a changed source is noticed."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return [[_name(p, folder), p.stat().st_size, p.stat().st_mtime_ns] for p in files]


def _write_sums(folder: Path, sums: Mapping[str, str]) -> None:
    lines: Sequence[str] = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
    write_synced(folder / hf_files.SUMS, "".join(lines).encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix()
