"""The embedding store: what is read is what was written, whatever died, and within its bound."""

import json
import os
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from tiny_qwen2 import ROOT, child

from rollout_bridge import VideoStore, entry_key, weights_digest
from rollout_bridge.video_cache import HEADER_BYTES, MAGIC, verify

BIG = 2**40


def numbers(seed: int, rows: int = 8, dtype=np.float32) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(rows, 4)).astype(dtype)


def put(store: VideoStore, key: str, x: np.ndarray, chunk: int = 3) -> None:
    with store.writer(key, x.shape, x.dtype) as writer:
        for start in range(0, len(x), chunk):
            writer.write(x[start : start + chunk])


def entry_bytes(x: np.ndarray) -> int:
    return HEADER_BYTES + x.nbytes


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_a_round_trip_keeps_every_bit(tmp_path, dtype):
    store, x = VideoStore(tmp_path, BIG), numbers(0, dtype=dtype)
    assert store.get("a") is None
    put(store, "a", x)
    for got in (store.get("a"), store.get("a"), VideoStore(tmp_path, BIG).get("a")):
        assert isinstance(got, np.memmap)
        assert (got.dtype, got.shape) == (x.dtype, x.shape)
        assert got.tobytes() == x.tobytes()
        with pytest.raises(ValueError, match="read-only"):
            got[0] = 0
    assert store.num_bytes() == entry_bytes(x)
    assert verify(tmp_path / "a.emb")


def test_chunks_in_any_layout_are_written_in_order(tmp_path):
    store, x = VideoStore(tmp_path, BIG), numbers(0)
    with store.writer("a", x.shape, x.dtype) as writer:
        writer.write(np.asfortranarray(x[:5]))
        writer.write(x[5:][::-1][::-1])
    np.testing.assert_array_equal(store.get("a"), x)


def test_an_entry_of_the_wrong_number_of_rows_is_refused(tmp_path):
    store, x = VideoStore(tmp_path, BIG), numbers(0)
    for rows in (7, 9):
        with (
            pytest.raises(ValueError, match=f"8 rows were written of {rows}"),
            store.writer("a", (rows, 4), x.dtype) as writer,
        ):
            writer.write(x)
    assert store.get("a") is None
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("chunk", [np.zeros((1, 5), np.float32), np.zeros((1, 4), np.float16)])
def test_a_chunk_that_does_not_fit_is_refused_and_nothing_is_kept(tmp_path, chunk):
    store = VideoStore(tmp_path, BIG)
    with (
        pytest.raises(ValueError, match="does not fit the entry float32"),
        store.writer("a", (8, 4), np.float32) as writer,
    ):
        writer.write(numbers(0)[:2])
        writer.write(chunk)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_a_store_without_room_is_refused(tmp_path):
    with pytest.raises(ValueError, match="max_bytes=0"):
        VideoStore(tmp_path, 0)


def test_keys_differ_with_everything_that_changes_the_data():
    base = ("video", "weights", "projected", np.float32, (8, 4))
    others = [
        ("other", *base[1:]),
        ("video", "other", *base[2:]),
        ("video", "weights", "packed", *base[3:]),
        (*base[:3], ml_dtypes.bfloat16, (8, 4)),
        (*base[:4], (4, 8)),
        ("videow", "eights", *base[2:]),
    ]
    keys = {entry_key(*parts) for parts in [base, *others]}
    assert len(keys) == 7
    assert entry_key("video", "weights", "projected", "float32", [8, 4]) in keys
    assert all(set(key) <= set("0123456789abcdef") for key in keys)


def test_a_digest_of_weights_changes_with_names_shapes_types_and_bytes():
    x = numbers(0)
    base = weights_digest({"a": x, "b": x[0]})
    assert weights_digest({"b": x[0].copy(), "a": np.asfortranarray(x)}) == base
    changed = x.copy()
    changed[3, 2] = np.nextafter(changed[3, 2], 9)
    others = [
        {"a": x},
        {"a": x, "c": x[0]},
        {"a": x[0], "b": x},
        {"a": changed, "b": x[0]},
        {"a": x.reshape(4, 8), "b": x[0]},
        {"a": x.view(np.int32), "b": x[0]},
        {"a": x, "b": x[0], "c": np.zeros(0, np.float32)},
    ]
    digests = {weights_digest(arrays) for arrays in others}
    assert len(digests) == 7
    assert base not in digests
    assert weights_digest({"a": x.astype(ml_dtypes.bfloat16)}) not in digests


