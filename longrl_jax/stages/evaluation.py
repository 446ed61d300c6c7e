"""Greedy answers to held-out questions, scored as in training."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rollout_bridge
from longrl_jax import rewards
from longrl_jax.config import Config
from longrl_jax.data import prompts as prompt_text
from longrl_jax.stages.policy import Policy
from longrl_jax.stages.questions import Embed
from longrl_jax.types import Prompt, Sample, Scored

Inputs = Callable[[Sequence[Prompt], Sequence[np.ndarray | None]], list[np.ndarray]]


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

    The engines must hold the weights that `inputs` embeds with. Scores go to evaluation.json and
    every answer to evaluation_answers.jsonl, in run.dir. Videos that cannot be read are refused
    and leave the means.
    """
    items: list[Scored] = []
    size = cfg.batch.groups
    for start in tqdm(range(0, len(asked), size), desc="evaluation", unit="batch", leave=False):
        kept, features = embed(asked[start : start + size], 0)  # step 0: not of the training
        answers = rollout_bridge.generate_all(
            engines,
            inputs(kept, features),
            num_samples=1,
            temperature=0.0,
            max_tokens=cfg.rollout.max_tokens,
            seeds=[cfg.seed] * len(kept),
        )
        for prompt, (sample,) in zip(kept, answers, strict=True):
            items.append(scored(prompt, sample, policy, cfg.data.template))
    parts = rewards.score(items, cfg.rewards)
    values: dict[str, list[float]] = defaultdict(list)
    for item, judged in zip(items, parts, strict=True):
        for name, value in (judged or {}).items():
            values[name].append(value)
            values[f"{name}/{item.example.kind or 'other'}"].append(value)
    scores = {name: float(np.mean(numbers)) for name, numbers in sorted(values.items())}
    scores = {"questions": float(len(items))} | scores
    folder = Path(cfg.run.dir)
    (folder / "evaluation.json").write_text(json.dumps({"step": step} | scores, indent=1) + "\n")
    with (folder / "evaluation_answers.jsonl").open("w", encoding="utf-8") as file:
        for item, judged in zip(items, parts, strict=True):
            example = item.example
            row = {"id": example.id, "kind": example.kind, "answer": example.answer}
            file.write(json.dumps(row | {"reward": judged, "text": item.text}) + "\n")
    return scores


def is_due(cfg: Config, number: int) -> bool:
    """Whether step `number` is evaluated: every run.eval_every steps, and the last one."""
    every = cfg.run.eval_every
    return number == cfg.run.num_steps or (every > 0 and number % every == 0)


def scored(prompt: Prompt, sample: Sample, policy: Policy, template: str) -> Scored:
    """Returns what a reward sees of a sample."""
    return Scored(
        example=prompt.example,
        text=prompt_text.decode_text(sample.tokens, policy.tokenizer),
        num_tokens=len(sample.tokens),
        finish_reason=sample.finish_reason,
        template=template,
    )
