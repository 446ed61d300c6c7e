"""Trains one experiment: python -m longrl_jax.train CONFIG.yaml [section.key=value ...]"""

import argparse
import dataclasses
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from longrl_jax import config, platform, run_folder

EPILOG = """\
examples:
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml run.num_steps=20 mesh.seq=4

The run folder (run.dir) holds
  resolved.yaml             the whole config, every default included; it is a config itself
  metrics.jsonl             a line a step: loss, rewards, engine/learner gap, seconds by phase
  tensorboard/              the same numbers: tensorboard --logdir RUN/tensorboard
  rollouts.jsonl            every sampled answer with its reward and advantage (grpo)
  refused.jsonl             records that could not be used, with reasons
  evaluation.json           the last scores on data.validation (evaluations.jsonl: all of them,
                            evaluation_answers.jsonl: every answer of the last)
  checkpoints/              what the run goes on from (run.checkpoint_every, run.keep)
  journal/                  rollouts and rewards of the steps since the newest checkpoint (grpo)
  export/                   the trained model as a Hugging Face folder
  finished.json             the last step, once nothing is left to do
  error.txt                 where a run that failed has failed

A run that was stopped, however, goes on when the same command is given again: from its newest
checkpoint, without sampling again what the journal holds. Keys that change no number (mesh, store,
worker counts, run.keep, ...) may be changed then, and run.num_steps be raised.
"""
COMPILE_CACHE = Path("cache/jax")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage of a config; a mistake of the user's is one line, its trace is in the run."""
    args = _parser().parse_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        folder = Path(cfg.run.dir)
        held = _take(folder)
        point = run_folder.find(folder, dataclasses.asdict(cfg))
        if point != run_folder.Point() or (folder / "metrics.jsonl").exists():
            sys.stdout.write(f"{run_folder.describe(folder, point, cfg.run.num_steps)}\n")
            sys.stdout.flush()
        platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
        run_folder.write_synced(folder / "resolved.yaml", config.to_yaml(cfg).encode())
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"longrl_jax.train: {error}")
    from longrl_jax.stages import STAGES  # after prepare: they bring JAX
    from rollout_bridge import EngineError

    try:
        check_names(cfg)
        config.pick(STAGES, cfg.stage, "stage")(cfg)
        _write_report(folder)
    except Exception as error:
        where = _keep_trace(folder / "error.txt")
        _write_report(folder)
        # what a person can mend is one line; the rest is a bug, and its trace is shown
        if not isinstance(error, ValueError | FloatingPointError | OSError | EngineError):
            raise
        # an engine's own trace is not in ours, and says more than where we called it
        notes = getattr(error, "__notes__", []) if isinstance(error, EngineError) else []
        sys.exit("\n".join([f"longrl_jax.train: {error}", *notes, f"({where})"]))
    finally:
        held.close()


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
    from longrl_jax import advantages, data, losses, metrics, rewards

    metrics.check_wandb(cfg.run.wandb)
    config.pick(data.SOURCES, cfg.data.source, "data.source")
    config.pick(advantages.ADVANTAGES, cfg.algorithm.advantage, "algorithm.advantage")
    config.pick(losses.LOSSES, cfg.algorithm.loss, "algorithm.loss")
    config.pick(losses.KL_ESTIMATORS, cfg.algorithm.kl_estimator, "algorithm.kl_estimator")
    for name in cfg.rewards:
        config.pick(rewards.REWARDS, name, "rewards")


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
