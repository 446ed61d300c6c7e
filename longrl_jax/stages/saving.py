"""What lets a stage be killed at any moment: checkpoints, the journal, and going on from them.

All processes of a run call everything here; the first one owns the run folder.
"""

import dataclasses
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from tqdm import tqdm

import rollout_bridge
from longrl_jax import checkpoint, journal, models, processes, run_folder, step
from longrl_jax.config import Config
from longrl_jax.metrics import WAY_OUT, RunLog
from longrl_jax.platform import disk_error
from longrl_jax.stages import policy as opened
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Prompt

START = "start.json"
"""Digests of the parameters that a run began with."""
JOURNAL_TOKEN_BYTES = 8  # int32 token and float32 log p
TEXT_TOKEN_BYTES = 8  # of rollouts.jsonl, at most about that


class Saver:
    """Owner of a run's checkpoints and journal; made by `open_saver`."""

    def __init__(
        self,
        cfg: Config,
        policy: Policy,
        first_step: int,
        start: dict[str, str],
        *,
        position: int | None = None,
    ):
        self.first_step = first_step
        """Step after which the run goes on; 0: from the start."""
        self.position = first_step if position is None else position
        """Slices of batch.groups records that the steps so far have taken from the data."""
        self._folder = Path(cfg.run.dir)
        self._run = cfg.run
        self._policy = policy
        self._start = start

    def open_log(self, name: str) -> RunLog:
        """Returns the log of the run, which goes on after first_step."""
        run = self._run
        return RunLog(
            self._folder, run.num_steps, name=name, first_step=self.first_step, wandb=run.wandb
        )

    def replayed(
        self, number: int, asked: Sequence[Prompt], place: tuple[int, int], *, attempt: int = 1
    ) -> journal.Entry | None:
        """Returns the journaled rollouts and rewards of a step's try, None if it must be sampled.

        place: (groups of the step before these, groups of the step). It is one or the other for
        all processes.
        """
        found, trouble = None, ""
        try:
            folder = self._folder / run_folder.JOURNAL
            found = journal.read(folder, number, asked, place=place, attempt=attempt)
        except ValueError as error:
            trouble = str(error)
        told = processes.gather([found is not None, trouble])
        troubles = [text for _, text in told if text]
        if troubles and processes.is_first():
            tqdm.write(f"{troubles[0]}; step {number} is sampled again")
        return found if all(has for has, _ in told) else None

    def journal(self, number: int, entry: journal.Entry, *, attempt: int = 1) -> None:
        """Puts rollouts and rewards of a step's try on disk; to be called before its update."""
        packed = processes.gather_bytes(journal.pack(entry))
        folder = self._folder / run_folder.JOURNAL

        def write() -> None:
            try:
                journal.write(folder, number, journal.join(packed), attempt=attempt)
            except OSError as error:
                path = journal.path_of(folder, number, attempt)
                raise disk_error(error, path, WAY_OUT) from error

        processes.first(write)

    def after_step(
        self,
        number: int,
        state: step.TrainState,
        scores: Mapping[str, float] | None = None,
        *,
        position: int | None = None,
    ) -> None:
        """Saves the state if the step is due; to be called when all of the step is in the logs.

        scores: of this step's evaluation; a new best of run.best_metric is due, too. position: see
        Saver.position; None: one slice a step.
        """
        every = self._run.checkpoint_every
        due = number == self._run.num_steps or (every > 0 and number % every == 0)
        is_best = self._is_best(scores)  # asked always: a wrong name is told at the first scores
        if not (due or is_best):
            return
        started_s = time.perf_counter()
        folder = self._folder / run_folder.CHECKPOINTS
        about: dict[str, Any] = {}
        if processes.is_first():
            about = {
                "start": self._start,
                "scores": dict(scores) if scores is not None else None,
                "position": number if position is None else position,
                "logs": run_folder.log_lengths(self._folder),
                "saved_unix_s": round(time.time(), 3),
            }
        path = checkpoint.save(folder, state, step=number, about=about)
        if not processes.is_first():
            return
        checkpoint.prune(folder, keep=self._run.keep, best_metric=self._run.best_metric)
        oldest = min(meta["step"] for _, meta in run_folder.metas(self._folder))
        journal.forget(
            self._folder / run_folder.JOURNAL, oldest
        )  # any kept one can be gone back to
        tqdm.write(f"checkpoint {path} ({time.perf_counter() - started_s:.1f} s)")

    def finish(self, state: step.TrainState) -> None:
        """Exports the model, if wanted, and marks the run as finished."""
        if self._run.export:
            self.export(state)
        if not processes.is_first():
            return
        run_folder.mark_finished(self._folder, self._run.num_steps)
        journal.forget(self._folder / run_folder.JOURNAL, self._run.num_steps)

    def export(self, state: step.TrainState) -> None:
        """Writes export/ (and adapter/, if the run has one) in place of what an earlier end of the
        run has left there."""
        export, adapter = self._folder / "export", self._folder / "adapter"
        if processes.is_first():
            for folder in (export, adapter):
                shutil.rmtree(folder, ignore_errors=True)
        opened.export(self._policy, state, export, dtype=self._run.export_dtype)
        if self._policy.lora is not None:
            opened.export_adapter(self._policy, state, adapter)

    def _is_best(self, scores: Mapping[str, float] | None) -> bool:
        name = self._run.best_metric
        if not name or scores is None:
            return False
        if name not in scores:
            raise ValueError(
                f"run.best_metric={name!r} is no score of the evaluation; choose one of "
                f"{', '.join(sorted(scores))}"
            )

        def beats_the_best() -> bool:
            saved = [meta for _, meta in run_folder.metas(self._folder)]
            best = checkpoint.best_of(saved, name)
            return best is None or scores[name] > best["scores"][name]

        return processes.first(beats_the_best)


