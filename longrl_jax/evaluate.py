"""Scores a checkpoint on held-out questions, beside what it scores without looking.

python -m longrl_jax.evaluate CONFIG.yaml [section.key=value ...] [--out DIR]
"""

import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from longrl_jax import config, platform, scores
from longrl_jax.scores import ALL, Row
from longrl_jax.train import COMPILE_CACHE, check_names

EPILOG = """\
examples:
  python -m longrl_jax.evaluate runs/mine/resolved.yaml model.path=runs/mine/export
  python -m longrl_jax.evaluate configs/tiny_cpu_grpo.yaml --examples 100 --samples 16

What is evaluated is model.path, a Hugging Face folder (a run's is RUN/export), on data.validation.
A run's resolved.yaml names as model.path what the run started from: without an override that is
the score *before* training.

modes
  greedy       the most likely answer to every question
  sampled      --samples answers at --temperature: their mean (mean@R), and the share of questions
               with at least one right among them (pass@R)
  no_video     greedy, the video left out of the prompt: what the policy knows without looking
  other_video  greedy, every question asked of another question's film
baselines
  one letter   the best constant answer to the multiple-choice questions
  one answer   the most frequent answer of each kind, free answers too
  chance       guessing among the options
A score means that the videos were understood as far as it exceeds all of these. Look at the format
of the blind modes too: a policy that never saw a question without a video may lose the form there,
and then other_video is the baseline that counts.

Intervals are 95 %. One right or wrong answer to a question: Wilson's. Everything else: Wilson's for
the number of independent questions that would have the same variance, or the normal interval for
rewards outside 0 to 1. Questions are the unit, and films where several questions share one. To
compare two checkpoints take the paired interval
longrl_jax.scores.difference(AFTER, BEFORE, mode="greedy", part="video_qa/accuracy").

files in DIR (default: run.dir/evaluate/<the run that model.path comes from>)
  scores.json    every mode, overall and by kind, with intervals; the baselines; the settings
  answers.jsonl  every answer with its reward
  refused.jsonl  questions that could not be asked, with reasons; they count in no score
An evaluation that was cut off goes on after its last whole mode.
"""
GREEDY, SAMPLED, NO_VIDEO, OTHER_VIDEO = "greedy", "sampled", "no_video", "other_video"
NOT_BLIND = {
    NO_VIDEO: "no question has a video",
    OTHER_VIDEO: "no question can be shown another video",
}
"""Why a blind mode is left out."""
EXPORT = "export"
"""Name of the folder that a run exports to."""
ALL_EXAMPLES = sys.maxsize


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an evaluation does; the rest is the config's (run.eval_examples: how many questions)."""

    out: Path
    num_samples: int = 8
    """Answers to a question in the mode `sampled`; 0: without it."""
    temperature: float = 1.0
    baselines: bool = True
    """With the blind modes and the one-letter baseline."""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates and prints the scores; a mistake of the user's is one line, its trace is in DIR."""
    args = _parser().parse_intermixed_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        limited = dataclasses.replace(cfg.run, eval_examples=args.examples)
        cfg = dataclasses.replace(cfg, run=limited)
        if cfg.mesh.processes > 1:
            raise ValueError(
                f"mesh.processes={cfg.mesh.processes}: an evaluation is one process; set "
                "mesh.processes=1 and mesh.* to the devices of this host"
            )
        plan = Plan(
            out=args.out or default_out(cfg),
            num_samples=args.samples,
            temperature=args.temperature,
            baselines=args.baselines,
        )
        if not cfg.data.validation:
            raise ValueError("data.validation is empty; name a file of held-out questions")
        found = begun(cfg, plan)
        if not found["complete"]:
            platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"longrl_jax.evaluate: {error}")
    if not found["complete"]:
        plan.out.mkdir(parents=True, exist_ok=True)
        try:
            check_names(cfg)
            found = run(cfg, plan, found)
        except ValueError as error:
            (plan.out / "error.txt").write_text(traceback.format_exc())
            sys.exit(f"longrl_jax.evaluate: {error}\n(where: {plan.out / 'error.txt'})")
    sys.stdout.write(f"{table(found)}\n\nread on: {plan.out}/scores.json, answers.jsonl\n")


