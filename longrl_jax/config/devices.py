"""The sections `mesh`, `attention` and `batch`: how work is laid out on devices."""

import dataclasses

from longrl_jax.config.checks import check_one_of, check_positive

MAX_SIMULATED_DEVICES = 512
"""Each is threads and buffers of this machine; a mistyped number must not take it down."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices on each mesh axis; the product is the number of devices."""

    data: int = 1
    """Copies of the model."""
    fsdp: int = 1
    """Devices that share parameters, optimizer state and rows."""
    seq: int = 1
    """Devices that share one long sequence (attention.kind says how) and one video's frames."""
    tensor: int = 1
    """Devices that share heads and MLP width."""
    simulated: bool = False
    """Simulate that many devices on the CPU."""
    processes: int = 1
    """Processes that share the devices evenly, one a host: the same command, started on each. Rows
    belong to processes, so this must divide data * fsdp (seq and tensor stay inside a host)."""
    process: int = -1
    """Which of them this one is, from 0; -1: Slurm (or Open MPI) knows."""
    coordinator: str = ""
    """HOST:PORT that process 0 listens at; empty: Slurm (or Open MPI) knows."""

    def __post_init__(self):
        for axis in ("data", "fsdp", "seq", "tensor", "processes"):
            check_positive(f"mesh.{axis}", getattr(self, axis))
        _check_processes(self)
        if self.simulated and self.num_devices > MAX_SIMULATED_DEVICES:
            raise ValueError(
                f"mesh.* asks for {self.num_devices} simulated devices, over "
                f"{MAX_SIMULATED_DEVICES}, the most that one machine should play; lower mesh.*"
            )

    @property
    def num_devices(self) -> int:
        return self.rows * self.seq * self.tensor

    @property
    def rows(self) -> int:
        """Rows that are computed at a time, each by seq * tensor devices."""
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How the devices of mesh.seq attend over the rows that they share; the numbers are equal."""

    kind: str = "ring"
    """ring: keys and values go round the devices. ulysses: a device takes all tokens for some of
    the heads, whose number mesh.seq must divide. 2d: neighbours share heads, their groups make a
    ring."""
    ulysses: int = 0
    """Neighbours that share heads with kind=2d, a divisor of mesh.seq; 0: the most that divide the
    heads."""
    kernel: str = "xla"
    """xla, or pallas: a Triton kernel for GPUs. A CPU can only interpret it, which is slow."""
    block_size: int = 0
    """Tokens on each side of a tile; 0: the kernel's own (xla 512, pallas 64, a power of 2). On a
    CPU 128 is faster for xla (benchmarks/results/ring_attention_cpu2_202611.md)."""

    def __post_init__(self):
        check_one_of("attention.kind", self.kind, ("ring", "ulysses", "2d"))
        check_one_of("attention.kernel", self.kernel, ("xla", "pallas"))
        for name in ("ulysses", "block_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"attention.{name}={getattr(self, name)} must be 0 or more")
        size = self.block_size
        if size and self.kernel == "pallas" and (size < 16 or size & (size - 1)):
            raise ValueError(
                f"attention.block_size={size} must be a power of 2, and at least 16, for "
                "attention.kernel=pallas; 0 takes its own"
            )
        if self.ulysses and self.kind != "2d":
            raise ValueError(
                f"attention.ulysses={self.ulysses} is for attention.kind=2d, the kind is "
                f"{self.kind}; change one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a step's prompts become rows."""

    groups: int = 8
    """Prompts of one step (one update)."""
    rows_per_pass: int = 0
    """Rows of one forward/backward pass; gradients are summed over passes. 0: all in one, or with
    pack one a device (mesh.data * mesh.fsdp)."""
    pack: bool = False
    """Fill rows with as many groups as fit into max_row_tokens; none sees another, and numbers stay
    those of a row a group. Questions on one video share its tokens. Rows have four lengths, up to
    max_row_tokens (and a bit over, where what is shared needs it); metrics pack/fill and
    pack/examples_per_row say how full they are."""
    max_row_tokens: int = 4096
    """Longest row: shared prefix and all branches. A longer group is refused by name."""
    smallest_bucket: int = 128
    """Both parts of a row (prefix, answers) are padded to one of few multiples of this number of
    tokens (packing.bucket), so that few lengths, and few compilations, occur."""

    def __post_init__(self):
        for name in ("groups", "max_row_tokens", "smallest_bucket"):
            check_positive(f"batch.{name}", getattr(self, name))
        if self.rows_per_pass < 0:
            raise ValueError(f"batch.rows_per_pass={self.rows_per_pass} must be 0 or more")


def _check_processes(mesh: "MeshConfig") -> None:
    if mesh.rows % mesh.processes:
        raise ValueError(
            f"mesh.processes={mesh.processes} does not divide mesh.data * mesh.fsdp = {mesh.rows}: "
            "a row's devices (mesh.seq * mesh.tensor) must be of one process; raise mesh.data or "
            "mesh.fsdp and lower mesh.seq or mesh.tensor"
        )
    if (mesh.process >= 0) != bool(mesh.coordinator):
        raise ValueError(
            f"mesh.process={mesh.process} and mesh.coordinator={mesh.coordinator!r}: give both, or "
            "neither and start with srun"
        )
    if not -1 <= mesh.process < mesh.processes:
        raise ValueError(
            f"mesh.process={mesh.process} must be 0 to {mesh.processes - 1} (mesh.processes - 1)"
        )
