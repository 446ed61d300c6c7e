"""Peak memory of `convert` on a random checkpoint of 2 GB, beside the package's own functions.

    python benchmarks/convert_memory.py > convert.md

Makes a Qwen2.5-VL with the names and widths of the 3B (8 of its 36 layers, 4 of its tower's 32) in
bfloat16 with norms in float32, in cache/convert_memory. Every side runs in a process of its own;
the kernel says the most that was resident (VmHWM: mapped pages of files count), and what was
resident when all was imported is taken off. The bound is two of the largest tensor and an output
file.
"""

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import ml_dtypes
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file

from longrl_jax import convert, models
from longrl_jax.models import copying, hf_files, qwen2_5_vl, weights

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "cache" / "convert_memory"
TEXT_LAYERS, TOWER_LAYERS = 8, 4
SHARD_GIB = 0.5
BLOCK_NUMBERS = 2**24
"""Random numbers that are made once, and repeated from another place for every tensor."""
SIDES = {
    "`convert to-hf`": ["to-hf"],
    "`convert to-hf --dtype float32`": ["to-hf", "--dtype", "float32"],
    "`convert verify`": ["verify"],
    "`safetensors`: load_file, save_file": ["whole"],
}
PACKAGES = ("jax", "flax", "numpy", "safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    child = parser.parse_args().child
    if child:
        return measure(*child)
    source = FOLDER / "source"
    if not source.exists():
        write_checkpoint(source)
    tensors = hf_files.open_tensors(source)
    sizes = [hf_files.Spec(n, x.dtype, x.shape).size_bytes for n, x in tensors.items()]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    lines = [
        "# Memory of `convert` on a checkpoint of 2 GB",
        "",
        f"- Command: `python benchmarks/convert_memory.py`. Commit: `{commit}`. Hardware: "
        f"{os.cpu_count()} CPU cores. Versions: {versions}.",
        f"- The checkpoint: {len(sizes)} tensors, {sum(sizes) / 2**20:,.0f} MiB, the largest "
        f"{max(sizes) / 2**20:,.0f} MiB; bfloat16, norms float32. Output files of "
        f"{SHARD_GIB * 1024:.0f} MiB (a larger tensor has its own).",
        "- Resident memory by the kernel (VmHWM, mapped pages of files included), less what was "
        "resident after the imports.",
        "",
        "| | MiB above the start | bound: 2 tensors + a file | seconds |",
        "|---|---|---|---|",
    ]
    for name, command in SIDES.items():
        shutil.rmtree(FOLDER / "out", ignore_errors=True)
        folder = source
        if command == ["verify"]:  # of what to-hf writes, unmeasured
            copying.copy(source, FOLDER / "out")
            folder = FOLDER / "out"
        arguments = [sys.executable, __file__, "--child", str(folder), str(FOLDER / "out")]
        done = subprocess.run(
            [*arguments, " ".join(command)], check=True, stdout=subprocess.PIPE, text=True
        )
        said = json.loads(done.stdout.splitlines()[-1])
        wide = 2 if "float32" in command else 1  # the largest tensor is bfloat16 in the source
        largest = max(sizes) * wide
        bound = 2 * largest + max(int(SHARD_GIB * 2**30), largest)
        lines.append(
            f"| {name} | {said['peak_bytes'] / 2**20:,.0f} | {bound / 2**20:,.0f} "
            f"| {said['time_s']:.1f} |"
        )
    shutil.rmtree(FOLDER / "out", ignore_errors=True)
    sys.stdout.write("\n".join(lines) + "\n")


def write_checkpoint(folder: Path) -> None:
    """Writes random tensors with the names that the table says."""
    tree = json.loads((ROOT / "configs" / "models" / "qwen2_5_vl_3b.json").read_text())
    tree["num_hidden_layers"] = TEXT_LAYERS
    tree["vision_config"] |= {"depth": TOWER_LAYERS, "fullatt_block_indexes": [TOWER_LAYERS - 1]}
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(tree, indent=2) + "\n")
    cfg = qwen2_5_vl.parse_config(tree, where=str(folder))
    model = nnx.eval_shape(lambda: qwen2_5_vl.Model(cfg, rngs=nnx.Rngs(0)))
    numbers = np.random.default_rng(0).standard_normal(BLOCK_NUMBERS, np.float32) * 0.02

    def dtype_of(name: str) -> np.dtype:
        return np.dtype(np.float32 if "norm" in name else ml_dtypes.bfloat16)

    specs = list(weights.specs(models.arrays_of(model), qwen2_5_vl.table(cfg), dtype_of=dtype_of))

    def tensors():
        for i, spec in enumerate(specs):
            size = int(np.prod(spec.shape))
            yield (
                spec.name,
                np.resize(np.roll(numbers, i), size).reshape(spec.shape).astype(spec.dtype),
            )

    hf_files.write_tensors(folder, specs, tensors(), shard_size_bytes=2**30)


def measure(source: str, out: str, command: str) -> None:
    """Runs one side and prints the bytes that it took at most, and the seconds."""
    name, *options = command.split()
    before_bytes, started_s = resident_bytes("VmRSS"), time.perf_counter()
    if name == "whole":
        files = Path(source).glob("*.safetensors")
        tensors = {n: x for path in files for n, x in load_file(path).items()}
        Path(out).mkdir()
        save_file(tensors, Path(out) / "model.safetensors")
    elif name == "verify":
        convert.main(["verify", source])
    else:
        convert.main([name, source, out, "--shard-gib", str(SHARD_GIB), *options])
    peak_bytes = resident_bytes("VmHWM") - before_bytes
    said = {"peak_bytes": peak_bytes, "time_s": time.perf_counter() - started_s}
    sys.stdout.write(json.dumps(said) + "\n")


def resident_bytes(key: str) -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{key}:\s+(\d+) kB", status)[1]) * 1024


if __name__ == "__main__":
    main()
