"""Which transfers of attention may overlap with its compute, in XLA's schedule for A100s.

    .venv-plan/bin/python benchmarks/overlap.py OUTPUT.md [--tokens 262144]

Forward and backward of one row over 8 A100-80GB (28 query heads, 4 of keys and values, of 128,
bfloat16), compiled without a GPU, under XLA's default flags and under those that training sets
(platform.OVERLAP_FLAGS). Needs JAX's CUDA packages: `make plan` makes the environment. Read from
the scheduled program: what stands between the start of a transfer and its end. A transfer that
nothing stands between cannot be hidden; one that spans the kernel can be. No time is measured.
"""

import argparse
import collections
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
HARDWARE, NUM_DEVICES = "a100-80gb", 8
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 28, 4, 128  # of Qwen2 7B
PROGRAMS = [(kind, kernel) for kind in ("ring", "2d") for kernel in ("xla", "pallas")]
DEFAULT_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=false",
    "--xla_gpu_experimental_parallel_collective_overlap_limit=1",
)
"""What XLA takes where nothing is said; said, so that `prepare_to_compile` leaves it."""
COMPUTE = ("while", "conditional", "custom-call", "fusion", "call")
"""Operations that take time on the GPU, as the schedule names them."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="the result file (Markdown)")
    parser.add_argument("--tokens", type=int, default=262144)
    parser.add_argument("--compile", nargs=2, metavar=("KIND", "KERNEL"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.compile:
        print(json.dumps(compile_one(*args.compile, args.tokens)))
        return
    if args.output is None:
        parser.error("name the result file")
    found = []
    for kind, kernel in PROGRAMS:
        for flags in (DEFAULT_FLAGS, ()):
            print(f"{kind}, {kernel}, {' '.join(flags) or 'training flags'}", file=sys.stderr)
            command = [sys.executable, "-W", "ignore", __file__, "--tokens", str(args.tokens)]
            done = subprocess.run(
                [*command, "--compile", kind, kernel],
                env=os.environ | {"XLA_FLAGS": " ".join(flags), "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
            )
            if done.returncode:
                sys.exit(f"{kind}, {kernel} does not compile:\n{done.stderr[-2000:]}")
            found.append((kind, kernel, bool(flags), json.loads(done.stdout.splitlines()[-1])))
    args.output.write_text(report(found, args.tokens))


# In a process of its own


def compile_one(kind: str, kernel: str, num_tokens: int) -> dict:
    """Returns {transfers, temp_mib, versions, xla_flags} of forward and backward."""
    from longrl_jax import platform

    platform.prepare_to_compile(NUM_DEVICES)
    import jax
    import jax.numpy as jnp

    from longrl_jax.plan import compiled, hardware
    from longrl_jax.sharding import attend, make_mesh, spec

    mesh = make_mesh(
        seq=NUM_DEVICES, devices=hardware.devices(hardware.find(HARDWARE), NUM_DEVICES)
    )

    def shape(dtype: jax.typing.DTypeLike, *dims: int) -> jax.ShapeDtypeStruct:
        place = jax.NamedSharding(mesh, spec("batch", "tokens"))
        return jax.ShapeDtypeStruct((1, num_tokens, *dims), dtype, sharding=place)

    def step(q, k, v, order, branch, segment, do):
        def attention(q, k, v):
            return attend(q, k, v, order, branch, segment, kind=kind, kernel=kernel)

        out, pull = jax.vjp(attention, q, k, v)
        return out, *pull(do)

    q = shape(jnp.bfloat16, NUM_HEADS, HEAD_DIM)
    k = shape(jnp.bfloat16, NUM_KV_HEADS, HEAD_DIM)
    with jax.set_mesh(mesh):
        traced = jax.jit(step, out_shardings=q.sharding).trace(q, k, k, *[shape(jnp.int32)] * 3, q)
        program = traced.lower(lowering_platforms=("cuda",)).compile()
    return {
        "transfers": [dataclasses.asdict(x) for x in transfers(program.as_text() or "")],
        "temp_mib": program.memory_analysis().temp_size_in_bytes / 2**20,
        "versions": compiled.versions(),
        "xla_flags": os.environ["XLA_FLAGS"],
    }


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One collective of a scheduled program, and what it can hide behind."""

    group: str
    asynchronous: bool
    """XLA lets the device go on between start and end."""
    kernels: int
    """Of attention, between start and end: loops over tiles (xla) or Triton calls (pallas)."""
    kernels_beside: int
    """Of attention, in the same body."""
    others: int
    """Operations between start and end that compute something else."""


_OPERATION = re.compile(r"^\s*(?:ROOT )?%([\w.\-]+) = (.*?[\])}]) ([a-z][\w\-]*)\(")


