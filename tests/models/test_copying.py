"""Copies of checkpoint folders: equal, bounded, resumable, verified; what is refused."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_weights import MIXED, raw_tensors
from tiny_models import write_text, write_vila
from tiny_qwen2_5_vl import write_qwen2_5_vl

from longrl_jax import convert
from longrl_jax.models import copying, hf_files

ROOT = Path(__file__).parents[2]
SHARD_BYTES = 60_000
QWEN_MIXED = ("visual.blocks", "mlp.up_proj", "embed_tokens")
WRITERS = {
    "vila": lambda folder: write_vila(folder, tied=False, bfloat16=MIXED),
    "qwen2_5_vl": lambda folder: write_qwen2_5_vl(folder, bfloat16=QWEN_MIXED),
    "qwen3": lambda folder: write_text(folder, "qwen3", tied=True),
}


@pytest.fixture(scope="module", params=WRITERS)
def source(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "source"
    WRITERS[request.param](folder)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """An untied Qwen2 in one file."""
    folder = tmp_path_factory.mktemp("text") / "source"
    write_text(folder, tied=False)
    return folder


def files_of(folder: Path, *, tensors: bool) -> dict[str, bytes]:
    paths = [p for p in folder.rglob("*") if p.is_file() and p.name != hf_files.SUMS]
    index = "model.safetensors.index.json"
    ours = [p for p in paths if (p.suffix == ".safetensors" or p.name == index) == tensors]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in ours}


def sha256sum(folder: Path) -> int:
    """The digests according to coreutils."""
    return subprocess.run(
        ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"],
        cwd=folder,
        capture_output=True,
    ).returncode


def test_a_copy_has_the_same_tensors_and_files_in_other_shards(source, tmp_path):
    out = tmp_path / "out"
    copying.copy(source, out, shard_size_bytes=SHARD_BYTES)
    assert raw_tensors(out) == raw_tensors(source)
    assert files_of(out, tensors=False) == files_of(source, tensors=False)
    assert len(list(out.rglob("*.safetensors"))) > len(list(source.rglob("*.safetensors")))
    assert len((out / "SHA256SUMS").read_text().splitlines()) == copying.verify(out)
    assert len(files_of(out, tensors=True)) + len(files_of(out, tensors=False)) == copying.verify(
        out
    )
    assert sha256sum(out) == 0
    assert not list(tmp_path.glob(".*"))


def test_a_folder_with_digests_may_be_the_source_and_the_next_one_has_its_own(text, tmp_path):
    copying.copy(text, tmp_path / "a")
    copying.copy(tmp_path / "a", tmp_path / "b", shard_size_bytes=SHARD_BYTES)
    assert sha256sum(tmp_path / "b") == 0
    sums = (tmp_path / "b" / "SHA256SUMS").read_text()
    assert "model-00002-of-" in sums and "  model.safetensors\n" not in sums


DIE = """
import os, signal, sys
from pathlib import Path
from longrl_jax.models import copying, hf_files
write, calls = hf_files.write_shard, []
def write_then_die(path, specs, tensors):
    calls.append(path)
    if len(calls) == 4:  # half of the fourth file is on disk
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    write(path, specs, tensors)
hf_files.write_shard = write_then_die
copying.copy(Path(sys.argv[1]), Path(sys.argv[2]), shard_size_bytes=int(sys.argv[3]))
"""


@pytest.fixture(scope="module")
def killed(text, tmp_path_factory):
    """A folder with source/ and what a killed copy of it to out/ has left."""
    folder = tmp_path_factory.mktemp("killed")
    shutil.copytree(text, folder / "source")
    args = [str(folder / "source"), str(folder / "out"), str(SHARD_BYTES)]
    done = subprocess.run([sys.executable, "-c", DIE, *args], cwd=ROOT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not (folder / "out").exists()
    return folder


def test_a_killed_copy_goes_on_with_its_finished_files(killed, tmp_path, monkeypatch):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    source, out = tmp_path / "source", tmp_path / "out"
    finished = sorted((tmp_path / ".out.partial").glob("*.safetensors"))
    assert len(finished) == 4 and finished[3].read_bytes() == b"half"
    damaged = bytearray(finished[1].read_bytes())
    damaged[-1] ^= 1
    finished[1].write_bytes(damaged)
    kept = {path.name: path.stat().st_ino for path in (finished[0], finished[2])}

    written = []
    write = hf_files.write_shard
    monkeypatch.setattr(
        hf_files, "write_shard", lambda path, *rest: (written.append(path.name), write(path, *rest))
    )
    copying.copy(source, out, shard_size_bytes=SHARD_BYTES)
    assert {name: (out / name).stat().st_ino for name in kept} == kept
    assert written[:2] == [finished[1].name, finished[3].name] and not set(written) & set(kept)
    assert raw_tensors(out) == raw_tensors(source)
    assert sha256sum(out) == 0 and not (out / copying.PLAN).exists()


@pytest.mark.parametrize("change", ["source", "size", "type"])
def test_what_is_left_of_another_copy_is_not_gone_on_with(killed, tmp_path, change):
    shutil.copytree(killed, tmp_path, dirs_exist_ok=True)
    source, out = tmp_path / "source", tmp_path / "out"
    size = SHARD_BYTES if change != "size" else 2 * SHARD_BYTES
    dtype = convert.DTYPES["bfloat16"] if change == "type" else None
    if change == "source":
        state = {name: x + 1 for name, x in load_file(source / "model.safetensors").items()}
        save_file(state, source / "model.safetensors")
    copying.copy(source, out, dtype=dtype, shard_size_bytes=size)
    want = load_file(source / "model.safetensors")
    got = {name: x for path in out.glob("*.safetensors") for name, x in load_file(path).items()}
    for name, x in want.items():
        assert torch.equal(got[name], x if dtype is None else x.bfloat16()), name
    assert sha256sum(out) == 0


@pytest.mark.parametrize(("room", "said"), [(0, "on another disk$"), (3, "same command goes on")])
def test_a_full_disk_keeps_finished_files(text, tmp_path, monkeypatch, room, said):
    write, calls = hf_files.write_shard, []

    def write_until_full(path, *rest):
        calls.append(path)
        if len(calls) > room:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, *rest)

    monkeypatch.setattr(hf_files, "write_shard", write_until_full)
    with pytest.raises(OSError, match=said):
        copying.copy(text, tmp_path / "out", shard_size_bytes=SHARD_BYTES)
    assert len(list(tmp_path.glob(".out.partial/*.safetensors"))) == room
    assert room or not list(tmp_path.iterdir())


def test_numbers_that_the_other_type_cannot_hold_are_refused(text, tmp_path):
    large = tmp_path / "large"
    shutil.copytree(text, large)
    state = load_file(text / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1e6
    save_file(state, large / "model.safetensors")
    with pytest.raises(ValueError, match="norm.weight holds numbers that float16 cannot"):
        copying.copy(large, tmp_path / "out", dtype=convert.DTYPES["float16"])
    assert [path.name for path in tmp_path.iterdir()] == ["large"]


def damage(folder: Path, change) -> str:
    """Changes the last file of a folder; returns the name of a tensor of a layer in it."""
    path = sorted(folder.rglob("model.safetensors"))[-1]
    state = load_file(path)
    name = next(n for n in sorted(state) if ".0." in n and n.endswith("weight"))
    change(state, name)
    save_file(state, path)
    sub = path.parent.relative_to(folder).as_posix()
    return name if sub == "." else f"{sub}/{name}"


def nan(state, name):
    state[name].view(-1)[-1] = float("nan")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state, name: state.pop(name), "checkpoint lacks {name}"),
        (lambda state, name: state.update({"odd": torch.ones(1)}), "have no row in the table"),
        (lambda state, name: state.update({name: state[name][:-1].clone()}), "{name} -> "),
        (nan, "{name} holds NaN"),
        (lambda state, name: state.update({name: state[name].to(torch.int8)}), "{name} holds int8"),
        (lambda state, name: state.update({name: state[name].double()}), "{name} holds float64"),
    ],
    ids=["missing", "extra", "misshapen", "nan", "int8", "float64"],
)
def test_what_training_would_refuse_is_refused_by_name(source, tmp_path, change, said):
    folder = tmp_path / "damaged"
    shutil.copytree(source, folder)
    name = damage(folder, change)
    with pytest.raises(ValueError) as error:
        copying.copy(folder, tmp_path / "out")
    assert said.format(name=name) in str(error.value) and str(folder) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["damaged"]


def test_a_head_that_differs_from_its_table_is_refused(tmp_path):
    write_text(tmp_path / "source", tied=False)
    tree = json.loads((tmp_path / "source" / "config.json").read_text())
    tree["tie_word_embeddings"] = True
    (tmp_path / "source" / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match=r"lm_head.weight differs from .*embed_tokens.weight"):
        copying.copy(tmp_path / "source", tmp_path / "out")


def test_verify_names_what_is_damaged_missing_or_unknown(text, tmp_path, capsys):
    out = tmp_path / "out"
    copying.copy(text, out, shard_size_bytes=SHARD_BYTES)
    convert.main(["verify", str(out)])
    count = len((out / "SHA256SUMS").read_text().splitlines())
    assert capsys.readouterr().out == f"{out}: {count} files are what their digests say\n"
    path = sorted(out.glob("*.safetensors"))[1]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{path.name} is not what its digest says"):
        copying.verify(out)
    with pytest.raises(ValueError, match=f"{path.name} is not what its digest says"):
        copying.copy(out, tmp_path / "again")  # before anything is written
    path.unlink()
    with pytest.raises(ValueError, match=f"{path.name} is missing"):
        copying.verify(out)
    path.write_bytes(whole)
    (out / "more.safetensors").write_bytes(whole)
    with pytest.raises(ValueError, match=r"more.safetensors has no digest"):
        copying.verify(out)
    with pytest.raises(SystemExit, match=f"{text} has neither SHA256SUMS"):
        convert.main(["verify", str(text)])


def test_verify_reads_what_the_hub_noted_of_a_download(text, tmp_path):
    """As huggingface_hub writes it: <name>.metadata holds commit, etag (SHA-256 of large files,
    git's hash of others) and time."""
    from huggingface_hub._local_folder import write_download_metadata

    folder = tmp_path / "download"
    shutil.copytree(text, folder)
    path = folder / "model.safetensors"
    said = subprocess.run(["sha256sum", str(path)], capture_output=True, text=True).stdout
    write_download_metadata(folder, path.name, "c" * 40, said.split()[0])
    write_download_metadata(folder, "config.json", "c" * 40, "d" * 40)
    assert copying.verify(folder) == 1
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"model.safetensors is not what its digest says"):
        copying.copy(folder, tmp_path / "out")


