"""Time and memory of attention over a split sequence, against three other ways to compute it.

    python benchmarks/ring_attention.py OUTPUT.md [--tokens 4096 ... 65536] [--public PYTHON]

One causal row, float32, forward and backward, on 8 simulated devices: our kinds; dense attention on
one device; keys and values gathered onto every device; and, where --public names the interpreter of
an environment that holds it (and the newest JAX that it imports with: 0.7.2 for 0.1.2), the
ringattention package, with ours under that JAX beside it. Every way has a process of its own,
started with the same flags (but for a time-out that the older JAX does not know); they take turns,
and a time is the median of --repeats. What would take more than --memory-gib is compiled for its
memory, and not run; what takes more than --limit-s is run once. All must agree in the norms of the
output and gradients. Ours deals tokens out like cards, so that no device waits for another where
each has cores of its own; a second line has them in order, as the package needs them.
Tiles have 128 tokens a side; ours and the package have a second line with
512, the default of kernel "xla", which is chosen for GPUs.
"""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
NUM_DEVICES = 8
BLOCK_SIZE, LARGE_BLOCK_SIZE = 128, 512
GATHERED_QUERIES = 256
HEAD_DIM = 64
SHARED_HEADS = {"2d": 2, "ulysses": NUM_DEVICES}
"""Kinds that exchange heads, and how many they need."""
SEED = 0
NORM_RTOL = 1e-4  # float32 sums over up to 65,536 keys, added up in other orders
FIT_DEVICES = (2, 4, 8)
FLAG = "--xla_cpu_enable_concurrency_optimized_scheduler=false"
"""Of every process; why: docs/measured.md 1.6."""
OUR_FLAG = "--xla_cpu_collective_call_terminate_timeout_seconds=3600"
"""Where JAX is ours: 0.7 does not know it, and ends the process. Why: docs/measured.md 1.2."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, nargs="?", help="the result file (Markdown)")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2**i for i in range(12, 17)])
    parser.add_argument("--heads", type=int, default=1, help="of queries and keys (default 1)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--public", help="interpreter of the environment with ringattention")
    parser.add_argument("--memory-gib", type=float, default=8, help="largest program that is run")
    parser.add_argument("--timed", type=int, default=2**16, help="most tokens that are run")
    parser.add_argument("--limit-s", type=float, default=45, help="longest run that is repeated")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--devices", type=int, default=NUM_DEVICES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(args.worker, args.tokens[0], args.heads, args.devices)
    if args.output is None:
        parser.error("name the result file")
    names = ["ring", "ring in order", "ring 512", "gathered", "dense"]
    names += [name for name, heads in SHARED_HEADS.items() if args.heads % heads == 0]
    ways = [(name, sys.executable) for name in names]
    if args.public:
        ways += [(name, args.public) for name in ("ringattention", "ringattention 512", "ring")]
    memory = fit(args)
    tables = []
    for tokens in args.tokens:
        tables.append(measure(ways, tokens, args))
        args.output.write_text(report(ways, tables, memory, args))  # what there is, so far


class Worker:
    """One way to compute attention, compiled in a process of its own."""

    def __init__(self, name: str, python: str, tokens: int, heads: int, devices: int = NUM_DEVICES):
        flags = f"--xla_force_host_platform_device_count={devices} {FLAG}"
        flags += f" {OUR_FLAG}" if python == sys.executable else ""
        command = [python, "-W", "ignore", __file__, "--worker", name, "--tokens", str(tokens)]
        command += ["--heads", str(heads), "--devices", str(devices)]
        env = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        self._process = subprocess.Popen(
            command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.compiled = self._answer()

    def run(self) -> dict[str, Any]:
        """Computes once: {"seconds", "core_s" (of all cores), "norms"}, or {"error"}."""
        assert self._process.stdin is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        return {"error": f"the process ended with {self._process.wait()}"}


def measure(
    ways: Sequence[tuple[str, str]], tokens: int, args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Returns {temp_mib, versions, seconds and core_s (lists), norms} or {error} of every way."""
    workers = [Worker(name, python, tokens, args.heads) for name, python in ways]
    results = [worker.compiled for worker in workers]
    running = []
    for worker, result in zip(workers, results, strict=True):
        if "error" not in result:
            needed_gib = result["temp_mib"] * result["devices"] / 2**10
            result |= {"seconds": [], "core_s": [], "needed_gib": needed_gib}
            if needed_gib <= args.memory_gib and tokens <= args.timed:
                running.append((worker, result))
    for turn in range(args.repeats + 1):  # the first warms up
        for worker, result in running:
            if "error" in result:
                continue
            if result.get("once_s", 0) > args.limit_s:
                continue
            answer = worker.run()
            if "error" in answer:
                result["error"] = answer["error"]
            elif turn:
                result["seconds"].append(answer["seconds"])
                result["core_s"].append(answer["core_s"])
            else:
                result["once_s"] = answer["seconds"]
            result["norms"] = answer.get("norms")
        print(f"{tokens} tokens, turn {turn} of {args.repeats}", file=sys.stderr)
    for worker in workers:
        worker.close()
    norms = [result["norms"] for _, result in running if "error" not in result]
    for other in norms[1:]:
        for a, b in zip(norms[0], other, strict=True):
            if abs(a - b) > NORM_RTOL * abs(a):
                sys.exit(f"{tokens} tokens: the ways differ in what they compute: {norms}")
    return results


