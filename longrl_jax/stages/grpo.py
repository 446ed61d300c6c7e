"""GRPO and its relatives on questions about videos: sample, score, compare, update, push.

Source: arXiv:2402.03300 (GRPO), arXiv:2507.07966 section 4 (MR-SP: one encoding of a video serves
the rollouts, the reference and the update). The relatives differ in algorithm.*.
"""

import contextlib
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Shaped

from longrl_jax import batching, journal, processes, step
from longrl_jax.advantages import ADVANTAGES, reinforce_plus_plus_tokens
from longrl_jax.config import Config, pick
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases, averages
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions, saving, update
from longrl_jax.stages.evaluation import evaluate, is_due
from longrl_jax.stages.policy import Policy
from longrl_jax.stages.sampling import Drawn, Sampler, answers

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
    phases = Phases()
    learner = Learner(cfg, policy, state, reference, phases)
    saver, state = saving.open_saver(cfg, policy, state, reference=reference)
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(RefusedLog(folder / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, phases))
        engines = stack.enter_context(opened.open_engines(cfg, policy))
        log = stack.enter_context(saver.open_log("grpo"))
        sample = stack.enter_context(Sampler(cfg, policy, engines, refused, embed, saver, phases))
        held_out = questions.validation(cfg, policy, refused)
        opened.push(engines, policy, state, version=saver.first_step)
        empty_steps = 0
        phases.take()  # what came before belongs to no step
        for number in range(saver.first_step + 1, cfg.run.num_steps + 1):
            drawn = sample(number, functools.cache(functools.partial(to_inputs, state)))
            empty_steps = questions.count_empty(drawn.num_drawn, empty_steps, refused)
            values: dict[str, Any] = {}
            if drawn.num_drawn:
                values |= averages(processes.added(sampled_sums(cfg, drawn.drawn)))
            if drawn.num_kept:
                state, means, advantages = learner(state, drawn)
                save = functools.partial(saver.export, state)
                update.stop_if_not_finite(means, number=number, save=save)
                with phases.phase("push"):
                    opened.push(engines, policy, state, version=number)
                values |= means
                rows = answer_rows(cfg, policy, drawn.kept, advantages)
                log.rollouts(number, processes.joined(rows))
            values |= drawn.counts | {
                "refused": refused.settle(),
                **questions.refused_by_source(cfg, refused),
                "compilations": learner.num_compilations,
            }
            log.step(number, values | phases.take(), shown=SHOWN)
            scores = None
            if cfg.data.validation and is_due(cfg, number):
                inputs = to_inputs(state)
                scores = evaluate(cfg, policy, engines, held_out, embed, inputs, step=number)
                log.evaluation(number, scores)
                refused.settle()
            saver.after_step(number, state, scores, position=sample.position)
            phases.take()  # the seconds of evaluation and checkpoint belong to no step
        saver.finish(state)