def test_digests_that_find_and_sha256sum_wrote_are_read(text, tmp_path):
    """Their names begin with ./"""
    folder = tmp_path / "a"
    shutil.copytree(text, folder)
    said = subprocess.run(
        ["sha256sum", "./model.safetensors"], capture_output=True, text=True, cwd=folder
    )
    (folder / "SHA256SUMS").write_text(said.stdout)
    assert copying.verify(folder) == 1


@pytest.mark.parametrize(
    "line", ["{sum}  ../config.json", "{sum}  /etc/passwd", "abc  config.json"]
)
def test_digests_of_files_elsewhere_are_refused(text, tmp_path, line):
    shutil.copytree(text, tmp_path / "a")
    (tmp_path / "a" / "SHA256SUMS").write_text(line.format(sum="0" * 64) + "\n")
    with pytest.raises(ValueError, match="SHA256SUMS line 1: .* is no digest of a file beside it"):
        copying.verify(tmp_path / "a")


MEMORY = """
import re, sys
from pathlib import Path
from longrl_jax.models import copying
def kib(key):
    return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
copying.copy(Path(sys.argv[1]), Path(sys.argv[3]))  # imports, tracing: what any size needs
before = kib("VmRSS")
copying.copy(Path(sys.argv[2]), Path(sys.argv[4]), shard_size_bytes=int(sys.argv[5]))
print(1024 * (kib("VmHWM") - before))
"""


