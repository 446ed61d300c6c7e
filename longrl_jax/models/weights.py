"""One table a backbone: the Hugging Face name, layout and logical dims of every parameter.

Loading, export, the weight push to the engine and sharding read the same rows, so they cannot
disagree. Paths are those of the NNX state, joined by dots: "text.layers.attn.q.kernel".
"""

import dataclasses
import fnmatch
import functools
import math
from collections.abc import Callable, Container, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from longrl_jax.models.hf_files import Spec
from longrl_jax.sharding import rules


@dataclasses.dataclass(frozen=True)
class Merged:
    """A stacked kernel that is exported as kernel + scale * a @ b, computed in float32 and a layer
    at a time."""

    kernel: Any
    """[L, i, o]"""
    a: Any
    """[L, i, r]"""
    b: Any
    """[L, r, o]"""
    scale: float

    def __len__(self) -> int:
        return len(self.kernel)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.kernel.shape

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(np.float32)


Leaf = jax.Array | jax.ShapeDtypeStruct | np.ndarray


@dataclasses.dataclass(frozen=True)
class Param:
    """One row of a table."""

    hf: str
    """Hugging Face name; with "{i}" one array a layer, which ours stacks on dim 0."""
    dims: tuple[str | None, ...]
    """Logical name of every dimension of the JAX array, without the layer dim."""
    transpose: tuple[int, ...] | None = None
    """Permutation from the HF array to the JAX array (its inverse is used on export)."""
    copy: str = ""
    """Second name that a file may have for the same array, and an engine wants (tied heads)."""


Table = Mapping[str, Param]


def by_path(state: nnx.State) -> dict[str, Leaf]:
    """Returns {JAX path: array} of a state, in the state's order."""
    return {".".join(map(str, path)): v.get_value() for path, v in nnx.to_flat_state(state)}


def with_arrays(state: nnx.State, arrays: Mapping[str, Leaf]) -> nnx.State:
    """Returns the state with every array replaced by the one of its path."""
    flat = [(p, v.replace(arrays[".".join(map(str, p))])) for p, v in nnx.to_flat_state(state)]
    return nnx.from_flat_state(flat)


