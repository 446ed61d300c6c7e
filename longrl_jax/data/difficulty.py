"""Keeps the questions that a checkpoint answers neither always nor never, and splits them.

python -m longrl_jax.data.difficulty CONFIG.yaml [section.key=value ...] [--samples 10] [--out DIR]
"""

import argparse
import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longrl_jax import config, platform, run_folder
from longrl_jax.data import loader, mixing, prompts
from longrl_jax.data.longvideo_reason import RecordError, to_record
from longrl_jax.data.pass_rates import REASONS, Bounds, Row, counted, split, unjudged, verdict
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.report import difficulty as page
from longrl_jax.stages import evaluation, questions
from longrl_jax.stages import policy as opened
from longrl_jax.train import COMPILE_CACHE, check_names
from longrl_jax.types import Example, Prompt
from rollout_bridge import EngineError

EPILOG = """\
examples:
  python -m longrl_jax.data.difficulty configs/tiny_cpu_grpo.yaml --samples 10
  python -m longrl_jax.data.difficulty configs/tiny_cpu_grpo.yaml --below 0.85 --rl-share 0.5

Every question of data.train is answered --samples times by model.path, in vLLM, with its film from
the embedding store (data.embed fills it beforehand) and one prefill for all answers to a question.
The answers are judged by the config's rewards; a question's pass rate is the share of them whose
accuracy (--part) is --right-from or more. It is kept if --above < pass rate < --below: what is
always right or always wrong teaches nothing to an algorithm that compares answers to one question.

An answer that no reward could judge is not wrong: it leaves the rate. A question with fewer than
--min-valid judged answers is invalid, which is counted, and never taken for too hard.

How sure is that? With k answers, a question of true pass rate p looks always right or always wrong
with probability p^k + (1-p)^k. For k = 10:
  p           0.5    0.3 or 0.7   0.2 or 0.8   0.1 or 0.9   0.05 or 0.95
  is dropped  0.2 %       2.8 %         11 %         35 %           60 %
so the filter is sure about what lies in the middle, and draws lots near the ends.

What is kept is split into records for SFT and for RL, 1 to 2. The split is by film: a film that
reasoning was learned from is not asked about again in RL. Films that a question shows together stay
together. --split-by question mixes them. The split follows from seed and records alone.

files in DIR (default: data.root/difficulty/<name of the checkpoint>, so that data.train can name
them: data.train=difficulty/NAME/rl.jsonl)
  kept.jsonl, sft.jsonl, rl.jsonl   records in the plain form (data.source=longvideo_reason)
  questions.jsonl   a line a question: pass, k, valid, rate, kept, reason
  answers.jsonl     a line a question, as soon as it is judged: its answers and their rewards
  histogram.html    pass rates, overall and by kind;  summary.json: the same in numbers
  refused.jsonl     records that could not be asked, with reasons
A run that was stopped, however, goes on when the same command is given again: what answers.jsonl
holds is not sampled again. Bounds and split may be changed afterwards without sampling anything.
--again asks anew what may go well another time: records that were refused (a decode time-out), and
questions with answers that no reward could judge (a judge that was down).
"""
MATTERS = ("stage", "seed", "model.", "data.", "rollout.", "rewards", "judge.")
"""Config keys, or sections, that answers and their rewards depend on, those of run_folder.FREE and
DO_NOT left out."""
ANSWERS, SAMPLED = "answers.jsonl", "sampled.json"
"""The journal, and what says that it holds every question that can be asked."""
DO_NOT = ("data.validation", "rollout.temperature", "model.reference", "model.lora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is asked of a run; the rest is the config's."""

    out: Path
    num_samples: int = 10
    temperature: float = 1.0
    bounds: Bounds = Bounds()
    rl_share: float = 2 / 3
    """Of the records that are kept."""
    by_film: bool = True

    def __post_init__(self):
        if self.num_samples < 2:
            raise ValueError(f"--samples {self.num_samples} must be 2 or more: one is never mixed")
        if not 1 <= self.bounds.min_valid <= self.num_samples:
            raise ValueError(
                f"--min-valid {self.bounds.min_valid} must be 1 to --samples {self.num_samples}"
            )
        if not 0 <= self.rl_share <= 1:
            raise ValueError(f"--rl-share {self.rl_share} must be 0 to 1")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs, and prints what was kept; a mistake of the user's is one line."""
    args = _parser().parse_intermixed_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        if cfg.mesh.processes > 1:
            raise ValueError(
                f"mesh.processes={cfg.mesh.processes}: the filter is one process; set "
                "mesh.processes=1 and mesh.* to the devices of this host"
            )
        plan = plan_of(cfg, args)
        check_names(cfg)
        mixing.open_training(cfg.data)  # before a folder is made for it
        run_folder.make_folder(plan.out)
        with run_folder.lock(plan.out):
            if args.again:
                begin(cfg, plan)  # before anything is deleted
                ask_again(plan.out)
            if not (plan.out / SAMPLED).exists():
                _prepare(cfg)
            summary = run(cfg, plan)
    except (ValueError, OSError, EngineError) as error:
        notes = getattr(error, "__notes__", []) if isinstance(error, EngineError) else []
        sys.exit("\n".join([f"longrl_jax.data.difficulty: {error}", *notes]))
    sys.stdout.write(f"{table(summary)}\n\nread on: {plan.out}/histogram.html, questions.jsonl\n")


def run(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Samples what answers.jsonl lacks, then filters, splits and writes; returns summary.json."""
    source = mixing.open_training(cfg.data)
    questions.refuse_repeated_ids(source, len(source))
    begin(cfg, plan)
    rows = read_journal(plan.out / ANSWERS)
    done = plan.out / SAMPLED
    if not done.exists():
        num_refused = sample(cfg, plan, source, rows)
        run_folder.write_synced(done, json.dumps({"refused": num_refused}).encode() + b"\n")
    if not rows:
        raise ValueError(f"not one question could be asked; see {plan.out / 'refused.jsonl'}")
    verdicts = {name: verdict(row, plan.bounds) for name, row in rows.items()}
    return write(cfg, plan, source, rows, verdicts)


def begin(cfg: config.Config, plan: Plan) -> None:
    """Raises ValueError if plan.out holds answers that were drawn with other settings."""
    settings = settings_of(cfg, plan)
    path = plan.out / "settings.json"
    if path.exists():
        found = json.loads(path.read_text())
        if other := sorted(k for k in settings | found if settings.get(k) != found.get(k)):
            raise ValueError(
                f"{plan.out} holds answers with another {', '.join(other)}; choose another --out, "
                "or move that one away"
            )
        return
    run_folder.write_synced(path, json.dumps(settings, indent=1).encode() + b"\n")


def settings_of(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Returns all that answers and rewards depend on, as JSON has it."""
    leave = run_folder.FREE + DO_NOT
    tree = run_folder.flat(dataclasses.asdict(cfg))
    settings = {k: v for k, v in tree.items() if k.startswith(MATTERS) and not k.startswith(leave)}
    settings |= {"--samples": plan.num_samples, "--temperature": plan.temperature}
    folder, digest = Path(cfg.model.path), hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        stat = path.stat()  # not the bytes: a checkpoint may be many gigabytes
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    settings["files of model.path"] = digest.hexdigest()[:16]
    content = hashlib.sha256()
    for path in mixing.training_files(cfg.data):
        with path.open("rb") as file:
            content.update(hashlib.file_digest(file, "sha256").digest())
    settings["content of data.train"] = content.hexdigest()[:16]
    return json.loads(json.dumps(settings))


def sample(cfg: config.Config, plan: Plan, source: Any, rows: dict[str, Row]) -> int:
    """Asks every question that `rows` lacks, adds it there and to answers.jsonl batch by batch;
    returns how many records were refused."""
    policy, state = opened.open_policy(cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    smallest = cfg.batch.smallest_bucket
    inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=smallest)(state)
    mode = evaluation.Mode(
        name="answers", num_samples=plan.num_samples, temperature=plan.temperature
    )
    with contextlib.ExitStack() as stack:
        (plan.out / "refused.jsonl").unlink(missing_ok=True)  # every attempt finds them anew
        refused = stack.enter_context(RefusedLog(plan.out / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, Phases()))
        engines = stack.enter_context(opened.open_engines(cfg, policy))
        bar = stack.enter_context(
            tqdm(total=len(source), initial=len(rows), desc="questions", dynamic_ncols=True)
        )
        counts = collections.Counter(verdict(row, plan.bounds)["reason"] for row in rows.values())
        for read, batch in _batches(cfg, policy, source, refused, set(rows)):
            answers = evaluation.answer(cfg, policy, engines, batch, embed, inputs, mode=mode)
            films = {prompt.example.id: films_of(prompt) for prompt in batch}
            new = [_row(answered, films[answered[0]["id"]]) for answered in answers]
            append(plan.out / ANSWERS, new)  # first: a --part that is not clear must cost nothing
            rows |= {row["id"]: _without_texts(row) for row in new}
            for row in new:
                counts[verdict(row, plan.bounds)["reason"]] += 1
            bar.update(read)
            bar.set_postfix(
                {reason: counts[reason] for reason in REASONS} | {"refused": refused.count}
            )
        return refused.count


def write(
    cfg: config.Config,
    plan: Plan,
    source: Any,
    rows: Mapping[str, Row],
    verdicts: Mapping[str, dict[str, Any]],
) -> dict[str, Any]:
    """Writes every file of a filtered data set; returns what summary.json says."""
    examples = [example for example in _examples(source) if example.id in rows]
    kept = [example for example in examples if verdicts[example.id]["kept"]]
    for_rl = split(
        [rows[example.id]["films"] for example in kept],
        rl_share=plan.rl_share,
        by_film=plan.by_film,
        seed=cfg.seed,
    )
    parts = {
        "kept": kept,
        "sft": [e for e, rl in zip(kept, for_rl, strict=True) if not rl],
        "rl": [e for e, rl in zip(kept, for_rl, strict=True) if rl],
    }
    for name, chosen in parts.items():
        _write_lines(plan.out / f"{name}.jsonl", [to_record(example) for example in chosen])
    about = {e.id: {"id": e.id, "kind": e.kind, "video": e.about} for e in examples}
    lines = [about[example.id] | verdicts[example.id] for example in examples]
    _write_lines(plan.out / "questions.jsonl", lines)
    finished = [reason for row in rows.values() for reason in row["finish_reasons"]]
    refused = json.loads((plan.out / SAMPLED).read_text())["refused"]
    summary = {
        "checkpoint": cfg.model.path,
        "samples": plan.num_samples,
        "above": plan.bounds.above,
        "below": plan.bounds.below,
        "refused": refused,
        "unjudged": sum(map(unjudged, rows.values())),
        "answers_cut_off": finished.count("length") / len(finished),
        "split_by": "film" if plan.by_film else "question",
        "sft": len(parts["sft"]),
        "rl": len(parts["rl"]),
        "sft_without_reasoning": sum(not e.reasoning for e in parts["sft"]),
        "kinds": counted(lines, plan.num_samples),
    }
    run_folder.write_synced(plan.out / "histogram.html", page.render(summary).encode())
    run_folder.write_synced(
        plan.out / "summary.json", json.dumps(summary, indent=1).encode() + b"\n"
    )
    return summary


def read_journal(path: Path) -> dict[str, Row]:
    """Returns the rows of answers.jsonl by id, without the texts, which may be gigabytes; cuts off
    a last line that a kill left torn.

    Raises ValueError, with the line's number, for any other line whose checksum is wrong.
    """
    rows: dict[str, Row] = {}
    if not path.exists():
        return rows
    good_bytes = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            row = _checked(line)
            if row is None:
                raise ValueError(
                    f"{path}:{number} is damaged: its checksum is wrong; delete the line, and its "
                    "question is asked again"
                )
            rows[row["id"]] = _without_texts(row)
            good_bytes += len(line)
    with path.open("r+b") as file:
        file.truncate(good_bytes)
    return rows


def ask_again(out: Path) -> None:
    """Lets the next `run` ask for what was refused, and what a reward could not judge: takes the
    latter out of answers.jsonl."""
    (out / SAMPLED).unlink(missing_ok=True)
    path = out / ANSWERS
    rows = read_journal(path)  # it cuts off a torn line
    if not any(map(unjudged, rows.values())):
        return
    partial = path.with_name(f".{path.name}.partial")
    try:
        with path.open("rb") as file, partial.open("wb") as kept:
            kept.writelines(line for line in file if not unjudged(rows[json.loads(line)["id"]]))
            kept.flush()
            os.fsync(kept.fileno())
        partial.replace(path)
        run_folder.sync_folder(out)
    except OSError as error:
        raise platform.disk_error(error, path, "make room, and give the same command") from error


def append(path: Path, rows: Sequence[Row]) -> None:
    """Adds rows to answers.jsonl; they are on disk when this returns."""
    lines = []
    for row in rows:
        text = json.dumps(row)
        digest = hashlib.sha256(text.encode()).hexdigest()
        lines.append(json.dumps({"sha256": digest}).removesuffix("}") + ", " + text[1:] + "\n")
    try:
        run_folder.append_synced(path, "".join(lines).encode())
    except OSError as error:
        way_out = "make room, and give the same command again: it goes on where it was"
        raise platform.disk_error(error, path, way_out) from error


def table(summary: Mapping[str, Any]) -> str:
    """Returns the counts as lines for people."""
    lines = [f"{'':14}{'questions':>10}" + "".join(f"{reason:>10}" for reason in REASONS)]
    for kind, counts in summary["kinds"].items():
        numbers = [counts[reason] for reason in REASONS]
        lines.append(f"{kind[:13]:14}{sum(numbers):>10}" + "".join(f"{n:>10}" for n in numbers))
    lines.append(
        f"kept if {summary['above']:g} < pass rate < {summary['below']:g} of {summary['samples']} "
        f"answers; {summary['refused']} records refused; "
        f"{100 * summary['answers_cut_off']:.1f} % of the answers were cut off"
    )
    if summary["unjudged"] or summary["refused"]:
        lines.append(
            f"answers of {summary['unjudged']} questions could not be judged, {summary['refused']} "
            "records were refused; --again asks them again"
        )
    lines.append(f"split by {summary['split_by']}: {summary['sft']} SFT, {summary['rl']} RL")
    if summary["sft_without_reasoning"]:
        lines.append(
            f"{summary['sft_without_reasoning']} of the SFT records have no reasoning: training "
            "refuses them unless data.template=direct"
        )
    return "\n".join(lines)


def _prepare(cfg: config.Config) -> None:
    try:
        platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
    except RuntimeError as error:  # the mesh is another than the machine
        raise ValueError(str(error)) from error


def plan_of(cfg: config.Config, args: argparse.Namespace) -> Plan:
    """Returns what the options say."""
    folder = Path(cfg.model.path).absolute()
    name = folder.parent.name if folder.name == "export" else folder.name
    min_valid = (args.samples + 1) // 2 if args.min_valid is None else args.min_valid
    return Plan(
        out=args.out or Path(cfg.data.root) / "difficulty" / name,
        num_samples=args.samples,
        temperature=cfg.rollout.temperature if args.temperature is None else args.temperature,
        bounds=Bounds(
            above=args.above,
            below=args.below,
            right_from=args.right_from,
            min_valid=min_valid,
            part=args.part,
        ),
        rl_share=args.rl_share,
        by_film=args.split_by == "film",
    )


def _batches(
    cfg: config.Config, policy: opened.Policy, source: Any, refused: RefusedLog, known: set[str]
) -> Iterator[tuple[int, list[Prompt]]]:
    """Yields (records read, prompts of those that are not known) in the order of the file."""
    num_samples = cfg.rollout.num_samples if cfg.stage == "grpo" else 1
    encode_prompt = questions.prompt_encoder(cfg, policy, num_samples=num_samples)
    batch: list[Prompt] = []
    read = 0
    for index in range(len(source)):
        try:
            if source[index].id in known:
                continue
        except RecordError:
            pass  # told by prompts_at
        read += 1
        asked = loader.prompts_at(source, encode_prompt, [index], on_refused=refused.add)
        batch += [prompt for prompt in asked if prompt is not None]
        if len(batch) == evaluation.MAX_QUESTIONS:
            yield read, batch
            batch, read = [], 0
    if read:
        yield read, batch


def films_of(prompt: Prompt) -> list[str]:
    """Returns what tells the films of a question from others: their content, whatever part of them
    it asks about and however that is sampled."""
    return [prompts.content_digest(Path(m.path)) for m in prompt.media]


def _row(answered: Sequence[Mapping[str, Any]], films: Sequence[str]) -> Row:
    first = answered[0]
    row = {name: first[name] for name in ("id", "kind", "video", "answer")} | {"films": films}
    names = {"reward": "rewards", "finish_reason": "finish_reasons", "text": "texts"}
    return row | {many: [answer[one] for answer in answered] for one, many in names.items()}


def _examples(source: Any) -> Iterator[Example]:
    for index in range(len(source)):
        with contextlib.suppress(RecordError):  # told when it was asked
            yield source[index]


def _without_texts(row: Mapping[str, Any]) -> Row:
    return {name: value for name, value in row.items() if name != "texts"}


def _checked(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
        digest = row.pop("sha256")
    except (ValueError, KeyError, AttributeError):
        return None
    return row if hashlib.sha256(json.dumps(row).encode()).hexdigest() == digest else None


def _write_lines(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    run_folder.write_synced(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.difficulty",
        usage="python -m longrl_jax.data.difficulty CONFIG.yaml [section.key=value ...] [options]",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("config", type=Path, help="a file of configs/ or a run's resolved.yaml")
    add("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    add("--out", type=Path, metavar="DIR", help="folder to write to (default: see below)")
    add("--samples", type=int, default=10, help="answers to a question, k (10)")
    add("--temperature", type=float, help="of the answers (rollout.temperature)")
    add("--above", type=float, default=0.0, help="lowest pass rate, not included (0)")
    add("--below", type=float, default=1.0, help="highest pass rate, not included (1)")
    add("--right-from", type=float, default=1.0, help="least accuracy of a right answer (1)")
    add("--min-valid", type=int, help="fewest judged answers to a question (half of --samples)")
    add("--part", default="", metavar="REWARD/PART", help="what is right (the only accuracy)")
    add("--rl-share", type=float, default=2 / 3, help="share of RL in what is kept (2/3)")
    add("--again", action="store_true", help="ask the refused and the unjudged ones again")
    add("--split-by", choices=("film", "question"), default="film", help="(film)")
    return parser


if __name__ == "__main__":
    main()
