"""How weights leave the learner: checked by name and shape, one layer at a time.

Numpy only, so that a learner whose engines live in other processes never imports vLLM. The
receiving half (vLLM's weight-transfer engines) is in vllm_engine.py.
"""

import difflib
import itertools
import json
import mmap
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"
TOWER = ("visual.", "model.visual.")
"""How names of a vision tower begin that stands in the folder of a language model; the engine has
none, it takes features."""
RENAMED = ("model.language_model.", "model.")
"""How transformers calls such a language model since 4.52, and as published; vLLM knows both."""
BUFFERS = ".rotary_emb.inv_freq"
"""End of names in older files (Llama-2) that no engine loads."""
ALIGN_BYTES = 64
"""Start of every array in a shared file, for aligned loads."""
DTYPES = ("float32", "bfloat16", "float16")
"""Of a pushed weight; the engine casts to its own."""

Named = tuple[str, Any]
"""A Hugging Face name and an array (jax.Array or np.ndarray)."""
Row = tuple[str, Sequence[int], int]
"""dtype, shape and offset in bytes of an array in a shared file."""


def layers(
    weights: Iterable[Named], shapes: Mapping[str, tuple[int, ...]], *, target: str
) -> Iterator[list[Named]]:
    """Splits a stream of weights into complete layers, taking no array of the next one ahead.

    A layer is all names of `shapes` with the same prefix up to the first number
    ("model.layers.3."); a name without a number is a layer of its own. The list is emptied before
    the next array is taken, so that one layer is alive at a time.

    Raises ValueError, before the layer is yielded, for a name that is unknown, doubled, misshapen,
    not of floating point or missing in its layer. That a whole layer is missing is only known at
    the end of the stream, when the engine holds a mixture: the caller must not generate from it.
    """
    missing: dict[str, set[str]] = {}
    for name in shapes:
        missing.setdefault(_layer_key(name), set()).add(name)
    layer: list[Named] = []
    open_key = ""
    for name, array in weights:
        _check(name, array, shapes, target)
        key = _layer_key(name)
        if name not in missing.get(key, ()):
            raise ValueError(f"{name} was pushed twice in one sync; send every weight once")
        if layer and key != open_key:
            raise ValueError(
                f"{name} came before {sorted(missing[open_key])} of {target}; send a layer whole"
            )
        missing[key].remove(name)
        layer.append((name, array))
        del array
        open_key = key
        if not missing[key]:
            del missing[key]
            yield layer
            layer.clear()
    if left := sorted(name for names in missing.values() for name in names):
        raise ValueError(
            f"the push lacks {len(left)} weights of {target}, first {left[:3]}; a push must be "
            f"complete ({HEAD} included, also where it is tied)"
        )


def _check(name: str, array: Any, shapes: Mapping[str, tuple[int, ...]], target: str) -> None:
    if name not in shapes:
        near = difflib.get_close_matches(name, shapes, n=3)
        raise ValueError(f"{target} has no weight {name!r}; it has e.g. {near or list(shapes)[:3]}")
    if tuple(array.shape) != tuple(shapes[name]):
        raise ValueError(f"{name} is {tuple(array.shape)}, {target} wants {tuple(shapes[name])}")
    if str(array.dtype) not in DTYPES:
        raise ValueError(f"{name} is {array.dtype}; push it as one of {', '.join(DTYPES)}")


def _layer_key(name: str) -> str:
    parts = name.split(".")
    head = list(itertools.takewhile(lambda part: not part.isdigit(), parts))
    return name if len(head) == len(parts) else ".".join(parts[: len(head) + 1])


def expected_shapes(llm_dir: Path | str) -> dict[str, tuple[int, ...]]:
    """Returns name -> shape of all weights that a push must carry, read from safetensors headers.

    A tied checkpoint has no lm_head.weight, but a push needs it: the engine keeps a packed copy of
    the head that would otherwise go stale (docs/measured.md 2.5). Of a folder that holds a vision
    tower too (Qwen2.5-VL), the language model's are returned, by their published names.
    """
    files = sorted(Path(llm_dir).glob("*.safetensors"))
    if not files:
        raise ValueError(f"{llm_dir} holds no *.safetensors file; export the model there first")
    shapes: dict[str, tuple[int, ...]] = {}
    for path in files:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        for name, entry in header.items():
            known = name != "__metadata__" and not name.startswith(TOWER)
            if known and not name.endswith(BUFFERS):
                name = name.replace(*RENAMED) if name.startswith(RENAMED[0]) else name
                shapes[name] = tuple(entry["shape"])
    if HEAD not in shapes and EMBEDDING in shapes:
        shapes[HEAD] = shapes[EMBEDDING]
    return shapes


def to_host(array: Any) -> np.ndarray:
    """Returns the array in host memory; a copy only where it is split over devices."""
    shards = getattr(array, "addressable_shards", None)
    if shards is not None and array.is_fully_replicated:
        array = shards[0].data
    return np.asarray(array)


class SharedFile:
    """Memory that carries arrays to other processes of this user; rewritten for each message.

    It has no name in any folder: the kernel frees it with the last process that holds it, however
    that process ends, and the size of /dev/shm (64 MiB in many containers) does not bound it.
    """

    def __init__(self):
        self._file = os.fdopen(os.memfd_create("rollout_bridge"), "r+b", buffering=0)
        self.path = f"/proc/{os.getpid()}/fd/{self._file.fileno()}"
        """What `read` opens, in any process of this user while this one lives."""

    def write(self, arrays: Sequence[Any]) -> list[Row]:
        """Copies the arrays in; returns the rows that `read` takes.

        This is the only copy on the sending side. Nobody may still be reading what was there.
        """
        rows: list[Row] = []
        end = 0
        for array in arrays:
            rows.append((str(array.dtype), tuple(array.shape), end))
            size = int(np.prod(array.shape)) * np.dtype(array.dtype).itemsize
            end += -(-size // ALIGN_BYTES) * ALIGN_BYTES
        self._file.truncate(max(end, 1))
        with mmap.mmap(self._file.fileno(), max(end, 1)) as buffer:
            for array, row in zip(arrays, rows, strict=True):
                target = _view(buffer, row)
                target[...] = to_host(array)
                del target
        return rows

    def clear(self) -> None:
        """Gives the memory back; nobody may still be reading."""
        self._file.truncate(0)

    def close(self) -> None:
        self._file.close()


def read(path: str, rows: Sequence[Row]) -> list[np.ndarray]:
    """Maps the arrays of SharedFile.path without copying them; they are read-only."""
    with open(path, "rb") as file:
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return [_view(buffer, row) for row in rows]


def _view(buffer: mmap.mmap, row: Row) -> np.ndarray:
    dtype_name, shape, offset = row
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype_name == "bfloat16" else dtype_name)
    count = int(np.prod(shape))
    return np.frombuffer(buffer, dtype, count=count, offset=offset).reshape(shape)
