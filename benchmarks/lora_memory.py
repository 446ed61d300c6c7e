"""What a config needs of a GPU with and without LoRA adapters: both planned in one run.

    .venv-plan/bin/python benchmarks/lora_memory.py configs/longvila_7b_256f_grpo.yaml
    options: hardware=a100-80gb rank=64 section.key=value ...

Every program that training would run is compiled for the GPU; nothing runs on one (see
python -m longrl_jax.plan --help). Sizes are GiB of one device, without vLLM's share.
"""

import sys
from collections.abc import Sequence

from longrl_jax import config, platform

OPTIONS = {"hardware": "a100-80gb", "rank": "64"}


def main(argv: Sequence[str]) -> None:
    if not argv or argv[0].startswith("-"):
        sys.exit(__doc__)
    path, *settings = argv
    given = dict(item.split("=", 1) for item in settings)
    options = OPTIONS | {k: v for k, v in given.items() if k in OPTIONS}
    overrides = [s for s in settings if s.partition("=")[0] not in OPTIONS]
    sides = {
        "all of the language model": [*overrides, "model.lora_rank=0"],
        f"adapters of rank {options['rank']}": [*overrides, f"model.lora_rank={options['rank']}"],
    }
    cfgs = {name: config.load(path, changes) for name, changes in sides.items()}
    platform.prepare_to_compile(next(iter(cfgs.values())).mesh.num_devices)
    from longrl_jax.plan import compiled, hardware, planned  # after prepare: they bring JAX

    kind = hardware.find(options["hardware"])
    if kind is None:
        sys.exit("lora_memory: a CPU has no memory to fit into; name a GPU, e.g. a100-80gb")
    columns = {}
    for name, cfg in cfgs.items():
        devices = hardware.devices(kind, cfg.mesh.num_devices)
        columns[name] = rows_of(planned.make(cfg, kind, devices), kind)
    lines = [f"| {path}, {kind.device} | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    for row in next(iter(columns.values())):
        lines.append(f"| {row} | " + " | ".join(f"{c[row]:,.2f}" for c in columns.values()) + " |")
    sys.stdout.write("\n".join([*lines, "", compiled.versions(), ""]))


def rows_of(plan, kind) -> dict[str, float]:
    """Returns what stands in a column, in GiB and, for work, trillions of operations."""
    resident, phases, gib = plan.resident, plan.phases, 2**30
    found = {s.name: s for s in plan.sums(kind.memory_bytes)}
    out = {
        "parameters that are trained": resident.trained / gib,
        "parameters that are frozen": resident.frozen / gib,
        "optimizer": resident.optimizer / gib,
        "reference of the KL term": resident.reference / gib,
        "together, always there": resident.learner / gib,
    }
    for name in ("logps", "update"):
        if name in phases:
            out[f"{name}: temporaries"] = phases[name].temporary_bytes / gib
            out[f"{name}: the learner at its peak"] = found[name].learner / gib
            out[f"{name}: free beside vLLM and the reserve"] = found[name].free / gib
    update = phases["update"]
    out["update: products, TFLOP a device"] = update.work.dense / 1e12
    out["update: sent, GiB a device"] = sum(update.links.values()) / gib
    return out


if __name__ == "__main__":
    main(sys.argv[1:])
