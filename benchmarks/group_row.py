"""What a group row saves: FLOPs and time of logps and update, against a row for every answer.

    python benchmarks/group_row.py OUTPUT.md [--answers 4 8 16] [--ratios 1 8 32 112]

One prompt and R answers to it. Group row: [prompt | answer 1 | ... | answer R], as training lays it
out. Copies: R rows [prompt | answer], all in one pass. Both sides have the same random model (the
decoder of a tiny VILA, float32), the same programs (step.py) on one device, and the same loss:
clipped surrogate and KL term, with old and reference log-probabilities that differ from the
policy's. They must agree in log-probabilities, loss and gradient. They take turns in one process;
a time is the median of --repeats, by the clock and of both cores (which other work on the machine
does not lengthen). FLOPs are those of our counter (plan/counter.py), with the tiles
of attention that are executed.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from longrl_jax import batching, step
from longrl_jax.config import AlgorithmConfig, MeshConfig, OptimizerConfig
from longrl_jax.losses import KL_ESTIMATORS, LOSSES
from longrl_jax.models import decoder
from longrl_jax.optimizer import make_optimizer
from longrl_jax.plan import compiled, counter
from longrl_jax.platform import prepare
from longrl_jax.sharding import make_mesh
from longrl_jax.types import Batch, Example, Prompt, Rollout, Sample

ROOT = Path(__file__).parents[1]
MODEL = "configs/models/tiny_vila.json"
KERNEL = "xla"
SEED = 0
LOGP_ATOL = 2e-5  # logits are sums of 128 products of order 1 in float32, behind four layers
LOSS_RTOL = 1e-5
GRADIENT_RTOL = 1e-5
"""Of |difference| / |gradient| of every parameter array, float32: tests/test_group_row.py's."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the result file (Markdown)")
    parser.add_argument("--answers", type=int, nargs="+", default=[4, 8, 16], help="R")
    parser.add_argument("--ratios", type=int, nargs="+", default=[1, 8, 32, 112])
    parser.add_argument("--answer-tokens", type=int, default=16, help="of one (default 16)")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    prepare(MeshConfig(simulated=True))
    rows = []
    for ratio in args.ratios:
        for num_answers in args.answers:
            row = measure(ratio * args.answer_tokens, num_answers, args)
            rows.append((num_answers, ratio, *row))
            print(f"R={num_answers}, {ratio}:1 {row}", file=sys.stderr)
            args.output.write_text(report(rows, args))  # what there is, so far


@dataclasses.dataclass
class Side:
    """One way to lay a group out: its programs, and what they read and leave."""

    logps: step.CountedJit
    update: step.TrainStep
    state: step.TrainState
    passes: Batch
    index: batching.Index
    flops: dict[str, float]

    def run(self, phase: str) -> tuple[np.ndarray, Any]:
        """Returns ([seconds, seconds of all cores], result) of one "logps" or "update"; an update
        moves the state on."""
        started_s = np.array([time.perf_counter(), time.process_time()])
        if phase == "logps":
            result = self.logps(step.all_params(self.state), self.passes)
        else:
            numbers = self.passes.engine_logps  # play the old policy's and the reference's
            self.state, result = self.update(self.state, self.passes, numbers, numbers)
        jax.block_until_ready((result, self.state))
        return np.array([time.perf_counter(), time.process_time()]) - started_s, result


def measure(
    prompt_tokens: int, num_answers: int, args: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, np.ndarray], dict[str, float]]:
    """Returns (FLOPs, median seconds, differences) of a size; the first two [copies, group row] by
    phase, seconds by the clock and of all cores."""
    group, advantage = make_group(prompt_tokens, num_answers, args.answer_tokens)
    copies = [dataclasses.replace(group, samples=(sample,)) for sample in group.samples]
    sides = [
        make_side(copies, [advantage[r : r + 1] for r in range(num_answers)], args.answer_tokens),
        make_side([group], [advantage], args.answer_tokens),
    ]
    flops, seconds = {}, {}
    results = {phase: [side.run(phase)[1] for side in sides] for phase in ("logps", "update")}
    differences = compare(sides, results)  # of the first run, which has compiled too
    for phase in results:
        times = [[side.run(phase)[0] for side in sides] for _ in range(args.repeats)]
        seconds[phase] = np.median(times, axis=0)
        flops[phase] = [side.flops[phase] for side in sides]
    return flops, seconds, differences


def make_group(
    prompt_tokens: int, num_answers: int, answer_tokens: int
) -> tuple[Rollout, np.ndarray]:
    """Random tokens; the engine's log-probabilities are near those of a random model."""
    rng, vocabulary = np.random.default_rng(SEED), decoder_config().vocab_size
    prompt = Prompt(
        example=Example(id="random", question="", answer=""),
        tokens=rng.integers(vocabulary, size=prompt_tokens, dtype=np.int32),
        is_media=np.zeros(prompt_tokens, bool),
        rope_pos=np.arange(prompt_tokens, dtype=np.int32),
        next_rope_pos=prompt_tokens,
    )
    samples = [
        Sample(
            tokens=rng.integers(vocabulary, size=answer_tokens, dtype=np.int32),
            logps=rng.normal(-np.log(vocabulary), 0.5, answer_tokens).astype(np.float32),
            finish_reason="stop",
            seed=r,
        )
        for r in range(num_answers)
    ]
    advantage = rng.normal(size=num_answers).astype(np.float32)
    return Rollout(prompt=prompt, samples=tuple(samples), policy_version=0), advantage