def run(cfg: config.Config, plan: Plan, found: dict[str, Any]) -> dict[str, Any]:
    """Answers in every mode that `found` (of `begun`) lacks; returns what scores.json then says."""
    from longrl_jax.data.refused import RefusedLog  # after platform.prepare: they bring JAX
    from longrl_jax.metrics import Phases
    from longrl_jax.stages import evaluation, questions
    from longrl_jax.stages import policy as opened

    policy, state = opened.open_policy(cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    smallest = cfg.batch.smallest_bucket
    inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=smallest)(state)
    answers = {mode: list(scores.read_answers(plan.out, mode).values()) for mode in found["modes"]}
    with contextlib.ExitStack() as stack:
        (plan.out / "refused.jsonl").unlink(missing_ok=True)  # every attempt finds them anew
        refused = stack.enter_context(RefusedLog(plan.out / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, Phases()))
        asked = evaluation.readable(questions.validation(cfg, policy, refused), embed)
        if not asked:
            raise ValueError(f"not one video could be read; the reasons are in {refused.path}")
        found |= {"questions": len(asked), "refused": refused.count}
        if plan.baselines:
            examples = [prompt.example for prompt in asked]
            one_letter, chance = scores.one_letter(examples), scores.chance(examples)
            found["baselines"] = {
                "one_letter": one_letter,
                "one_answer": scores.one_answer(examples),
                "chance": chance,
            }
        engines = stack.enter_context(opened.open_engines(cfg, policy))
        for how in modes(plan):
            if how.name in found["modes"]:
                continue
            shown = {
                NO_VIDEO: lambda: questions.without_video(cfg, policy, asked),
                OTHER_VIDEO: lambda: questions.with_other_video(cfg, policy, asked, refused),
            }.get(how.name, lambda: asked)()
            if not shown:
                found["skipped"][how.name] = NOT_BLIND[how.name]
                continue
            got = evaluation.answer(cfg, policy, engines, shown, embed, inputs, mode=how)
            if how.name == NO_VIDEO:  # the film asked about: questions that share one are kin
                films = {prompt.example.id: prompt.example.about for prompt in asked}
                got = [[row | {"video": films[row["id"]]} for row in rows] for rows in got]
            answers[how.name], found["modes"][how.name] = got, scores.summary(got)
            found["counts"][how.name] = {"asked": len(asked), "answered": len(got)}
            keep(plan.out, found, answers)
    found["complete"] = True
    keep(plan.out, found, answers)
    return found


def modes(plan: Plan) -> list[Any]:
    """Returns how the questions are answered, one evaluation.Mode after the other."""
    from longrl_jax.stages.evaluation import Mode  # after platform.prepare: it brings JAX

    sampled = Mode(name=SAMPLED, num_samples=plan.num_samples, temperature=plan.temperature)
    blind = [Mode(name=NO_VIDEO), Mode(name=OTHER_VIDEO)]
    return [Mode(name=GREEDY)] + [sampled] * (plan.num_samples > 0) + blind * plan.baselines


