"""Trains one experiment: python -m longrl_jax.train CONFIG.yaml [section.key=value ...]"""

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from longrl_jax import config, platform

EPILOG = """\
examples:
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml
  python -m longrl_jax.train configs/tiny_cpu_grpo.yaml run.num_steps=20 mesh.seq=4

The run folder (run.dir) holds
  resolved.yaml             the whole config, every default included; it is a config itself
  metrics.jsonl             a line a step: loss, rewards, engine/learner gap, seconds by phase
  rollouts.jsonl            every sampled answer with its reward and advantage (grpo)
  refused.jsonl             records that could not be used, with reasons
  evaluation.json           the last scores on data.validation (evaluations.jsonl: all of them,
                            evaluation_answers.jsonl: every answer of the last)
  export/                   the trained model as a Hugging Face folder
  error.txt                 where a run that failed has failed
"""
COMPILE_CACHE = Path("cache/jax")


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the stage of a config; a mistake of the user's is one line, its trace is in the run."""
    args = _parser().parse_args(argv)
    try:
        cfg = config.load(args.config, args.overrides)
        folder = Path(cfg.run.dir)
        if (folder / "metrics.jsonl").exists():
            raise ValueError(
                f"run.dir={cfg.run.dir} holds another run; choose another folder, e.g. "
                f"run.dir={cfg.run.dir}_2, or move that one away"
            )
        platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=str(COMPILE_CACHE))
    except (ValueError, RuntimeError) as error:
        sys.exit(f"longrl_jax.train: {error}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text(config.to_yaml(cfg))
    from longrl_jax.stages import STAGES  # after prepare: it brings JAX

    try:
        check_names(cfg)
        config.pick(STAGES, cfg.stage, "stage")(cfg)
    except Exception as error:
        (folder / "error.txt").write_text(traceback.format_exc())
        if not isinstance(error, ValueError | FloatingPointError):  # not the user's: show the trace
            raise
        sys.exit(f"longrl_jax.train: {error}\n(where: {folder / 'error.txt'})")


def check_names(cfg: config.Config) -> None:
    """Raises ValueError for a name in the config that no table knows, before anything is loaded."""
    from longrl_jax import advantages, data, losses, rewards

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