DAMAGES = {
    "cut": lambda data: data[:-1],
    "longer": lambda data: data + b"x",
    "empty": lambda data: b"",
    "half a header": lambda data: data[: HEADER_BYTES // 2],
    "another magic": lambda data: b"X" + data[1:],
    "not JSON": lambda data: data[: len(MAGIC)] + b"!" + data[len(MAGIC) + 1 :],
    "zeroed header": lambda data: MAGIC.ljust(HEADER_BYTES, b"\0") + data[HEADER_BYTES:],
    "unknown type": lambda data: data.replace(b'"float32"', b'"float99"'),
    "no shape": lambda data: data.replace(b'"shape"', b'"shame"'),
    "another shape": lambda data: data.replace(b"[8, 4]", b"[8, 5]"),
    "text as shape": lambda data: data.replace(b"[8, 4]", b'["8"] '),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_counts_as_absent_and_can_be_written_again(tmp_path, damage):
    x = numbers(0)
    put(VideoStore(tmp_path, BIG), "a", x)
    path = tmp_path / "a.emb"
    damaged = DAMAGES[damage](path.read_bytes())
    assert damaged != path.read_bytes()
    path.write_bytes(damaged)
    assert not verify(path)
    store = VideoStore(tmp_path, BIG)
    assert store.get("a") is None
    assert not path.exists()
    put(store, "a", x)
    np.testing.assert_array_equal(store.get("a"), x)


def test_verify_finds_a_flipped_bit(tmp_path):
    put(VideoStore(tmp_path, BIG), "a", numbers(0))
    path = tmp_path / "a.emb"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert not verify(path)


def test_problems_are_named_and_nothing_is_touched(tmp_path):
    store, x = VideoStore(tmp_path, BIG), numbers(0)
    put(store, "a", x)
    path, about = tmp_path / "a.emb", ((8, 4), np.float32)
    whole, before = path.read_bytes(), path.stat().st_mtime_ns
    assert store.problem("a", *about, read=True) is None
    assert store.problem("b", *about) == "it is missing"
    assert store.problem("a", (8, 2), np.float32) == "it holds float32[8, 4], not float32[8, 2]"
    assert "not float16[8, 4]" in store.problem("a", (8, 4), np.float16)
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert store.problem("a", *about) is None  # its header says nothing of that
    assert store.problem("a", *about, read=True) == "its checksum is wrong"
    for damage in (whole[:-1], whole[:100], b"x" + whole[1:]):
        path.write_bytes(damage)
        assert store.problem("a", *about) == "its header or its size is damaged"
        assert path.read_bytes() == damage
    os.utime(path, ns=(before, before))
    store.problem("a", *about, read=True)
    assert path.stat().st_mtime_ns == before


def test_the_least_recently_used_entry_goes_first(tmp_path):
    x = numbers(0)
    store = VideoStore(tmp_path, 3 * entry_bytes(x))
    for key in "abc":
        put(store, key, x)
        store.get(key)
    store.get("a")
    put(store, "d", x)  # b is the oldest now
    assert [key for key in "abcd" if store.get(key) is not None] == ["a", "c", "d"]
    assert store.num_bytes() == 3 * entry_bytes(x)


def test_nothing_alive_is_evicted(tmp_path):
    x = numbers(0)
    store = VideoStore(tmp_path, entry_bytes(x))
    put(store, "a", x)
    rows = np.asarray(store.get("a"))[2:4]  # a view of a view keeps the entry
    put(store, "b", x)  # written and not yet asked for: kept, though over the bound
    put(store, "c", x)
    assert sorted(path.stem for path in tmp_path.glob("*.emb")) == ["a", "b", "c"]
    np.testing.assert_array_equal(rows, x[2:4])
    del rows
    store.close()
    put(store, "d", x)
    assert [path.stem for path in tmp_path.glob("*.emb")] == ["d"]


HOLD = """
import sys
from rollout_bridge import VideoStore
x = VideoStore(sys.argv[1], 1).get("a")
sys.stdout.write(x.tobytes().hex() + "\\n")
sys.stdout.flush()
sys.stdin.read()
sys.stdout.write(x.tobytes().hex() + "\\n")
"""


def start(code: str, *args) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, args)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )


