"""Says, without a GPU, what a config needs of one, whether it fits, and what would.

python -m longrl_jax.plan CONFIG.yaml hardware=a100-80gb devices=8 [section.key=value ...]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from longrl_jax import config, platform

EPILOG = """\
  hardware=NAME   a100-80gb, a100-40gb, h100, h200, or cpu (simulated devices, no limit)
  devices=N       must be the product of the config's mesh.*
  search=no       leave out the search for the most frames (two to three more compilations)
  sleep=yes       as if vLLM slept while the learner computes (it cannot yet: labelled)

model.path may be a folder or a config.json without weights. The largest programs take two GiB of
memory and a minute or two. Compiling for a GPU needs JAX's CUDA packages, no driver and no GPU:
`make plan CONFIG=configs/NAME.yaml` makes the environment that has them.
"""
OPTIONS = {"hardware": "a100-80gb", "devices": "", "search": "yes", "sleep": "no"}


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the plan of a config; a mistake of the user's is one line."""
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.plan",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="a file of configs/, see configs/README.md")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="see below")
    args = parser.parse_args(argv)
    given = dict(item.partition("=")[::2] for item in args.settings)
    options = OPTIONS | {k: v for k, v in given.items() if k in OPTIONS}
    overrides = [s for s in args.settings if s.partition("=")[0] not in OPTIONS]
    try:
        for line in run(args.config, overrides, options):
            sys.stdout.write(line + "\n")
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"longrl_jax.plan: {error}")


def run(path: Path, overrides: Sequence[str], options: dict[str, str]) -> list[str]:
    """Returns the lines of a plan; options are those of OPTIONS, as text."""
    cfg = config.load(path, overrides)
    wanted, have = options["devices"], cfg.mesh.num_devices
    if wanted and wanted != str(have):
        raise ValueError(
            f"devices={wanted}, but mesh.* of {path} makes {have}; say how they are used, e.g. "
            f"mesh.seq={wanted} with the other axes 1"
        )
    for name in ("search", "sleep"):
        config.pick({"yes": True, "no": False}, options[name], name)
    platform.prepare_to_compile(have)
    from longrl_jax.plan import compiled, hardware, page, planned  # after prepare: they bring JAX

    kind = hardware.find(options["hardware"])
    devices = hardware.devices(kind, have)
    asleep = options["sleep"] == "yes"
    plan = planned.make(cfg, kind, devices, say=_say)
    fit = None
    if kind is not None and options["search"] == "yes" and plan.row.num_frames:
        fit = planned.most_frames(plan, kind, devices, asleep=asleep, say=_say)
    settings = " ".join(
        f"{k}={v}" for k, v in options.items() if v != OPTIONS[k] or k == "hardware"
    )
    command = " ".join(["python -m longrl_jax.plan", str(path), settings, *overrides])
    said = page.lines(plan, kind, fit, asleep=asleep)
    return [f"plan     {command}", f"by       {compiled.versions()}", *said]


def _say(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