def fit(args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """Returns (tokens, devices, MiB of temporaries a device) of our ring; it is only compiled."""
    rows = []
    for tokens in args.tokens:
        for devices in FIT_DEVICES:
            worker = Worker("ring", sys.executable, tokens, args.heads, devices)
            worker.close()
            if "error" in worker.compiled:
                sys.exit(f"ring on {devices} devices: {worker.compiled['error']}")
            rows.append((tokens, devices, worker.compiled["temp_mib"]))
    return rows


# Inside a worker


def work(name: str, tokens: int, heads: int, devices: int) -> None:
    """Compiles, says what it needs, and computes once for every line that comes in."""
    import jax
    import numpy as np

    def say(**answer: Any) -> None:
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()

    rng = np.random.default_rng(SEED)
    arrays = [rng.normal(size=(1, tokens, heads, HEAD_DIM)).astype(np.float32) for _ in range(4)]
    try:
        attention, order, place = WAYS[name](tokens, heads, devices)

        def step(q: Any, k: Any, v: Any, cotangent: Any) -> Any:
            out, pull = jax.vjp(attention, q, k, v)
            return out, *pull(cotangent)

        placed = [jax.device_put(x[:, order], place) for x in arrays]
        compiled = jax.jit(step, out_shardings=place).lower(*placed).compile()
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # another JAX than ours
        return say(error=f"{type(error).__name__}: {str(error).splitlines()[0][:100]}")
    packages = ["jax", *(["ringattention"] if name.startswith("ringattention") else [])]
    say(
        temp_mib=compiled.memory_analysis().temp_size_in_bytes / 2**20,
        devices=place.num_devices,
        versions=" ".join(f"{p} {importlib.metadata.version(p)}" for p in packages),
    )
    for _ in sys.stdin:
        started_s, started_core_s = time.monotonic(), time.process_time()
        results = jax.block_until_ready(compiled(*placed))
        seconds, core_s = time.monotonic() - started_s, time.process_time() - started_core_s
        norms = [float(np.linalg.norm(np.asarray(x, np.float64))) for x in results]
        say(seconds=seconds, core_s=core_s, norms=norms)


Way = tuple[Callable[..., Any], Any, Any]
"""(attention of q, k, v [1, T, N, H], the tokens in the order that it wants, their sharding)."""


def ours(
    tokens: int,
    heads: int,
    devices: int,
    *,
    block: int = BLOCK_SIZE,
    in_order: bool = False,
    **options: Any,
) -> Way:
    """in_order: device d has the d-th part of the tokens, as the package lays them out."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from longrl_jax.sharding import attend, make_mesh, spec

    mesh = make_mesh(seq=devices)
    jax.set_mesh(mesh)
    order = np.arange(tokens) if in_order else spread(tokens, devices)
    ids = jnp.asarray(order)[None], jnp.zeros((1, tokens), int), jnp.ones((1, tokens), int)
    place = jax.NamedSharding(mesh, spec("batch", "tokens"))
    return lambda q, k, v: attend(q, k, v, *ids, block_size=block, **options), order, place


def spread(tokens: int, devices: int) -> Any:
    """Order "spread" of longrl_jax.batching: device d has the tokens d, d + devices, ..."""
    import numpy as np

    return np.arange(tokens).reshape(-1, devices).T.reshape(-1)


def dense(tokens: int, heads: int, devices: int) -> Way:
    import jax
    import jax.numpy as jnp

    from longrl_jax.sharding import dense_attention

    order = jnp.arange(tokens)
    ids = order[None], jnp.zeros_like(order)[None], jnp.ones_like(order)[None]
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return lambda q, k, v: dense_attention(q, k, v, *ids), order, place


def gathered(tokens: int, heads: int, devices: int) -> Way:
    """All keys and values on every device; the scores of 256 queries at a time."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec

    from longrl_jax.sharding import make_mesh

    mesh = make_mesh(seq=devices)
    order = spread(tokens, devices)
    block = min(GATHERED_QUERIES, tokens // devices)

    def local(q: Any, k: Any, v: Any, order_t: Any) -> Any:
        k, v, order_T = (
            jax.lax.all_gather(x, "seq", axis=axis, tiled=True)
            for x, axis in ((k, 1), (v, 1), (order_t, 0))
        )

        @jax.checkpoint
        def rows(xs: Any) -> Any:
            q_qNH, order_q = xs
            score = jnp.einsum("qNH,SNH->NqS", q_qNH, k[0]) / HEAD_DIM**0.5
            score = jnp.where(order_T <= order_q[:, None], score, -1e30)
            return jnp.einsum("NqS,SNH->qNH", jax.nn.softmax(score), v[0])

        blocks = q.reshape(-1, block, heads, HEAD_DIM), order_t.reshape(-1, block)
        return jax.lax.map(rows, blocks).reshape(q.shape)

    tokens_split = PartitionSpec(None, "seq")
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens_split, tokens_split, tokens_split, PartitionSpec("seq")),
        out_specs=tokens_split,
    )
    place = jax.NamedSharding(mesh, tokens_split)
    return lambda q, k, v: mapped(q, k, v, jnp.asarray(order)), order, place


