"""A config, planned for a kind of device: every program compiled, every sum made; and the search
for what would fit."""

import bisect
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl_jax import models
from longrl_jax.config import Config
from longrl_jax.models import lora
from longrl_jax.plan import bill, programs
from longrl_jax.plan.compiled import Compiled, Tiles, compile_phase, tiles_of
from longrl_jax.plan.hardware import Hardware
from longrl_jax.sharding import ulysses_size
from longrl_jax.stages.policy import Policy

Say = Callable[[str], None]
MOST_FRAMES = 8192
"""config.DataConfig takes no more."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything that the printed page says of a config as it stands."""

    cfg: Config
    policy: Policy
    row: programs.Row
    row_tokens: int
    """T: tokens of a row with its padding."""
    num_rows: int
    """Of a step, padding included."""
    num_passes: int
    chunk_frames: int
    """Frames of one call of the tower."""
    tiles: Tiles
    resident: bill.Resident
    phases: Mapping[str, Compiled]
    engine: bill.Engine | None
    """None: no rollout, or a CPU."""
    language_parameters: int

    def sums(self, memory: int, *, asleep: bool = False) -> list[bill.Sum]:
        """Returns bill.sums of this plan."""
        return bill.sums(self.phases, self.resident, memory, engine=self.engine, asleep=asleep)


def make(
    cfg: Config,
    hardware: Hardware | None,
    devices: Sequence[Any],
    *,
    only: Sequence[str] = (),
    say: Say = lambda text: None,
) -> Plan:
    """Traces and compiles a config's programs, one at a time; `only` these phases (empty: all)."""
    mesh = programs.mesh_of(cfg, devices)
    policy, state = programs.abstract_policy(cfg, mesh)
    row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
    passes = programs.host_passes(cfg, row)
    text = policy.backbone.text_config(policy.model_cfg)
    size = ulysses_size(
        text.num_heads,
        kind=cfg.attention.kind,
        ulysses=cfg.attention.ulysses,
        seq=cfg.mesh.seq,
        tensor=cfg.mesh.tensor,
    )
    tiles = tiles_of(
        passes,
        kernel=cfg.attention.kernel,
        ulysses=size,
        block_size=cfg.attention.block_size,
    )
    traced = programs.trace_all(cfg, policy, state, passes, row)
    compiled = {}
    for name, phase in traced.items():
        if not only or name in only:
            say(f"compiling {name}, {passes.tokens.shape[-1]:,} tokens a row")
            compiled[name] = compile_phase(phase, hardware, num_devices=len(devices), tiles=tiles)
    trained = programs.shard_bytes(state.params)
    with_kl = cfg.stage == "grpo" and cfg.algorithm.kl > 0
    own = programs.shard_bytes(lora.base(state.params))
    if cfg.model.reference:
        own += programs.shard_bytes(state.frozen)
    language = language_parameters(policy)
    engine = None
    if cfg.stage == "grpo" and hardware is not None:
        engine = bill.engine_of(text, language, row, cfg.rollout, hardware.memory_bytes)
    return Plan(
        cfg=cfg,
        policy=policy,
        row=row,
        row_tokens=passes.tokens.shape[-1],
        num_rows=math.prod(passes.tokens.shape[:2]),
        num_passes=passes.tokens.shape[0],
        chunk_frames=traced["encode"].inputs.shape[0] if "encode" in traced else 0,
        tiles=tiles,
        resident=bill.Resident(
            trained=trained,
            frozen=programs.shard_bytes(state.frozen),
            optimizer=programs.shard_bytes(state.opt_state),
            reference=own if with_kl else 0,
        ),
        phases=compiled,
        engine=engine,
        language_parameters=language,
    )


def language_parameters(policy: Policy) -> int:
    """Returns the number of the language model's parameters, a tied head counted once."""
    model = models.abstract(policy.backbone, policy.model_cfg, mesh=policy.mesh)
    arrays = models.arrays_of(model)
    return sum(math.prod(x.shape) for path, x in arrays.items() if path.startswith("text."))


