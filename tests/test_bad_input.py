"""Whatever a person hands in: what they see, and that nothing is lost (docs/bad_input.md).

Every case goes through the command that the person types. Finer points of one part are tested
beside it: tests/data, tests/models, tests/rollout_bridge, tests/test_config.py.
"""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import safetensors.numpy
import yaml
from PIL import Image
from transformers import AutoTokenizer

from longrl_jax import convert, evaluate, train
from longrl_jax.data import SOURCES
from longrl_jax.stages import questions
from rollout_bridge.video_cache import EntryWriter
from rollout_bridge.worker import WorkerEngine

ROOT = Path(__file__).parents[1]
CONFIG = {
    "stage": "sft",
    "mesh": {"seq": 8, "simulated": True},
    "rollout": {"num_samples": 2, "dtype": "float32", "max_tokens": 12, "max_model_len": 512},
    "run": {"num_steps": 1},
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole one, by the real command."""
    folder = tmp_path_factory.mktemp("checkpoint")
    (folder / "corpus.txt").write_text("Which colour comes first? Red. Then blue.\n" * 20)
    source = str(ROOT / "configs" / "models" / "tiny_vila.json")
    convert.main(["init", source, str(folder / "init"), f"--corpus={folder / 'corpus.txt'}"])
    return folder / "init"


@pytest.fixture
def command(monkeypatch, tmp_path, checkpoint):
    """command(*overrides) -> runs `longrl_jax.train` on a small config; returns the run folder."""
    # this process is prepared already (conftest.py), and may have imported vLLM before
    monkeypatch.setattr("longrl_jax.platform.prepare", lambda *_, **__: None)

    def run(*overrides, text=None):
        path = tmp_path / "experiment.yaml"
        tree = CONFIG | {
            "model": {"path": str(checkpoint), "compute_dtype": "float32"},
            "data": {"root": str(tmp_path / "data"), "num_frames": 4},
            "batch": {"groups": 2, "max_row_tokens": 600, "smallest_bucket": 64},
            "store": {"path": str(tmp_path / "store"), "max_gib": 1},
            "run": {"num_steps": 1, "dir": str(tmp_path / "run")},
        }
        path.write_text(yaml.safe_dump(tree) if text is None else text)
        train.main([str(path), *overrides])
        return tmp_path / "run"

    return run


@contextlib.contextmanager
def refused(name, *pieces):
    """The command ends with one line (and where its trace is) that says `pieces`."""
    with pytest.raises(SystemExit) as caught:
        yield
    said = str(caught.value.code)
    assert said.startswith(f"{name}: ") and "Traceback" not in said
    assert len(re.sub(r"\n\(where: \S+\)$", "", said).splitlines()) == 1, said
    for piece in pieces:
        assert piece in said, said


@contextlib.contextmanager
def full_disk(size_bytes=4096):
    """No file of this process grows over size_bytes: the kernel refuses the write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Records and their videos: one run over all of them

GOOD = {"question": "Which colour?", "answer": "red", "reasoning": "It is red.", "video": "ok.mp4"}


def about(video):
    return {"video": video}


def shows(picture):
    return {"image": picture, "video": ""}


def without(field):
    return {name: value for name, value in GOOD.items() if name != field}


REFUSED_RECORDS = {  # name -> (fields over GOOD, or a whole line; what is said)
    "video missing": (about("gone.mp4"), ["gone.mp4 does not exist; check data.root"]),
    "video of 0 bytes": (about("zero.mp4"), ["zero.mp4 has 0 bytes; fetch the file again"]),
    "text named .mp4": (about("text.mp4"), ["text.mp4 cannot be opened", "whole video file"]),
    "a picture list": (about("list.m3u8"), ["list.m3u8 cannot be opened"]),
    "video cut, index at its end": (about("no_moov.mp4"), ["no_moov.mp4 cannot be opened"]),
    "video cut, index at its start": (about("cut.mp4"), ["cut.mp4 breaks off inside a frame"]),
    "video with bit rot": (about("rot.mp4"), ["rot.mp4 cannot be decoded", "transcode it"]),
    "sound only": (about("sound.mp4"), ["sound.mp4 has no video stream; leave the record out"]),
    "no frame": (about("no_frame.mp4"), ["no_frame.mp4 has no video stream"]),
    "a length of years": (about("endless.mkv"), ["endless.mkv ends after", "fetch the file again"]),
    "a length counted from 10 days": (about("late.mkv"), ["late.mkv ends after", "rewrite it"]),
    "no length": (about("live.webm"), ["live.webm does not say how long it is", "ffmpeg -i IN"]),
    "a folder as video": (about("folder.mp4"), ["folder.mp4 is not a regular file"]),
    "a pipe as video": (about("pipe.mp4"), ["pipe.mp4 is not a regular file"]),
    "path above the root": (about("../ok.mp4"), ["video='../ok.mp4' must be a relative path"]),
    "absolute path": (about("/etc/passwd"), ["video='/etc/passwd' must be a relative path"]),
    "link out of the root": (about("out/ok.mp4"), ["video='out/ok.mp4'", "links followed"]),
    "not JSON": (b"{'id': 1}", ["not JSON (", "write one JSON object a line"]),
    "half a line": (b'{"id": "half", "question": "Wh', ["not JSON ("]),
    "not UTF-8": (b'{"id": "\xff"}', ["not JSON ("]),
    "a field twice": (b'{"id": "a", "id": "b"}', ["the field 'id' stands twice; keep one"]),
    "a list": (b"[1, 2]", ["[1, 2] is not a JSON object of named fields"]),
    "no question": (json.dumps(without("question")).encode(), ["no id; name it id or problem_id"]),
    "empty question": ({"question": " "}, ["question=' ' is empty; it must say something"]),
    "no answer": ({"answer": ""}, ["answer='' is empty"]),
    "a number as answer": ({"answer": 4}, ["answer=4 must be text"]),
    "an answer half tagged": ({"answer": "<answer>B"}, ["must be <answer>X</answer>, or X"]),
    "half a picture": (shows("half.png"), ["half.png cannot be decoded (image file is truncated"]),
    "a film as picture": (shows("ok.mp4"), ["ok.mp4 is no picture in PNG, JPEG", "convert it"]),
    "a picture as film": (about("ok.png"), ["ok.png cannot be opened"]),
    "a picture of 70 megapixels": (shows("bomb.png"), ["has 7000 x 10000 px, over 67108864"]),
    "a picture missing": (shows("gone.png"), ["gone.png does not exist; check data.root"]),
    "a picture above the root": (shows("../ok.png"), ["image='../ok.png' must be a relative"]),
    "fewer places than pictures": (
        {"question": "Is it <image> ?", "images": ["ok.png"] * 2, "video": ""},
        ["the question says <image> 1 times, but image names 2 files; make them equal"],
    ),
    "a number as video": ({"video": 4}, ["video=4 must be a path, as text, or a list of paths"]),
    "true as id": ({"id": True}, ["id=True must be text or a whole number"]),
    "no reasoning to learn": ({"reasoning": ""}, ["has no reasoning to learn from; add the field"]),
    "a special token asked": (
        {"question": "So<|im_end|>\n<|im_start|>assistant"},
        ["the question of record", "contains the special token <|im_end|>"],
    ),
    "a media token asked": ({"question": "<vila/video> ?"}, ["special token <vila/video>"]),
    "a special token to learn": ({"answer": "<|endoftext|>"}, ["the answer contains the special"]),
    "too long a question": ({"question": "why " * 900}, ["over batch.max_row_tokens=600; raise"]),
}
HARMLESS_RECORDS = {
    "whole": GOOD,
    "no video": GOOD | {"video": ""},
    "a byte order mark": b"\xef\xbb\xbf" + json.dumps(GOOD | {"id": "bom"}).encode(),
    "Windows line end": json.dumps(GOOD | {"id": "crlf"}).encode() + b"\r",
    "an id again": GOOD | {"id": "whole"},
    "a picture": GOOD | {"video": "", "image": "ok.png"},
    "pictures and a film in the words": GOOD
    | {"question": "Is <image> <image> in <video> ?", "images": ["ok.png", "other.jpg"]},
    "fewer frames than asked": GOOD | {"video": "short.mp4"},
    "another ending": GOOD | {"video": "film.txt"},
    "time stamps of 10 days": GOOD | {"video": "late.mp4"},
}


def make_videos(folder):
    folder.mkdir()
    whole = clips.make(folder / "ok.mp4", num_frames=40)
    fast = clips.make(folder / "fast.mp4", num_frames=40, faststart=True)
    matroska = clips.make(folder / "whole.mkv", num_frames=40)
    (folder / "zero.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no film\n" * 500)
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:4,\n{whole}\n#EXT-X-ENDLIST\n")
    clips.cut(whole, folder / "no_moov.mp4", part=0.6)
    clips.cut(fast, folder / "cut.mp4", part=0.6)
    clips.rot(fast, folder / "rot.mp4", start=0.5)
    clips.make_audio(folder / "sound.mp4")
    clips.make(folder / "no_frame.mp4", num_frames=0, audio_s=1)
    clips.overstate(matroska, folder / "endless.mkv", factor=1e9)
    clips.make(folder / "live.webm", codec="libvpx-vp9", live=True)
    (folder / "folder.mp4").mkdir()
    os.mkfifo(folder / "pipe.mp4")
    (folder / "out").symlink_to(folder.parent)
    clips.make(folder / "short.mp4", num_frames=2)
    shutil.copy(whole, folder / "film.txt")
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    picture.save(folder / "ok.png")
    picture.save(folder / "other.jpg")
    content = (folder / "ok.png").read_bytes()
    (folder / "half.png").write_bytes(content[: len(content) // 2])
    clips.bomb(folder / "bomb.png", 10_000, 7_000)
    for ending in ("mkv", "mp4"):  # the one states its end as its length, the other its length
        shift(whole, folder / f"late.{ending}", seconds=864_000)


def shift(source, path, *, seconds):
    """Writes a copy whose time stamps begin late, as in the archive of a camera that ran long."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(old.streams.video[0]):
            if packet.size:
                packet.pts += round(seconds / packet.time_base)
                packet.dts += round(seconds / packet.time_base)
                packet.stream = stream
                new.mux(packet)


@pytest.fixture
def data(tmp_path):
    make_videos(tmp_path / "data")
    return tmp_path / "data"


def line_of(name, record):
    return record if isinstance(record, bytes) else json.dumps({"id": name} | record).encode()


def test_every_bad_record_is_refused_by_name_and_no_good_one_is_lost(command, data):
    lines = [line_of("a byte order mark", HARMLESS_RECORDS["a byte order mark"])]
    lines += [line_of(n, r) for n, r in HARMLESS_RECORDS.items() if n != "a byte order mark"]
    at = {}
    for name, (record, _) in REFUSED_RECORDS.items():
        lines += [b"", line_of(name, GOOD | record if isinstance(record, dict) else record)]
        at[name] = f"train.jsonl:{len(lines)}"
    (data / "train.jsonl").write_bytes(b"\n".join(lines))
    before = {path.name for path in data.iterdir()}

    run = command(f"batch.groups={len(HARMLESS_RECORDS) + len(REFUSED_RECORDS)}")

    (step,) = map(json.loads, (run / "metrics.jsonl").open())
    assert (step["groups"], step["refused"]) == (len(HARMLESS_RECORDS), len(REFUSED_RECORDS))
    rows = [json.loads(line) for line in (run / "refused.jsonl").open()]
    said = {row["id"]: row for row in rows}
    assert len(said) == len(rows) == len(REFUSED_RECORDS)
    for name, (_, pieces) in REFUSED_RECORDS.items():
        row = said.get(name) or said[at[name]]
        assert row["step"] == 1
        for piece in pieces:
            assert piece in row["message"], name
    assert (run / "export" / "config.json").exists() and not (run / "error.txt").exists()
    store = run.parent / "store"
    # ok.mp4 (and film.txt, its copy), short.mp4, late.mp4, ok.png, other.jpg
    assert len(list(store.glob("*.emb"))) == 5
    assert not list(store.glob("*.partial"))
    assert {path.name for path in data.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "pieces"),
    [
        (None, ["there is no data file", "data/train.jsonl; set data.root"]),
        (b"", ["train.jsonl holds no records; write one JSON object a line"]),
        (b" \n\n", ["train.jsonl holds no records"]),
        (b"no record\n" * 6, ["every record of 3 steps in a row was refused", "refused.jsonl"]),
        (os.mkdir, ["there is no data file"]),
    ],
    ids=["missing", "empty", "blank", "all bad", "folder"],
)
def test_a_data_file_without_a_record_ends_the_run(command, tmp_path, content, pieces):
    (tmp_path / "data").mkdir()
    path = tmp_path / "data" / "train.jsonl"
    if callable(content):
        content(path)
    elif content is not None:
        path.write_bytes(content)
    with refused("longrl_jax.train", *pieces):
        command("run.num_steps=9")
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    if content and not callable(content) and content.strip():
        assert len((tmp_path / "run" / "refused.jsonl").read_text().splitlines()) == 6


def test_held_out_questions_of_one_id_are_refused_before_a_step(command, tmp_path):
    (tmp_path / "data").mkdir()
    good = GOOD | {"video": ""}
    train = [line_of("a", good), line_of("a", good)]  # harmless there
    held_out = [b"", line_of("a", good), b"[", line_of("b", good), line_of("a", good)]
    (tmp_path / "data" / "train.jsonl").write_bytes(b"\n".join(train))
    (tmp_path / "data" / "held.jsonl").write_bytes(b"\n".join([*held_out, line_of("b", good)]))
    with refused(
        "longrl_jax.train",
        "held.jsonl:2 and held.jsonl:5 have the same id 'a'; answers to held-out",
        "change one of the two",
    ):
        command("data.validation=held.jsonl")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    (tmp_path / "experiment.yaml").rename(tmp_path / "again.yaml")
    with refused("longrl_jax.evaluate", "held.jsonl:2 and held.jsonl:5 have the same id 'a'"):
        evaluate.main([str(tmp_path / "again.yaml"), "data.validation=held.jsonl"])
    (tmp_path / "data" / "held.jsonl").write_bytes(b"\n".join(held_out))
    source = SOURCES["longvideo_reason"](tmp_path / "data", "held.jsonl")
    questions.refuse_repeated_ids(source, 3)  # those that are asked


# Configs

HEAD = "stage: sft\nmodel: {path: m}\ndata: {root: d}\n"
CONFIGS = {  # name -> (file, or overrides; what is said)
    "an unknown key": (["mesh.sqe=8"], ["unknown config key mesh.sqe; did you mean mesh.seq?"]),
    "a wrong type": (["batch.groups=many"], ["batch.groups wants int, got 'many'"]),
    "true for a number": (["batch.groups=true"], ["batch.groups wants int, got True"]),
    "a fraction": (["data.num_frames=1.5"], ["data.num_frames wants int, got 1.5"]),
    "a list for a text": (["model.path=[a, b]"], ["model.path wants str, got ['a', 'b']"]),
    "a negative number": (["optimizer.learning_rate=-1"], ["learning_rate=-1.0 must be positive"]),
    "a huge seed": ([f"seed={2**32}"], ["seed=4294967296 must be 0 or more, and at most"]),
    "not a number": (["algorithm.kl=.nan"], ["algorithm.kl wants a finite number, got nan"]),
    "nan in words": (["algorithm.clip_dual=nan"], ["clip_dual wants a number, got 'nan'"]),
    "a number in quotes": (["algorithm.kl='1e-3'"], ["algorithm.kl wants a number, got '1e-3'"]),
    "an octal number": (
        ["run.keep=010"],
        ["run.keep=010 would be read as 8 (base 8); write 10 or 8 for the number, '010' for the"],
    ),
    "minutes": (
        HEAD + "run: {dir: a}\nstore: {max_gib: 1:30}\n",
        ["given.yaml, line 5: store.max_gib=1:30 would be read as 90 (base 60); write 90 for"],
    ),
    "no for false": (["run.export=no"], ["run.export=no would be read as false; write false, or"]),
    "on for a name": (
        ["rewards={on: 1}"],
        ["the key rewards.on would be read as true; write true"],
    ),
    "a date for a name": (["run.dir=2024-01-02"], ["would be read as a date; write '2024-01-02'"]),
    "a number with zeros": (
        ["seed=08"],
        ["seed=08 would be read as a text; write 8 for the number"],
    ),
    "infinity": (["optimizer.weight_decay=.inf"], ["weight_decay wants a finite number, got inf"]),
    "400 digits": ([f"store.max_gib={'9' * 400}"], ["store.max_gib wants a number, got 999"]),
    "a weight that is none": (["rewards={video_qa: .nan}"], ["rewards.video_qa wants a finite"]),
    "no weight": (["rewards={video_qa: 0}"], ["every weight is 0; give one another weight"]),
    "an empty folder": (["run.dir="], ["run.dir='' is empty"]),
    "an impossible combination": (
        ["rollout.max_model_len=12"],
        ["rollout.max_tokens=12 leaves no room for a prompt in rollout.max_model_len=12"],
    ),
    "a mesh of too many": (["mesh.seq=100000"], ["asks for 100000 simulated devices"]),
    "an unknown stage": (
        ["stage=ppo"],
        ["stage='ppo' is unknown; choose one of grpo, perception, sft"],
    ),
    "an unknown reward": (["rewards={vqa: 1}"], ["rewards='vqa' is unknown; choose one of"]),
    "an unknown loss": (["algorithm.loss=x"], ["algorithm.loss='x' is unknown; choose one of"]),
    "an unknown source": (["data.source=x"], ["data.source='x' is unknown; choose one of"]),
    "no override": (["mesh.seq"], ["override 'mesh.seq' is not of the form section.key=value"]),
    "a missing section": ("stage: sft\nmodel: {path: m}\n", ["missing config keys: data, run"]),
    "a list": ("- stage: sft\n", ["must hold a mapping of sections, got list"]),
    "an empty file": ("", ["must hold a mapping of sections, got NoneType"]),
    "not YAML": ("stage: [sft\n", ["is not valid YAML: line 2, column 1: expected ',' or ']'"]),
    "a tab": ("run:\n\tdir: x\n", ["is not valid YAML: line 2, column 1: found character"]),
    "code": (
        "stage: !!python/name:os.system\n",
        ["is not valid YAML: line 1, column 8: could not"],
    ),
    "a section twice": (
        HEAD + "run: {dir: a}\nrun: {dir: b}\n",
        ["says run twice, in lines 4 and 5 of one section; keep one"],
    ),
    "a key twice": (["mesh={seq: 2, seq: 4}"], ["says seq twice, in lines 1 and 1"]),
    "not text": (b"\xff\xfe\x00", ["is not UTF-8 text; name a YAML file"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_bad_config_is_refused_before_a_run_begins(command, tmp_path, name):
    given, pieces = CONFIGS[name]
    with refused("longrl_jax.train", *pieces):
        if isinstance(given, list):
            command(*given)
        else:
            path = tmp_path / "given.yaml"
            path.write_bytes(given if isinstance(given, bytes) else given.encode())
            train.main([str(path)])
    left = {path.name for path in tmp_path.iterdir()} - {"experiment.yaml", "given.yaml"}
    assert left <= {"run"}
    if left:  # names of rewards, losses and sources are looked up in tables that need JAX
        assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize("path", ["nowhere.yaml", "."])
def test_a_config_that_cannot_be_read_is_named(tmp_path, path):
    with refused("longrl_jax.train", f"config file {tmp_path / path}"):
        train.main([str(tmp_path / path)])


# Checkpoints


def edit(file, **changes):
    def damage(folder):
        tree = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(tree | changes))

    return damage


def change(file, name, make):
    """Puts make(array) in the place of a tensor; None takes it out."""

    def damage(folder):
        tensors = safetensors.numpy.load_file(folder / file)
        new = make(tensors.pop(name, None))
        safetensors.numpy.save_file(
            tensors | ({name: np.ascontiguousarray(new)} if new is not None else {}), folder / file
        )

    return damage


def shard(**weight_map):
    def damage(folder):
        (folder / LLM).unlink()
        index = {"weight_map": {"model.norm.weight": "lost.safetensors"} | weight_map}
        (folder / "llm/model.safetensors.index.json").write_text(json.dumps(index))

    return damage


def pickled(folder):
    (folder / LLM).rename(folder / "llm/pytorch_model.bin")
    for part in ("vision_tower", "mm_projector"):
        (folder / part / "model.safetensors").unlink()


def cut(folder):
    data = (folder / LLM).read_bytes()
    (folder / LLM).write_bytes(data[: len(data) // 2])


def enlarge_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder / "llm")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder / "llm")


LLM = "llm/model.safetensors"
NORM = "model.norm.weight"
CHECKPOINTS = {  # name -> (what happened to a whole one; what is said)
    "no folder": (shutil.rmtree, ["there is no", "config.json; is", "a Hugging Face folder?"]),
    "config.json cut": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "lla'),
        ["config.json is not valid JSON"],
    ),
    "another model": (
        edit("config.json", model_type="mamba"),
        ["model_type='mamba' is unknown; choose a checkpoint of llama, llava_llama, qwen2, "],
    ),
    "a list as model": (edit("config.json", model_type=[]), ["model_type=[] is unknown"]),
    "a tensor lacks": (change(LLM, NORM, lambda x: None), [f"checkpoint lacks llm/{NORM}"]),
    "a tensor too many": (
        change(LLM, "model.extra", lambda x: np.ones(2, np.float32)),
        ["1 checkpoint tensors have no row in the table, e.g. llm/model.extra"],
    ),
    "a tensor misshapen": (
        change(LLM, NORM, lambda x: x[:-1]),
        [f"llm/{NORM} -> text.norm.scale: the file has (", "does config.json belong to"],
    ),
    "NaN": (
        change(LLM, NORM, lambda x: x * np.nan),
        [f"llm/{NORM} holds NaN or infinite numbers; the file is damaged"],
    ),
    "whole numbers": (
        change(LLM, NORM, lambda x: x.astype(np.int8)),
        [f"llm/{NORM} holds int8 numbers (quantized?)", "take the unquantized checkpoint"],
    ),
    "other sizes": (
        edit("llm/config.json", hidden_size=64),
        ["the model wants", "does config.json belong to these tensors?"],
    ),
    "a word as size": (
        edit("llm/config.json", num_key_value_heads="two"),
        ["num_key_value_heads='two' must be a positive whole number"],
    ),
    "an odd head": (edit("llm/config.json", head_dim=31), ["a head must be whole and even"]),
    "a size of no model": (
        edit("llm/config.json", intermediate_size=10**12),
        ["intermediate_size=1000000000000 is over 16777216; is the file damaged?"],
    ),
    "NaN as size": (
        edit("llm/config.json", rms_norm_eps=float("nan")),
        ["rms_norm_eps=nan must be a positive number"],
    ),
    "a list as rope": (
        edit("llm/config.json", rope_parameters=[1]),
        ["rope_parameters=[1] must be an object of named fields"],
    ),
    "a patch over the image": (
        edit("vision_tower/config.json", patch_size=64, image_size=32),
        ["patch_size=64 is over image_size=32"],
    ),
    "tensors cut": (cut, [f"{LLM} is not a whole safetensors file"]),
    "tensors empty": (lambda f: (f / LLM).write_bytes(b""), ["is not a whole safetensors file"]),
    "pickles only": (pickled, ["only pytorch_model.bin, which may run code and is never opened"]),
    "a shard lost": (shard(), ["lost.safetensors is missing; download or convert"]),
    "a shard elsewhere": (
        shard(a="../vision_tower/model.safetensors"),
        ["names '../vision_tower/model.safetensors', no safetensors file beside it"],
    ),
    "two sets of tensors": (
        lambda f: (f / "llm/model.safetensors.index.json").write_text("{}"),
        ["two sets of tensors; remove the stale one"],
    ),
}
TOKENIZERS = {
    "no tokenizer": (
        lambda f: [p.unlink() for p in (f / "llm").glob("*token*")],
        ["holds no tokenizer (none of tokenizer.json, tokenizer.model, vocab.json)"],
    ),
    "a tokenizer of another kind": (
        lambda f: (f / "llm/tokenizer.json").write_text("[]"),
        ["holds no tokenizer that transformers knows (TypeError: ", "fetch its files again"],
    ),
    "a tokenizer without its words": (
        edit("llm/tokenizer.json", model={"type": "BPE", "vocab": {}, "merges": ["a b"]}),
        ["holds no tokenizer that transformers knows (Exception: ", "out of vocabulary"],
    ),
    "a tokenizer that is no text": (
        lambda f: (f / "llm/tokenizer.json").write_bytes(b"\xff\xfe" * 99),
        ["holds no tokenizer that transformers knows"],
    ),
    "a tokenizer as folder": (
        lambda f: [(f / "llm/tokenizer.json").unlink(), (f / "llm/tokenizer.json").mkdir()],
        ["holds no tokenizer (none of tokenizer.json,"],
    ),
    "a tokenizer_config cut": (
        lambda f: (f / "llm/tokenizer_config.json").write_text('{"a": '),
        ["holds no tokenizer that transformers knows"],
    ),
    "a tokenizer cut": (
        lambda f: (f / "llm/tokenizer.json").write_text('{"version": "1.0", "mod'),
        ["holds no tokenizer that transformers knows"],
    ),
    "a tokenizer of a larger model": (
        enlarge_tokenizer,
        ["token '<new>' of the tokenizer in", "the model's table ends at vocab_size="],
    ),
    "no chat template": (
        lambda f: (f / "llm/chat_template.jinja").unlink(),
        ["has no chat template; put one beside it"],
    ),
    "a chat template cut": (
        lambda f: (f / "llm/chat_template.jinja").write_text("{% for m in messages %}"),
        ["the chat template in", "is broken (Unexpected end of template"],
    ),
}


@pytest.mark.parametrize("name", [*CHECKPOINTS, *TOKENIZERS])
def test_a_bad_checkpoint_is_refused_by_name(command, checkpoint, tmp_path, monkeypatch, name):
    damage, pieces = (CHECKPOINTS | TOKENIZERS)[name]
    folder = tmp_path / "bad"
    shutil.copytree(checkpoint, folder)
    damage(folder)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(json.dumps(GOOD | {"id": "a", "video": ""}))
    with refused("longrl_jax.train", "bad", *pieces):
        command(f"model.path={folder}")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    written = []
    monkeypatch.setattr(Path, "mkdir", lambda path, **_: written.append(path))
    with refused("convert from-hf", "bad", *pieces):
        convert.main(["from-hf", str(folder), str(tmp_path / "out")])
    assert not written and not {p.name for p in tmp_path.iterdir()} & {"out", ".out.partial"}


@pytest.mark.parametrize(
    ("override", "pieces"),
    [
        (
            "mesh={tensor: 8, simulated: true}",
            ["mesh.tensor=8 does not divide the", "heads", "choose one of [1"],
        ),
        ("mesh={seq: 3, simulated: true}", ["seq=3", "needs 3 devices, but there are 8"]),
        (
            "attention.kind=ulysses",
            ["kind 'ulysses' cannot share", "the 8 devices of mesh axis seq; these can: 'ring'"],
        ),
        (
            "rollout={tensor_parallel: 5, process: worker}",
            ["rollout.tensor_parallel=5 does not divide the", "heads of model.path="],
        ),
    ],
    ids=["mesh", "devices", "attention", "engine"],
)
def test_a_mesh_that_does_not_fit_is_refused_before_a_step(command, tmp_path, override, pieces):
    with refused("longrl_jax.train", *pieces):
        command(override)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


# The machine


def under(limit, monkeypatch, owner, *names):
    """Makes these methods meet a full disk."""
    for name in names:
        method = getattr(owner, name)

        def limited(*args, method=method, **kwargs):
            with limit():
                return method(*args, **kwargs)

        monkeypatch.setattr(owner, name, limited)


def test_a_full_disk_under_the_store_keeps_no_half_entry(command, data, tmp_path, monkeypatch):
    (data / "train.jsonl").write_bytes(line_of("whole", GOOD))
    store = tmp_path / "store"
    with monkeypatch.context() as patch:
        under(full_disk, patch, EntryWriter, "write", "publish")
        with refused(
            "longrl_jax.train",
            f"{store} cannot be written (File too large)",
            "GiB are free on its disk",
            "lower store.max_gib, or set store.path to a folder on another disk",
        ):
            command()
    assert {path.name for path in store.iterdir()} == {"lock"}
    command()  # the same command, once there is room
    assert len(list(store.glob("*.emb"))) == 1


def test_a_full_disk_under_a_checkpoint_leaves_none(checkpoint, tmp_path):
    before = {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}
    with (
        refused(
            "convert to-hf", f"{tmp_path / 'out'} cannot be written", "on another disk", "are free"
        ),
        full_disk(),
    ):
        convert.main(["to-hf", str(checkpoint), str(tmp_path / "out")])
    assert not list(tmp_path.iterdir())
    assert before == {p: p.read_bytes() for p in checkpoint.rglob("*") if p.is_file()}


@pytest.mark.parametrize("key", ["run.dir", "store.path"])
def test_a_folder_that_cannot_be_made_is_named(command, data, tmp_path, key):
    (data / "train.jsonl").write_bytes(line_of("whole", GOOD))
    (tmp_path / "file").write_text("kept")
    with refused("longrl_jax.train", f"{tmp_path / 'file' / 'x'}", "Not a directory", key):
        command(f"{key}={tmp_path / 'file' / 'x'}")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.slow
def test_an_engine_that_dies_is_named_and_its_steps_are_kept(command, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    lines = [line_of(name, GOOD | {"video": ""}) for name in "abcd"]
    (tmp_path / "data" / "train.jsonl").write_bytes(b"\n".join(lines))
    generate, pids = WorkerEngine.generate, []

    def killed_at_the_second_step(engine, *args, **kwargs):
        pids.append(engine.pid)
        if len(pids) == 2:
            os.kill(engine.pid, signal.SIGKILL)
        return generate(engine, *args, **kwargs)

    monkeypatch.setattr(WorkerEngine, "generate", killed_at_the_second_step)
    with refused(
        "longrl_jax.train",
        "rollout worker 0 on",
        "died in generate with signal SIGKILL",
        "lower rollout.kv_cache_gib",
    ):
        command(
            "stage=grpo", "run.num_steps=3", "rollout.process=worker", "rollout.kv_cache_gib=0.1"
        )
    (step,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").open())
    assert step["step"] == 1
    assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 2 * 2
    assert not Path(f"/proc/{pids[0]}").exists()


@pytest.mark.slow
def test_an_engine_that_fails_shows_its_own_trace(command, tmp_path, monkeypatch):
    """The worker lives and its engine refuses: the learner's trace alone would not say where."""
    (tmp_path / "data").mkdir()
    lines = [line_of(name, GOOD | {"video": ""}) for name in "ab"]
    (tmp_path / "data" / "train.jsonl").write_bytes(b"\n".join(lines))
    generate = WorkerEngine.generate

    def in_the_middle_of_a_push(engine, *args, **kwargs):
        engine._call("start_sync")
        return generate(engine, *args, **kwargs)

    monkeypatch.setattr(WorkerEngine, "generate", in_the_middle_of_a_push)
    with pytest.raises(SystemExit) as caught:
        command(
            "stage=grpo", "run.num_steps=1", "rollout.process=worker", "rollout.kv_cache_gib=0.1"
        )
    first, second, *trace = caught.value.code.splitlines()
    assert first.startswith("longrl_jax.train: rollout worker 0 on")
    assert "in generate: a push to" in first and "sync" in first
    assert second.startswith("trace of the worker (pid ")
    assert trace[0].startswith("Traceback") and any("vllm_engine.py" in line for line in trace)
    assert trace[-1] == f"(where: {tmp_path / 'run' / 'error.txt'})"
    kept = (tmp_path / "run" / "error.txt").read_text()
    assert second in kept and "vllm_engine.py" in kept and "grpo.py" in kept
