"""Answers to held-out questions, scored as in training; during training, greedy ones."""

import dataclasses
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rollout_bridge
from longrl_jax import processes, rewards, scores
from longrl_jax.config import Config
from longrl_jax.data import prompts as prompt_text
from longrl_jax.data.mixing import template_of
from longrl_jax.scores import ALL, Row
from longrl_jax.stages.policy import Inputs, Policy
from longrl_jax.stages.questions import Embed
from longrl_jax.types import Prompt, Sample, Scored

MAX_QUESTIONS = 64
"""Questions that the engines get at once. On two CPU cores 128 questions to a tiny model take 3.7 s
of processor time like this, 8.7 s by 8 and 3.5 s all at once; the answers are the same."""
MAX_PROMPT_TOKENS = 2**17
"""Prompt tokens that the engines get at once: their embeddings (1.9 GB at width 3584) wait here."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mode:
    """How a set of questions is answered."""

    name: str = "greedy"
    num_samples: int = 1
    """Answers to one question (R)."""
    temperature: float = 0.0
    """0: the most likely token every time; then num_samples is 1."""


def evaluate(
    cfg: Config,
    policy: Policy,
    engines: Sequence[rollout_bridge.Engine],
    asked: Sequence[Prompt],
    embed: Embed,
    inputs: Inputs,
    *,
    step: int,
) -> dict[str, float]:
    """Answers every prompt greedily; returns the mean of every reward part, overall and by kind.

    asked: this process's part of the questions; the scores are of all. The engines must hold the
    weights that `inputs` embeds with. Scores go to evaluation.json, with 95 % intervals
    ("<name>/low", "<name>/high"; those over all kinds are returned too), and every answer to
    evaluation_answers.jsonl, in run.dir. Videos that cannot be read are refused and leave the
    means.
    """
    questions = processes.joined(answer(cfg, policy, engines, asked, embed, inputs, mode=Mode()))
    flat = {"questions": float(len(questions))} | flattened(questions)
    if processes.is_first():
        folder = Path(cfg.run.dir)
        (folder / "evaluation.json").write_text(json.dumps({"step": step} | flat, indent=1) + "\n")
        write_answers(folder / "evaluation_answers.jsonl", questions)
    kinds = {scores.kind_name(rows[0]["kind"]) for rows in questions}
    bounds = tuple(f"/{kind}/{bound}" for kind in kinds for bound in ("low", "high"))
    return {name: value for name, value in flat.items() if not name.endswith(bounds)}


def answer(
    cfg: Config,
    policy: Policy,
    engines: Sequence[rollout_bridge.Engine],
    asked: Sequence[Prompt],
    embed: Embed,
    inputs: Inputs,
    *,
    mode: Mode,
) -> list[list[Row]]:
    """Returns the judged answers to every question whose video can be read, in the order asked.

    An answer's seed comes from (seed, id of the question) alone: it is the same whatever else is
    asked.
    """
    items: list[list[Scored]] = []
    drawn: list[tuple[Sample, ...]] = []
    with progress(mode.name, len(asked)) as bar:
        for part in batches(asked):
            kept, samples = draw(cfg, engines, part, embed, inputs, mode=mode)
            for prompt, group in zip(kept, samples, strict=True):
                items.append([scored(prompt, s, policy, cfg) for s in group])
                drawn.append(group)
            bar.update(len(part))
    flat = [item for group in items for item in group]
    parts = iter(judge(cfg, flat, "judge_evaluation")[1])
    return [
        [
            _row(item, sample, next(parts), mode=mode.name, number=number)
            for number, (item, sample) in enumerate(zip(group, samples, strict=True))
        ]
        for group, samples in zip(items, drawn, strict=True)
    ]


def draw(
    cfg: Config,
    engines: Sequence[rollout_bridge.Engine],
    asked: Sequence[Prompt],
    embed: Embed,
    inputs: Inputs,
    *,
    mode: Mode,
) -> tuple[list[Prompt], list[tuple[Sample, ...]]]:
    """Returns the questions of a batch whose videos can be read, and the answers to each."""
    kept, features = embed(asked, 0)  # step 0: not of the training
    samples = rollout_bridge.generate_all(
        engines,
        inputs(kept, features),
        num_samples=mode.num_samples,
        temperature=mode.temperature,
        max_tokens=cfg.rollout.max_tokens,
        seeds=[_seed(cfg.seed, prompt.example.id) for prompt in kept],
    )
    return kept, samples


def progress(name: str, num_questions: int) -> tqdm:
    """Returns a bar over questions, shown by the first process."""
    return tqdm(
        total=num_questions,
        desc=name,
        unit="question",
        leave=False,
        disable=not processes.is_first(),
    )


def readable(asked: Sequence[Prompt], embed: Embed) -> list[Prompt]:
    """Returns the questions whose videos can be read, after which they are in the store."""
    kept: list[Prompt] = []
    with tqdm(total=len(asked), desc="videos", unit="question", leave=False) as bar:
        for part in batches(asked):
            kept += embed(part, 0)[0]
            bar.update(len(part))
    return kept


def flattened(questions: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Returns {part: mean, part/low, part/high} over all, and the same for every part/kind."""
    flat: dict[str, float] = {}
    if not questions:
        return flat
    for kind, parts in scores.summary(questions).items():
        for part, score in parts.items():
            name = part if kind == ALL else f"{part}/{kind}"
            for key, bound in ((name, "mean"), (f"{name}/low", "low"), (f"{name}/high", "high")):
                value = score[bound]
                if value is not None:
                    flat[key] = value
    return dict(sorted(flat.items()))


