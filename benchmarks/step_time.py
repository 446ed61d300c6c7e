"""Where a GRPO step's time goes, with the embedding store cold and warm, in one run.

    python benchmarks/step_time.py [CONFIG.yaml] [section.key=value ...] > step_time.md

Cold: an empty store and every video of a step is new. Warm: the same steps again with what the
cold run stored. The first step of each run compiles, so it is left out; medians of the others.
Needs the config's checkpoint and data (make demo leaves those of configs/tiny_cpu_grpo.yaml).
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PHASES = ("decode", "encode", "embed", "rollout", "reward", "batch", "logps", "update", "push")
PHASES += ("other", "step")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="?", default="configs/tiny_cpu_grpo.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--steps", type=int, default=8, help="steps of each run (default 8)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cold, warm = (
            run(args.config, args.overrides, Path(scratch), name=name, num_steps=args.steps)
            for name in ("cold", "warm")
        )
    print(f"| phase | cold, s | warm, s | cold / warm |\n|---|---|---|---|\n{rows(cold, warm)}")
    print(f"\nMedians of steps 2 to {args.steps}; groups a step: {cold[-1]['groups']:.0f}.")


def run(
    config: str, overrides: Sequence[str], scratch: Path, *, name: str, num_steps: int
) -> list[dict[str, float]]:
    """Trains in a process of its own and returns the steps' metrics."""
    fixed = (f"store.path={scratch}/store", f"run.dir={scratch}/{name}", "run.export=false")
    fixed += (f"run.num_steps={num_steps}", "data.validation=''")
    command = [sys.executable, "-m", "longrl_jax.train", config, *overrides, *fixed]
    subprocess.run(command, check=True)
    return [json.loads(line) for line in (scratch / name / "metrics.jsonl").open()]


def rows(cold: Sequence[dict[str, float]], warm: Sequence[dict[str, float]]) -> str:
    """Returns the table's lines."""
    lines = []
    for phase in PHASES:
        a, b = (
            statistics.median(step.get(f"time/{phase}_s", 0.0) for step in steps[1:])
            for steps in (cold, warm)
        )
        ratio = f"{a / b:.1f}" if b > 0.005 else "-"
        lines.append(f"| {phase} | {a:.3f} | {b:.3f} | {ratio} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