def open_saver(
    cfg: Config, policy: Policy, state: step.TrainState, *, reference: nnx.State | None = None
) -> tuple[Saver, step.TrainState]:
    """Returns the saver of a run and the state to go on with: that of the newest checkpoint.

    The logs are cut to that step. reference: of the KL term, as open_reference returns it.
    """
    parts = {"frozen": state.frozen, "trained": state.params}
    if reference is not None:
        parts["reference"] = reference
    start = {
        name: rollout_bridge.weights_digest(models.arrays_of(part), to_host=models.to_host)
        for name, part in parts.items()
    }
    first_step, found, position = processes.first(lambda: _go_on(cfg, state, start))
    if found:
        state = checkpoint.restore(Path(found), state)
    return Saver(cfg, policy, first_step, start, position=position), state


def _go_on(cfg: Config, state: step.TrainState, start: dict[str, str]) -> tuple[int, str, int]:
    """Cuts a run back to where it goes on; returns that step, its checkpoint ("" if it has none)
    and its place in the data.

    Of many processes one does this for all.
    """
    folder = Path(cfg.run.dir)
    point = run_folder.find(folder, dataclasses.asdict(cfg))
    run_folder.check_disk(folder, needs(cfg, state))
    changed = [
        k for k, digest in _written_start(folder, point, start).items() if start.get(k) != digest
    ]
    if changed:
        raise ValueError(
            f"the {' and '.join(changed)} parameters are not those that {folder} was started with: "
            f"model.path={cfg.model.path} (or model.reference) has changed since; put it back"
        )
    run_folder.cut_logs(folder, point)
    checkpoint.sweep(folder / run_folder.CHECKPOINTS)
    return point.step, str(point.checkpoint or ""), point.meta.get("position", point.step)


def _written_start(
    folder: Path, point: run_folder.Point, start: dict[str, str]
) -> Mapping[str, str]:
    """Returns what the outcome that a run goes on with began from.

    A run with nothing to go on from is new: it writes `start` down.
    """
    if point.checkpoint is not None:
        began: Mapping[str, str] = point.meta["start"]
        return began
    if not point.journaled:
        run_folder.write_synced(folder / START, json.dumps(start).encode() + b"\n")
    found: Mapping[str, str] = json.loads((folder / START).read_text())
    return found


def needs(cfg: Config, state: step.TrainState) -> list[run_folder.Need]:
    """Returns the most that a run will have on disk at a time, by part; videos' store excluded."""
    Need = run_folder.Need
    one, kept = checkpoint.num_bytes(state), cfg.run.keep + bool(cfg.run.best_metric)
    found = [
        Need(what=f"{kept} checkpoints", size_bytes=kept * one, name=run_folder.CHECKPOINTS),
        Need(what="another while it is written", size_bytes=one),
    ]
    if cfg.run.export:
        size = sum(x.nbytes for x in jax.tree.leaves(step.all_params(state)))
        found.append(Need(what="export", size_bytes=size, name="export"))
    if cfg.stage == "grpo":
        steps = min(cfg.run.checkpoint_every or cfg.run.num_steps, cfg.run.num_steps)
        tokens = cfg.batch.groups * cfg.rollout.num_samples * cfg.rollout.max_tokens
        tries = cfg.algorithm.max_tries if cfg.algorithm.filter_by else 1
        journaled = cfg.run.keep * steps * tries * tokens * JOURNAL_TOKEN_BYTES
        sampled = cfg.run.num_steps * tokens * TEXT_TOKEN_BYTES
        found.append(Need(what="journal", size_bytes=journaled, name=run_folder.JOURNAL))
        found.append(Need(what="rollouts.jsonl", size_bytes=sampled, name="rollouts.jsonl"))
    return found
