"""Compiles a traced phase for a kind of device and says what it takes, computes and sends."""

import dataclasses
import time
from typing import Any

import jax

from longrl_jax.plan import counter, programs
from longrl_jax.plan.hardware import Hardware
from longrl_jax.sharding import KERNELS, executed_tiles, imbalance, num_blocks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compiled:
    """One program, of one device; sizes in bytes."""

    name: str
    input_bytes: int
    """Of programs.Phase.inputs: what it reads beside what lies there anyway."""
    argument_bytes: int
    """Of all that it reads and uses, parameters too."""
    temporary_bytes: int
    """Of all that lives while it runs but arguments: activations, gradients, gathered weights."""
    output_bytes: int
    """Of results that take no argument's place."""
    host_bytes: int
    """Temporaries that it keeps in the host's memory."""
    peak_bytes: int
    """Of arguments, results and temporaries together."""
    compile_s: float
    work: counter.Work
    links: dict[str, float]
    """Bytes that one device sends, by kind of collective (counter.link_bytes)."""
    kernels: tuple[str, ...]

    @property
    def extra_bytes(self) -> int:
        """What it needs beside its arguments."""
        return self.peak_bytes - self.argument_bytes


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How much of attention's tiles is executed, and how evenly."""

    share: float
    """Of all tiles, over all devices."""
    balance: float
    """The busiest device's tiles, ring step by ring step, over the mean; 1 is even."""
    block_size: int
    """Tokens on each side."""


def compile_phase(
    phase: programs.Phase, hardware: Hardware | None, *, num_devices: int, tiles: Tiles
) -> Compiled:
    """Compiles one phase; takes seconds to minutes, and up to some GiB of this machine.

    hardware=None: for simulated devices of this machine.
    """
    started_s = time.perf_counter()
    platforms = ("cuda",) if hardware is not None else ("cpu",)
    program = phase.traced.lower(lowering_platforms=platforms).compile()
    compile_s = time.perf_counter() - started_s
    memory = program.memory_analysis()
    new_output = memory.output_size_in_bytes - memory.alias_size_in_bytes
    together = memory.argument_size_in_bytes + memory.temp_size_in_bytes + new_output
    jaxpr = phase.traced.jaxpr
    return Compiled(
        name=phase.name,
        input_bytes=programs.shard_bytes(phase.inputs),
        argument_bytes=memory.argument_size_in_bytes,
        temporary_bytes=memory.temp_size_in_bytes,
        output_bytes=new_output,
        host_bytes=memory.host_temp_size_in_bytes,
        # XLA's own figure of a CPU program leaves temporaries out
        peak_bytes=max(memory.peak_memory_in_bytes, together) if hardware is None else together,
        compile_s=compile_s,
        work=counter.work(jaxpr, num_devices=num_devices, tile_share=tiles.share),
        links=counter.link_bytes(program.as_text() or ""),
        kernels=tuple(counter.kernels(jaxpr))
        or (f"blockwise XLA, tiles of {tiles.block_size} tokens",),
    )


def tiles_of(passes: Any, *, kernel: str, ulysses: int, block_size: int = 0) -> Tiles:
    """Returns what is executed for the first row of programs.host_passes (all are alike).

    kernel, block_size: of cfg.attention; ulysses: devices that share heads
    (sharding.ulysses_size).
    """
    order, branch, segment = (x[0, :1] for x in (passes.order, passes.branch, passes.segment))
    size = block_size or KERNELS[kernel].block_size
    tiles = executed_tiles(
        order, branch, segment, num_devices=passes.num_shards, block_size=size, ulysses=ulysses
    )
    places = passes.num_shards // ulysses
    whole = places * num_blocks(order.shape[1] // places, size)[0]
    share = float(tiles.sum() / (whole**2 * ulysses))
    return Tiles(share=share, balance=imbalance(tiles), block_size=size)


def versions() -> str:
    """Returns the versions that the figures depend on."""
    from importlib import metadata

    names = ("jax", "jaxlib", "jax-cuda12-pjrt", "nvidia-cudnn-cu12", "flax", "optax")
    have = {d.metadata["Name"].lower(): d.version for d in metadata.distributions()}
    assert jax.__version__ == have["jax"]
    return ", ".join(f"{name} {have[name]}" for name in names if name in have)