class Learner:
    """Owner of the reference and of the programs that make an update of a step's groups."""

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        state: step.TrainState,
        reference: nnx.State | None,
        phases: Phases,
    ):
        """state: any of this policy; it says where arrays lie. reference: of the KL term."""
        self._cfg, self._policy, self._reference, self._phases = cfg, policy, reference, phases
        self._pass_logps = update.make_pass_logps(cfg, policy, adapters=False)
        self._train_step = update.make_grpo_update(cfg, policy, state)
        self._token_kls = update.make_token_kls(cfg)
        self._advantage = pick(ADVANTAGES, cfg.algorithm.advantage, "algorithm.advantage")

    @property
    def num_compilations(self) -> int:
        return self._train_step.num_compilations + self._pass_logps.num_compilations

    def __call__(
        self, state: step.TrainState, drawn: Drawn
    ) -> tuple[step.TrainState, dict[str, float], Float[np.ndarray, "G R"]]:
        """Returns the state after an update from all processes' groups (state is consumed), its
        statistics, and the advantages of this process's samples (their means, where tokens differ).
        """
        groups = drawn.kept.groups
        with self._phases.phase("batch"):
            advantage_GR = self._advantages(drawn.kept)
            passes, index = update.make_passes(
                self._cfg, self._policy, groups, drawn.features, list(advantage_GR)
            )
        reference_nBA, kl = None, {}
        if self._reference is not None:
            with self._phases.phase("logps"):
                reference_nBA = jax.block_until_ready(self._pass_logps(self._reference, passes)[0])
            if self._cfg.algorithm.kl_in == "reward":
                with self._phases.phase("batch"):
                    kls = self._token_kls(passes, reference_nBA, index)
                    advantages = self._token_advantages(drawn.kept, kls)
                    passes = batching.with_advantages(passes, index, advantages)
                    reference_nBA, kl = None, kl_sums(kls)
                    advantage_GR = means_of(advantages, advantage_GR.shape)
        with self._phases.phase("update"):
            state, stats = self._train_step(state, passes, reference_nBA)
            filled = update.filling(index) if self._cfg.batch.pack else {}
            means = averages(jax.device_get(stats)) | averages(processes.added(kl | filled))
        return state, means, advantage_GR

    def _advantages(self, kept: journal.Entry) -> Float[np.ndarray, "G R"]:
        """Compares this process's rewards with those of all."""
        shape = len(kept.groups), self._cfg.rollout.num_samples
        num_tokens = [len(sample.tokens) for group in kept.groups for sample in group.samples]
        mine = *totals(self._cfg, kept), np.array(num_tokens, int).reshape(shape)
        before, _ = processes.place_of(len(kept.groups))
        advantage_GR = self._advantage(*map(of_all_groups, mine))
        return advantage_GR[before : before + len(kept.groups)]

    def _token_advantages(
        self, kept: journal.Entry, kls: list[list[np.ndarray]]
    ) -> list[list[np.ndarray]]:
        reward_GR, valid_GR = totals(self._cfg, kept)
        flat = reinforce_plus_plus_tokens(
            reward_GR.reshape(-1),
            valid_GR.reshape(-1),
            [kl for samples in kls for kl in samples],
            coefficient=self._cfg.algorithm.kl,
            everywhere=lambda number: processes.added({"": (number, 0)})[""][0],
        )
        found = iter(flat)
        return [[next(found) for _ in samples] for samples in kls]


def kl_sums(kls: list[list[np.ndarray]]) -> dict[str, tuple[float, float]]:
    """Returns (sum, count) of the KL estimates of all tokens."""
    flat = [kl for samples in kls for kl in samples]
    return {"kl": (float(sum(kl.sum() for kl in flat)), sum(len(kl) for kl in flat))}


def means_of(advantages: list[list[np.ndarray]], shape: tuple[int, ...]) -> np.ndarray:
    means = [x.mean() if x.size else 0.0 for samples in advantages for x in samples]
    return np.array(means, np.float64).reshape(shape)


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


def sampled_sums(cfg: Config, entry: journal.Entry) -> dict[str, tuple[float, float]]:
    """Returns (sum, count) of every reward part, and of what says whether there is anything to
    learn from, so that those of many processes add up; and the engines' own.

    `reward/mixed` is the share of groups whose valid rewards differ; an advantage that compares
    within groups learns nothing from the others. One answer a group has none to differ from.
    """
    reward_GR, valid_GR = totals(cfg, entry)
    samples = [sample for group in entry.groups for sample in group.samples]
    spread = [
        np.ptp(r[v]) > 0 if v.any() else False for r, v in zip(reward_GR, valid_GR, strict=True)
    ]
    sums = part_sums(entry)
    if cfg.rollout.num_samples > 1:
        sums["reward/mixed"] = int(np.sum(spread)), len(spread)
    return (
        sums
        | entry.sums
        | {
            "reward/invalid": (int((~valid_GR).sum()), valid_GR.size),
            "prompt/tokens": (sum(len(g.prompt.tokens) for g in entry.groups), len(entry.groups)),
            "answer/tokens": (sum(len(sample.tokens) for sample in samples), len(samples)),
            "answer/cut_off": (sum(s.finish_reason == "length" for s in samples), len(samples)),
        }
    )


def part_sums(entry: journal.Entry) -> dict[str, tuple[float, float]]:
    """Returns (sum, count) of every reward part over the answers that have it, and of the total of
    every source of a mix, `reward/<source>/total`."""
    sums: dict[str, tuple[float, float]] = {}
    sources = [group.prompt.example.source for group in entry.groups for _ in group.samples]
    for source, parts in zip(sources, entry.parts, strict=True):
        if parts is None:
            continue
        of_source = {f"{source}/total": parts["total"]} if source else {}
        for name, value in (dict(parts) | of_source).items():
            before, count = sums.get(f"reward/{name}", (0.0, 0.0))
            sums[f"reward/{name}"] = before + value, count + 1
    return sums


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
                    **({"source": example.source} if example.source else {}),
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
