"""GRPO on questions about videos: sample, score, compare within the group, update, push.

Source: arXiv:2402.03300 (GRPO), arXiv:2507.07966 section 4 (MR-SP: one encoding of a video serves
the rollouts, the reference and the update).
"""

import contextlib
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Shaped

import rollout_bridge
from longrl_jax import journal, processes, rewards
from longrl_jax.advantages import ADVANTAGES
from longrl_jax.config import Config, pick
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases, averages
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions, saving, update
from longrl_jax.stages.evaluation import evaluate, is_due, scored
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Prompt, Rollout, Scored

SHOWN = ("reward/total", "loss", "gap/max", "time/step_s")


def run(cfg: Config) -> None:
    """Trains model.path with GRPO and leaves metrics, rollouts, scores and an export in run.dir.

    A run.dir with an unfinished run of this config is gone on with.
    """
    folder = Path(cfg.run.dir)
    policy, state = opened.open_policy(cfg)
    encoder = opened.open_encoder(policy, state)
    smallest = cfg.batch.smallest_bucket
    to_inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=smallest)
    reference = opened.open_reference(cfg, policy, state)
    pass_logps = update.make_pass_logps(cfg, policy, adapters=False)
    train_step = update.make_grpo_update(cfg, policy, state)
    advantage = pick(ADVANTAGES, cfg.algorithm.advantage, "algorithm.advantage")
    saver, state = saving.open_saver(cfg, policy, state, reference=reference)
    phases = Phases()
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(RefusedLog(folder / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, phases))
        engines = stack.enter_context(opened.open_engines(cfg, policy))
        log = stack.enter_context(saver.open_log("grpo"))
        held_out = questions.validation(cfg, policy, refused)
        opened.push(engines, policy, state, version=saver.first_step)
        empty_steps = 0
        phases.take()  # what came before belongs to no step
        for number, asked in questions.training(cfg, policy, refused, first_step=saver.first_step):
            kept, features = embed(asked, number)
            values: dict[str, Any] = {}
            place = before, num_groups = processes.place_of(len(kept))
            empty_steps = questions.count_empty(num_groups, empty_steps, refused)
            if num_groups:
                entry = saver.replayed(number, kept, place)  # of a run killed after sampling
                if entry is None:
                    with phases.phase("embed"):
                        embeddings = to_inputs(state)(kept, features)
                    seeds = [sample_seed(cfg.seed, number, before + i) for i in range(len(kept))]
                    entry = draw(cfg, policy, engines, kept, embeddings, phases, seeds=seeds)
                    with phases.phase("journal"):
                        saver.journal(number, entry)
                with phases.phase("batch"):
                    reward_GR, valid_GR = totals(cfg, entry)
                    advantage_GR = advantage(*map(of_all_groups, (reward_GR, valid_GR)))
                    advantage_GR = advantage_GR[before : before + len(kept)]
                    passes = update.make_passes(
                        cfg, policy, entry.groups, features, list(advantage_GR)
                    )
                reference_nBA = None
                if reference is not None:
                    with phases.phase("logps"):
                        reference_nBA = jax.block_until_ready(pass_logps(reference, passes)[0])
                with phases.phase("update"):
                    state, stats = train_step(state, passes, reference_nBA)
                    means = averages(jax.device_get(stats))
                save = functools.partial(saver.export, state)
                update.stop_if_not_finite(means, number=number, save=save)
                with phases.phase("push"):
                    opened.push(engines, policy, state, version=number)
                sums = reward_sums(reward_GR, valid_GR, entry) | entry.sums
                values = means | averages(processes.added(sums))
                rows = answer_rows(cfg, policy, entry, advantage_GR)
                log.rollouts(number, processes.joined(rows))
            counts = {
                "groups": num_groups,
                "refused": refused.settle(),
                "compilations": train_step.num_compilations + pass_logps.num_compilations,
            }
            log.step(number, values | counts | phases.take(), shown=SHOWN)
            scores = None
            if cfg.data.validation and is_due(cfg, number):
                inputs = to_inputs(state)
                scores = evaluate(cfg, policy, engines, held_out, embed, inputs, step=number)
                log.evaluation(number, scores)
                refused.settle()
            saver.after_step(number, state, scores)
            phases.take()  # the seconds of evaluation and checkpoint belong to no step
        saver.finish(state)


def draw(
    cfg: Config,
    policy: Policy,
    engines: Sequence[rollout_bridge.Engine],
    asked: Sequence[Prompt],
    embeddings: Sequence[np.ndarray],
    phases: Phases,
    *,
    seeds: Sequence[int],
) -> journal.Entry:
    """Samples answers to this process's prompts of a step and judges them, all at once."""
    with phases.phase("rollout"):
        groups, sums = roll_out(cfg, engines, asked, embeddings, seeds=seeds)
    with phases.phase("reward"):
        parts = rewards.score(answers(cfg, policy, groups), cfg.rewards)
    return journal.Entry(groups=groups, parts=parts, sums=sums)


