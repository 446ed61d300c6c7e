"""One evaluation: questions asked in every mode, answers kept as they come, then judged.

What an engine says is on disk before it is judged, so nothing is sampled twice; judging is done
anew at every start and costs nothing, or is in a journal of its own (a judge that is paid for).
"""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import rollout_bridge
from longrl_jax import encode, journal, platform, rewards, run_folder, scores, shuffled
from longrl_jax.benchmarks import BENCHMARKS, joined
from longrl_jax.config import Config
from longrl_jax.data import subtitles
from longrl_jax.data.refused import RefusedLog
from longrl_jax.evaluate.drawn import DrawnLog, Row
from longrl_jax.evaluate.plan import ANSWERS, DRAWN, JUDGE, SCORES, Found, Plan
from longrl_jax.metrics import Phases
from longrl_jax.stages import evaluation, questions
from longrl_jax.stages import policy as opening
from longrl_jax.stages.evaluation import Mode
from longrl_jax.stages.policy import Inputs, Policy
from longrl_jax.stages.questions import Embed
from longrl_jax.types import Prompt, Sample, Scored

GREEDY, SAMPLED, SHUFFLED = "greedy", "sampled", "shuffled"
NO_VIDEO, OTHER_VIDEO = "no_video", "other_video"
LEFT_OUT = {
    SHUFFLED: "no question lists options that could stand in another order",
    NO_VIDEO: "no question has a video",
    OTHER_VIDEO: "no question can be shown another video",
}
"""Why a mode has nothing to ask."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint, ready to answer; evaluations of it share it."""

    policy: Policy
    encoder: encode.Encoder | None
    inputs: Inputs
    engines: Callable[[], list[rollout_bridge.Engine]]
    """Starts them at the first call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ask:
    """A prompt of a question."""

    prompt: Prompt
    first: int = 0
    """Number of its first answer among those to the question."""
    about: str
    """Media that make questions kin: those that are shown, or would be."""


@contextlib.contextmanager
def opened(cfg: Config) -> Iterator[Opened]:
    """Loads model.path, and starts its engines where one is asked."""
    policy, state = opening.open_policy(cfg, trains=False)
    smallest = cfg.batch.smallest_bucket
    inputs = opening.make_prompt_embedder(policy, state, smallest_bucket=smallest)(state)
    with contextlib.ExitStack() as stack:
        start = functools.cache(lambda: stack.enter_context(opening.open_engines(cfg, policy)))
        encoder = opening.open_encoder(policy, state)
        yield Opened(policy=policy, encoder=encoder, inputs=inputs, engines=start)


def run(cfg: Config, plan: Plan, found: Found, model: Opened) -> Found:
    """Asks what is not yet answered, judges all of it; returns what scores.json then says.

    found: of `begun`.
    """
    policy = model.policy
    _keep(plan, found)  # before the first answer: it says what the answers are of
    with contextlib.ExitStack() as stack:
        (plan.out / "refused.jsonl").unlink(missing_ok=True)  # every attempt finds them anew
        refused = stack.enter_context(RefusedLog(plan.out / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, model.encoder, refused, Phases()))
        asked = evaluation.readable(questions.validation(cfg, policy, refused), embed)
        if not asked:
            raise ValueError(f"not one video could be read; the reasons are in {refused.path}")
        found |= {"questions": len(asked), "refused": refused.count}
        tags = dict.fromkeys(name for prompt in asked for name, _ in prompt.example.tags)
        kinds = [name for name in tags if name not in (subtitles.START, subtitles.LENGTH)]
        report_by = list(found["judged_by"]["report_by"] if plan.benchmark else kinds)
        benchmark = BENCHMARKS.get(plan.benchmark)
        rotations = benchmark.rotations if benchmark else 1
        if plan.baselines:
            found["baselines"] = _baselines(asked, report_by, rotations)
        greedy: dict[str, list[Row]] = {}
        for mode in modes(plan):
            asks = _asks(cfg, plan, policy, asked, refused, mode)
            if not asks:
                found["skipped"][mode.name] = LEFT_OUT[mode.name]
                continue
            drawn = answers(cfg, plan, model, asks, embed, mode)
            rows = judged(cfg, plan, policy, asks, drawn, mode)
            _write_rows(plan, mode.name, rows)
            if benchmark:
                rows = joined(rows, benchmark)
            several = scores.EVERY if mode.name == SHUFFLED else scores.PASS
            summary = scores.summary(rows, report_by=report_by, several=several)
            found["modes"][mode.name] = summary
            greedy = greedy or {question[0]["id"]: question for question in rows}
            if mode.name == SHUFFLED:
                found["shuffled_minus_greedy"] = gains(rows, greedy)
            found["counts"][mode.name] = {
                "asked": len(asked) // rotations,
                "answered": len(rows),
                "unjudged": scores.unjudged(rows),
            }
            _keep(plan, found)
    found["complete"] = True
    _keep(plan, found)
    return found


def modes(plan: Plan) -> list[Mode]:
    """Returns how the questions are answered, one mode after the other."""
    sampled = Mode(name=SAMPLED, num_samples=plan.num_samples, temperature=plan.temperature)
    blind = [Mode(name=NO_VIDEO), Mode(name=OTHER_VIDEO)]
    return [
        Mode(name=GREEDY),
        *[sampled] * (plan.num_samples > 0),
        *[Mode(name=SHUFFLED)] * (plan.num_shuffles > 0),
        *blind * plan.baselines,
    ]


def answers(
    cfg: Config, plan: Plan, model: Opened, asks: Sequence[Ask], embed: Embed, mode: Mode
) -> dict[tuple[str, int], Row]:
    """Returns the answers to all asks by (question, number), drawing those that are not on disk.

    Batches are those of an unbroken evaluation, wherever one was cut off. Raises ValueError where
    the file holds answers to other prompts.
    """
    by_prompt = {id(ask.prompt): ask for ask in asks}
    with DrawnLog(plan.out / DRAWN / f"{mode.name}.jsonl") as log:
        _check_prompts(log, asks)
        batches = evaluation.batches([ask.prompt for ask in asks])
        with evaluation.progress(mode.name, len(asks)) as bar:
            for batch in batches:
                left = [p for p in batch if not _has(log, by_prompt[id(p)], mode)]
                if left:
                    part = evaluation.draw(
                        cfg, model.engines(), left, embed, model.inputs, mode=mode
                    )
                    log.add(
                        [
                            _drawn_row(by_prompt[id(prompt)], number, sample)
                            for prompt, group in zip(*part, strict=True)
                            for number, sample in enumerate(group)
                        ]
                    )
                bar.update(len(batch))
        return log.rows


def judged(
    cfg: Config,
    plan: Plan,
    policy: Policy,
    asks: Sequence[Ask],
    drawn: dict[tuple[str, int], Row],
    mode: Mode,
) -> list[list[Row]]:
    """Returns the judged answers to every question that has some, in the order asked."""
    items: list[Scored] = []
    rows: list[Row] = []
    for ask in asks:
        for number in range(ask.first, ask.first + mode.num_samples):
            said = drawn.get((ask.prompt.example.id, number))
            if said is not None:  # else its film could not be read when it was to be asked
                sample = _sample(said)
                items.append(evaluation.scored(ask.prompt, sample, policy, cfg))
                rows.append(_item(cfg, mode, ask, number, sample, items[-1].text))
    benchmark = BENCHMARKS.get(plan.benchmark)
    scorers = benchmark.scorers if benchmark else {}
    verdicts: Sequence[Mapping[str, float | None]] = [{}] * len(items)
    if benchmark and benchmark.judge:
        verdicts = benchmark.judge(items, cfg.judge, plan.out / JUDGE)
    server = rewards.judge.Server(chat=cfg.judge, journal=plan.out / JUDGE)
    parts = rewards.score(items, cfg.rewards, server)
    by_question: dict[str, list[Row]] = {}
    for row, item, part, more in zip(rows, items, parts, verdicts, strict=True):
        row["scores"] = {name: judge(item.text, item.example) for name, judge in scorers.items()}
        row["scores"] |= more
        row["reward"] = None if part is None else dict(part)
        by_question.setdefault(row["id"], []).append(row)
    return list(by_question.values())


def gains(rows: Sequence[list[Row]], others: Mapping[str, list[Row]]) -> dict[str, scores.Score]:
    """Returns what every accuracy gains over other answers to the same questions, paired."""
    mine = {question[0]["id"]: question for question in rows}
    parts = dict.fromkeys(part for question in rows for part in scores.verdicts(question[0]))
    found = {part: scores.gains(mine, others, part) for part in parts if scores.is_right(part)}
    return {part: by_kind[scores.ALL] for part, by_kind in found.items() if by_kind}


def _baselines(asked: Sequence[Prompt], report_by: Sequence[str], rotations: int) -> dict[str, Any]:
    examples = [prompt.example for prompt in asked]
    if rotations > 1:  # no letter is right in all of them
        return {"chance": scores.chance(examples, report_by, rotations)}
    return {
        "one_letter": scores.one_letter(examples, report_by),
        "one_answer": scores.one_answer(examples, report_by),
        "chance": scores.chance(examples, report_by),
    }


def _asks(
    cfg: Config,
    plan: Plan,
    policy: Policy,
    asked: Sequence[Prompt],
    refused: RefusedLog,
    mode: Mode,
) -> list[Ask]:
    """Returns the prompts of a mode; the orders of a question's options stand together."""
    if mode.name == SHUFFLED:
        return [
            Ask(prompt=prompt, first=number, about=question.example.about)
            for question in asked
            for number, prompt in enumerate(_orders(cfg, plan, policy, question, refused))
        ]
    if mode.name == NO_VIDEO:
        films = {prompt.example.id: prompt.example.about for prompt in asked}
        blind = questions.without_video(cfg, policy, asked)
        return [Ask(prompt=prompt, about=films[prompt.example.id]) for prompt in blind]
    if mode.name == OTHER_VIDEO:
        asked = questions.with_other_video(cfg, policy, asked, refused)
    return [Ask(prompt=prompt, about=prompt.example.about) for prompt in asked]


