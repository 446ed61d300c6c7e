"""What packing saves in CoT-SFT: FLOPs, tiles, time and compilations, against a row an example.

    python benchmarks/packed_sft.py OUTPUT.md [--steps 50] [--examples 16]

Steps of examples whose lengths are drawn: seven in ten ask about a picture (prompts of 30 to 90
tokens, answers of 5 to 30), three in ten about a long video, with its reasoning (200 to 600, 40 to
160). Alone: a row an example, one row a pass, all as long as the longest of the step. Packed: rows
of up to 1,024 tokens (batch.pack), one a pass. Both sides train the same random model (the decoder
of a tiny VILA, float32) with the stages' own programs on one device, step after step in turn, so
each compiles for what it has not seen. They must agree in the loss and gradient norm of every step.
FLOPs are those of our counter (plan/counter.py), tiles those that attention executes; a time is the
median of the steps that compiled nothing, by the clock and of both cores (which other work on the
machine does not lengthen).
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from longrl_jax import batching, packing, step
from longrl_jax.config import MeshConfig, OptimizerConfig
from longrl_jax.losses import nll
from longrl_jax.models import decoder
from longrl_jax.optimizer import make_optimizer
from longrl_jax.plan import compiled, counter
from longrl_jax.platform import prepare
from longrl_jax.sharding import executed_tiles, make_mesh, num_blocks
from longrl_jax.types import Example, Prompt, Rollout, Sample

ROOT = Path(__file__).parents[1]
MODEL = "configs/models/tiny_vila.json"
SEED = 0
MAX_ROW_TOKENS, SMALLEST_BUCKET, BLOCK_SIZE = 1024, 64, 512
LONG_SHARE = 0.3
LENGTHS = {"picture": ((30, 90), (5, 30)), "video": ((200, 600), (40, 160))}
"""Fewest and most tokens of a prompt, and of an answer."""
LOSS_RTOL = 1e-4  # float32 over up to 50 steps of Adam, whose root makes rounding larger
NORM_RTOL = 1e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the result file (Markdown)")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--examples", type=int, default=16, help="of a step")
    args = parser.parse_args()
    prepare(MeshConfig())
    rng = np.random.default_rng(SEED)
    sides = [Side("alone", None), Side("packed", args.examples)]
    for _ in tqdm(range(args.steps), unit="step"):
        examples = [draw(rng) for _ in range(args.examples)]
        for side in sides:
            side.learn(examples)
    differences = compare(*sides)
    args.output.write_text(report(sides, differences, args))


def draw(rng: np.random.Generator) -> Rollout:
    """Returns an example of random tokens."""
    prompt_range, answer_range = LENGTHS["video" if rng.random() < LONG_SHARE else "picture"]
    num_prompt, num_answer = (
        rng.integers(low, high + 1) for low, high in (prompt_range, answer_range)
    )
    vocabulary = decoder_config().vocab_size
    prompt = Prompt(
        example=Example(id="random", question="", answer=""),
        tokens=rng.integers(vocabulary, size=num_prompt, dtype=np.int32),
        is_media=np.zeros(num_prompt, bool),
        rope_pos=np.arange(num_prompt, dtype=np.int32),
        next_rope_pos=int(num_prompt),
    )
    tokens = rng.integers(vocabulary, size=num_answer, dtype=np.int32)
    sample = Sample(
        tokens=tokens, logps=np.zeros(num_answer, np.float32), finish_reason="stop", seed=0
    )
    return Rollout(prompt=prompt, samples=(sample,), policy_version=0)


def decoder_config() -> decoder.Config:
    tree = json.loads((ROOT / MODEL).read_text())
    return decoder.parse_config(tree["llm_cfg"], where=MODEL)


class Side:
    """A model, its update, and what its steps have said and cost."""

    def __init__(self, name: str, examples: int | None):
        """examples: of a step, where they are packed."""
        self.name = name
        self._mesh = make_mesh()
        self._packed = None
        if examples is not None:
            self._packed = packing.Packed(rows_per_pass=1, num_sequences=examples)
        optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-4), num_steps=1)
        model = decoder.Model(decoder_config(), rngs=nnx.Rngs(SEED))
        graphdef, self._state = step.init_state(model, (), optimizer, self._mesh)
        self._update = step.make_train_step(
            step.make_token_logps(graphdef, temperature=1.0),
            nll,
            optimizer,
            shardings=step.state_shardings(self._state),
            mesh=self._mesh,
            engine_gap=False,
            skip_empty=self._packed is not None,
        )
        self._flops_of_pass: dict[Any, float] = {}
        self.steps: list[dict[str, float]] = []

    def learn(self, examples: list[Rollout]) -> None:
        """Makes one update, and a line of self.steps."""
        started = time.perf_counter(), time.process_time()
        host, index = batching.make_batch(
            examples,
            features=[None] * len(examples),
            advantages=[np.ones(1, np.float32)] * len(examples),
            num_rows=len(examples),
            num_shards=1,
            smallest_bucket=SMALLEST_BUCKET,
            max_row_tokens=MAX_ROW_TOKENS,
            share_videos=False,
            packed=self._packed,
        )
        passes = batching.place(batching.split_passes(host, 1), self._mesh)
        before = self._update.num_compilations
        self._state, stats = self._update(self._state, passes)
        loss, norm = (float(stats[name][0]) for name in ("loss", "grad_norm"))
        seconds = time.perf_counter() - started[0], time.process_time() - started[1]
        tiles, whole = tiles_of(host)
        self.steps.append(
            {
                "loss": loss,
                "norm": norm,
                "seconds": seconds[0],
                "core_s": seconds[1],
                "compilations": self._update.num_compilations - before,
                "rows": len(set(index.rows)),
                "tokens": index.num_tokens,
                "places": index.num_places,
                "tiles": tiles,
                "flops": self._flops(passes, index, tiles / whole),
            }
        )

    def _flops(self, passes: Any, index: batching.Index, tile_share: float) -> float:
        """Of the passes that are computed; without the update of the parameters."""
        T, A = passes.tokens.shape[-1], passes.targets.shape[-1]
        if (T, A) not in self._flops_of_pass:
            two = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype, sharding=x.sharding),
                passes,
            )
            work = counter.work(self._update.trace(self._state, two).jaxpr, num_devices=1)
            self._flops_of_pass[T, A] = work.dense / 2, work.tiles / 2
        dense, tiles = self._flops_of_pass[T, A]
        return (dense + tiles * tile_share) * (index.num_places / T)


def tiles_of(host: Any) -> tuple[int, int]:
    """Returns the tiles that one layer and head executes in all rows, and how many there would be
    in the rows that hold a token."""
    rows = [b for b in range(len(host.tokens)) if host.segment[b].any()]
    tiles = sum(
        int(
            executed_tiles(
                host.order[b : b + 1],
                host.branch[b : b + 1],
                host.segment[b : b + 1],
                num_devices=1,
                block_size=BLOCK_SIZE,
            ).sum()
        )
        for b in rows
    )
    return tiles, len(rows) * num_blocks(host.tokens.shape[1], BLOCK_SIZE)[0] ** 2


def compare(alone: Side, packed: Side) -> dict[str, float]:
    """Returns the largest relative differences of any step; ends the run if one is no rounding."""
    found = {}
    for name, bound in (("loss", LOSS_RTOL), ("norm", NORM_RTOL)):
        a, b = (np.array([line[name] for line in side.steps]) for side in (alone, packed))
        found[name] = float(np.abs(b / a - 1).max())
        if not found[name] <= bound:
            sys.exit(f"the sides differ in {name}: {found[name]:.2g}, the bound is {bound:g}")
    return found


def report(sides: list[Side], differences: dict[str, float], args: argparse.Namespace) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()

    def column(side: Side, name: str, *, warm: bool = False) -> np.ndarray:
        return np.array([x[name] for x in side.steps if not (warm and x["compilations"])])

    def last_new(side: Side) -> int:
        return int(np.flatnonzero(column(side, "compilations")).max()) + 1

    measures = {
        "rows a step": lambda s: column(s, "rows").mean(),
        "fill (tokens over places)": lambda s: (
            column(s, "tokens").sum() / column(s, "places").sum()
        ),
        "GFLOP a step": lambda s: column(s, "flops").mean() / 1e9,
        "tiles of attention a step": lambda s: column(s, "tiles").mean(),
        "seconds a step, median": lambda s: np.median(column(s, "seconds", warm=True)),
        "core seconds a step, median": lambda s: np.median(column(s, "core_s", warm=True)),
        "tokens a second": lambda s: (
            column(s, "tokens", warm=True).sum() / column(s, "seconds", warm=True).sum()
        ),
        "compilations": lambda s: column(s, "compilations").sum(),
        "step of the last compilation": last_new,
    }
    lines = [
        "# Packed CoT-SFT against a row an example: FLOPs, time, compilations",
        "",
        f"`python benchmarks/packed_sft.py OUTPUT --steps {args.steps} --examples {args.examples}` "
        f"at commit {commit or 'unknown'}, {datetime.date.today()}; {platform.machine()}, "
        f"{os.cpu_count()} CPU cores, one device, other work on the machine; "
        f"{compiled.versions()}, Python {platform.python_version()}. Decoder of `{MODEL}`, random, "
        f"float32; rows of up to {MAX_ROW_TOKENS:,} tokens, one a pass; smallest bucket "
        f"{SMALLEST_BUCKET}. {args.steps} steps of {args.examples} examples, "
        f"{100 * LONG_SHARE:.0f} % of them long.",
        "",
        f"Both sides agree: in every step the loss to {differences['loss']:.1e} and the norm of "
        f"the gradient to {differences['norm']:.1e} (relative; bounds {LOSS_RTOL:g} and "
        f"{NORM_RTOL:g}).",
        "",
        "| | a row an example | packed | ratio |",
        "|---|---|---|---|",
    ]
    for name, measure in measures.items():
        alone, packed = (float(measure(side)) for side in sides)
        ratio = (
            packed / alone if "second, " in name or name == "tokens a second" else alone / packed
        )
        shown = "" if "compilation" in name or "fill" in name else f"**{ratio:.2f}**"
        lines.append(f"| {name} | {alone:.3g} | {packed:.3g} | {shown} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
