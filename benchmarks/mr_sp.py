"""MR-SP's figure as ratios: what a GRPO step of one question costs, against RL that shares nothing.

    python benchmarks/mr_sp.py OUTPUT.md [--frames 8 ... 1024] [--repeats 3]

Four ways to make the same step (R = 8 answers to one question about one video; SIDES): plain, the
two stages of MR-SP (arXiv:2507.07966 section 4) and ours. They are timed here with a tiny model,
and counted in FLOPs for the 7B model of CONFIG, on 8 devices each. OUTPUT.svg is drawn beside.
"""

import argparse
import dataclasses
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from longrl_jax import config
from longrl_jax.config import BatchConfig, Config, MeshConfig
from longrl_jax.platform import prepare

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/longvila_7b_hour_grpo.yaml"
NUM_DEVICES = 8
R = 8
"""Answers to a question: rollout.num_samples of CONFIG; plain gives each one a device."""
COUNTED_FRAMES = (8, 32, 128, 512, 1024, 3600)
FRAMES = (8, 32, 128, 512, 1024)
COUNTED_BUCKET, TIMED_BUCKET = 64, 32
"""batch.smallest_bucket of both, small enough for the shortest prompts."""
MODEL = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "num_attention_heads": 2}
MODEL |= {"intermediate_size": 160, "num_hidden_layers": 3}
"""The tower, in place of tiny_vila.json's: a frame costs it 0.2 of what the language model takes
for the frame's tokens, as in the 7B (there 0.23)."""
QUESTION_TOKENS, ANSWER_TOKENS = 16, 32
"""Of the tiny model, which has 2 tokens a frame: about 1 / 36 of the 7B's 72, 512 and 1,024."""
SETTINGS = (
    "data.fps=0 data.timestamp= rollout.process=inline rollout.replicas=1 rollout.tensor_parallel=1"
    f" rollout.max_tokens={ANSWER_TOKENS} rollout.max_model_len=4000 rollout.dtype=float32"
    " model.compute_dtype=float32 rollout.kv_cache_gib=1"
).split()
SAME_RTOL = 1e-3
"""Of loss and gradient norm between sides, float32: prompts of 2,000 tokens, summed otherwise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One way to make the step."""

    label: str
    encodings: int
    """Times that the video goes through the tower; over 1, each on one device, R at a time."""
    prefills: int
    """Prompts that the engine has to read."""
    copies: bool
    """The learner gets R rows of prompt and answer, instead of one with R answers."""
    seq: int
    """Devices that share a row; the others share the rows."""
    store: str = ""
    """write or read: the video's features on the disk."""

    @property
    def mesh(self) -> dict[str, int]:
        return {"fsdp": NUM_DEVICES // self.seq, "seq": self.seq}


SIDES = {
    "plain": Side(label="plain", encodings=3 * R, prefills=R, copies=True, seq=1),
    "stage 1": Side(label="MR-SP stage 1", encodings=1, prefills=R, copies=True, seq=1),
    "stage 1+2": Side(label="MR-SP stages 1 and 2", encodings=1, prefills=R, copies=True, seq=8),
    "ours": Side(label="ours", encodings=1, prefills=1, copies=False, seq=8, store="write"),
    "ours, later": Side(
        label="ours, later epochs", encodings=0, prefills=1, copies=False, seq=8, store="read"
    ),
}
PHASES = ("encode", "prefill", "reference", "update")
Costs = dict[str, dict[str, float]]
"""Side -> phase -> seconds or FLOPs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the result file (Markdown)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="to time")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    cfg = config.load(CONFIG)
    prepare(MeshConfig(seq=NUM_DEVICES, simulated=True), cfg.rollout)
    counted = {f: counts(cfg, f) for f in tqdm(COUNTED_FRAMES, "counting", unit="length")}
    with tempfile.TemporaryDirectory() as scratch:
        timed = times(Path(scratch), args.frames, args.repeats)
    args.output.write_text(report(args, timed, counted))
    picture = args.output.with_suffix(".svg")
    picture.write_text(drawing(medians(timed), counted))


def on(side: Side, cfg: Config, *, bucket: int) -> Config:
    """Returns the config of one side's step: one question, all its rows in one pass."""
    groups = R if side.copies else 1
    batch = BatchConfig(groups=groups, max_row_tokens=2**31, smallest_bucket=bucket)
    mesh = MeshConfig(**side.mesh, simulated=True)
    return dataclasses.replace(cfg, batch=batch, mesh=mesh)


# Counted


def counts(cfg: Config, num_frames: int) -> Costs:
    """Returns the FLOPs of the busiest device, of shapes alone; nothing is computed."""
    data = dataclasses.replace(cfg.data, num_frames=num_frames)
    cfg = dataclasses.replace(cfg, data=data)
    made: dict[tuple[bool, int], dict[str, float]] = {}
    for side in SIDES.values():
        if (side.copies, side.seq) not in made:
            made[side.copies, side.seq] = learner_flops(cfg, side)
    prefill = learner_flops(cfg, SIDES["plain"], prefill=True)["logps"]  # of a device, so of one
    result: Costs = {}
    for name, side in SIDES.items():
        flops = made[side.copies, side.seq]
        result[name] = {
            "encode": side.encodings * num_frames * flops["frame"] / NUM_DEVICES,
            "prefill": side.prefills * prefill / NUM_DEVICES,
            "reference": flops["logps"],
            "update": flops["update"],
        }
    return result


def learner_flops(cfg: Config, side: Side, *, prefill: bool = False) -> dict[str, float]:
    """Returns FLOPs of the busiest device (logps, update) and of a frame in the tower (frame).

    prefill: of rows that hold the prompt and one slot for the first token of an answer, no more.
    """
    import jax

    from longrl_jax.plan import counter, programs
    from longrl_jax.plan.compiled import tiles_of

    cfg = on(side, cfg, bucket=COUNTED_BUCKET)
    policy, state = programs.abstract_policy(cfg, programs.mesh_of(cfg, jax.devices()))
    row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
    if side.copies:
        row = dataclasses.replace(row, answers=1)
    if prefill:
        row = dataclasses.replace(row, answers=1, answer_tokens=1)
    passes = programs.host_passes(cfg, row)
    tiles = tiles_of(passes, kernel="xla", ulysses=1)
    flops = {}
    for name, phase in programs.trace_all(cfg, policy, state, passes, row).items():
        work = counter.work(phase.traced.jaxpr, num_devices=NUM_DEVICES, tile_share=tiles.share)
        assert not work.unknown_loops, name
        flops[name] = work.dense + work.tiles * tiles.balance
        if name == "encode":
            flops["frame"] = work.flops * NUM_DEVICES / len_of(phase.inputs)
    return flops


def len_of(frames: Any) -> int:
    return frames.shape[0]
