"""The only door of safetensors: folders of tensor files, read lazily and written shard by shard.

Numbers keep their type: bfloat16 is `ml_dtypes.bfloat16` in numpy.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
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


class Tensors(Mapping[str, np.ndarray]):
    """Tensors of one or several folders by name; an array is read when it is asked for.

    Names of a sub-folder start with its name and a slash: "llm/model.norm.weight".
    """

    def __init__(self, files: Mapping[str, tuple[Path, str]]):
        """files: our name -> (file, name in that file)."""
        self._files = dict(files)
        self._open: dict[Path, Any] = {}

    def __getitem__(self, name: str) -> np.ndarray:
        self.dtype(name)  # refuses by name what numpy cannot hold
        path, inner = self._files[name]
        return self._handle(path).get_tensor(inner)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # Mapping's own would read the array

    def dtype(self, name: str) -> np.dtype:
        """Returns the type in the file, without reading the array."""
        path, inner = self._files[name]
        code = self._handle(path).get_slice(inner).get_dtype()
        if code not in DTYPES:
            raise ValueError(f"{path}: {inner} has type {code}; we read {', '.join(DTYPES)}")
        return DTYPES[code]

    def shape(self, name: str) -> tuple[int, ...]:
        """Returns the shape in the file, without reading the array."""
        path, inner = self._files[name]
        return tuple(self._handle(path).get_slice(inner).get_shape())

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = _opened(path)
        return self._open[path]


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


def write_tensors(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    *,
    shard_size_bytes: int = SHARD_SIZE_BYTES,
) -> None:
    """Writes the tensors in files of at most shard_size_bytes (a larger tensor has its own file).

    Holds one shard in memory. More than one file gets an index, as `transformers` reads it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shard: dict[str, np.ndarray] = {}
    written: list[tuple[Path, list[str]]] = []
    sizes_bytes = [0]

    def flush() -> None:
        path = folder / f"shard-{len(written)}.partial"
        try:
            save_file(shard, path, metadata={"format": "pt"})  # transformers asks for this entry
        except SafetensorError as error:  # what it calls a full disk, among others
            raise OSError(f"{path} cannot be written ({error})") from None
        written.append((path, list(shard)))
        shard.clear()
        sizes_bytes.append(0)

    for name, x in tensors:
        if shard and sizes_bytes[-1] + x.nbytes > shard_size_bytes:
            flush()
        shard[name] = np.ascontiguousarray(x)
        sizes_bytes[-1] += x.nbytes
    if shard:
        flush()
    if len(written) == 1:
        written[0][0].rename(folder / SINGLE)
        return
    weight_map: dict[str, str] = {}
    for i, (path, names) in enumerate(written, start=1):
        final = path.rename(folder / f"model-{i:05d}-of-{len(written):05d}.safetensors")
        weight_map |= dict.fromkeys(names, final.name)
    if written:
        index = {"metadata": {"total_size": sum(sizes_bytes)}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


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


def _opened(path: Path) -> Any:
    if not path.exists():
        raise ValueError(f"{path} is missing; download or convert the folder again")
    try:
        return safe_open(path, framework="np")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file ({error})") from None
