"""Trains one experiment: python -m longrl_jax.train CONFIG.yaml [section.key=value ...]"""

import argparse
import dataclasses
import json
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn, TextIO

from longrl_jax import config, platform, run_folder

EPILOG = """\
examples:
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml run.num_steps=20 mesh.seq=4

The run folder (run.dir) holds
  resolved.yaml             the whole config, every default included; it is a config itself
  metrics.jsonl             a line a step: loss, rewards, engine/learner gap, seconds by phase,
                            frames decoded and encoded (0: the store held all videos)
  tensorboard/              the same numbers: tensorboard --logdir RUN/tensorboard
  rollouts.jsonl            every answer that was learned from, with its reward and advantage (grpo)
  judge.jsonl               verdicts of the reward judge, each paid for once (judge_1.jsonl: process
                            1 of several; judge_evaluation.jsonl: those of evaluations)
  refused.jsonl             records that could not be used, with reasons
  evaluation.json           the last scores on data.validation (evaluations.jsonl: all of them,
                            evaluation_answers.jsonl: every answer of the last)
  checkpoints/              what the run goes on from (run.checkpoint_every, run.keep)
  journal/                  rollouts and rewards of the steps since the newest checkpoint (grpo)
  export/                   the trained model as a Hugging Face folder, adapters merged
  adapter/                  the adapters alone, as peft opens them (model.lora_rank)
  finished.json             the last step, once nothing is left to do
  error.txt                 where a run that failed has failed (error_1.txt: process 1 of several)

A run that was stopped, however, goes on when the same command is given again: from its newest
checkpoint, without sampling again what the journal holds. Keys that change no number (mesh, store,
worker counts, run.keep, ...) may be changed then, and run.num_steps be raised.

Several hosts: the same command on each, with mesh.processes (srun starts them; by hand each one
also gets mesh.process and mesh.coordinator). Process 0 writes the run folder, which all must see;
all write the checkpoints. An evaluation during training is shared out like the prompts of a step.
"""
COMPILE_CACHE = Path("cache/jax")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage of a config; a mistake of the user's is one line, its trace is in the run."""
    args = _parser().parse_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
    except ValueError as error:
        sys.exit(f"longrl_jax.train: {error}")
    if cfg.mesh.processes == 1:
        _train(cfg)
        return
    try:
        _train(cfg)
    except BaseException as error:
        leave_the_others(error)


def _train(cfg: config.Config) -> None:
    folder = Path(cfg.run.dir)
    alone = cfg.mesh.processes == 1
    try:
        held = _begin(cfg) if alone else None
        platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
        if alone:
            _write_resolved(cfg)
        else:
            held = _begin_together(cfg)
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"longrl_jax.train: {error}")
    import jax  # after prepare

    from longrl_jax import processes
    from longrl_jax.stages import STAGES
    from rollout_bridge import EngineError

    try:
        check_names(cfg)
        config.pick(STAGES, cfg.stage, "stage")(cfg)
        if processes.is_first():
            _write_report(folder)
    except Exception as error:
        name = "error.txt" if processes.is_first() else f"error_{processes.index()}.txt"
        where = _keep_trace(folder / name)
        if processes.is_first():
            _write_report(folder)
        if not alone and isinstance(error, jax.errors.JaxRuntimeError) and _lost_another(error):
            sys.exit(
                f"longrl_jax.train: process {processes.index()} lost another one, whose own words "
                "say why; the same command goes on from the newest checkpoint\n"
                f"({str(error).splitlines()[0]}; {where})"
            )
        # what a person can mend is one line; the rest is a bug, and its trace is shown
        if not isinstance(error, ValueError | FloatingPointError | OSError | EngineError):
            raise
        # an engine's own trace is not in ours, and says more than where we called it
        notes = getattr(error, "__notes__", []) if isinstance(error, EngineError) else []
        sys.exit("\n".join([f"longrl_jax.train: {error}", *notes, f"({where})"]))
    finally:
        if held is not None:
            held.close()


def _begin(cfg: config.Config) -> TextIO:
    """Takes the run folder and says where its run goes on; returns what holds it."""
    folder = Path(cfg.run.dir)
    held = _take(folder)
    point = run_folder.find(folder, dataclasses.asdict(cfg))
    if point != run_folder.Point() or (folder / "metrics.jsonl").exists():
        sys.stdout.write(f"{run_folder.describe(folder, point, cfg.run.num_steps)}\n")
        sys.stdout.flush()
    return held