def test_a_copy_holds_two_tensors_and_a_shard_at_most(text, tmp_path):
    """Of the resident memory, mapped pages and all, as the kernel counts it."""
    large, rows = tmp_path / "large", 40_000
    shutil.copytree(text, large)
    tree = json.loads((large / "config.json").read_text()) | {"vocab_size": rows}
    tree |= {"intermediate_size": rows}
    (large / "config.json").write_text(json.dumps(tree))
    state = load_file(text / "model.safetensors")
    for name, x in state.items():
        if "mlp" in name or name in ("model.embed_tokens.weight", "lm_head.weight"):
            shape = [rows, 64] if x.shape[1] == 64 else [64, rows]
            state[name] = torch.full(shape, 0.5)
    save_file(state, large / "model.safetensors")
    tensor_bytes = rows * 64 * 4
    assert (large / "model.safetensors").stat().st_size > 8 * tensor_bytes
    args = [str(text), str(large), str(tmp_path / "a"), str(tmp_path / "b"), str(tensor_bytes)]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, *args],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},
    )
    assert done.returncode == 0, done.stderr
    shard_bytes = tensor_bytes
    assert int(done.stdout) <= 2 * tensor_bytes + shard_bytes  # measured: 2.3 tensors
    np.testing.assert_array_equal(
        hf_files.open_tensors(tmp_path / "b")["lm_head.weight"][...], np.full((rows, 64), 0.5)
    )