@dataclasses.dataclass(frozen=True)
class Fit:
    """What the search found."""

    frames: int
    """The most frames of a video that fit, or are believed to."""
    row_tokens: int
    compiled: tuple[tuple[int, int, int], ...]
    """(frames, tokens of a row, bytes to spare) of what was compiled, by frames."""
    confirmed: bool
    """The number found was compiled itself and fits."""


def most_frames(
    plan: Plan,
    hardware: Hardware,
    devices: Sequence[Any],
    *,
    asleep: bool,
    tries: int = 2,
    say: Say = lambda text: None,
) -> Fit:
    """Searches for the largest data.num_frames whose update fits, vLLM given just what it needs.

    Compiles half the frames (or more of them, where half are padded to as long a row), draws a line
    through the two (memory grows with the tokens of a row), compiles what the line promises, and
    draws again, `tries` times in all.
    """
    points = {plan.row.num_frames: _point(plan, hardware, asleep)}

    def look(frames: int) -> None:
        cfg = with_frames(plan.cfg, frames)
        other = make(cfg, hardware, devices, only=("update",), say=say)
        points[frames] = _point(other, hardware, asleep)

    look(_other_length(plan))
    for _ in range(tries):
        frames = _largest(points, plan)
        if frames in points or frames < 1:
            break
        look(frames)
    best = max((f for f, (_, spare) in points.items() if spare >= 0), default=0)
    return Fit(
        frames=best or _largest(points, plan),
        row_tokens=points[best][0] if best else 0,
        compiled=tuple((f, *points[f]) for f in sorted(points)),
        confirmed=best > 0,
    )


def _other_length(plan: Plan) -> int:
    """Half the frames, or the first of twice, four times, ... whose row has another length."""
    frames = max(1, plan.row.num_frames // 2)
    while frames < MOST_FRAMES:
        cfg = with_frames(plan.cfg, frames)
        row = programs.row_of(cfg, plan.policy.backbone, plan.policy.model_cfg)
        if programs.padded_tokens(cfg, row) != plan.row_tokens:
            return frames
        frames = 2 * max(frames, plan.row.num_frames)
    return MOST_FRAMES


def with_frames(cfg: Config, frames: int) -> Config:
    """Returns the config with other frames, a row a group, and limits of row and engine that let
    them pass."""
    data = dataclasses.replace(cfg.data, num_frames=frames)
    batch = dataclasses.replace(cfg.batch, max_row_tokens=2**31, pack=False)
    rollout = dataclasses.replace(cfg.rollout, max_model_len=2**31)
    return dataclasses.replace(cfg, data=data, batch=batch, rollout=rollout)


def _point(plan: Plan, hardware: Hardware, asleep: bool) -> tuple[int, int]:
    """(tokens of a row, bytes to spare) with vLLM's share as small as the row allows."""
    engine = plan.engine
    if engine is not None:
        share = bill.smallest_utilization(engine, hardware.memory_bytes)
        engine = dataclasses.replace(engine, takes=int(share * hardware.memory_bytes))
    found = bill.sums(
        plan.phases, plan.resident, hardware.memory_bytes, engine=engine, asleep=asleep
    )
    return plan.row_tokens, bill.tightest([s for s in found if s.name != "rollout"]).free


def _largest(points: Mapping[int, tuple[int, int]], plan: Plan) -> int:
    """Draws a line through the two points nearest to the limit; returns the frames it allows."""
    (t0, s0), (t1, s1) = sorted(sorted(points.values(), key=lambda p: abs(p[1]))[:2])
    if t1 == t0 or s0 == s1:
        return max(points)
    tokens = t0 + s0 * (t1 - t0) / (s0 - s1)

    def too_long(frames: int) -> bool:
        cfg = with_frames(plan.cfg, frames)
        row = programs.row_of(cfg, plan.policy.backbone, plan.policy.model_cfg)
        return programs.padded_tokens(cfg, row) > tokens

    return bisect.bisect_left(range(1, MOST_FRAMES + 1), True, key=too_long)