def _begin_together(cfg: config.Config) -> TextIO | None:
    """The same for many processes, of which the first one takes the folder (others: None)."""
    from longrl_jax import processes

    shared = dataclasses.replace(cfg.mesh, process=-1, coordinator="")
    cfg = dataclasses.replace(cfg, mesh=shared)
    mine = json.loads(json.dumps(run_folder.flat(dataclasses.asdict(cfg))))  # lists for tuples
    for number, theirs in enumerate(processes.gather(mine)):
        if keys := sorted(key for key in mine if mine[key] != theirs.get(key)):
            raise ValueError(f"process {number} was started with another {', '.join(keys)}")
    held: list[TextIO] = []

    def begin() -> None:
        held.append(_begin(cfg))
        _write_resolved(cfg)

    processes.first(begin)
    resolved = Path(cfg.run.dir) / "resolved.yaml"
    blind = [i for i, sees in enumerate(processes.gather(resolved.exists())) if not sees]
    if blind:
        raise ValueError(
            f"run.dir={cfg.run.dir} of process 0 is not seen by processes {blind}; choose a folder "
            "that all hosts share"
        )
    return held[0] if held else None


def _write_resolved(cfg: config.Config) -> None:
    text = config.to_yaml(cfg)
    run_folder.write_synced(Path(cfg.run.dir) / "resolved.yaml", text.encode())


def _lost_another(error: Exception) -> bool:
    """Whether a transfer between processes has failed, as XLA's libraries for them say it."""
    return any(name in str(error) for name in ("Gloo", "NCCL", "coordination service"))


def leave_the_others(error: BaseException) -> NoReturn:
    """Says an error and ends this process at once: an orderly exit would wait for the others, who
    wait for this one. Its connections close with it, and that ends them."""
    if isinstance(error, SystemExit):
        if not error.code:
            raise error
        sys.stderr.write(f"{error.code}\n")
    else:
        traceback.print_exception(error)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _take(folder: Path) -> TextIO:
    """Makes the run folder and takes it for this process; returns what holds it."""
    try:
        run_folder.make_folder(folder)
        return run_folder.lock(folder)
    except OSError as error:
        raise platform.disk_error(error, folder, "set run.dir to another folder") from error


def _write_report(folder: Path) -> None:
    """Writes report.html; whatever goes wrong with a page does not undo a run."""
    try:
        from longrl_jax import report

        sys.stdout.write(f"report: {report.write(folder)}\n")
    except Exception as error:
        sys.stdout.write(f"no report: {type(error).__name__}: {error}\n")


def _keep_trace(path: Path) -> str:
    """Writes the trace of the error being handled and says where; a full disk gets it said here."""
    trace = traceback.format_exc()
    try:
        path.write_text(trace)
    except OSError as error:
        return f"{path} cannot be written ({error.strerror}), so here it is:\n{trace}"
    return f"where: {path}"


def check_names(cfg: config.Config) -> None:
    """Raises ValueError for a name in the config that no table knows, before anything is loaded."""
    from longrl_jax import advantages, chat, data, losses, metrics, rewards
    from longrl_jax.data import wording

    wording.check(cfg.data.wording, cfg.data.template_file)
    metrics.check_wandb(cfg.run.wandb)
    config.pick(data.SOURCES, cfg.data.source, "data.source")
    for part in cfg.data.mix:
        config.pick(data.SOURCES, part.source, f"data.mix: source of {part.name}")
    config.pick(advantages.ADVANTAGES, cfg.algorithm.advantage, "algorithm.advantage")
    config.pick(losses.LOSSES, cfg.algorithm.loss, "algorithm.loss")
    config.pick(losses.MEANS, cfg.algorithm.loss_mean, "algorithm.loss_mean")
    config.pick(losses.KL_ESTIMATORS, cfg.algorithm.kl_estimator, "algorithm.kl_estimator")
    for key, weights in cfg.reward_sets.items():
        for name in weights:
            rewards.named(name, key=key)
    if any("judge" in weights for weights in cfg.reward_sets.values()):
        chat.check(cfg.judge)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.train",
        description=__doc__,
        epilog=EPILOG + "\n" + config.describe(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/, see configs/README.md")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="values are YAML")
    return parser


if __name__ == "__main__":
    main()
