"""`make demo`: from nothing to a GRPO-trained video model on a laptop CPU, by user commands.

Every line that starts with `$` is a command you can run yourself. A second demo keeps the data and
the first checkpoint, and moves earlier runs aside.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from pathlib import Path

DATA, RUNS = Path("data/tiny"), Path("runs/demo")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longrl_jax.demo", description=__doc__)
    parser.add_argument(
        "--sft-steps", type=int, help="updates of stage 1 (default: the config's run.num_steps)"
    )
    parser.add_argument(
        "--grpo-steps", type=int, help="updates of stage 2 (default: the config's run.num_steps)"
    )
    args = parser.parse_args()
    started_s = time.monotonic()
    say("1. Synthetic videos: real H.264 files with questions of four kinds")
    if not (DATA / "train.jsonl").exists():
        run("longrl_jax.data.synthetic", str(DATA), "--clips=160", "--validation=32")
    say("2. A tiny random VILA checkpoint, with tokenizer and chat template")
    if not (RUNS / "init" / "config.json").exists():
        run(
            "longrl_jax.convert",
            "init",
            "configs/models/tiny_vila.json",
            str(RUNS / "init"),
            f"--corpus={DATA / 'corpus.txt'}",
        )
    say("3. SFT: the answer format and a first idea of the task")
    move_aside(RUNS / "sft")
    run("longrl_jax.train", "configs/tiny_cpu_sft.yaml", *steps(args.sft_steps))
    say("4. GRPO: vLLM answers, rewards, update, push, again")
    move_aside(RUNS / "grpo")
    run("longrl_jax.train", "configs/tiny_cpu_grpo.yaml", *steps(args.grpo_steps))
    say(f"\nDone in {(time.monotonic() - started_s) / 60:.1f} minutes")
    summary(RUNS / "sft", RUNS / "grpo")


def steps(number: int | None) -> list[str]:
    """Overrides for a shorter or longer stage; a warm-up would outlast a short one."""
    return [] if number is None else [f"run.num_steps={number}", "optimizer.warmup_steps=0"]


def move_aside(folder: Path) -> None:
    """Keeps an earlier run folder under another name."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{int(folder.stat().st_mtime)}"))


def run(module: str, *arguments: str) -> None:
    """Runs `python -m module arguments`; ends the demo if that fails."""
    say(f"$ python -m {module} {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        sys.exit(f"demo: python -m {module} failed with exit status {done.returncode}")


def summary(sft: Path, grpo: Path) -> None:
    """Prints what the two run folders say."""
    for folder in (sft, grpo):
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        first, last = lines[0], lines[-1]
        say(f"{folder}: {len(lines)} steps, loss {first['loss']:.3f} -> {last['loss']:.3f}")
        if "reward/total" in last:
            for part in (
                key for key in last if key.startswith(("reward/total", "reward/video_qa"))
            ):
                say(f"  {part} by step: " + " ".join(f"{line[part]:.2f}" for line in lines))
            say(f"  largest engine/learner gap: {max(line['gap/max'] for line in lines):.1e}")
    names = ("total", "video_qa/format", "video_qa/accuracy")
    before, after = (json.loads((f / "evaluation.json").read_text()) for f in (sft, grpo))
    say(f"validation, {after['questions']:.0f} questions, greedy (by luck: 25 %)")
    for name in sorted(name for name in after if name.startswith(names)):
        say(f"  {name:32s} SFT {before[name]:.3f} -> GRPO {after[name]:.3f}")
    say(f"read on: {grpo}/rollouts.jsonl, metrics.jsonl, and export/ for Hugging Face")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