def decoder_config() -> decoder.Config:
    tree = json.loads((ROOT / MODEL).read_text())
    return decoder.parse_config(tree["llm_cfg"], where=MODEL)


def make_side(
    groups: Sequence[Rollout], advantages: Sequence[np.ndarray], smallest_bucket: int
) -> Side:
    """A row for each of these groups, all in one pass."""
    mesh = make_mesh()
    host, index = batching.make_batch(
        groups,
        features=[None] * len(groups),
        advantages=advantages,
        num_rows=len(groups),
        num_shards=1,
        smallest_bucket=smallest_bucket,
        max_row_tokens=2**31,
    )
    host = batching.split_passes(host, rows_per_pass=0)
    passes = batching.place(host, mesh)
    optimizer = make_optimizer(OptimizerConfig(), num_steps=1)
    model = decoder.Model(decoder_config(), rngs=nnx.Rngs(SEED))
    graphdef, state = step.init_state(model, (), optimizer, mesh)
    token_logps = step.make_token_logps(graphdef, temperature=1.0)
    default = AlgorithmConfig()
    clips = {name: getattr(default, name) for name in ("clip_low", "clip_high", "clip_dual")}
    update = step.make_train_step(
        token_logps,
        functools.partial(LOSSES[default.loss], **clips),
        optimizer,
        shardings=step.state_shardings(state),
        mesh=mesh,
        kl=0.01,
        kl_estimator=KL_ESTIMATORS[default.kl_estimator],
    )
    logps = step.make_pass_logps(token_logps, mesh=mesh)
    numbers = passes.engine_logps
    traced = {
        "logps": logps.trace(step.all_params(state), passes),
        "update": update.trace(state, passes, numbers, numbers),
    }
    share = compiled.tiles_of(host, kernel=KERNEL, ulysses=1).share  # all rows are laid out alike
    flops = {
        phase: counter.work(program.jaxpr, num_devices=1, tile_share=share).flops
        for phase, program in traced.items()
    }
    return Side(logps, update, state, passes, index, flops)


def compare(sides: Sequence[Side], results: dict[str, list[Any]]) -> dict[str, float]:
    """Returns how far apart the sides are; ends the run if that is more than rounding."""
    logps = [
        np.concatenate([x for group in side.index.per_sample(np.asarray(logps)) for x in group])
        for side, (logps, _) in zip(sides, results["logps"], strict=True)
    ]
    losses = [float(stats["loss"][0]) for stats in results["update"]]
    # after one update from zero Adam's first moment is the gradient, times a constant
    moments = [
        jax.tree.leaves(optax.tree_utils.tree_get(side.state.opt_state, "mu")) for side in sides
    ]
    found = {
        "log-probabilities": float(np.abs(logps[1] - logps[0]).max()),
        "loss": abs(losses[1] / losses[0] - 1),
        "gradient": max(
            float(np.linalg.norm(b - a) / np.linalg.norm(a))
            for a, b in zip(*(map(np.asarray, x) for x in moments), strict=True)
        ),
    }
    for name, bound in zip(found, (LOGP_ATOL, LOSS_RTOL, GRADIENT_RTOL), strict=True):
        if not found[name] <= bound:
            sys.exit(f"the two sides differ in {name}: {found[name]:.2g}, the bound is {bound:g}")
    return found


# The result file


def report(rows: Sequence[tuple[Any, ...]], args: argparse.Namespace) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    numbers = (
        f"--{name} {' '.join(map(str, getattr(args, name)))}" for name in ("answers", "ratios")
    )
    command = f"python benchmarks/group_row.py OUTPUT {' '.join(numbers)}"
    command += f" --answer-tokens {args.answer_tokens} --repeats {args.repeats}"
    worst = {name: max(row[-1][name] for row in rows) for name in rows[0][-1]}
    lines = [
        "# A group row against a row for every answer: FLOPs and time",
        "",
        f"`{command}` at commit {commit or 'unknown'}, {datetime.date.today()}; "
        f"{platform.machine()}, {os.cpu_count()} CPU cores, one device; {compiled.versions()}, "
        f"Python {platform.python_version()}. Decoder of `{MODEL}`, random, float32; answers of "
        f"{args.answer_tokens} tokens. Seconds are medians of {args.repeats}, in turn; FLOPs are "
        "the counter's, with the tiles of attention that are executed.",
        "",
        "Log-probabilities, loss and gradient agree: the largest differences are "
        f"{worst['log-probabilities']:.1e} (absolute), {worst['loss']:.1e} and "
        f"{worst['gradient']:.1e} (relative, of every parameter array); the bounds are "
        f"{LOGP_ATOL:g}, {LOSS_RTOL:g} and {GRADIENT_RTOL:g}.",
        "",
        "Copies over row, how many times as much:",
        "",
        "| R | prompt : answer | tokens | logps: FLOPs | logps: time (s, s) | logps: core time "
        "| update: FLOPs | update: time (s, s) | update: core time |",
        "|---" * 9 + "|",
    ]
    for num_answers, ratio, flops, seconds, _ in rows:
        cells = [f"{num_answers}", f"{ratio} : 1"]
        cells.append(f"{num_answers * (ratio + 1) / (ratio + num_answers):.2f}")
        for phase in ("logps", "update"):
            (copies, copies_cores), (row, row_cores) = seconds[phase]
            cells.append(f"{flops[phase][0] / flops[phase][1]:.2f}")
            cells.append(f"**{copies / row:.2f}** ({copies:.3f}, {row:.3f})")
            cells.append(f"{copies_cores / row_cores:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
