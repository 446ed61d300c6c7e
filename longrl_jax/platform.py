"""The one place that sets environment variables and jax.config; every entry point calls it first.

Nothing here may run at import: a library that changes the process behind its user's back is a trap.
"""

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path

from longrl_jax.config import MeshConfig, RolloutConfig

GPU_RESERVE = 0.08
"""Share of a GPU that neither XLA nor vLLM may take: contexts, NCCL, fragmentation."""
OVERLAP_FLAGS = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_experimental_parallel_collective_overlap_limit=8",
)
"""Of XLA for GPUs: with both, all that attention sends may overlap with its compute; by default dk
and dv do not (docs/measured.md 1.10). Known to the jaxlib that pyproject.toml allows (0.10)."""
RENDEZVOUS_TIMEOUT_S = 600
"""Simulated devices share few cores: a collective may wait long before its partners arrive. XLA's
default aborts the process after 60 s (docs/measured.md 1.2)."""
HEARTBEAT_TIMEOUT_S = 60
"""A process that is not heard of for so long is dead, and the others end (jax.distributed)."""


def prepare(
    mesh: MeshConfig, rollout: RolloutConfig | None = None, *, compilation_cache: str = ""
) -> None:
    """Sets up JAX and vLLM for this process; call it before either makes a device.

    With mesh.processes over 1 it returns when all of them have joined. Raises RuntimeError if JAX
    has already made its devices and their number is not the mesh's.
    """
    if mesh.simulated:
        add_xla_flags(
            f"--xla_force_host_platform_device_count={mesh.num_devices // mesh.processes}",
            f"--xla_cpu_collective_call_terminate_timeout_seconds={RENDEZVOUS_TIMEOUT_S}",
            # else two collectives that do not depend on each other may start in another order on
            # another device, and all wait for ever (docs/measured.md 1.6)
            "--xla_cpu_enable_concurrency_optimized_scheduler=false",
        )
        os.environ["JAX_PLATFORMS"] = "cpu"
    elif mesh.num_devices > 1:
        add_xla_flags(*OVERLAP_FLAGS)
    if rollout is not None:
        prepare_vllm(rollout)
        share = max(0.1, 1 - rollout.gpu_memory_utilization - GPU_RESERVE)  # vLLM has the rest
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{share:.2f}")
    import jax

    if mesh.simulated:
        jax.config.update("jax_platforms", "cpu")  # jax may have read its variable before
    if compilation_cache:
        jax.config.update("jax_compilation_cache_dir", compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    if mesh.processes > 1 and not jax.distributed.is_initialized():
        join(mesh)
    if jax.device_count() != mesh.num_devices:
        hint = "mesh.simulated=true simulates them" if not mesh.simulated else "JAX started before"
        raise RuntimeError(
            f"the mesh wants {mesh.num_devices} devices, JAX has {jax.device_count()} "
            f"({jax.default_backend()}); change mesh.* or the machine ({hint})"
        )


def join(mesh: MeshConfig) -> None:
    """Joins the processes of a run; waits for all. What one that dies does to the others: train.py.

    Raises RuntimeError if they do not come, or are others than mesh.processes says.
    """
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    told = bool(mesh.coordinator)
    try:
        jax.distributed.initialize(
            coordinator_address=mesh.coordinator if told else None,
            num_processes=mesh.processes if told else None,
            process_id=mesh.process if told else None,
            local_device_ids=list(range(mesh.num_devices // mesh.processes)),  # else Slurm: one
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
        )
    except ValueError as error:
        raise RuntimeError(
            f"mesh.processes={mesh.processes}, but no launcher was found ({error}); start with "
            "srun, or give every process mesh.coordinator=HOST:PORT and its own mesh.process"
        ) from None
    if jax.process_count() != mesh.processes:
        raise RuntimeError(
            f"mesh.processes={mesh.processes}, but {jax.process_count()} were started; make the "
            "two equal"
        )


def prepare_to_compile(num_devices: int) -> None:
    """Sets JAX up to compile for GPUs that are not here, and for simulated devices.

    Without a GPU nothing can be tuned by trying. XLA's Triton matrix products then have tiles that
    are poor, and for some shapes none at all (it ends in an error): cuBLAS takes them instead.
    Transfers overlap as in training (`prepare`), so that the memory is that schedule's.
    """
    if num_devices > 1:
        add_xla_flags(*OVERLAP_FLAGS)
    add_xla_flags(
        f"--xla_force_host_platform_device_count={num_devices}",
        "--xla_gpu_autotune_level=0",
        "--xla_gpu_enable_triton_gemm=false",
    )
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # what a plan says itself, in GiB


def prepare_vllm(rollout: RolloutConfig) -> None:
    """Sets vLLM's environment variables; a value that the person has set is kept."""
    if "vllm" in sys.modules:
        raise RuntimeError("vllm was imported before platform.prepare; import it later")
    for name, value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_DO_NOT_TRACK": "1",
        "OMP_WAIT_POLICY": "PASSIVE",  # torch's idle threads would spin on cores that JAX shares
        "TORCHDYNAMO_DISABLE": "1",  # saves a C++ compile of 15-50 s; outputs are equal (tested)
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }.items():
        os.environ.setdefault(name, value)
    logging.getLogger("vllm").setLevel(logging.ERROR)  # what it says before it reads its variable
    warnings.filterwarnings("ignore", message=".*reduce_op.*", category=FutureWarning)


def disk_error(error: OSError, path: Path, way_out: str) -> OSError:
    """Returns the same error in words: what cannot be written, why, what is free, and what to do.

    path need not exist; the disk is that of its nearest folder.
    """
    folder = next(p for p in (path.absolute(), *path.absolute().parents) if p.is_dir())
    usage = shutil.disk_usage(folder)
    why = error.strerror or str(error)
    if error.filename is not None:
        why += f": {error.filename}"
    said = OSError(
        f"{path} cannot be written ({why}); {usage.free / 2**30:.3g} of {usage.total / 2**30:.3g} "
        f"GiB are free on its disk ({folder}); {way_out}"
    )
    said.errno = error.errno
    return said


def add_xla_flags(*flags: str) -> None:
    """Appends what XLA_FLAGS lacks. A flag that XLA does not know ends the process."""
    have = os.environ.get("XLA_FLAGS", "").split()
    names = {flag.split("=")[0] for flag in have}
    os.environ["XLA_FLAGS"] = " ".join(have + [f for f in flags if f.split("=")[0] not in names])
