"""Folders of tensor files: what is refused, and what a written one looks like to others."""

import json
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.torch
import torch

from longrl_jax.models import hf_files

INDEX = "model.safetensors.index.json"
TYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "i64": torch.int64,
    "i32": torch.int32,
    "i16": torch.int16,
    "i8": torch.int8,
    "u8": torch.uint8,
    "bool": torch.bool,
}


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def write(folder, tensors, **kwargs):
    specs = [hf_files.Spec(name, x.dtype, x.shape) for name, x in tensors.items()]
    hf_files.write_tensors(folder, specs, tensors.items(), **kwargs)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def two_files(tmp_path):
    """A folder of two files with an index: a and b in the first, c in the second."""
    first = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    second = {"c": torch.zeros(5, dtype=torch.int64)}
    safetensors.torch.save_file(first, tmp_path / "first.safetensors")
    safetensors.torch.save_file(second, tmp_path / "second.safetensors")
    names = {"a": "first.safetensors", "b": "first.safetensors", "c": "second.safetensors"}
    write_index(tmp_path, names)
    return tmp_path


@pytest.mark.parametrize("kind", TYPES)
def test_every_type_is_read_and_written_byte_for_byte(tmp_path, kind):
    x = torch.arange(12).reshape(3, 4).to(TYPES[kind])
    safetensors.torch.save_file({"x": x}, tmp_path / "model.safetensors")
    tensors = hf_files.open_tensors(tmp_path)
    assert tensors["x"][...].tobytes() == raw(x)
    assert tensors["x"][...].dtype == tensors["x"].dtype
    write(tmp_path / "out", {"x": tensors["x"][...]})
    again = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")["x"]
    assert (again.dtype, again.shape, raw(again)) == (x.dtype, x.shape, raw(x))


def test_an_index_joins_its_files(two_files):
    tensors = hf_files.open_tensors(two_files)
    assert sorted(tensors) == ["a", "b", "c"] and len(tensors) == 3
    np.testing.assert_array_equal(tensors["a"][...], [[0, 1, 2], [3, 4, 5]])
    assert tensors["b"].dtype == ml_dtypes.bfloat16
    assert tensors["c"].shape == (5,)


def test_names_of_a_subfolder_start_with_it(two_files):
    tensors = hf_files.open_tensors(two_files.parent, (two_files.name, "absent"))
    assert sorted(tensors) == [f"{two_files.name}/{name}" for name in "abc"]


@pytest.mark.parametrize("damage", ["empty", "pickle", "cut", "text"])
def test_a_broken_file_is_refused_by_name(tmp_path, damage):
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({"x": torch.ones(100)}, path)
    whole = path.read_bytes()
    pickle = b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94."
    path.write_bytes(
        {"empty": b"", "pickle": pickle, "cut": whole[:-4], "text": b"<html>404</html>"}[damage]
    )
    with pytest.raises(ValueError, match="model.safetensors is not a whole safetensors file"):
        hf_files.open_tensors(tmp_path)


@pytest.mark.parametrize(
    "name", ["../a.safetensors", "/a.safetensors", "sub/a.safetensors", "..", "pytorch_model.bin"]
)
def test_an_index_names_safetensors_files_beside_it_only(two_files, name):
    write_index(two_files, {"a": "first.safetensors", "b": name})
    with pytest.raises(ValueError, match=f"names '{name}', no safetensors file beside it"):
        hf_files.open_tensors(two_files)


def test_a_missing_file_is_refused_by_name(two_files):
    (two_files / "second.safetensors").unlink()
    with pytest.raises(ValueError, match="second.safetensors is missing"):
        hf_files.open_tensors(two_files)


def test_a_tensor_that_only_the_index_knows_is_refused(two_files):
    write_index(two_files, {"a": "first.safetensors", "c": "first.safetensors"})
    with pytest.raises(ValueError, match="first.safetensors lacks c"):
        hf_files.open_tensors(two_files)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (b"{}", "has no weight_map"),
        (b'{"weight_map": ["a"]}', "has no weight_map"),
        (b'{"weight_map": {"a": 1}}', "names 1, no safetensors file"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"{", "is not valid JSON"),
        (b"\xff\xfe", "is not valid JSON"),
    ],
    ids=repr,
)
def test_a_broken_index_is_refused_by_name(two_files, text, named):
    (two_files / INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=named) as error:
        hf_files.open_tensors(two_files)
    assert INDEX in str(error.value)


def test_a_type_we_do_not_read_is_refused_by_name(tmp_path):
    x = torch.ones(4).to(torch.float8_e4m3fn)
    safetensors.torch.save_file({"scaled": x}, tmp_path / "model.safetensors")
    tensors = hf_files.open_tensors(tmp_path)
    for read in (lambda x: x.dtype, lambda x: x[...]):
        with pytest.raises(ValueError, match="scaled has type F8_E4M3; we read F64"):
            read(tensors["scaled"])


