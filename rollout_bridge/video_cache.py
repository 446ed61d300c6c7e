"""The store of media embeddings: written once by whoever encodes first, mapped by everybody else.

An entry is one file: a fixed header (magic, sizes, dtype, digest of the data), then the array. It
is written under a temporary name, synced and renamed, so that a name with the right ending is a
whole entry whatever died when. Entries are content-addressed (`entry_key`) and never change.
Several processes may share a folder; numpy only.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from longrl_jax.platform import disk_error

MAGIC = b"longrl-embedding-1\n"
HEADER_BYTES = 4096
"""A page, so that the data behind it is aligned for a memory map."""
SUFFIX = ".emb"
PARTIAL = ".partial"
MISSING = "it is missing"
"""What VideoStore.problem says of an entry that is not there."""
WAY_OUT = "free some space, lower store.max_gib, or set store.path to a folder on another disk"


def entry_key(
    media_key: str, weights_digest: str, stage: str, dtype: Any, shape: Sequence[int] = ()
) -> str:
    """Returns the name of what `stage` with these weights makes of this medium."""
    text = json.dumps([media_key, weights_digest, stage, str(np.dtype(dtype)), list(shape)])
    return hashlib.sha256(text.encode()).hexdigest()


def weights_digest(
    arrays: Mapping[str, Any],
    *,
    about: str = "",
    to_host: Callable[[Any], np.ndarray] = np.asarray,
) -> str:
    """Returns a digest of names, shapes, dtypes and bytes; the mapping's order does not count.

    about: what else the numbers depend on, such as sizes that no array shows. to_host: fetches an
    array; arrays are fetched in the order of their names.
    """
    digest = hashlib.sha256(about.encode())
    for name in sorted(arrays):
        array = to_host(arrays[name])
        digest.update(json.dumps([name, str(array.dtype), list(array.shape)]).encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        del array
    return digest.hexdigest()


class VideoStore:
    """A folder of embeddings of at most max_bytes; the least recently used go first.

    An entry is never evicted while an array of it is alive, in any process: the array holds a lock
    on the file. If everything is in use, the bound gives way.
    """

    def __init__(self, path: Path | str, max_bytes: int):
        if max_bytes <= 0:
            raise ValueError(f"max_bytes={max_bytes} of the embedding store must be positive")
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / "lock").touch()
        except OSError as error:
            raise disk_error(error, self.path, WAY_OUT) from error
        self.max_bytes = max_bytes
        self._fresh: dict[str, np.ndarray] = {}  # written here and not yet asked for
        self._sweep_partials()

    def get(self, key: str) -> np.ndarray | None:
        """Returns the entry as a read-only memory map, or None.

        An entry whose header does not fit the file (a disk that lost it) is deleted: None.
        """
        if key in self._fresh:
            return self._fresh.pop(key)
        with self._exclusive():
            return self._map(key)

    def problem(
        self, key: str, shape: Sequence[int], dtype: Any, *, read: bool = False
    ) -> str | None:
        """Says what is wrong with an entry, None if nothing is; touches and deletes nothing.

        read: reads its data, too, and compares their checksum.
        """
        path = self._entry(key)
        try:
            with path.open("rb") as file:
                header = _read_header(file.fileno())
            if header is None:
                return "its header or its size is damaged"
            if header != (np.dtype(dtype), tuple(shape)):
                return f"it holds {header[0]}{list(header[1])}, not {np.dtype(dtype)}{list(shape)}"
            return "its checksum is wrong" if read and not verify(path) else None
        except FileNotFoundError:
            return MISSING
        except OSError as error:  # a sector that cannot be read
            return f"it cannot be read ({error.strerror})"

    def writer(self, key: str, shape: Sequence[int], dtype: Any) -> "EntryWriter":
        """Opens an entry for writing in chunks of its first dimension.

        What this process has written cannot be evicted before its first `get`, or `close`.
        """
        return EntryWriter(self, key, tuple(shape), np.dtype(dtype))

    def num_bytes(self) -> int:
        """Size of all entries, of all processes."""
        return sum(size for _, _, size in self._entries())

    def close(self) -> None:
        """Lets go of entries that were written and never asked for."""
        self._fresh.clear()

    def publish(self, key: str, partial: Path, file: BinaryIO) -> None:
        """Takes a finished file in, and evicts what is over the bound; for EntryWriter."""
        with self._exclusive():
            os.replace(partial, self._entry(key))  # a second writer's file holds the same bytes
            _sync_folder(self.path)
            fcntl.flock(file, fcntl.LOCK_SH)
            fresh = self._map(key)
            assert fresh is not None
            self._fresh[key] = fresh
            self._evict()

    def _map(self, key: str) -> np.ndarray | None:
        path = self._entry(key)
        try:
            fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return None
        header = _read_header(fd)
        if header is None:
            os.close(fd)
            path.unlink()
            return None
        now = time.time_ns()  # the kernel's own "now" has steps of 4 ms
        os.utime(path, ns=(now, now))  # the order of eviction
        fcntl.flock(fd, fcntl.LOCK_SH)
        dtype, shape = header
        array = np.memmap(path, dtype, "r", offset=HEADER_BYTES, shape=shape)
        weakref.finalize(array, os.close, fd).atexit = False  # views keep `array` alive
        return array

    def _evict(self) -> None:
        entries = sorted(self._entries())
        total = sum(size for _, _, size in entries)
        for _, path, size in entries:
            if total <= self.max_bytes:
                return
            if not _is_locked(path):
                path.unlink()
                total -= size

    def _entries(self) -> list[tuple[int, Path, int]]:
        """(last use in ns, path, bytes) of every entry."""
        entries = []
        for path in self.path.glob(f"*{SUFFIX}"):
            with contextlib.suppress(FileNotFoundError):  # evicted by another process just now
                stat = path.stat()
                entries.append((stat.st_mtime_ns, path, stat.st_size))
        return entries

    def _entry(self, key: str) -> Path:
        return self.path / f"{key}{SUFFIX}"

    def _sweep_partials(self) -> None:
        """Deletes what died writers left; a living writer holds its file's lock."""
        with self._exclusive():
            for path in self.path.glob(f"*{PARTIAL}"):
                if not _is_locked(path):
                    path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _exclusive(self) -> Iterator[None]:
        """One process at a time looks up, publishes or evicts; the kernel frees a dead one's."""
        with (self.path / "lock").open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


