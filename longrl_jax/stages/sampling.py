"""Sampling a step: prompts are asked until enough groups have something to teach.

Source: arXiv:2503.14476 section 3.2 (DAPO, dynamic sampling); Long-RL ray_trainer._make_batch_data.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Self

import numpy as np

import rollout_bridge
from longrl_jax import journal, processes, rewards
from longrl_jax.config import AlgorithmConfig, Config
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.stages import questions
from longrl_jax.stages.evaluation import judge, scored
from longrl_jax.stages.policy import Inputs, Policy
from longrl_jax.stages.questions import Embed
from longrl_jax.stages.saving import Saver
from longrl_jax.types import Example, Prompt, Rollout, Scored

MAX_DRY_STEPS = 3
"""Steps in a row of which no group is kept, after which a run stops."""
FATES = ("kept", "surplus", "too_low", "too_high", "unjudged")
"""What becomes of a group: it is learned from; it could be, but batch.groups are kept already; its
mean is not between the bounds; none of its answers could be judged."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Drawn:
    """This process's groups of a step."""

    kept: journal.Entry
    """Those that the update is made from."""
    features: list[np.ndarray | None]
    """Of their videos."""
    drawn: journal.Entry
    """All that were asked, those that are kept among them."""
    num_kept: int
    """Of all processes."""
    num_drawn: int
    """Of all processes."""
    counts: dict[str, int]
    """Metrics of all processes: `groups` are those kept; with a filter also `filter/tries`,
    `filter/drawn`, and `filter/<fate>`, which add up to that."""


class Sampler:
    """Owner of a run's place in the data; every process calls it once a step."""

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        engines: Sequence[rollout_bridge.Engine],
        refused: RefusedLog,
        embed: Embed,
        saver: Saver,
        phases: Phases,
    ):
        self.position = saver.position
        """Slices that have been taken from the data."""
        self._cfg, self._policy, self._engines = cfg, policy, engines
        self._refused, self._embed, self._saver, self._phases = refused, embed, saver, phases
        self._number = saver.first_step
        self._dry_steps = 0
        self._tries = cfg.algorithm.max_tries if cfg.algorithm.filter_by else 1
        steps = cfg.run.num_steps - saver.first_step
        self._slices = questions.slices(
            cfg, policy, self._refuse, first=self.position, count=steps * self._tries
        )

    def __call__(self, number: int, inputs: Callable[[], Inputs]) -> Drawn:
        """Samples a step. inputs: of the weights as they are; called only where an engine is asked.

        Every try asks a slice, and is journaled when it is judged: a run that is killed takes it
        from there. In a run of many processes each one fills its own rows; one that has done so
        asks nothing while others go on.
        """
        algorithm, wanted = self._cfg.algorithm, len(processes.part(self._cfg.batch.groups))
        self._number = number
        drawn, kept = _empty(), _empty()
        features: list[np.ndarray | None] = []
        fates = dict.fromkeys(FATES, 0)
        num_tries = 0
        missing = True
        while missing and num_tries < self._tries:
            num_tries += 1
            asked = next(self._slices)
            self.position += 1
            if len(kept.groups) == wanted:
                asked = []
            entry, found = self._ask(num_tries, asked, inputs)
            for one, feature in zip(by_group(entry), found, strict=True):
                fate = fate_of(one, algorithm)
                if fate == "kept" and len(kept.groups) == wanted:
                    fate = "surplus"
                if fate == "kept":
                    kept = joined(kept, one)
                    features.append(feature)
                fates[fate] += 1
            drawn = joined(drawn, entry)
            missing = any(processes.gather(wanted - len(kept.groups)))
        told = processes.added({name: (count, 0) for name, count in fates.items()})
        totals = {name: int(count) for name, (count, _) in told.items()}
        num_drawn, counts = sum(totals.values()), {"groups": totals["kept"]}
        if algorithm.filter_by:
            counts |= {f"filter/{name}": count for name, count in totals.items()}
            counts |= {"filter/drawn": num_drawn, "filter/tries": num_tries}
            self._stop_if_dry(counts)
        return Drawn(
            kept=kept,
            features=features,
            drawn=drawn,
            num_kept=totals["kept"],
            num_drawn=num_drawn,
            counts=counts,
        )

    def _ask(
        self, attempt: int, asked: Sequence[Prompt], inputs: Callable[[], Inputs]
    ) -> tuple[journal.Entry, list[np.ndarray | None]]:
        """Returns the judged answers to prompts whose videos can be read, and their features."""
        number = self._number
        readable, features = self._embed(asked, number)
        place = before, num_groups = processes.place_of(len(readable))
        if not num_groups:
            return _empty(), features
        entry = self._saver.replayed(number, readable, place, attempt=attempt)
        if entry is None:
            with self._phases.phase("embed"):
                embeddings = inputs()(readable, features)
            first = (attempt - 1) * self._cfg.batch.groups + before
            seeds = [sample_seed(self._cfg.seed, number, first + i) for i in range(len(readable))]
            entry = draw(
                self._cfg, self._policy, self._engines, readable, embeddings, self._phases,
                seeds=seeds,
            )  # fmt: skip
            with self._phases.phase("journal"):
                self._saver.journal(number, entry, attempt=attempt)
        return entry, features

    def close(self) -> None:
        self._slices.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _refuse(self, record: Example | str, error: ValueError, *, step: int) -> None:
        """Says of which step a record was, whatever the number of its slice."""
        self._refused.add(record, error, step=self._number)

    def _stop_if_dry(self, counts: Mapping[str, int]) -> None:
        is_dry = counts["filter/drawn"] and not counts["groups"]
        self._dry_steps = self._dry_steps + 1 if is_dry else 0
        if self._dry_steps < MAX_DRY_STEPS:
            return
        algorithm = self._cfg.algorithm
        raise ValueError(
            f"no group of {MAX_DRY_STEPS} steps was kept: of the last {counts['filter/drawn']}, "
            f"{counts['filter/too_low']} have a mean {algorithm.filter_by} of at most "
            f"algorithm.filter_low={algorithm.filter_low}, {counts['filter/too_high']} of at least "
            f"algorithm.filter_high={algorithm.filter_high}. Move the bounds, raise "
            "rollout.num_samples or rollout.temperature, or ask other questions"
        )