def transfers(hlo_text: str) -> list[Transfer]:
    """Reads every pair of start and end in the text of a scheduled program."""
    assert "is_scheduled=true" in hlo_text.partition("\n")[0], "the text is no schedule"
    found: list[Transfer] = []
    body: list[tuple[str, str, str, str]] = []
    in_loop = False
    for line in hlo_text.splitlines():
        if line.startswith(("%", "ENTRY ")) and line.endswith("{"):
            body, in_loop = [], not line.startswith("ENTRY ")
        elif line.startswith("}"):
            found += _in_body(body, in_loop)
            body = []
        elif match := _OPERATION.match(line):
            body.append((match[1], match[2], match[3], line))
    return found


def _in_body(body: list[tuple[str, str, str, str]], in_loop: bool) -> list[Transfer]:
    """body: (name, type, operation, line) in the order of the schedule."""
    kinds = [_kind(operation, line) for _, _, operation, line in body]
    place = {name: i for i, (name, *_) in enumerate(body)}
    found = []
    for i, (_, _, operation, line) in enumerate(body):
        if not operation.endswith("-done"):
            continue
        match = re.search(r"-done\(%([\w.\-]+)\)", line)
        assert match, f"an end without a start: {line[:200]}"
        start = place[match[1]]
        between = collections.Counter(kinds[start + 1 : i])
        found.append(
            Transfer(
                group=_group(operation.removesuffix("-done"), body[start][1], line, in_loop),
                asynchronous='"is_sync":true' not in body[start][3],
                kernels=between["kernel"],
                kernels_beside=kinds.count("kernel"),
                others=between["other"],
            )
        )
    return found


def _kind(operation: str, line: str) -> str:
    if operation == "while" or (operation == "custom-call" and "triton" in line):
        return "kernel"
    return "other" if operation in COMPUTE else ""


def _group(operation: str, result: str, line: str, in_loop: bool) -> str:
    """Names what is sent, by its type: only dk and dv travel round in float32, only ids are s32."""
    way = "backward" if "transpose(" in line else "forward"
    if operation != "collective-permute":
        return "heads for tokens (all-to-all)" if operation == "all-to-all" else "ids gathered"
    if not in_loop:
        return "dk, dv: the last hop, after the ring"
    item = result.lstrip("(").partition("[")[0]
    return f"{way}: { {'bf16': 'k, v', 's32': 'ids', 'f32': 'dk, dv'}[item] }"


# The result file


def report(found: list[tuple[str, str, bool, dict]], num_tokens: int) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    default, named = (
        next(x["xla_flags"] for *_, is_, x in found if is_ == d) for d in (True, False)
    )
    lines = [
        "# Transfers and compute in XLA's schedule of attention for 8 A100-80GB",
        "",
        f"`python benchmarks/overlap.py OUTPUT --tokens {num_tokens}` at commit "
        f"{commit or 'unknown'}, {datetime.date.today()}; compiled on a machine without a GPU; "
        f"{found[0][3]['versions']}. Forward and backward of one row of {num_tokens:,} tokens, "
        f"{NUM_HEADS} query heads and {NUM_KV_HEADS} of keys and values, of {HEAD_DIM}, bfloat16.",
        "",
        "A cell counts transfers: *hidden* may run behind attention's kernel (between their start "
        "and their end in the schedule stands every kernel of the body that they are in: the loop "
        "over tiles of kernel xla, the one or two Triton calls of kernel pallas), *partly* behind "
        "some of them, *others* behind smaller operations only, *alone* behind nothing. It says "
        "what the schedule allows, not what time is saved: nothing ran.",
        "",
        f"- default: `{default}`",
        f"- named: `{named}`",
    ]
    for kind, kernel in PROGRAMS:
        mine = {is_: x for a, b, is_, x in found if (a, b) == (kind, kernel)}
        groups = {t["group"]: None for x in mine.values() for t in x["transfers"]}
        lines += [
            "",
            f"## kind {kind}, kernel {kernel}",
            "",
            "| | default | named |",
            "|---|---|---|",
        ]
        for group in groups:
            cells = [_cell(mine[is_]["transfers"], group) for is_ in (True, False)]
            lines.append(f"| {group} | {cells[0]} | {cells[1]} |")
        temp = [f"{mine[is_]['temp_mib']:,.0f} MiB" for is_ in (True, False)]
        lines.append(f"| temporaries of a device | {temp[0]} | {temp[1]} |")
    return "\n".join(lines) + "\n"


def _cell(found: list[dict], group: str) -> str:
    counts = collections.Counter(_said(Transfer(**t)) for t in found if t["group"] == group)
    return ", ".join(f"{n} {said}" for said, n in sorted(counts.items()))


def _said(transfer: Transfer) -> str:
    if not transfer.asynchronous:
        return "alone"
    if transfer.kernels:
        return "hidden" if transfer.kernels == transfer.kernels_beside else "partly"
    return "others" if transfer.others else "alone"


if __name__ == "__main__":
    main()