def test_pickles_are_not_read(tmp_path):
    torch.save({"x": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    torch.save({"x": torch.ones(2)}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="holds no safetensors files"):
        hf_files.open_tensors(tmp_path)


def test_shards_are_bounded_and_the_index_names_them(tmp_path):
    """Tensors of 40, 40, 40, 400 and 4 bytes in files of at most 100."""
    sizes = {"a": 10, "b": 10, "c": 10, "large": 100, "d": 1}
    tensors = {name: np.full(size, i, np.float32) for i, (name, size) in enumerate(sizes.items())}
    write(tmp_path, tensors, shard_size_bytes=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [f.name for f in files] == [f"model-0000{i}-of-00004.safetensors" for i in range(1, 5)]
    assert [sorted(safetensors.torch.load_file(f)) for f in files] == [
        ["a", "b"],
        ["c"],
        ["large"],
        ["d"],
    ]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 4 * sum(sizes.values())
    assert set(index["weight_map"]) == set(sizes)
    assert not list(tmp_path.glob("*.partial"))
    again = hf_files.open_tensors(tmp_path)
    for name, x in tensors.items():
        np.testing.assert_array_equal(again[name][...], x)


def test_one_file_has_no_index(tmp_path):
    write(tmp_path, {"a": np.ones(3)})
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_writer_holds_two_tensors(tmp_path):
    alive: list[weakref.ref] = []
    most = 0

    def stream():
        nonlocal most
        for i in range(12):
            x = np.full(250, i, np.float32)  # 1,000 bytes
            alive.append(weakref.ref(x))
            most = max(most, sum(ref() is not None for ref in alive))
            yield f"x{i}", x
            del x

    specs = [hf_files.Spec(f"x{i}", np.dtype(np.float32), (250,)) for i in range(12)]
    hf_files.write_tensors(tmp_path, specs, stream(), shard_size_bytes=3000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    assert most <= 2  # one that is written, and the next


def test_tensors_of_several_types_are_aligned_for_torch(tmp_path):
    """Odd numbers of narrow ones come first by name; torch refuses a tensor that is not aligned."""
    counts = {"bool": 1, "bf16": 3, "i8": 5, "f32": 1, "f64": 1, "f16": 1, "i64": 1}
    want = {
        f"{i}{kind}": torch.ones(n).to(TYPES[kind]) for i, (kind, n) in enumerate(counts.items())
    }
    safetensors.torch.save_file(want, tmp_path / "theirs.safetensors")
    write_index(tmp_path, dict.fromkeys(want, "theirs.safetensors"))
    tensors = hf_files.open_tensors(tmp_path)
    write(tmp_path / "out", {name: tensors[name][...] for name in sorted(want)})
    got = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert {n: (x.dtype, raw(x)) for n, x in got.items()} == {
        n: (x.dtype, raw(x)) for n, x in want.items()
    }


def test_a_part_is_read_as_numpy_cuts_it_and_blocks_make_up_the_whole(tmp_path, monkeypatch):
    x = np.arange(7 * 5 * 2, dtype=np.float32).reshape(7, 5, 2)
    write(tmp_path, {"x": x, "flat": x.reshape(-1), "one": np.float32(3).reshape(())})
    tensors = hf_files.open_tensors(tmp_path)
    index = slice(2, 6), slice(1, 3), slice(0, 2)
    np.testing.assert_array_equal(tensors["x"][index], x[index])
    monkeypatch.setattr(hf_files, "BLOCK_SIZE_BYTES", 3 * 5 * 2 * 4)
    assert list(tensors["x"].blocks()) == [(slice(0, 3),), (slice(3, 6),), (slice(6, 7),)]
    for name, want in (("x", x), ("flat", x.reshape(-1))):
        blocks = [tensors[name][index] for index in tensors[name].blocks()]
        np.testing.assert_array_equal(np.concatenate(blocks), want)
    assert [tensors["one"][index] for index in tensors["one"].blocks()] == [3]


def test_a_view_is_written_as_it_looks(tmp_path):
    """The file holds rows; a transposed view without a copy would be written column by column."""
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T
    write(tmp_path, {"x": x})
    got = safetensors.torch.load_file(tmp_path / "model.safetensors")["x"].numpy()
    np.testing.assert_array_equal(got, [[0, 3], [1, 4], [2, 5]])


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "2", None])
def test_a_size_must_be_a_positive_whole_number(value):
    with pytest.raises(ValueError, match="here: hidden_size=.* must be a positive whole number"):
        hf_files.positive_int({"hidden_size": value}, "hidden_size", "here")