def fate_of(entry: journal.Entry, algorithm: AlgorithmConfig) -> str:
    """Returns which of FATES a group's answers earn it, as long as there is room."""
    if not algorithm.filter_by:
        return "kept"
    known = [parts for parts in entry.parts if parts is not None]
    if not known:
        return "unjudged"
    if algorithm.filter_by not in known[0]:
        raise ValueError(
            f"algorithm.filter_by={algorithm.filter_by!r} is no part of the rewards; choose one of "
            f"{', '.join(sorted(known[0]))}"
        )
    mean = sum(parts[algorithm.filter_by] for parts in known) / len(known)
    if mean <= algorithm.filter_low:
        return "too_low"
    return "too_high" if mean >= algorithm.filter_high else "kept"


def by_group(entry: journal.Entry) -> list[journal.Entry]:
    """Splits an entry into those of its groups, without the sums, which belong to all."""
    entries, parts = [], iter(entry.parts)
    for group in entry.groups:
        judged = [next(parts) for _ in group.samples]
        entries.append(journal.Entry(groups=[group], parts=judged, sums={}))
    return entries


def joined(a: journal.Entry, b: journal.Entry) -> journal.Entry:
    """Returns the groups of both, in order."""
    sums = dict(a.sums)
    for name, (value, count) in b.sums.items():
        before, count_before = sums.get(name, (0.0, 0.0))
        sums[name] = before + value, count_before + count
    return journal.Entry(groups=[*a.groups, *b.groups], parts=[*a.parts, *b.parts], sums=sums)


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
    """Samples answers to this process's prompts of a try and judges them, all at once."""
    with phases.phase("rollout"):
        groups, sums = roll_out(cfg, engines, asked, embeddings, seeds=seeds)
    with phases.phase("reward"):
        items = answers(cfg, policy, groups)
        found, parts = judge(cfg, items, "judge")
    return journal.Entry(groups=groups, parts=parts, sums=sums | rewards.invalid(found))


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

    place: among the groups of the step, those of all processes counted; try t begins at
    (t - 1) * batch.groups.
    """
    return int(np.random.SeedSequence([seed, number, place]).generate_state(1)[0] >> 1)


def answers(cfg: Config, policy: Policy, groups: Sequence[Rollout]) -> list[Scored]:
    """Returns what a reward sees of every sample of a step, group after group."""
    return [scored(g.prompt, sample, policy, cfg) for g in groups for sample in g.samples]


def _empty() -> journal.Entry:
    return journal.Entry(groups=[], parts=[], sums={})
