"""`make demo`: from a tiny checkpoint to a video model trained by SFT and GRPO, on a laptop CPU.

Every line that starts with `$` is a command you can run yourself. A second demo keeps the data, and
moves earlier runs aside.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from longrl_jax import scores
from longrl_jax.commands import run, say, shown

DATA, RUNS = Path("data/tiny"), Path("runs/demo")
START = Path("configs/models/tiny_vila_start")
SHOWN = (("greedy", "accuracy"), ("sampled", "accuracy"), ("greedy", "format"))
"""Mode and part of the scores that the summary shows."""
REWARD = "video_qa"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m longrl_jax.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of both stages (default 0)")
    parser.add_argument(
        "--sft-steps", type=int, help="updates of stage 1 (default: the config's run.num_steps)"
    )
    parser.add_argument(
        "--grpo-steps", type=int, help="updates of stage 2 (default: the config's run.num_steps)"
    )
    parser.add_argument(
        "--examples", default="all", help="held-out questions of an evaluation (default: all)"
    )
    args = parser.parse_args()
    started_s = time.monotonic()
    sft, grpo = RUNS / "sft", RUNS / "grpo"
    seed = [] if args.seed == 0 else [f"seed={args.seed}"]
    say("1. Synthetic videos: real H.264 files with questions of six kinds")
    if not (DATA / "train.jsonl").exists():
        run("longrl_jax.data.synthetic", str(DATA))
    say(f"2. CoT-SFT of {START}, a tiny VILA that knows words and frames, but not the task")
    move_aside(sft)
    run("longrl_jax.train", "configs/tiny_cpu_sft.yaml", *seed, *steps(args.sft_steps))
    evaluate("configs/tiny_cpu_sft.yaml", sft, args.examples)
    say("3. GRPO: vLLM answers, rewards, update, push, again")
    move_aside(grpo)
    run("longrl_jax.train", "configs/tiny_cpu_grpo.yaml", *seed, *steps(args.grpo_steps))
    evaluate("configs/tiny_cpu_grpo.yaml", grpo, args.examples)
    say("4. A page to look at")
    run("longrl_jax.report", str(sft), str(grpo), "--out", str(RUNS / "report.html"))
    say(f"\nDone in {(time.monotonic() - started_s) / 60:.1f} minutes")
    summary(sft, grpo)


def steps(number: int | None) -> list[str]:
    """Overrides for a shorter or longer stage; a warm-up would outlast a short one."""
    return [] if number is None else [f"run.num_steps={number}", "optimizer.warmup_steps=0"]


def evaluate(config: str, folder: Path, examples: str) -> None:
    """Scores a run's export on the held-out questions; the scores go to folder/evaluate/."""
    exported = f"model.path={folder / 'export'}"
    where = ["--out", str(folder / "evaluate" / folder.name), "--examples", examples]
    run("longrl_jax.evaluate", config, exported, *where)


def move_aside(folder: Path) -> None:
    """Keeps an earlier run folder under another name."""
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.{int(folder.stat().st_mtime)}"))


def summary(sft: Path, grpo: Path) -> None:
    """Prints what the two stages scored, and what blind guessing would."""
    before, after = (read_scores(folder) for folder in (sft, grpo))
    say(f"{after['questions']} held-out questions on films that no stage has seen, 95 % intervals")
    for mode, part in SHOWN:
        name = f"{REWARD}/{part}"
        parts = [shown(s["modes"][mode]["all"][name]) for s in (before, after)]
        say(f"  {mode + ' ' + part:18s} SFT {parts[0]} -> GRPO {parts[1]}")
    for mode in ("no_video", "other_video"):
        if mode in before["modes"]:
            blind = shown(before["modes"][mode]["all"][f"{REWARD}/accuracy"])
            say(f"  {mode + ' accuracy':18s} SFT {blind}")
    outs = [folder / "evaluate" / folder.name for folder in (grpo, sft)]
    gains = scores.difference(*outs, mode="greedy", part=f"{REWARD}/accuracy")
    for kind, gain in gains.items():
        say(f"  greedy gain, question by question, {kind:9s} {shown(gain)}")
    lines = [json.loads(line) for line in (grpo / "metrics.jsonl").open()]
    gap = max(line["gap/max"] for line in lines if "gap/max" in line)
    say(f"  largest difference between engine's and learner's log-probabilities: {gap:.1e}")
    say(f"look at {RUNS / 'report.html'}; {grpo}/export is for transformers and vLLM")


def read_scores(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "evaluate" / folder.name / "scores.json").read_text())


if __name__ == "__main__":
    main()