def write_answers(path: Path, questions: Sequence[Sequence[Row]]) -> None:
    """Writes one line an answer; the file is whole or not there at all."""
    unfinished = path.with_name(f"{path.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for rows in questions for row in rows)
    unfinished.replace(path)


def is_due(cfg: Config, number: int) -> bool:
    """Whether step `number` is evaluated: every run.eval_every steps, and the last one."""
    every = cfg.run.eval_every
    return number == cfg.run.num_steps or (every > 0 and number % every == 0)


def scored(prompt: Prompt, sample: Sample, policy: Policy, cfg: Config) -> Scored:
    """Returns what a reward sees of a sample."""
    return Scored(
        example=prompt.example,
        text=prompt_text.decode_text(sample.tokens, policy.tokenizer),
        num_tokens=len(sample.tokens),
        finish_reason=sample.finish_reason,
        template=template_of(cfg.data, prompt.example),
        max_tokens=cfg.rollout.max_tokens,
        overlong_tokens=cfg.rollout.overlong_tokens,
    )


def judge(
    cfg: Config, items: Sequence[Scored], journal: str
) -> tuple[rewards.Judged, list[rewards.Parts | None]]:
    """Returns what the rewards of its source say of every item, and their weighted sums.

    journal: name of what keeps the verdicts of the reward `judge`, as of `judge_of`.
    """
    weights = [cfg.rewards_of(item.example.source) for item in items]
    found = rewards.judged(items, weights, judge_of(cfg, journal))
    return found, rewards.joined(found, weights)


def judge_of(cfg: Config, name: str) -> rewards.judge.Server | None:
    """Returns who judges, with this process's journal of that name in run.dir; None: nobody."""
    if not any("judge" in weights for weights in cfg.reward_sets.values()):
        return None
    place = f"_{processes.index()}" if processes.index() else ""
    return rewards.judge.Server(chat=cfg.judge, journal=Path(cfg.run.dir) / f"{name}{place}.jsonl")


def batches(asked: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Splits questions in order; a batch has at least one, and no more than both limits allow."""
    batch: list[Prompt] = []
    num_tokens = 0
    for prompt in asked:
        full = len(batch) == MAX_QUESTIONS or num_tokens + len(prompt.tokens) > MAX_PROMPT_TOKENS
        if batch and full:
            yield batch
            batch, num_tokens = [], 0
        batch.append(prompt)
        num_tokens += len(prompt.tokens)
    if batch:
        yield batch


def _seed(seed: int, question: str) -> int:
    """Seed of a question's first answer; answer r has that plus r. 0 to 2**31 - 1."""
    entropy = [seed, zlib.crc32(question.encode())]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)


def _row(
    item: Scored, sample: Sample, judged: rewards.Parts | None, *, mode: str, number: int
) -> Row:
    example = item.example
    return {
        "id": example.id,
        "kind": example.kind,
        "video": example.about,
        "mode": mode,
        "sample": number,
        "answer": example.answer,
        "reward": None if judged is None else dict(judged),
        "finish_reason": sample.finish_reason,
        "text": item.text,
    }
