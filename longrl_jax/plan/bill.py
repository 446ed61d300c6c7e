"""The arithmetic of a plan: what lies in a device's memory together, what fits, and how long.

Figures of programs come from the compiler (compiled.py); those of vLLM and of time are formulas,
and the page says so.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from longrl_jax.config import Config, RolloutConfig
from longrl_jax.plan.compiled import Compiled
from longrl_jax.plan.hardware import Hardware
from longrl_jax.plan.programs import Row
from longrl_jax.platform import GPU_RESERVE

GIB = 2**30
RESERVE_BYTES = 6 * GIB
"""Of one device, for what no compiler counts: NCCL's buffers, the CUDA contexts of learner and
engine, cuBLAS workspaces, fragmentation of the pool."""
ENGINE_BATCH_TOKENS = 8192
"""Most tokens of one vLLM step (its max_num_batched_tokens on such GPUs): sizes its workspace."""
ENGINE_SEQUENCES = 256
"""Most sequences of one vLLM step (its max_num_seqs): their logits stand in float32, twice."""
DENSE_SHARE, TILE_SHARE, LINK_SHARE, MEMORY_SHARE = 0.5, 0.25, 0.6, 0.6
"""Shares of a data sheet's rates that an estimate of time goes by; guesses, not measurements:
matrix products; attention's tiles; links; memory (decoding)."""
DECISION_S = 10e-6
"""Of deciding about one tile of blockwise XLA attention: a conditional on a GPU waits for the host.
A guess."""
ENGINE_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Engine:
    """vLLM's part of one device, in bytes; formulas."""

    weights: int
    row: int
    """Keys and values of one group: its prompt once, and its R answers."""
    workspace: int
    takes: int
    """gpu_memory_utilization of the device: vLLM fills what is left of it with cache."""

    @property
    def needs(self) -> int:
        return self.weights + self.row + self.workspace

    @property
    def rows_at_once(self) -> int:
        return max(0, (self.takes - self.weights - self.workspace) // self.row)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Resident:
    """What lies on one device between programs, in bytes."""

    trained: int
    frozen: int
    optimizer: int
    reference: int
    """Parameters of the KL term's reference that are not the policy's own."""

    @property
    def learner(self) -> int:
        return self.trained + self.frozen + self.optimizer + self.reference


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """One phase of one device: everything that is there at its peak, and what is left."""

    name: str
    learner: int
    engine: int
    free: int
    """Beside the reserve; below 0 it does not fit."""


def engine_of(text: Any, parameters: int, row: Row, rollout: RolloutConfig, memory: int) -> Engine:
    """Returns vLLM's part of a device.

    text: the decoder's config; parameters: of the language model. Each of the tensor_parallel ranks
    holds its share of the weights, and of the key/value heads (at least one).
    """
    ranks, item = rollout.tensor_parallel, ENGINE_DTYPE_BYTES[rollout.dtype]
    heads = max(text.num_kv_heads // ranks, 1)
    token = 2 * text.num_layers * heads * text.head_dim * item
    tokens = row.prompt_tokens + row.answers * row.answer_tokens
    widths = 4 * text.width + 2 * text.mlp_width // ranks
    logits = 2 * ENGINE_SEQUENCES * text.vocab_size * 4
    return Engine(
        weights=parameters * item // ranks,
        row=token * tokens,
        workspace=ENGINE_BATCH_TOKENS * widths * item + logits,
        takes=int(rollout.gpu_memory_utilization * memory),
    )


def learner_limit(memory: int, engine_takes: int) -> int:
    """Returns the bytes that the learner may take: the reserve is left, and platform.prepare's."""
    return memory - engine_takes - max(RESERVE_BYTES, int(GPU_RESERVE * memory))


def sums(
    programs: Mapping[str, Compiled],
    resident: Resident,
    memory: int,
    *,
    engine: Engine | None,
    asleep: bool = False,
) -> list[Sum]:
    """Returns every phase of a step in order, the rollout among them.

    Temporaries live while their program runs, one program at a time; parameters, optimizer,
    reference and vLLM's share stay; what else a program reads is counted with it.
    asleep: vLLM gives its share back while the learner computes.
    """
    out = []
    order = [n for n in ("encode", "embed", "rollout", "logps", "update") if n in programs]
    if engine is not None:
        order.insert(order.index("embed") + 1 if "embed" in order else 0, "rollout")
    for name in order:
        learner = resident.learner
        if name != "rollout":
            learner += programs[name].input_bytes + programs[name].extra_bytes
        takes = 0 if engine is None or (asleep and name != "rollout") else engine.takes
        free = learner_limit(memory, takes) - learner
        out.append(Sum(name=name, learner=learner, engine=takes, free=free))
    return out


def tightest(found: Sequence[Sum]) -> Sum:
    """Returns the phase with the least memory left."""
    return min(found, key=lambda s: s.free)


def smallest_utilization(engine: Engine, memory: int) -> float:
    """Returns the least rollout.gpu_memory_utilization, in hundredths, that holds one row."""
    return math.ceil(100 * engine.needs / memory) / 100


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seconds:
    """An estimate of one phase's time, by what takes it."""

    products: float
    attention: float
    decisions: float
    links: float

    @property
    def total(self) -> float:
        return self.products + self.attention + self.decisions + self.links


def seconds(program: Compiled, hardware: Hardware, *, balance: float, calls: int = 1) -> Seconds:
    """Estimates `calls` calls of a program; nothing overlaps, the busiest device is waited for."""
    work, links = program.work, sum(program.links.values())
    blockwise = any("blockwise" in kernel for kernel in program.kernels)
    return Seconds(
        products=calls * work.dense / (DENSE_SHARE * hardware.flops_per_s),
        attention=calls * work.tiles * balance / (TILE_SHARE * hardware.flops_per_s),
        decisions=calls * work.decisions * balance * DECISION_S if blockwise else 0.0,
        links=calls * links / (LINK_SHARE * hardware.link_bytes_per_s),
    )


def rollout_seconds(
    text: Any, parameters: int, row: Row, cfg: Config, engine: Engine, hardware: Hardware
) -> float:
    """Estimates a step's rollout: every prompt is prefilled once, answers are decoded together.

    Prefill by FLOPs (causal attention, no flash kernel slower than DENSE_SHARE), decoding by memory
    traffic: per token the weights once, and for each sample the cache of its whole sequence.
    """
    ranks = cfg.rollout.tensor_parallel
    rows = math.ceil(cfg.batch.groups / cfg.rollout.replicas)
    attended = 2 * text.num_layers * text.num_heads * text.head_dim * row.prompt_tokens**2
    flops = (2 * parameters * row.prompt_tokens + attended) / ranks
    prefill = rows * flops / (DENSE_SHARE * hardware.flops_per_s)
    at_once = max(1, min(rows, engine.rows_at_once))
    rounds = math.ceil(rows / at_once)
    traffic = engine.weights + at_once * row.answers * engine.row
    decode = rounds * row.answer_tokens * traffic / (MEMORY_SHARE * hardware.memory_bytes_per_s)
    return prefill + decode