class EntryWriter:
    """Takes chunks and publishes them as one entry; as a context it publishes on success.

    with store.writer(key, (M, C), np.float32) as writer:
        for chunk in chunks:
            writer.write(chunk)
    """

    def __init__(self, store: VideoStore, key: str, shape: tuple[int, ...], dtype: np.dtype):
        self._store, self._key, self._shape, self._dtype = store, key, shape, dtype
        self._rows = 0
        self._digest = hashlib.sha256()
        self._partial = store.path / f"{key}.{uuid.uuid4().hex}{PARTIAL}"
        with store._exclusive():  # so that no sweep sees the file before its lock
            self._file = self._partial.open("wb")
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._file.seek(HEADER_BYTES)

    def write(self, chunk: np.ndarray) -> None:
        """Appends rows, in order."""
        if chunk.shape[1:] != self._shape[1:] or chunk.dtype != self._dtype:
            raise ValueError(
                f"a chunk of {chunk.dtype}{list(chunk.shape)} does not fit the entry "
                f"{self._dtype}{list(self._shape)}"
            )
        data = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        try:
            self._file.write(data)
        except OSError as error:
            raise self._given_up(error) from error
        self._digest.update(data)
        self._rows += chunk.shape[0]

    def publish(self) -> None:
        """Makes the entry visible; raises ValueError if rows are missing or too many."""
        if self._rows != self._shape[0]:
            self.discard()
            raise ValueError(f"{self._rows} rows were written of {self._shape[0]}; nothing is kept")
        header = {
            "dtype": str(self._dtype),
            "shape": list(self._shape),
            "sha256": self._digest.hexdigest(),
        }
        text = MAGIC + json.dumps(header).encode()
        assert len(text) < HEADER_BYTES
        try:
            self._file.seek(0)
            self._file.write(text.ljust(HEADER_BYTES))
            self._file.flush()
            os.fsync(self._file.fileno())
            self._store.publish(self._key, self._partial, self._file)
        except OSError as error:
            raise self._given_up(error) from error
        except BaseException:
            self.discard()
            raise
        self._file.close()

    def discard(self) -> None:
        """Drops what was written."""
        self._partial.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # what a full disk did not take goes with the file
            self._file.close()

    def _given_up(self, error: OSError) -> OSError:
        said = disk_error(error, self._store.path, WAY_OUT)
        self.discard()
        return said

    def __enter__(self) -> "EntryWriter":
        return self

    def __exit__(self, error_type: Any, error: Any, trace: Any) -> None:
        if error_type is None:
            self.publish()
        else:
            self.discard()


def verify(path: Path) -> bool:
    """Reads an entry's data and says whether its digest is that of the header."""
    with path.open("rb") as file:
        if _read_header(file.fileno()) is None:
            return False
        header = json.loads(os.pread(file.fileno(), HEADER_BYTES, 0)[len(MAGIC) :])
        file.seek(HEADER_BYTES)
        return hashlib.file_digest(file, "sha256").hexdigest() == header["sha256"]


def _read_header(fd: int) -> tuple[np.dtype, tuple[int, ...]] | None:
    """Returns dtype and shape; None if the header is not ours or the file has another size."""
    text = os.pread(fd, HEADER_BYTES, 0)
    if len(text) < HEADER_BYTES or not text.startswith(MAGIC):
        return None
    try:
        header = json.loads(text[len(MAGIC) :])
        name, shape = header["dtype"], tuple(map(int, header["shape"]))
        dtype = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
        size = math.prod(shape) * dtype.itemsize
    except (ValueError, KeyError, TypeError):  # damaged: not JSON, or not what we write
        return None
    return (dtype, shape) if os.fstat(fd).st_size == HEADER_BYTES + size else None


def _is_locked(path: Path) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return True  # gone already
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _sync_folder(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