def _orders(
    cfg: Config, plan: Plan, policy: Policy, asked: Prompt, refused: RefusedLog
) -> list[Prompt]:
    """Returns a question with its options in --shuffles orders; none where they cannot move, and
    where one order, in which words may be other tokens, no longer fits."""
    encode_prompt = questions.prompt_encoder(cfg, policy, num_samples=1)
    prompts = []
    for number in range(plan.num_shuffles):
        order = shuffled.order_of(asked.example, seed=cfg.seed, number=number)
        if order is not None:
            example = shuffled.shuffled(asked.example, order)
            try:
                prompts.append(encode_prompt(example))
            except ValueError as error:
                refused.add(example, error, step=0)
                return []
    return prompts


def _check_prompts(log: DrawnLog, asks: Sequence[Ask]) -> None:
    for ask in asks:
        name = ask.prompt.example.id
        said = log.rows.get((name, ask.first))
        if said is not None and said["prompt"] != journal.prompt_digest(ask.prompt):
            raise ValueError(
                f"{log.path} holds an answer to another prompt of question {name!r}: its words, "
                "its film or the way it is asked have changed; choose another --out"
            )


def _has(log: DrawnLog, ask: Ask, mode: Mode) -> bool:
    name = ask.prompt.example.id
    return all((name, ask.first + i) in log.rows for i in range(mode.num_samples))


