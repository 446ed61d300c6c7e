"""The only door of safetensors: folders of tensor files, read and written part by part.

Numbers keep their type: bfloat16 is `ml_dtypes.bfloat16` in numpy.
"""

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SUMS = "SHA256SUMS"
"""Digests of all files of a folder that `convert` wrote, as `sha256sum -c` reads them."""
SHARD_SIZE_BYTES = 4 * 2**30
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
"""Type names of the safetensors format that we read."""
MAX_SIZE = 2**24
"""Over every size of a published model; more would only fill the memory."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
"""Ends of tensor files that may run code when they are opened; they never are."""


BLOCK_SIZE_BYTES = 32 * 2**20
"""Of a tensor that is read piece by piece."""


class Stored:
    """A tensor in a file: type and shape are known, numbers are read when they are asked for."""

    def __init__(self, path: Path, name: str, header: Any):
        """header: the opened file."""
        self._path, self.name = path, name
        about = header.get_slice(name)
        self.shape: tuple[int, ...] = tuple(about.get_shape())
        self._code: str = about.get_dtype()

    @property
    def dtype(self) -> np.dtype:
        """Raises ValueError for a type that numpy cannot hold."""
        if self._code not in DTYPES:
            known = ", ".join(DTYPES)
            raise ValueError(f"{self._path}: {self.name} has type {self._code}; we read {known}")
        return DTYPES[self._code]

    def __getitem__(self, index: Any) -> np.ndarray:
        """Reads all of it (`x[...]`), or a part of slices without steps, which cost their bytes.

        The file is opened for this read alone: its pages leave our memory with it.
        """
        self.dtype  # noqa: B018  (refuses by name)
        file = _opened(self._path)
        if index is ... or not self.shape:
            return file.get_tensor(self.name)
        return file.get_slice(self.name)[index]

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """Yields the indices of about BLOCK_SIZE_BYTES each that make up the tensor, in order."""
        if not self.shape:
            yield ()
            return
        row_size_bytes = max(math.prod(self.shape[1:]) * self.dtype.itemsize, 1)
        rows = max(BLOCK_SIZE_BYTES // row_size_bytes, 1)
        for start in range(0, self.shape[0], rows):
            yield (slice(start, min(start + rows, self.shape[0])),)


class Tensors(Mapping[str, Stored]):
    """Tensors of one or several folders by name.

    Names of a sub-folder start with its name and a slash: "llm/model.norm.weight".
    """

    def __init__(self, files: Mapping[str, tuple[Path, str]]):
        """files: our name -> (file, name in that file)."""
        self._files = dict(files)
        self._headers: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> Stored:
        path, inner = self._files[name]
        if path not in self._headers:
            self._headers[path] = _opened(path)
        return Stored(path, inner, self._headers[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files

    def paths(self) -> list[Path]:
        """Returns the files that hold the tensors."""
        return sorted({path for path, _ in self._files.values()})


def open_tensors(folder: Path, subfolders: Iterable[str] = ("",)) -> Tensors:
    """Opens every tensor of a folder, or of those sub-folders of it that hold tensors.

    Raises ValueError for a folder without tensors, a broken file, or an index that names a file or
    tensor that is not there.
    """
    files: dict[str, tuple[Path, str]] = {}
    subfolders = tuple(subfolders)
    for sub in subfolders:
        prefix = f"{sub}/" if sub else ""
        for name, path in _files_of(folder / sub).items():
            files[prefix + name] = (path, name)
    if not files:
        folders = [folder / sub for sub in subfolders]
        pickles = [p for f in folders if f.is_dir() for p in f.iterdir() if p.suffix in PICKLES]
        odd = (
            f", only {min(pickles).name}, which may run code and is never opened" if pickles else ""
        )
        raise ValueError(
            f"{folder} holds no safetensors files{odd}; convert other formats to safetensors first"
        )
    return Tensors(files)


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a file says of a tensor before its numbers."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file of tensors."""

    file: str
    specs: tuple[Spec, ...]

    @property
    def size_bytes(self) -> int:
        return sum(spec.size_bytes for spec in self.specs)


def plan_shards(specs: Iterable[Spec], shard_size_bytes: int) -> list[Shard]:
    """Cuts tensors, in their order, into files of at most shard_size_bytes (a larger tensor has its
    own file), with the names that `transformers` gives them."""
    groups: list[list[Spec]] = []
    room_bytes = 0
    for spec in specs:
        if not groups or spec.size_bytes > room_bytes:
            groups.append([])
            room_bytes = shard_size_bytes
        groups[-1].append(spec)
        room_bytes -= spec.size_bytes
    count = len(groups)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    names = [SINGLE] if count == 1 else names
    return [Shard(name, tuple(group)) for name, group in zip(names, groups, strict=True)]


