"""`make road`: from a folder of videos to a trained and honestly scored model, on a laptop CPU.

Films -> captions by a checkpoint of our own, behind vLLM's server -> questions (by an oracle, not a
model: rules over the captions) -> films encoded -> questions that teach -> CoT-SFT -> GRPO -> a
score on held-out films after each. Every line that starts with `$` is a command you can run
yourself. What is finished is skipped, so the same command goes on after a kill; delete data/road
and runs/road to begin anew (runs/captioner, too, for another captioner).
"""

import argparse
import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longrl_jax import scores
from longrl_jax.commands import run, say, serving, shown

DATA, RUNS = Path("data/road"), Path("runs/road")
CAPTIONER = Path("runs/captioner")
START = Path("configs/models/tiny_vila_start")
GENERATE = "configs/generate/road.yaml"
SFT, GRPO = "configs/road/sft.yaml", "configs/road/grpo.yaml"
PACKAGE, FILTERED = DATA / "out" / "package", DATA / "difficulty"
SCORED = {"start": START, "sft": RUNS / "sft" / "export", "grpo": RUNS / "grpo" / "export"}
"""Who is scored: name of the evaluation -> checkpoint."""
BENCHMARK = "longvideo_reason"
PARTS = STRICT, OFFICIAL = "strict/accuracy", "official/accuracy"
"""Scores of the benchmark."""
SERVERS = {
    "captioner": (
        "serve",
        str(CAPTIONER / "export"),
        *("--dtype", "float32", "--max-model-len", "256"),
    ),
    "oracle": ("oracle",),
}
"""Name in the config of the generation -> what `longrl_jax.data.generate` serves."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """A command of the road."""

    title: str
    command: tuple[str, ...]
    """Module and arguments, as after `python -m`."""
    made: Path
    """Is there when the step need not run again; of an evaluation scores.json, which says so."""
    servers: tuple[str, ...] = ()
    """Names in SERVERS; they run as long as the step does."""


def steps() -> list[Step]:
    return [
        Step(
            title="films whose parts are described, to learn describing from",
            command=(
                *("longrl_jax.data.synthetic", "data/captions", "--clips", "200"),
                *("--validation", "0", "--lessons", "1", "--seed", "3"),
            ),
            made=Path("data/captions/train.jsonl"),
        ),
        Step(
            title="a captioner learns them",
            command=("longrl_jax.train", "configs/caption_cpu_sft.yaml"),
            made=CAPTIONER / "finished.json",
        ),
        Step(
            title="the folder of videos: 200 other films",
            command=(
                *("longrl_jax.data.synthetic", str(DATA / "films"), "--clips", "200"),
                *("--validation", "0", "--seed", "22"),
            ),
            made=DATA / "films" / "train.jsonl",
        ),
        Step(
            title="split, caption, merge, question, parse, rewrite, verify, package",
            command=("longrl_jax.data.generate", "all", GENERATE),
            made=PACKAGE / "README.md",
            servers=("captioner", "oracle"),
        ),
        Step(
            title="every film encoded once",
            command=("longrl_jax.data.embed", SFT, whole_package()),
            made=FILTERED / "summary.json",
        ),
        Step(
            title="ten answers to a question: which are right neither always nor never?",
            command=(
                *("longrl_jax.data.difficulty", SFT, whole_package()),
                *("--samples", "10", "--out", str(FILTERED)),
            ),
            made=FILTERED / "summary.json",
        ),
        evaluation("start"),
        Step(
            title="CoT-SFT, packed, on a third of the films",
            command=("longrl_jax.train", SFT),
            made=RUNS / "sft" / "finished.json",
        ),
        evaluation("sft"),
        Step(
            title="GRPO on the others",
            command=("longrl_jax.train", GRPO),
            made=RUNS / "grpo" / "finished.json",
        ),
        evaluation("grpo"),
        Step(
            title="a page to look at",
            command=(
                *("longrl_jax.report", str(RUNS / "sft"), str(RUNS / "grpo")),
                *("--out", str(RUNS / "report.html")),
            ),
            made=RUNS / "report.html",
        ),
    ]


def whole_package() -> str:
    return f"data.train={(PACKAGE / 'train.jsonl').relative_to(DATA)}"


def evaluation(name: str) -> Step:
    return Step(
        title=f"questions about held-out films, asked of {SCORED[name]}",
        command=(
            *("longrl_jax.evaluate", SFT, f"model.path={SCORED[name]}"),
            *("--benchmark", BENCHMARK, "data.num_frames=32", "rollout.max_tokens=48"),
            f"data.validation={(PACKAGE / 'test.jsonl').relative_to(DATA)}",
            *("--samples", "4", "--examples", "all", "--out", str(scored(name).parent)),
        ),
        made=scored(name) / "scores.json",
    )


def scored(name: str) -> Path:
    """Returns the folder of an evaluation."""
    return RUNS / "evaluate" / name / BENCHMARK


def main(argv: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(
        prog="python -m longrl_jax.road",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args(argv)
    started_s = time.monotonic()
    walk(steps(), RUNS / "times.jsonl")
    say(f"\nDone in {(time.monotonic() - started_s) / 60:.1f} minutes")
    summary()


def walk(todo: Sequence[Step], times: Path) -> None:
    """Runs the steps that are not finished, and appends to `times` how long each took."""
    for number, step in enumerate(todo, 1):
        say(f"{number}. {step.title}{' (done)' if is_made(step.made) else ''}")
        if is_made(step.made):
            continue
        started_s = time.monotonic()
        with serve(step.servers) as overrides:
            run(*step.command, *overrides)
        took = {"step": number, "command": step.command, "s": time.monotonic() - started_s}
        times.parent.mkdir(parents=True, exist_ok=True)
        with times.open("a") as file:
            file.write(json.dumps(took) + "\n")


@contextlib.contextmanager
def serve(names: Sequence[str]) -> Iterator[list[str]]:
    """Yields the overrides that say where the servers are."""
    with contextlib.ExitStack() as running:
        overrides = []
        for name in names:
            server = serving(RUNS / f"{name}.log", "longrl_jax.data.generate", *SERVERS[name])
            url = running.enter_context(server)
            overrides.append(f"servers.{name}.base_url={url}")
        yield overrides


def is_made(path: Path) -> bool:
    if path.name == "scores.json" and path.exists():
        return json.loads(path.read_text())["complete"]
    return path.exists()


def summary() -> None:
    """Prints what was scored, and what blind guessing would."""
    found = {name: read_scores(name) for name in SCORED}
    say(
        f"{found['grpo']['questions']} questions about films that no stage has seen, 95 % intervals"
    )
    say(f"  {'':20s} " + " ".join(f"{name:24s}" for name in found))
    for mode in found["grpo"]["modes"]:
        for part in PARTS:
            cells = [shown(one["modes"][mode]["all"][part]) for one in found.values()]
            name = f"{mode.replace('_', ' ')}, {part.split('/')[0]}"
            say(f"  {name:20s} " + " ".join(f"{cell:24s}" for cell in cells))
    for kind in found["grpo"]["modes"]["greedy"]:
        cells = [shown(one["modes"]["greedy"][kind][STRICT]) for one in found.values()]
        say(f"  {'greedy, ' + kind:20s} " + " ".join(f"{cell:24s}" for cell in cells))
    for after, before in (("sft", "start"), ("grpo", "sft")):
        outs = scored(after), scored(before)
        gain = scores.difference(*outs, mode="greedy", part=STRICT)["all"]
        say(f"  {after} - {before}, question by question: {shown(gain)}")
    say(f"look at {RUNS / 'report.html'}, {FILTERED / 'histogram.html'}, {PACKAGE / 'README.md'}")


def read_scores(name: str) -> dict[str, Any]:
    return json.loads((scored(name) / "scores.json").read_text())


if __name__ == "__main__":
    main()
