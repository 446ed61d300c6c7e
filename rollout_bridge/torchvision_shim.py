"""Lets PyPI's torchvision (built for CUDA) import beside a CPU build of torch.

torchvision registers fake kernels for two operators, nms and qnms, that its compiled part should
have declared. That part does not load beside torch+cpu, so the import fails, and with it the model
classes of `transformers`. `install` writes a .pth file into site-packages; every Python process
of that environment then carries an import hook that does nothing until somebody imports
torchvision, and at that moment declares both operators.

    python -m rollout_bridge.torchvision_shim install      (or: remove)

The hook's own file must not import anything of ours: it is copied, not referred to.
"""

import argparse
import sys
import sysconfig
from pathlib import Path

MODULE = "_torchvision_shim"
"""Name of the copied module; `<MODULE>.pth` imports it when Python starts."""

SOURCE = '''\
"""Written by `python -m rollout_bridge.torchvision_shim install`; see there."""

import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        try:
            import torch
        except ImportError:
            return None
        if torch.version.cuda is None:
            library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                try:
                    library.define(operator + schema)
                except RuntimeError:  # a torchvision built for this torch has declared it already
                    pass
            sys.modules["_torchvision_shim_library"] = library  # dropped, it would undeclare them
        return None


if "torchvision" not in sys.modules:
    sys.meta_path.insert(0, _Finder())
'''


def install(site_packages: Path) -> None:
    """Writes the hook and its .pth file; a second call rewrites the same bytes."""
    (site_packages / f"{MODULE}.py").write_text(SOURCE)
    (site_packages / f"{MODULE}.pth").write_text(f"import {MODULE}\n")


def remove(site_packages: Path) -> None:
    """Undoes `install`."""
    for suffix in (".pth", ".py"):
        (site_packages / f"{MODULE}{suffix}").unlink(missing_ok=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m rollout_bridge.torchvision_shim",
        description="Makes torchvision import beside a CPU build of torch, in this environment.",
    )
    parser.add_argument("action", choices=("install", "remove"))
    parser.add_argument(
        "--site-packages",
        type=Path,
        default=Path(sysconfig.get_paths()["purelib"]),
        help="folder that takes the hook (default: of the Python that runs this)",
    )
    args = parser.parse_args(argv)
    {"install": install, "remove": remove}[args.action](args.site_packages)
    sys.stdout.write(f"torchvision shim: {args.action} in {args.site_packages}\n")


if __name__ == "__main__":
    main()