def to_hf(
    params: nnx.State | Mapping[str, Leaf],
    table: Table,
    *,
    dtype_of: Callable[[str], np.dtype] | None = None,
    copies: Container[str] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (HF name, array on the host), so that a caller never holds two full copies.

    Arrays outside stacks come first, then layer after layer: whoever takes them (vLLM's loader
    waits for whole layers) buffers at most one layer. dtype_of says the type by HF name; without
    it arrays keep theirs. Sharded arrays are gathered one layer at a time. Of the second names in
    the table those in `copies` are yielded, too.
    """
    arrays: Mapping[str, Any] = by_path(params) if isinstance(params, nnx.State) else params
    check_same_keys(arrays, table)
    for path, i in _export_order(arrays, table):
        row, x = table[path], _to_host(arrays[path], i)
        if row.transpose is not None:
            x = x.transpose(np.argsort(row.transpose))
        for name in _names(row, i, copies):
            yield name, x if dtype_of is None else x.astype(dtype_of(name), copy=False)
        del x  # before the next one is gathered


def specs(
    arrays: Mapping[str, Leaf],
    table: Table,
    *,
    dtype_of: Callable[[str], np.dtype] | None = None,
    copies: Container[str] = (),
) -> Iterator[Spec]:
    """Yields name, type and shape of what to_hf yields, in its order; reads no array."""
    check_same_keys(arrays, table)
    for path, i in _export_order(arrays, table):
        row, x = table[path], arrays[path]
        shape = tuple(x.shape if i is None else x.shape[1:])
        if row.transpose is not None:
            shape = tuple(shape[d] for d in np.argsort(row.transpose))
        for name in _names(row, i, copies):
            yield Spec(name, np.dtype(dtype_of(name) if dtype_of else x.dtype), shape)


def check(
    abstract: nnx.State, table: Table, hf: Mapping[str, Any], *, ignored: tuple[str, ...] = ()
) -> dict[str, list[str]]:
    """Returns the HF names of every parameter of a checkpoint that fits; reads no number.

    hf: name -> array, or what has the shape and dtype of one. A tensor that is missing, or left
    over and of none of the patterns in `ignored`, a wrong shape and whole numbers raise ValueError.
    """
    want = by_path(abstract)
    check_same_keys(want, table)
    names = {
        path: [row.hf.format(i=i) for i in range(want[path].shape[0] if stacked(row) else 1)]
        for path, row in table.items()
    }
    copies = {row.copy for row in table.values()}
    _check_names(names, hf, ignored=lambda name: name in copies or matches(name, ignored))
    for path, row in table.items():
        shape = tuple(want[path].shape[1:] if stacked(row) else want[path].shape)
        for name in names[path]:
            _check_kind(name, path, row, hf[name], shape)
        if row.copy in hf and hf[row.copy].shape != hf[row.hf].shape:
            raise copy_differs(row.copy, row.hf)
    return names


def from_hf(
    abstract: nnx.State,
    table: Table,
    hf: Mapping[str, Any],
    *,
    ignored: tuple[str, ...] = (),
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (JAX path, host array of the model's type), one stacked parameter at a time.

    All is checked as in `check` before the first array is read; a NaN, an infinity or a copy that
    differs raise ValueError.
    """
    names = check(abstract, table, hf, ignored=ignored)
    for path, x in by_path(abstract).items():
        yield path, _read(table[path], names[path], hf, (slice(None),) * x.ndim, x)


def placed(
    abstract: nnx.State,
    table: Table,
    hf: Mapping[str, Any],
    places: Mapping[str, jax.sharding.Sharding],
    *,
    ignored: tuple[str, ...] = (),
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (JAX path, array on its devices), otherwise as from_hf.

    This process reads what its own devices hold, each part once, and the host holds one part at a
    time.
    """
    names = check(abstract, table, hf, ignored=ignored)
    for path, x in by_path(abstract).items():
        index_of = places[path].addressable_devices_indices_map(x.shape)
        sharing: dict[str, list[jax.Device]] = {}  # a slice is no key before Python 3.12
        for device, index in index_of.items():
            sharing.setdefault(repr(index), []).append(device)
        parts: dict[jax.Device, jax.Array] = {}
        for devices in sharing.values():
            part = _read(table[path], names[path], hf, index_of[devices[0]] or (), x)
            for device in devices:
                parts[device] = jax.block_until_ready(jax.device_put(part, device))
        yield (
            path,
            jax.make_array_from_single_device_arrays(
                x.shape, places[path], [parts[device] for device in index_of]
            ),
        )


def shardings(
    abstract: nnx.State | Mapping[str, Leaf], table: Table, mesh: Mesh
) -> dict[str, NamedSharding]:
    """Returns {JAX path: sharding} from the logical dims of the table.

    A dim that does not divide by its mesh axes stays whole on every device (a vocabulary of odd
    size, for example), since a stored array cannot be split unevenly.
    """
    out = {}
    arrays: Mapping[str, Any] = by_path(abstract) if isinstance(abstract, nnx.State) else abstract
    for path, x in arrays.items():
        dims = (None,) * (x.ndim - len(table[path].dims)) + table[path].dims  # None: layers
        even = [
            dim if size % _num_parts(mesh, dim) == 0 else None
            for size, dim in zip(x.shape, dims, strict=True)
        ]
        out[path] = NamedSharding(mesh, rules.spec(*even))
    return out


def matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a tensor's name has the form of one of the patterns ("*" stands for anything)."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def stacked(row: Param) -> bool:
    """Whether the row stands for one array a layer."""
    return "{i}" in row.hf


def copy_differs(copy: str, first: str) -> ValueError:
    """Returns the error for a second name that holds another array than the first."""
    return ValueError(
        f"{copy} differs from {first}, but config.json says that they are one "
        "(tie_word_embeddings); does config.json belong to these tensors?"
    )


def check_finite(name: str, x: np.ndarray) -> None:
    """Raises ValueError for a NaN or an infinity."""
    if not np.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinite numbers; the file is damaged")


def check_same_keys(arrays: Mapping[str, Leaf], table: Table) -> None:
    """Raises ValueError for a parameter without a row, or a row without a parameter."""
    if diff := sorted(set(arrays) ^ set(table)):
        raise ValueError(f"parameter table and model disagree on {diff}")


def to_host(x: Any) -> np.ndarray:
    """Returns an array on the host, whole. Where other processes hold parts of it, all processes
    must call this, and no device holds more than a layer of a stack at a time."""
    if not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated:
        return np.asarray(x)
    if x.ndim < 3:
        return _to_host(x)
    out = np.empty(x.shape, x.dtype)
    for i, part in enumerate(out):
        part[...] = _to_host(x, i)
    return out


def _read(
    row: Param, names: list[str], hf: Mapping[str, Any], index: tuple[slice, ...], want: Leaf
) -> np.ndarray:
    """Reads a part of a parameter, whose index is in the dims of the JAX array."""
    index = tuple(slice(*i.indices(size)) for i, size in zip(index, want.shape, strict=True))
    out = np.empty([i.stop - i.start for i in index], want.dtype)
    parts: Any = [out]
    if stacked(row):
        names, index, parts = names[index[0]], index[1:], out
    if row.transpose is not None:
        index = tuple(index[d] for d in np.argsort(row.transpose))
    for part, name in zip(parts, names, strict=True):
        x = hf[name][index]
        part[...] = x if row.transpose is None else x.transpose(row.transpose)
        check_finite(name, part)  # first: a NaN differs from itself
        if row.copy in hf and not np.array_equal(hf[row.copy][index], x):
            raise copy_differs(row.copy, row.hf)
    return out


def _to_host(x: Any, i: int | None = None) -> np.ndarray:
    if isinstance(x, Merged):
        place = x.kernel.sharding if isinstance(x.kernel, jax.Array) else None
        mesh = place.mesh if isinstance(place, NamedSharding) else None
        return np.asarray(_merge(mesh)(x.kernel, x.a, x.b, x.scale, i))
    if isinstance(x, jax.Array) and isinstance(x.sharding, NamedSharding):
        x = _gather(x.sharding.mesh, i is not None)(x, i or 0)
    elif i is not None:
        x = x[i]
    return np.asarray(x)


@functools.cache
def _gather(mesh: Mesh, layer: bool) -> Callable[[jax.Array, int], jax.Array]:
    """Returns a program that puts x, or its i-th layer, whole on every device of the mesh."""

    def take(x: jax.Array, i: int) -> jax.Array:
        return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if layer else x

    return jax.jit(take, out_shardings=NamedSharding(mesh, rules.spec()))


@functools.cache
def _merge(mesh: Mesh | None) -> Callable[..., jax.Array]:
    """Returns a program that computes the i-th layer of a Merged, whole on every device."""

    def merge(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: float, i: int) -> jax.Array:
        layer = functools.partial(jax.lax.dynamic_index_in_dim, index=i, keepdims=False)
        # highest: the learner's sums are float32's, and a GPU would take TF32 for these
        change = jnp.matmul(layer(a), layer(b), precision=jax.lax.Precision.HIGHEST)
        return layer(kernel).astype(jnp.float32) + scale * change

    whole = None if mesh is None else NamedSharding(mesh, rules.spec())
    return jax.jit(merge, out_shardings=whole)


def _export_order(arrays: Mapping[str, Leaf], table: Table) -> Iterator[tuple[str, int | None]]:
    """Yields (JAX path, layer of a stack) in the order of to_hf."""
    for path, row in table.items():
        if not stacked(row):
            yield path, None
    for paths in _stacks(table).values():
        for i in range(len(arrays[paths[0]])):
            for path in paths:
                yield path, i


def _names(row: Param, i: int | None, copies: Container[str]) -> list[str]:
    return [row.hf.format(i=i), *([row.copy] if row.copy in copies else [])]


def _stacks(table: Table) -> dict[str, list[str]]:
    """Groups the stacked paths by what precedes the layer number in their HF names."""
    groups: dict[str, list[str]] = {}
    for path, row in table.items():
        if stacked(row):
            groups.setdefault(row.hf.partition("{i}")[0], []).append(path)
    return groups


def _num_parts(mesh: Mesh, dim: str | None) -> int:
    (axis,) = rules.spec(dim)
    axes = (axis,) if isinstance(axis, str) else axis or ()
    return math.prod(mesh.shape[a] for a in axes)


def _check_kind(name: str, path: str, row: Param, x: Any, want: tuple[int, ...]) -> None:
    shape = tuple(x.shape)
    if row.transpose is not None and len(shape) == len(row.transpose):
        shape = tuple(shape[d] for d in row.transpose)
    if shape != want:
        raise ValueError(
            f"{name} -> {path}: the file has {shape} (in our layout), the model wants {want}; "
            "does config.json belong to these tensors?"
        )
    if not jax.numpy.issubdtype(x.dtype, jax.numpy.floating):
        raise ValueError(
            f"{name} holds {x.dtype} numbers (quantized?); the model wants floating-point ones, "
            "take the unquantized checkpoint"
        )
    if x.dtype.itemsize > 4:
        raise ValueError(
            f"{name} holds {x.dtype} numbers, which an export could not give back: parameters are "
            "float32; save the checkpoint in that"
        )


def _check_names(
    names: Mapping[str, list[str]], hf: Mapping[str, Any], ignored: Callable[[str], bool]
) -> None:
    owner: dict[str, str] = {}
    for path, wanted in names.items():
        if missing := [n for n in wanted if n not in hf]:
            raise ValueError(f"checkpoint lacks {missing[0]} (for {path}; {len(missing)} missing)")
        for name in wanted:
            if name in owner:
                raise ValueError(f"{name} stands in two rows of the table: {owner[name]}, {path}")
            owner[name] = path
    left = sorted(n for n in hf if n not in owner and not ignored(n))
    if left:
        raise ValueError(f"{len(left)} checkpoint tensors have no row in the table, e.g. {left[0]}")