def begun(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Returns what plan.out/scores.json holds of this very evaluation, or an empty start.

    Raises ValueError where it holds one with other settings, or of weights that have changed.
    """
    settings = settings_of(cfg, plan)
    path = plan.out / "scores.json"
    if not path.exists():
        start: dict[str, Any] = {"checkpoint": cfg.model.path, "step": step_of(cfg.model.path)}
        start |= {"questions": 0, "refused": 0, "complete": False, "counts": {}, "modes": {}}
        return start | {"baselines": {}, "skipped": {}, "settings": settings}
    found: dict[str, Any] = json.loads(path.read_text())
    other = sorted(k for k, v in settings.items() if found["settings"].get(k) != v)
    if other:
        raise ValueError(
            f"{path} holds an evaluation with another {', '.join(other)}; choose another --out, or "
            "move that one away"
        )
    return found


def settings_of(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Returns all that the scores depend on, as JSON has it."""
    folder = Path(cfg.model.path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(
            f"model.path={cfg.model.path} holds no files; name a Hugging Face folder, e.g. a run's "
            "RUN/export"
        )
    digest = hashlib.sha256()
    for path in files:  # not the bytes: a checkpoint may be many gigabytes
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    settings = {
        "model.path": cfg.model.path,
        "files of model.path": digest.hexdigest()[:16],
        "model.compute_dtype": cfg.model.compute_dtype,
        "rollout": [cfg.rollout.dtype, cfg.rollout.max_tokens, cfg.rollout.max_model_len],
        "batch.max_row_tokens": cfg.batch.max_row_tokens,
        "data": dataclasses.asdict(cfg.data),
        "content of data.validation": _digest(Path(cfg.data.root) / cfg.data.validation),
        "rewards": cfg.rewards,
        "seed": cfg.seed,
        "--samples": plan.num_samples,
        "--temperature": plan.temperature,
        "--examples": "all" if cfg.run.eval_examples == ALL_EXAMPLES else cfg.run.eval_examples,
        "--baselines": plan.baselines,
    }
    return json.loads(json.dumps(settings))


def _digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise ValueError(f"data.validation={path} cannot be read: {error.strerror}") from error


def keep(out: Path, found: dict[str, Any], answers: dict[str, list[list[Row]]]) -> None:
    """Writes answers.jsonl, then scores.json, which says what of it counts; each whole."""
    from longrl_jax.stages.evaluation import write_answers

    write_answers(out / "answers.jsonl", [rows for mode in answers.values() for rows in mode])
    unfinished = out / "scores.json.unfinished"
    unfinished.write_text(json.dumps(found, indent=1) + "\n")
    unfinished.replace(out / "scores.json")


def default_out(cfg: config.Config) -> Path:
    """Returns run.dir/evaluate/<run that model.path is the export of, or its own name>."""
    folder = Path(cfg.model.path).absolute()
    name = folder.parent.name if folder.name == EXPORT else folder.name
    return Path(cfg.run.dir) / "evaluate" / name


def step_of(checkpoint: str) -> int | None:
    """Returns the last step of the run that exported this folder; None for any other folder."""
    metrics = Path(checkpoint).absolute().parent / "metrics.jsonl"
    if Path(checkpoint).name != EXPORT or not metrics.is_file():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["step"] if lines else None


def table(found: dict[str, Any]) -> str:
    """Returns the scores as lines for people: kinds in rows, modes and baselines in columns."""
    modes, num_samples = found["modes"], found["settings"]["--samples"]
    sampled = {f"mean@{num_samples}": (SAMPLED, "")}
    if num_samples > 1:
        sampled |= {f"pass@{num_samples}": (SAMPLED, f"/pass@{num_samples}")}
    blind = {"no video": (NO_VIDEO, ""), "other video": (OTHER_VIDEO, "")}
    columns = {"greedy": (GREEDY, "")} | sampled | blind
    columns = {title: column for title, column in columns.items() if column[0] in modes}
    baselines = found["baselines"]
    rows = [["", "n", *columns, *(name.replace("_", " ") for name in baselines)]]
    for part, score in modes[GREEDY][ALL].items():
        right = part.rpartition("/")[2] == scores.CORRECT
        rows.append([part])
        for kind, parts in modes[GREEDY].items():
            if kind != ALL and not right:
                break
            cells = [modes[mode].get(kind, {}).get(part + tail) for mode, tail in columns.values()]
            cells += [by_kind.get(kind) if right else None for by_kind in baselines.values()]
            count = parts.get(part, score)["n"]
            rows.append([f"  {kind}", str(count), *(_cell(cell) for cell in cells)])
    step = "" if found["step"] is None else f" (step {found['step']})"
    head = (
        f"{found['checkpoint']}{step}: {found['questions']} questions, {found['refused']} refused"
    )
    remarks = [f"{mode} is left out: {why}" for mode, why in found["skipped"].items()]
    for mode, count in found["counts"].items():
        if count["answered"] < count["asked"]:
            remarks.append(f"{mode}: {count['answered']} of {count['asked']} could be asked")
    return "\n".join([head, "scores x 100 (95 % interval)", *_aligned(rows), *remarks])


def _cell(score: dict[str, Any] | None) -> str:
    if score is None:
        return "-"
    text = f"{100 * score['mean']:.1f}"
    if score.get("low") is not None:
        text += f" ({100 * score['low']:.0f}-{100 * score['high']:.0f})"
    return f"{text} {score['letter']}" if "letter" in score else text


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pads the cells of full rows to the widest of their column; a short row is a heading."""
    full = [row for row in rows if len(row) > 1]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip()
        for row in rows
    ]


def _examples(text: str) -> int:
    return ALL_EXAMPLES if text == "all" else _count(1)(text)


def _count(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isascii() or not text.isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from {least} on")
        return int(text)

    return parse


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0.01 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text!r} must be a number from 0.01 on (vLLM's lowest); greedy answers come anyway"
        )
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.evaluate",
        usage="python -m longrl_jax.evaluate CONFIG.yaml [section.key=value ...] [options]",
        description=__doc__,
        epilog=EPILOG + "\n" + config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, help="a file of configs/ or a run's resolved.yaml")
    add("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    add("--out", type=Path, metavar="DIR", help="folder to write to (default: see below)")
    add("--samples", type=_count(0), default=8, help="answers to a question; 0: greedy only (8)")
    add("--temperature", type=_temperature, default=1.0, help="of those answers (1.0)")
    add("--examples", type=_examples, default="all", help="the first so many questions, or all")
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask blind too, and count letters (on)",
    )
    return parser


if __name__ == "__main__":
    main()