def _drawn_row(ask: Ask, number: int, sample: Sample) -> Row:
    return {
        "id": ask.prompt.example.id,
        "sample": ask.first + number,
        "prompt": journal.prompt_digest(ask.prompt),
        "seed": sample.seed,
        "finish_reason": sample.finish_reason,
        "tokens": sample.tokens.tolist(),
    }


def _sample(said: Row) -> Sample:
    """Returns an answer without its log-probabilities, which no score needs."""
    tokens = np.array(said["tokens"], np.int32)
    reason, seed = said["finish_reason"], said["seed"]
    return Sample(tokens=tokens, logps=np.zeros(0, np.float32), finish_reason=reason, seed=seed)


def _item(cfg: Config, mode: Mode, ask: Ask, number: int, sample: Sample, text: str) -> Row:
    """Returns a line of answers/<mode>.jsonl, but for the verdicts."""
    example = ask.prompt.example
    return {
        "id": example.id,
        "kind": example.kind,
        "tags": dict(example.tags),
        "video": ask.about,
        "mode": mode.name,
        "sample": number,
        "question": example.question,
        "options": shuffled.options_of(example.question),
        "answer": example.answer,
        "prompt": {
            "template": cfg.data.template,
            "frames": [len(media.times_s) for media in ask.prompt.media],
            "tokens": len(ask.prompt.tokens),
        },
        "temperature": mode.temperature,
        "seed": sample.seed,
        "text": text,
        "tokens": len(sample.tokens),
        "finish_reason": sample.finish_reason,
    }


def _write_rows(plan: Plan, mode: str, rows: Sequence[Sequence[Row]]) -> None:
    lines = [json.dumps(row) + "\n" for question in rows for row in question]
    write_whole(plan.out / ANSWERS / f"{mode}.jsonl", "".join(lines))


def _keep(plan: Plan, found: Found) -> None:
    write_whole(plan.out / SCORES, json.dumps(found, indent=1) + "\n")


def write_whole(path: Path, text: str) -> None:
    """Writes a file that is whole whenever it is read."""
    try:
        run_folder.make_folder(path.parent)
        run_folder.write_synced(path, text.encode())
    except OSError as error:
        way_out = "free some, and the same command goes on; no answer is lost"
        raise platform.disk_error(error, path, way_out) from error
