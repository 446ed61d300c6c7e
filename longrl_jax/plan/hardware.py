"""Devices that a plan may be made for: what XLA must know of them, and what they are said to do.

The text that XLA reads is a GpuTargetConfigProto. Its numbers are those that the openxla/xla
repository publishes (xla/backends/gpu/target_config/specs/*.txtpb, Apache-2.0), with the versions
of cuDNN and CUDA that the `plan` extra installs. Rates are NVIDIA's data sheets': dense bfloat16
without sparsity, NVLink in one direction.
"""

import dataclasses
from typing import Any

import jax

from longrl_jax.config import pick

CUDNN, CUDA = (9, 10, 0), (12, 9, 0)
"""Major, minor and patch that code is generated for."""
DEVICES_A_HOST = 8
HOW_TO_INSTALL = (
    "`make plan CONFIG=...` makes an environment that has them (.venv-plan), or: "
    'pip install -c constraints.txt -e ".[plan]"'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hardware:
    """One kind of GPU."""

    device: str
    """Name in the driver's words."""
    capability: tuple[int, int]
    extension: str = "NONE"
    """Of the instruction set: H100 and H200 have instructions that only their own code may use."""
    num_cores: int
    fpus_per_core: int
    clock_ghz: float
    shared_memory_per_core: int
    shared_memory_per_block: int
    """Bytes that a block may opt into."""
    l2_bytes: int
    memory_bytes: int
    memory_bytes_per_s: float
    flops_per_s: float
    """Of bfloat16 matrix products."""
    link_bytes_per_s: float
    """NVLink, one direction."""


_A100: dict[str, Any] = {
    "capability": (8, 0),
    "num_cores": 108,
    "fpus_per_core": 64,
    "clock_ghz": 1.41,
    "shared_memory_per_core": 167936,
    "shared_memory_per_block": 166912,
    "l2_bytes": 41943040,
    "flops_per_s": 312e12,
    "link_bytes_per_s": 300e9,
}
_HOPPER: dict[str, Any] = {
    "capability": (9, 0),
    "extension": "ACCELERATED_FEATURES",
    "num_cores": 132,
    "fpus_per_core": 128,
    "clock_ghz": 1.98,
    "shared_memory_per_core": 233472,
    "shared_memory_per_block": 232448,
    "l2_bytes": 52428800,
    "flops_per_s": 989e12,
    "link_bytes_per_s": 450e9,
}
HARDWARE: dict[str, Hardware] = {
    # a100_sxm_80.txtpb, a100_sxm_40.txtpb; NVIDIA A100 data sheet (June 2021): 312 TFLOP/s,
    # 600 GB/s of NVLink in both directions together
    "a100-80gb": Hardware(
        **_A100,
        device="NVIDIA A100-SXM4-80GB",
        memory_bytes=85100068864,
        memory_bytes_per_s=2.039e12,
    ),
    "a100-40gb": Hardware(
        **_A100,
        device="NVIDIA A100-SXM4-40GB",
        memory_bytes=42331013120,
        memory_bytes_per_s=1.555e12,
    ),
    # h100_sxm.txtpb, h200.txtpb; NVIDIA H100 and H200 data sheets: 1,979 TFLOP/s with sparsity,
    # half of it without; 900 GB/s of NVLink in both directions together
    "h100": Hardware(
        **_HOPPER,
        device="NVIDIA H100 80GB HBM3",
        memory_bytes=84942979072,
        memory_bytes_per_s=3.352e12,
    ),
    "h200": Hardware(
        **_HOPPER,
        device="NVIDIA H200 141GB HBM3e",
        memory_bytes=151397597184,
        memory_bytes_per_s=4.8e12,
    ),
}
CPU = "cpu"
"""The only other `hardware=`: simulated devices of this machine, which have no size."""


def find(name: str) -> Hardware | None:
    """Returns a row of HARDWARE, None for the CPU; an unknown name lists the known ones."""
    return pick({**HARDWARE, CPU: None}, name, "hardware")


def devices(hardware: Hardware | None, num_devices: int) -> list[Any]:
    """Returns devices to compile for: of that kind, none of them here, or this machine's own.

    Raises RuntimeError that says how to get what is missing (JAX's CUDA packages).
    """
    if hardware is None:
        return list(jax.devices()[:num_devices])
    from jax.experimental import topologies

    hosts, rest = divmod(num_devices, DEVICES_A_HOST)
    if hosts and rest:
        raise ValueError(
            f"{num_devices} devices are no whole number of hosts of {DEVICES_A_HOST}; "
            f"take 1 to {DEVICES_A_HOST}, or a multiple of {DEVICES_A_HOST}"
        )
    shape = f"1x{hosts}x{DEVICES_A_HOST}" if hosts else f"1x1x{rest}"
    try:
        topology = topologies.get_topology_desc(
            platform="cuda", target_config=target_config(hardware), topology=shape
        )
    except (RuntimeError, NotImplementedError, AttributeError) as error:
        raise RuntimeError(
            f"compiling for {hardware.device} needs JAX's CUDA packages (no GPU, no driver), and "
            f"JAX cannot use them here ({type(error).__name__}: {error}). {HOW_TO_INSTALL}"
        ) from None
    return list(topology.devices)


def target_config(hardware: Hardware) -> str:
    """Returns the GpuTargetConfigProto text of a kind of GPU."""
    (major, minor), cudnn, cuda = hardware.capability, CUDNN, CUDA
    capability = f"major: {major} minor: {minor} feature_extension: {hardware.extension}"
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {hardware.shared_memory_per_core}
  threads_per_core_limit: 2048
  core_count: {hardware.num_cores}
  fpus_per_core: {hardware.fpus_per_core}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: {hardware.memory_bytes_per_s:.0f}
  l2_cache_size: {hardware.l2_bytes}
  clock_rate_ghz: {hardware.clock_ghz}
  device_memory_size: {hardware.memory_bytes}
  shared_memory_per_block_optin: {hardware.shared_memory_per_block}
  cuda_compute_capability {{ {capability} }}
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
}}
platform_name: "CUDA"
dnn_version_info {{ major: {cudnn[0]} minor: {cudnn[1]} patch: {cudnn[2]} }}
runtime_version {{ major: {cuda[0]} minor: {cuda[1]} patch: {cuda[2]} }}
device_description_str: "{hardware.device}"
"""