def test_an_entry_is_shared_with_another_process_and_kept_while_that_reads(tmp_path):
    x = numbers(0)
    put(VideoStore(tmp_path, BIG), "a", x)
    reader = start(HOLD, tmp_path)
    assert bytes.fromhex(reader.stdout.readline()) == x.tobytes()
    store = VideoStore(tmp_path, 1)
    put(store, "b", x)
    store.close()
    put(store, "c", x)  # evicts b, but not a
    assert sorted(path.stem for path in tmp_path.glob("*.emb")) == ["a", "c"]
    out, _ = reader.communicate("")
    assert bytes.fromhex(out) == x.tobytes()
    put(store, "d", x)
    assert not (tmp_path / "a.emb").exists()


WRITE_HALF = """
import sys, time
import numpy as np
from rollout_bridge import VideoStore
writer = VideoStore(sys.argv[1], 2**40).writer("a", (4096, 256), np.float32)
for _ in range(2048):
    writer.write(np.ones((1, 256), np.float32))
sys.stdout.write("half\\n")
sys.stdout.flush()
time.sleep(600)
"""


def test_what_a_killed_writer_left_is_never_read_and_is_swept(tmp_path):
    writer = start(WRITE_HALF, tmp_path)
    assert writer.stdout.readline() == "half\n"
    (partial,) = tmp_path.glob("*.partial")
    assert partial.stat().st_size > 2**20
    store = VideoStore(tmp_path, BIG)  # the writer lives: its file stays
    assert partial.exists()
    assert store.get("a") is None
    assert store.num_bytes() == 0
    writer.send_signal(signal.SIGKILL)
    assert writer.wait() == -signal.SIGKILL
    assert store.get("a") is None
    store = VideoStore(tmp_path, BIG)
    assert not partial.exists()
    put(store, "a", numbers(0))
    np.testing.assert_array_equal(store.get("a"), numbers(0))


WRITE_ALL = """
import sys
import numpy as np
from rollout_bridge import VideoStore
store = VideoStore(sys.argv[1], 5 * (4096 + 64 * 16))
for key in range(40):
    x = store.get(str(key))
    if x is None:
        with store.writer(str(key), (64, 4), np.float32) as writer:
            writer.write(np.full((64, 4), key, np.float32))
        x = store.get(str(key))
    assert (x == key).all() and x.shape == (64, 4), (key, x)
"""


def test_processes_that_write_and_evict_the_same_entries_do_not_disturb_each_other(tmp_path):
    writers = [start(WRITE_ALL, tmp_path) for _ in range(3)]
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    paths = list(tmp_path.glob("*.emb"))
    assert 1 <= len(paths) <= 5 + 3  # each process holds one
    assert all(verify(path) for path in paths)
    assert not list(tmp_path.glob("*.partial"))


def test_a_writer_that_fails_to_publish_leaves_nothing(tmp_path):
    """A file size limit stands for the full disk."""
    code = """
import resource, signal, sys
import numpy as np
from rollout_bridge import VideoStore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
store = VideoStore(sys.argv[1], 2**40)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, 6000))
try:
    with store.writer("a", (1000, 4), np.float32) as writer:
        writer.write(np.ones((1000, 4), np.float32))
except OSError as error:
    sys.stdout.write(str(error))
"""
    done = child(code, tmp_path)
    assert f"{tmp_path} cannot be written (File too large); " in done.stdout, done.stderr
    assert "lower store.max_gib" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_the_header_says_what_the_file_holds(tmp_path):
    put(VideoStore(tmp_path, BIG), "a", numbers(0))
    header = json.loads((tmp_path / "a.emb").read_bytes()[len(MAGIC) : HEADER_BYTES])
    assert (header["dtype"], header["shape"]) == ("float32", [8, 4])
