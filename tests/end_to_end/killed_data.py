"""A preparation of data that kills itself: killed_data.py CONFIG TOOL POINT VISIT [OPTION ...].

TOOL: embed or difficulty. As killed_run.py, whose points it knows besides its own.
"""

import sys

import killed_run

from longrl_jax import config, platform, run_folder

QUESTIONS = 8
"""That are sampled at once here."""


def torn(bomb: killed_run.Bomb) -> None:
    """Half of a batch of the difficulty filter's journal is written."""
    append = run_folder.append_synced

    def half(path, content):
        append(path, content[: len(content) // 2])
        bomb()
        append(path, content[len(content) // 2 :])

    run_folder.append_synced = half


def main() -> None:
    path, tool, point, visit, *options = sys.argv[1:]
    cfg = config.load(path)
    cache = str(killed_run.COMPILE_CACHE)
    platform.prepare(cfg.mesh, cfg.rollout, compilation_cache=cache)
    from longrl_jax import rewards
    from longrl_jax.data import difficulty, embed
    from longrl_jax.stages import evaluation

    rewards.REWARDS |= {"parity": killed_run.parity}
    evaluation.MAX_QUESTIONS = QUESTIONS
    if point != "none":
        points = killed_run.POINTS | {"torn": torn}
        points[point](killed_run.Bomb(int(visit)))
    platform.prepare = lambda *args, **kwargs: None  # it is done, and vLLM may be imported, already
    {"embed": embed, "difficulty": difficulty}[tool].main([path, *options])


if __name__ == "__main__":
    main()
