"""Does it learn? SFT and GRPO of the demo with several seeds, and the controls beside them.

    python benchmarks/learning.py --out benchmarks/results/learning_cpu2_202611.md

For every seed: SFT, its scores with blind baselines, GRPO, its scores. For the first seed also two
controls: SFT continued for as many seconds as GRPO took, and GRPO on another film's frames (every
question of the training set is shown another film). Every line of the log is a command. What is in
runs/learning is not run again, so a run that was cut off goes on.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from longrl_jax import scores

RUNS, DATA = Path("runs/learning"), Path("data/tiny")
SFT, GRPO = "configs/tiny_cpu_sft.yaml", "configs/tiny_cpu_grpo.yaml"
OTHER_FILM = "train_other_film.jsonl"
SFT_LONGER, GRPO_BLIND = RUNS / "sft_longer_0", RUNS / "grpo_other_film_0"
ACCURACY, FORMAT = "video_qa/accuracy", "video_qa/format"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--out", type=Path, help="Markdown file (default: to the screen)")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    if not args.table:
        run_all(args.seeds)
    text = "\n".join(table(args.seeds)) + "\n"
    if args.out:
        args.out.write_text(text)
    sys.stdout.write(text)


def run_all(num_seeds: int) -> None:
    if not (DATA / "train.jsonl").exists():
        run("longrl_jax.data.synthetic", str(DATA))
    for seed in range(num_seeds):
        train(SFT, sft(seed), seed)
        evaluate(SFT, sft(seed), "--baselines")
        train(GRPO, grpo(seed), seed, f"model.path={sft(seed) / 'export'}")
        evaluate(GRPO, grpo(seed), "--no-baselines")
    start = f"model.path={sft(0) / 'export'}"
    num_steps = math.ceil(seconds(grpo(0)) / median_step_s(sft(0)))
    train(SFT, SFT_LONGER, 0, start, f"run.num_steps={num_steps}")
    evaluate(SFT, SFT_LONGER, "--no-baselines")
    write_other_film(DATA)
    train(GRPO, GRPO_BLIND, 0, start, f"data.train={OTHER_FILM}")
    evaluate(GRPO, GRPO_BLIND, "--no-baselines")


def sft(seed: int) -> Path:
    return RUNS / f"sft_{seed}"


def grpo(seed: int) -> Path:
    return RUNS / f"grpo_{seed}"


def train(config: str, folder: Path, seed: int, *overrides: str) -> None:
    if not (folder / "export").exists():
        run("longrl_jax.train", config, f"run.dir={folder}", f"seed={seed}", *overrides)


def evaluate(config: str, folder: Path, *options: str, into: str = "evaluate") -> None:
    """Scores a run's export on all held-out questions; goes on where it was cut off."""
    model = f"model.path={folder / 'export'}"
    run("longrl_jax.evaluate", config, model, "--out", str(folder / into), *options)


def write_other_film(root: Path) -> None:
    """Writes the training questions again, each with the next film's name."""
    records = [json.loads(line) for line in (root / "train.jsonl").open()]
    films = sorted({record["video"] for record in records})
    after = dict(zip(films, films[1:] + films[:1], strict=True))
    lines = [json.dumps(record | {"video": after[record["video"]]}) for record in records]
    (root / OTHER_FILM).write_text("\n".join(lines) + "\n")


def run(module: str, *arguments: str) -> None:
    sys.stderr.write(f"$ python -m {module} {shlex.join(arguments)}\n")
    subprocess.run([sys.executable, "-m", module, *arguments], check=True)


def steps_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


def seconds(folder: Path) -> float:
    return sum(step["time/step_s"] for step in steps_of(folder))


def median_step_s(folder: Path) -> float:
    times = sorted(step["time/step_s"] for step in steps_of(folder))
    return times[len(times) // 2]


def table(num_seeds: int) -> list[str]:
    """Returns the result file: scores of every run that is there, and gains over the same seed."""
    seeds = range(num_seeds)
    runs = [folder for seed in seeds for folder in (sft(seed), grpo(seed))]
    runs = [r for r in [*runs, SFT_LONGER, GRPO_BLIND] if is_scored(r)]
    lines = [
        "| run | steps | minutes | greedy | sampled (T=1, mean of 8) | format | no video | "
        "other film | one letter |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(row, runs),
    ]
    pairs = {f"GRPO, seed {s}": (grpo(s), sft(s)) for s in seeds}
    pairs |= {"SFT continued": (SFT_LONGER, sft(0)), "GRPO on another film": (GRPO_BLIND, sft(0))}
    for mode in ("greedy", "sampled"):
        gains = {
            name: scores.difference(*(r / "evaluate" for r in pair), mode=mode, part=ACCURACY)
            for name, pair in pairs.items()
            if all(map(is_scored, pair))
        }
        if gains:
            kinds = list(next(iter(gains.values())))
            lines += ["", f"Gain over the same seed's SFT, question by question ({mode}, points):"]
            lines += ["", "| pair | " + " | ".join(kinds) + " |", "|---" * (len(kinds) + 1) + "|"]
        for name, gain in gains.items():
            lines.append(f"| {name} | " + " | ".join(points(gain[kind]) for kind in kinds) + " |")
    return lines


def is_scored(folder: Path, into: str = "evaluate") -> bool:
    path = folder / into / "scores.json"
    return path.exists() and json.loads(path.read_text())["complete"]


def row(folder: Path) -> str:
    found = json.loads((folder / "evaluate" / "scores.json").read_text())
    modes, letters = found["modes"], found.get("baselines", {}).get("one_letter", {}).get("all")
    cells = [
        folder.name,
        str(len(steps_of(folder))),
        f"{seconds(folder) / 60:.1f}",
        percent(modes["greedy"]["all"][ACCURACY]),
        percent(modes["sampled"]["all"][ACCURACY]),
        percent(modes["greedy"]["all"][FORMAT]),
        *(percent(modes[m]["all"][ACCURACY]) if m in modes else "" for m in BLIND),
        f"{100 * letters['mean']:.1f}" if letters else "",
    ]
    return "| " + " | ".join(cells) + " |"


BLIND = ("no_video", "other_video")


def percent(score: dict[str, float]) -> str:
    return f"{100 * score['mean']:.1f} ({100 * score['low']:.1f} to {100 * score['high']:.1f})"


def points(score: dict[str, float]) -> str:
    text = f"{100 * score['mean']:+.1f}"
    if score["low"] is not None:
        text += f" ({100 * score['low']:+.1f} to {100 * score['high']:+.1f})"
    return text


if __name__ == "__main__":
    main()
