"""Makes report.html of a run folder: curves, scores, answers with the frames they saw, time.

Examples:
    python -m longrl_jax.report runs/demo/grpo
    python -m longrl_jax.report runs/seed0 runs/seed1 runs/seed2 --out seeds.html
"""

import argparse
import sys
from pathlib import Path

from longrl_jax import report


def main(argv: list[str] | None = None) -> None:
    """Reads run folders and writes one page about them."""
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder of train")
    parser.add_argument(
        "--out", type=Path, help="the page (default: RUN/report.html; of several, above them)"
    )
    args = parser.parse_args(argv)
    try:
        out = report.write_page(args.runs, args.out or report.default_out(args.runs))
    except (ValueError, OSError) as error:
        sys.exit(f"longrl_jax.report: {error}")
    sys.stdout.write(f"{out} ({out.stat().st_size / 2**20:.2f} MiB)\n")


if __name__ == "__main__":
    main()
