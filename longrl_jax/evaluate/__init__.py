"""Scores a checkpoint on held-out questions, beside what it scores without looking.

python -m longrl_jax.evaluate CONFIG.yaml [section.key=value ...] [--out DIR]
python -m longrl_jax.evaluate compare AFTER BEFORE
"""

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from longrl_jax import config, platform, run_folder
from longrl_jax.evaluate.choices import THINKING, Variant, folder, variants
from longrl_jax.evaluate.plan import ALL_EXAMPLES, Found, begun
from longrl_jax.evaluate.tables import compared, side_by_side, table
from longrl_jax.train import COMPILE_CACHE, check_names

EPILOG = """\
examples:
  python -m longrl_jax.evaluate runs/mine/resolved.yaml model.path=runs/mine/export
  python -m longrl_jax.evaluate configs/tiny_cpu_grpo.yaml --examples 100 --samples 16
  python -m longrl_jax.evaluate CONFIG --thinking both --frames 16,32,64,128
  python -m longrl_jax.evaluate CONFIG --benchmark longvideo_reason data.validation=test.jsonl
  python -m longrl_jax.evaluate compare runs/grpo/evaluate/grpo runs/sft/evaluate/sft

What is evaluated is model.path, a Hugging Face folder (a run's is RUN/export), on data.validation.
A run's resolved.yaml names as model.path what the run started from: without an override that is
the score *before* training.

modes
  greedy       the most likely answer to every question
  sampled      --samples answers at --temperature: their mean (mean@R), and the share of questions
               with at least one right among them (pass@R)
  shuffled     greedy, the options of every question in other orders (--shuffles of them, drawn by
               the seed; the answer's letter follows): a policy that likes a letter loses it here
  no_video     greedy, the video left out of the prompt: what the policy knows without looking
  other_video  greedy, every question asked of another question's film
baselines
  one letter   the best constant answer to the multiple-choice questions
  one answer   the most frequent answer of each kind, free answers too
  chance       guessing among the options
A score means that the videos were understood as far as it exceeds all of these. On a published copy
of LongVideo-Reason-eval "B" alone is right in 44.7 %. Look at the format of the blind modes too: a
policy that never saw a question without a video may lose the form there, and then other_video is
the baseline that counts.

Intervals are 95 %. One right or wrong answer to a question: Wilson's. Everything else: Wilson's for
the number of independent questions that would have the same variance, or the normal interval for
rewards outside 0 to 1. Questions are the unit, and films where several questions share one. To
compare two checkpoints take `compare`, whose intervals are of the paired difference.

Scores are of the rewards of the config and, with --benchmark, of that benchmark's scorers: official
(as its published code judges) beside strict (the form that was asked for, and the letter alone). An
answer that could not be judged counts in no score, is counted, and is judged again next time.

--benchmark sets data.source, template, wording, subtitles, num_frames and rollout.max_tokens
(docs/benchmarks.md); overrides on the command line win. data.root and data.validation say where its
records are; of several benchmarks NAME's are under data.root/NAME, in the file data.validation or
NAME=FILE. --thinking sets data.template (on: think, off: direct), --frames data.num_frames. Each
evaluation then has a folder of its own below DIR; the model is loaded, and vLLM started, once.

files in DIR (default: run.dir/evaluate/<the run that model.path comes from>)
  scores.json           every mode, overall, by kind and by tag, with intervals; the baselines; the
                        settings
  answers/MODE.jsonl    a line an answer: the question as it was asked, its options in their order,
                        the text, every verdict, film, kind and tags
  drawn/MODE.jsonl      the answers as the engine gave them, on disk as they come
  judge.jsonl           verdicts of a model that judges, each paid for once
  refused.jsonl         questions that could not be asked, with reasons; they count in no score
  sweep.json, sweep.svg with --frames: scores by number of frames, and the plot
An evaluation that was cut off goes on when the same command is given again: what was answered is
not asked again, and the result is the unbroken one's. Other rewards judge what was answered anew.
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Evaluates and prints the scores; a mistake of the user's is one line, its trace is in DIR."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["compare"]:
        _compare(words[1:])
        return
    args = parser().parse_intermixed_args(words)
    try:
        todo = variants(args)
        out = folder(args, todo[0].cfg)
        found = [begun(variant.cfg, variant.plan) for variant in todo]
        if unfinished := [one for one in found if not one["complete"]]:
            held = _take(out)
            cfg = todo[0].cfg
            platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"longrl_jax.evaluate: {error}")
    if unfinished:
        try:
            run_all(todo, found)
            (out / "error.txt").unlink(missing_ok=True)  # of an attempt that failed
        except (ValueError, OSError) as error:
            sys.exit(f"longrl_jax.evaluate: {error}\n({_keep_trace(out)})")
        finally:
            held.close()
    _show(todo, found, out)


def run_all(todo: Sequence[Variant], found: list[Found]) -> None:
    """Runs the evaluations that are not complete, and puts what they find in their place."""
    from longrl_jax.evaluate import answering  # after platform.prepare: it brings JAX

    for variant in todo:
        check_names(variant.cfg)
    with answering.opened(todo[0].cfg) as model:
        for place, variant in enumerate(todo):
            if not found[place]["complete"]:
                if variant.words:
                    sys.stdout.write(f"{', '.join(variant.words)}\n")
                    sys.stdout.flush()
                found[place] = answering.run(variant.cfg, variant.plan, found[place], model)


def _show(todo: Sequence[Variant], found: Sequence[Found], out: Path) -> None:
    """Prints every evaluation, several also side by side, and writes the sweep over frames."""
    for one in found:
        sys.stdout.write(f"{table(one)}\n\n")
    if len(todo) > 1:
        names = [", ".join(variant.words) for variant in todo]
        folders = {name: v.plan.out for name, v in zip(names, todo, strict=True)}
        by_name = dict(zip(names, found, strict=True))
        sys.stdout.write(f"{side_by_side(by_name, folders)}\n\n")
    from longrl_jax.evaluate import sweep  # here: it brings the report

    for path in sweep.write(todo, found, out):
        sys.stdout.write(f"{path}\n")
    for variant in todo:
        sys.stdout.write(f"read on: {variant.plan.out}/scores.json, answers/\n")


def _compare(words: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.evaluate compare",
        description="Says what one evaluation scores above another, question by question.",
    )
    parser.add_argument("after", type=Path, help="folder of an evaluation (its --out)")
    parser.add_argument("before", type=Path, help="the one it is compared with")
    args = parser.parse_args(words)
    try:
        sys.stdout.write(f"{compared(args.after, args.before)}\n")
    except ValueError as error:
        sys.exit(f"longrl_jax.evaluate: {error}")


def _take(out: Path) -> TextIO:
    """Makes the folder and takes it for this process; returns what holds it."""
    try:
        run_folder.make_folder(out)
    except OSError as error:
        raise platform.disk_error(error, out, "choose another --out") from error
    try:
        return run_folder.lock(out)
    except ValueError:
        raise ValueError(
            f"{out} is in use by another evaluation; wait for it, or choose another --out"
        ) from None


def _keep_trace(out: Path) -> str:
    trace = traceback.format_exc()
    try:
        (out / "error.txt").write_text(trace)
    except OSError as error:
        return f"{out}/error.txt cannot be written ({error.strerror}), so here it is:\n{trace}"
    return f"where: {out / 'error.txt'}"


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


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len({name.partition("=")[0] for name in names}) < len(names):
        raise argparse.ArgumentTypeError(f"{text!r} must be names, each once, with commas between")
    return names


def _thinking(text: str) -> list[str]:
    if text not in (*THINKING, "both"):
        raise argparse.ArgumentTypeError(f"{text!r} must be on, off or both")
    return list(THINKING) if text == "both" else [text]


def _frames(text: str) -> list[int]:
    return sorted({_count(1)(number.strip()) for number in text.split(",")})


def parser() -> argparse.ArgumentParser:
    """Returns what reads the command line of an evaluation."""
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
    add("--shuffles", type=_count(0), default=1, help="orders of the options; 0: without (1)")
    add("--temperature", type=_temperature, default=1.0, help="of those answers (1.0)")
    add("--examples", type=_examples, default="all", help="the first so many questions, or all")
    add("--benchmark", type=_names, metavar="NAME,...", help="of longrl_jax.benchmarks, or all")
    add("--thinking", type=_thinking, metavar="on|off|both", help="reason first, or answer at once")
    add("--frames", type=_frames, metavar="N,...", help="numbers of frames, e.g. 16,32,64,128")
    add(
        "--baselines",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask blind too, and count letters (on)",
    )
    return parser