def write_shard(
    path: Path, specs: Sequence[Spec], tensors: Iterable[tuple[str, Iterable[np.ndarray]]]
) -> None:
    """Writes one file piece by piece; it is on disk on return, and absent after an error.

    tensors: (name, its pieces in the order of its rows) of every spec, in any order.
    """
    header, offset_of = _header(specs)
    left = {spec.name: spec for spec in specs}
    try:
        with path.open("wb") as file:
            file.write(header)
            for name, pieces in tensors:
                spec, size_bytes = left.pop(name), 0
                file.seek(offset_of[name])
                for piece in pieces:
                    assert piece.dtype == spec.dtype, f"{name} is {piece.dtype}, not {spec.dtype}"
                    raw = np.ascontiguousarray(piece).reshape(-1).view(np.uint8)
                    size_bytes += file.write(raw.data)
                assert size_bytes == spec.size_bytes, f"{name} is not of shape {spec.shape}"
            assert not left, f"{sorted(left)} were not given"
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_index(folder: Path, shards: Sequence[Shard]) -> None:
    """Writes the index of several files, as `transformers` reads it; one file has none."""
    if len(shards) < 2:
        return
    index = {
        "metadata": {"total_size": sum(shard.size_bytes for shard in shards)},
        "weight_map": {spec.name: shard.file for shard in shards for spec in shard.specs},
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def write_tensors(
    folder: Path,
    specs: Iterable[Spec],
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
) -> None:
    """Writes files of at most shard_size_bytes, and their index. Holds two tensors in memory.

    tensors: (name, array) of every spec, in their order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards, stream = plan_shards(specs, shard_size_bytes), iter(tensors)
    for shard in shards:
        pieces = ((name, (x,)) for name, x in itertools.islice(stream, len(shard.specs)))
        write_shard(folder / shard.file, shard.specs, pieces)
    write_index(folder, shards)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an error names the file."""
    try:
        tree = json.loads(path.read_text())
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; is {path.parent} a Hugging Face folder?") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(tree).__name__}")
    return tree


def positive_int(tree: Mapping[str, Any], name: str, where: str) -> int:
    """Returns tree[name], a size of a config.json; `where` is for the error."""
    value = tree.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{where}: {name}={value!r} must be a positive whole number")
    if value > MAX_SIZE:
        raise ValueError(f"{where}: {name}={value} is over {MAX_SIZE}; is the file damaged?")
    return value


def positive_float(tree: Mapping[str, Any], name: str, default: float, where: str) -> float:
    """Returns tree[name], or the default where it lacks; `where` is for the error."""
    value = tree.get(name, default)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (number and value > 0 and math.isfinite(value)):
        raise ValueError(f"{where}: {name}={value!r} must be a positive number")
    return float(value)


def part(tree: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    """Returns the object tree[name], empty where it lacks or is null; `where` is for the error."""
    value = tree.get(name) or {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name}={value!r} must be an object of named fields")
    return value


def _files_of(folder: Path) -> dict[str, Path]:
    """Returns tensor name -> file; empty where the folder has no tensors."""
    if (folder / INDEX).exists():
        if (folder / SINGLE).exists():
            raise ValueError(
                f"{folder} holds {SINGLE} and {INDEX}: two sets of tensors; remove the stale one"
            )
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{folder / INDEX} has no weight_map; download the folder again")
        for file in weight_map.values():
            beside = isinstance(file, str) and Path(file).name == file
            if not (beside and file.endswith(".safetensors")):
                raise ValueError(f"{folder / INDEX} names {file!r}, no safetensors file beside it")
        files = {name: folder / file for name, file in weight_map.items()}
        for path in sorted(set(files.values())):
            have = set(_opened(path).keys())
            lacking = sorted(n for n, p in files.items() if p == path and n not in have)
            if lacking:
                raise ValueError(f"{path} lacks {lacking[0]}, which {INDEX} says it holds")
        return files
    if (folder / SINGLE).exists():
        return dict.fromkeys(_opened(folder / SINGLE).keys(), folder / SINGLE)
    return {}


def _header(specs: Sequence[Spec]) -> tuple[bytes, dict[str, int]]:
    """Returns how a file begins, and where in it every tensor does.

    The format: length of the JSON in 8 bytes, JSON, numbers without gaps. Wider types come first,
    so that every tensor is aligned to its type: torch refuses others.
    """
    code_of = {dtype: code for code, dtype in DTYPES.items()}
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for this entry
    start_of, end = {}, 0
    for spec in sorted(specs, key=lambda spec: -spec.dtype.itemsize):
        start_of[spec.name], end = end, end + spec.size_bytes
        tree[spec.name] = {
            "dtype": code_of[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [start_of[spec.name], end],
        }
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    size_bytes = 8 + len(text)
    header = len(text).to_bytes(8, "little") + text
    return header, {name: size_bytes + start for name, start in start_of.items()}


def _opened(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path} is missing; download or convert the folder again")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
