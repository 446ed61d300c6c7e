"""Lets PyPI's torchvision, torchaudio and torchcodec stand beside a CPU build of torch.

torchvision registers fake kernels for two operators, nms and qnms, that its compiled part should
have declared; that part, built for CUDA, does not load beside torch+cpu, so the import fails.
torchaudio and torchcodec fail on their own compiled parts. These failures break `transformers` (its
model classes) and `vllm`. `install` writes a .pth file into site-packages; every Python process of
that environment then carries an import hook that does nothing until somebody imports torchvision
(both operators are declared), transformers or vllm (torchaudio and torchcodec are hidden: they
count as not installed; nothing here reads audio through torch).

    python -m rollout_bridge.torchvision_shim install      (or: remove)

Beside a CUDA build of torch the hook changes nothing.
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
        if name == "torchvision":
            _declare_operators()
        elif name in ("transformers", "vllm"):
            _hide("torchaudio")
            _hide("torchcodec")
        return None


def _declare_operators():
    try:
        import torch
    except ImportError:
        return
    if torch.version.cuda is not None or "_torchvision_shim_library" in sys.modules:
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for operator in ("nms", "qnms"):
        try:
            library.define(operator + schema)
        except RuntimeError:  # a torchvision built for this torch has declared it already
            pass
    sys.modules["_torchvision_shim_library"] = library  # dropped, it would undeclare them


def _hide(package):
    from importlib import metadata

    try:
        on_cpu = metadata.version("torch").endswith("+cpu")
        other_build = not metadata.version(package).endswith("+cpu")
    except metadata.PackageNotFoundError:
        return
    if on_cpu and other_build:
        sys.modules.setdefault(package, None)  # find_spec now says: not installed


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