def roll_out(
    cfg: Config,
    engines: Sequence[rollout_bridge.Engine],
    asked: Sequence[Prompt],
    embeddings: Sequence[np.ndarray],
    *,
    seeds: Sequence[int],
) -> tuple[list[Rollout], dict[str, tuple[float, float]]]:
    """Draws rollout.num_samples answers to every prompt, whose seeds are of `sample_seed`.

    Returns the groups and the share, (sum, count), of prompt tokens that no engine had to prefill:
    R samples of one prompt of P tokens share (R-1) * floor((P-1) / block) * block of R * P.
    """
    before = prefix_cache_counts(engines)
    samples = rollout_bridge.generate_all(
        engines,
        embeddings,
        num_samples=cfg.rollout.num_samples,
        temperature=cfg.rollout.temperature,
        max_tokens=cfg.rollout.max_tokens,
        seeds=seeds,
    )
    hits, queries = prefix_cache_counts(engines) - before
    groups = [
        Rollout(prompt=prompt, samples=drawn, policy_version=engines[0].version or 0)
        for prompt, drawn in zip(asked, samples, strict=True)
    ]
    return groups, {"rollout/prefix_hits": (float(hits), float(queries))}


def prefix_cache_counts(engines: Sequence[rollout_bridge.Engine]) -> np.ndarray:
    """Returns [prompt tokens found in prefix caches, looked up], since the engines began."""
    stats = [engine.prefix_cache_stats() for engine in engines]
    return np.array([sum(stat[name] for stat in stats) for name in ("hits", "queries")])


def sample_seed(seed: int, number: int, place: int) -> int:
    """Returns the seed of a group's first sample; sample r has that plus r. 0 to 2**31 - 1.

    place: among the groups of the step, those of all processes counted.
    """
    return int(np.random.SeedSequence([seed, number, place]).generate_state(1)[0] >> 1)


def answers(cfg: Config, policy: Policy, groups: Sequence[Rollout]) -> list[Scored]:
    """Returns what a reward sees of every sample of a step, group after group."""
    template = cfg.data.template
    return [scored(g.prompt, sample, policy, template) for g in groups for sample in g.samples]


def totals(
    cfg: Config, entry: journal.Entry
) -> tuple[Float[np.ndarray, "G R"], Bool[np.ndarray, "G R"]]:
    """Returns the total reward of every sample (0 where it is invalid), and whether it is valid."""
    shape = len(entry.groups), cfg.rollout.num_samples
    valid_GR = np.array([p is not None for p in entry.parts], bool).reshape(shape)
    reward_GR = np.array([0.0 if p is None else p["total"] for p in entry.parts]).reshape(shape)
    return reward_GR, valid_GR


def of_all_groups(mine_GR: Shaped[np.ndarray, "G R"]) -> Shaped[np.ndarray, "H R"]:
    """Returns what all processes have of a step, group after group."""
    return np.array(processes.joined(mine_GR.tolist()), mine_GR.dtype)


def reward_sums(
    reward_GR: Float[np.ndarray, "G R"], valid_GR: Bool[np.ndarray, "G R"], entry: journal.Entry
) -> dict[str, tuple[float, float]]:
    """Returns (sum, count) of every reward part, and of what says whether there is anything to
    learn from, so that those of many processes add up.

    `reward/mixed` is the share of groups whose valid rewards differ: the others have no gradient.
    """
    known = [p for p in entry.parts if p is not None]
    samples = [sample for group in entry.groups for sample in group.samples]
    spread = [
        np.ptp(r[v]) > 0 if v.any() else False for r, v in zip(reward_GR, valid_GR, strict=True)
    ]
    sums: dict[str, tuple[float, float]] = {
        f"reward/{k}": (sum(p[k] for p in known), len(known)) for k in (known or [{}])[0]
    }
    return sums | {
        "reward/mixed": (int(np.sum(spread)), len(spread)),
        "reward/invalid": (int((~valid_GR).sum()), valid_GR.size),
        "prompt/tokens": (sum(len(g.prompt.tokens) for g in entry.groups), len(entry.groups)),
        "answer/tokens": (sum(len(sample.tokens) for sample in samples), len(samples)),
        "answer/cut_off": (sum(s.finish_reason == "length" for s in samples), len(samples)),
    }


def answer_rows(
    cfg: Config, policy: Policy, entry: journal.Entry, advantage_GR: Float[np.ndarray, "G R"]
) -> list[dict[str, Any]]:
    """Returns a line for every sample, so that a person can read what the policy says."""
    items = answers(cfg, policy, entry.groups)
    rows, flat = [], iter(zip(items, entry.parts, strict=True))
    for group, advantages in zip(entry.groups, advantage_GR, strict=True):
        example = group.prompt.example
        for sample, advantage in zip(group.samples, advantages, strict=True):
            item, judged = next(flat)
            rows.append(
                {
                    "id": example.id,
                    "kind": example.kind,
                    "answer": example.answer,
                    "text": item.text,
                    "reward": judged,
                    "advantage": float(advantage),
                    "finish_reason": sample.finish_reason,
                    "seed": sample.seed,
                }
            )
    return rows
