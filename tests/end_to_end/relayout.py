"""Reads a checkpoint onto the mesh of a config and writes it again from there.

relayout.py CONFIG IN OUT: OUT is a folder for checkpoints, where it becomes that of step 1.
"""

import sys
from pathlib import Path

from longrl_jax import config, platform


def main() -> None:
    path, source, target = sys.argv[1:]
    cfg = config.load(path)
    platform.prepare(cfg.mesh)
    from longrl_jax import checkpoint
    from longrl_jax.stages import policy as opened

    _, state = opened.open_policy(cfg)
    state = checkpoint.restore(Path(source), state)
    checkpoint.save(Path(target), state, step=1, about={})


if __name__ == "__main__":
    main()