def public(tokens: int, heads: int, devices: int, *, block: int = BLOCK_SIZE) -> Way:
    """As its README calls it; tokens lie in order, which is the only one it knows."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import PartitionSpec
    from ringattention import ringattention

    mesh = jax.make_mesh((devices,), ("seq",))
    block = min(block, tokens // devices)
    options = {
        "causal_block_size": 1, "deterministic": True, "dropout_rng": None, "attn_pdrop": 0.0,
        "query_chunk_size": block, "key_chunk_size": block, "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable, "precision": None, "prevent_cse": False,
    }  # fmt: skip
    spec = PartitionSpec(None, "seq")
    mapped = jax.shard_map(
        lambda q, k, v: ringattention(q, k, v, None, None, None, "seq", True, options),
        mesh=mesh,
        in_specs=(spec, spec, spec),
        out_specs=spec,
        check_vma=False,
    )
    return mapped, jnp.arange(tokens), jax.NamedSharding(mesh, spec)


WAYS: dict[str, Callable[[int, int, int], Way]] = {
    "ring": ours,
    "ring in order": lambda *sizes: ours(*sizes, in_order=True),
    "ring 512": lambda *sizes: ours(*sizes, block=LARGE_BLOCK_SIZE),
    "2d": lambda *sizes: ours(*sizes, kind="2d", ulysses=2),
    "ulysses": lambda *sizes: ours(*sizes, kind="ulysses"),
    "gathered": gathered,
    "dense": dense,
    "ringattention": public,
    "ringattention 512": lambda *sizes: public(*sizes, block=LARGE_BLOCK_SIZE),
}
LABELS = {
    "ring": "ours, ring",
    "ring in order": "ours, ring, tokens in order",
    "ring 512": "ours, ring, tiles of 512",
    "2d": "ours, 2d (2 x 4)",
    "ulysses": "ours, ulysses",
    "gathered": "keys and values gathered",
    "dense": "dense, one device",
    "ringattention": "the ringattention package",
    "ringattention 512": "the ringattention package, tiles of 512",
}


# The result file


def report(
    ways: Sequence[tuple[str, str]],
    tables: Sequence[Sequence[dict[str, Any]]],
    memory: Sequence[tuple[int, int, float]],
    args: argparse.Namespace,
) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    command = "python benchmarks/ring_attention.py OUTPUT --tokens "
    command += f"{' '.join(map(str, args.tokens))} --heads {args.heads} --repeats {args.repeats} "
    command += f"--memory-gib {args.memory_gib:g} --timed {args.timed} --limit-s {args.limit_s:g}"
    command += " --public PYTHON" if args.public else ""
    lines = [
        "# Attention over a split sequence: time and memory",
        "",
        f"`{command}` at commit {commit or 'unknown'}, {datetime.date.today()}; "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, {NUM_DEVICES} simulated devices, "
        f"Python {platform.python_version()}. One causal row, forward and backward, float32, "
        f"{args.heads} head(s) of {HEAD_DIM} for queries and for keys, tiles of {BLOCK_SIZE} "
        "tokens a side where no other size is named. "
        f"Seconds are medians of {args.repeats} (lowest to highest) in turn; those of cores are "
        "processor time, which other work on the machine does not lengthen much; MiB are the "
        "compiler's temporaries of one device. What would take over "
        f"{args.memory_gib:g} GiB on all devices together, or has over {args.timed:,} "
        f"tokens, is not run; what takes over {args.limit_s:g} s is run once.",
        "",
    ]
    sizes = args.tokens[: len(tables)]
    header = "| way | with | " + " | ".join(f"{t:,} tokens" for t in sizes) + " |"
    lines += [header, "|---" * (2 + len(sizes)) + "|"]
    for i, (name, _) in enumerate(ways):
        cells = [cell(table[i]) for table in tables]
        versions = next((t[i]["versions"] for t in tables if "versions" in t[i]), "")
        lines.append(f"| {LABELS[name]} | {versions} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *memory_lines(memory)]) + "\n"


def cell(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"does not run: {result['error'].replace('|', '/')}"
    mib = f"{result['temp_mib']:.0f} MiB"
    if not result["seconds"] and "once_s" in result:
        return f"once: {result['once_s']:.1f} s, {mib}"
    if not result["seconds"]:
        return f"not run ({result['needed_gib']:.0f} GiB), {mib}"
    middle, low, high = (f(result["seconds"]) for f in (statistics.median, min, max))
    cores = statistics.median(result["core_s"])
    return f"{middle:.2f} s ({low:.2f} to {high:.2f}), cores {cores:.2f} s, {mib}"


def memory_lines(memory: Sequence[tuple[int, int, float]]) -> list[str]:
    """The one line a + b * tokens / devices through our ring's memory, and how far off it is."""
    import numpy as np

    tokens, devices, mib = map(np.asarray, zip(*memory, strict=True))
    x = np.stack([np.ones(len(mib)), tokens / devices], axis=1)
    (a, b), *_ = np.linalg.lstsq(x / mib[:, None], np.ones(len(mib)), rcond=None)  # of ratios
    fitted = a + b * tokens / devices
    lines = [
        f"Our ring's temporaries, fitted over all sizes and {', '.join(map(str, FIT_DEVICES))} "
        f"devices: {a:.2f} MiB + {b * 2**10:.2f} KiB a token of a device; the largest difference "
        f"is {np.abs(fitted / mib - 1).max():.1%}.",
        "",
        "| tokens | devices | MiB | fitted |",
        "|---|---|---|---|",
    ]
    return lines + [
        f"| {t:,} | {n} | {m:.1f} | {f:.1f} |"
        for t, n, m, f in zip(tokens, devices, mib, fitted, strict=True)
    ]


if __name__ == "__main__":
    main()
