"""A group row is exact: its loss and gradients are those of R separate sequences.

The witness is `transformers` (torch, autograd): every sample runs alone, whole, behind its own copy
of the prompt, with a loss written as a loop over tokens. Ours is the real update (step.py) on rows
that share prefixes, with tokens in any order over any number of devices, in one pass or several.
"""

import copy
import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx
from models.tiny_models import write_text, write_vila
from tiny_groups import V, make_group, make_prompt, scatter

from longrl_jax import models, step
from longrl_jax.batching import make_batch, place, split_passes
from longrl_jax.losses import LOSSES, low_variance_kl, nll
from longrl_jax.models import weights
from longrl_jax.sharding import make_mesh

BOUND = {"float32": 1e-5, "float64": 1e-10}
"""Of |difference| / |gradient|, for every parameter array: the project's promise."""
LOGP_ATOL = {"float32": 2e-5, "float64": 1e-12}  # logits are sums of 64 products of order 1
TEMPERATURE, BANNED = 0.7, (V, 3)
CLIP = {"clip_low": 0.1, "clip_high": 0.2, "clip_dual": 1.5}
KL = 0.3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Groups and how they are laid out."""

    prompts: tuple[tuple[list[int], str], ...]
    """Tokens and key of the video, which stands where the tokens are V."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of every sample of every group."""
    num_media: int = 0
    loss: str = "clipped"
    tied: bool = True
    num_shards: int = 1
    order: str = "contiguous"
    num_rows: int = 3
    rows_per_pass: int = 0
    groups_per_row: int = 1
    rows_used: int
    """How many rows must come out filled: that the case is laid out as it says."""


TEXT = (([5, 6, 7, 8, 9], ""), ([11, 12], ""), ([13, 14, 15, 16, 17, 18, 19], ""))
TEXT_LENGTHS = ((4, 1, 6), (1, 3), (2, 5, 1, 1))
FRAMES = [1, 2, V, V, 4, V, V, 4, V, V, 4, V, V, 4]
VIDEO = (([*FRAMES, 31, 32], "a"), ([*FRAMES, 33, 34, 35], "a"), ([*FRAMES, 36], "b"))
VIDEO_LENGTHS = ((3, 1), (5, 2), (1, 4))
LATE = [V, V, 4, V, V, 4, 50]  # a video after its question: no common start but one token

CASES = {
    "one device, a row a group": Case(prompts=TEXT, lengths=TEXT_LENGTHS, rows_used=3),
    "untied head, 2 groups a row, zigzag over 2, a padding row in each pass": Case(
        prompts=TEXT, lengths=TEXT_LENGTHS, tied=False, num_shards=2, order="zigzag",
        groups_per_row=2, num_rows=4, rows_per_pass=1, rows_used=2,
    ),
    "3 groups in one row, spread over 4": Case(
        prompts=TEXT, lengths=TEXT_LENGTHS, num_shards=4, order="spread", groups_per_row=3,
        num_rows=1, rows_used=1,
    ),
    "two questions on one video, spread over 2, a pass a row, one of padding": Case(
        prompts=VIDEO, lengths=VIDEO_LENGTHS, num_media=8, num_shards=2, order="spread",
        num_rows=3, rows_per_pass=1, rows_used=2,
    ),
    "two questions on one video and another video, one row, contiguous over 4": Case(
        prompts=VIDEO, lengths=VIDEO_LENGTHS, num_media=8, tied=False, num_shards=4,
        groups_per_row=2, num_rows=2, rows_used=1,
    ),
    "media in tails, fine-tuning on reference answers": Case(
        prompts=(([1, 60, *LATE], "a"), ([1, 61, *LATE], "a"), ([62, 63], "")), num_media=4,
        lengths=((4,), (2,), (1,)), loss="nll", num_shards=2, order="spread", rows_used=2,
    ),
}  # fmt: skip


FAST = {  # compiling takes 5 to 10 s a case; these have a bit of everything
    ("3 groups in one row, spread over 4", "float32"),
    ("two questions on one video, spread over 2, a pass a row, one of padding", "float64"),
}


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What both sides are given: [group][sample] -> one number a token, or one a sample."""

    groups: list[Any]
    features: list[np.ndarray | None]
    advantage: list[np.ndarray]
    old: list[list[np.ndarray]]
    reference: list[list[np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Result:
    loss: float
    logps: list[list[np.ndarray]]
    gradient: dict[str, np.ndarray]
    """By Hugging Face name."""


def make_numbers(case: Case, width: int) -> Numbers:
    rng = np.random.default_rng(0)
    stored = {k: rng.normal(size=(case.num_media, width)).astype(np.float32) for k in "ab"}
    allowed = np.setdiff1d(np.arange(99), BANNED)
    groups, features = [], []
    for (tokens, key), lengths in zip(case.prompts, case.lengths, strict=True):
        samples = [rng.choice(allowed, n) for n in lengths]
        groups.append(make_group(make_prompt(tokens, key=key), *samples))
        features.append(stored[key] if key else None)

    def about(low: float, high: float) -> list[list[np.ndarray]]:
        return [[rng.uniform(low, high, n) for n in lengths] for lengths in case.lengths]

    ones = case.loss == "nll"
    advantage = [np.ones(1) if ones else rng.normal(size=len(n)) for n in case.lengths]
    return Numbers(
        groups, features, [a.astype(np.float32) for a in advantage], about(-9, -1), about(-6, -3)
    )


def near(numbers: Numbers, logps: list[list[np.ndarray]]) -> Numbers:
    """The old policy within +-0.6 of the new one, so that every branch of the loss is taken."""
    rng = np.random.default_rng(1)
    old = [[x + rng.uniform(-0.6, 0.6, len(x)) for x in group] for group in logps]
    reference = [[x + rng.uniform(-1, 1, len(x)) for x in group] for group in logps]
    return dataclasses.replace(numbers, old=old, reference=reference)


# The witness.


class Rotary64(torch.nn.Module):
    """Qwen2's rotation in float64; the one of transformers is float32 in any model."""

    def __init__(self, theta: float, head_dim: int):
        super().__init__()
        self.rate = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)

    def forward(self, x, position_ids):
        angle = position_ids[..., None].double() * self.rate
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos(), angle.sin()


def in_float64(llm: torch.nn.Module) -> torch.nn.Module:
    """Norms, rotation and softmax of transformers are float32 in any model; here they are not."""
    llm = copy.deepcopy(llm)
    for parent in list(llm.modules()):
        for name, child in parent.named_children():
            if type(child).__name__ == "Qwen2RMSNorm":
                norm = torch.nn.RMSNorm(len(child.weight), eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    config = llm.config
    head_dim = config.hidden_size // config.num_attention_heads
    llm.model.rotary_emb = Rotary64(config.rope_parameters["rope_theta"], head_dim)
    llm.set_attn_implementation("sdpa")  # torch's own, in the type of its inputs
    return llm.double()


class Witness:
    """Separate sequences through torch."""

    def __init__(self, parts: dict[str, torch.nn.Module], dtype: str):
        self.parts = {
            name: in_float64(part) if dtype == "float64" and name == "llm" else copy.deepcopy(part)
            for name, part in parts.items()
        }
        self.dtype = getattr(torch, dtype)
        self.parts = {name: part.to(self.dtype) for name, part in self.parts.items()}

    def sample_logps(self, prompt, sample, features) -> torch.Tensor:
        tokens = torch.tensor(np.concatenate([prompt.tokens, sample.tokens])).long()
        llm, P = self.parts["llm"], len(prompt.tokens)
        x = llm.get_input_embeddings()(tokens)
        if features is not None:
            projector = self.parts["mm_projector"].layers[1:]  # the first layer packs patches
            media = projector(torch.tensor(features).to(self.dtype))
            x = x.index_put((torch.tensor(np.flatnonzero(prompt.is_media)),), media)
        logits = llm(inputs_embeds=x[None]).logits[0, P - 1 : -1] / TEMPERATURE
        banned = torch.zeros(logits.shape[-1], dtype=torch.bool)
        banned[list(BANNED)] = True
        logps = torch.log_softmax(logits.masked_fill(banned, -math.inf), dim=-1)
        return logps[torch.arange(len(sample.tokens)), tokens[P:]]

    def logps(self, numbers: Numbers) -> list[list[torch.Tensor]]:
        return [
            [self.sample_logps(group.prompt, sample, features) for sample in group.samples]
            for group, features in zip(numbers.groups, numbers.features, strict=True)
        ]

    def run(self, case: Case, numbers: Numbers) -> Result:
        logps = self.logps(numbers)
        terms = []
        for g, of_group in enumerate(logps):
            for r, of_sample in enumerate(of_group):
                for i, logp in enumerate(of_sample):
                    A = float(numbers.advantage[g][r])
                    old, reference = numbers.old[g][r][i], numbers.reference[g][r][i]
                    terms.append(
                        -A * logp if case.loss == "nll" else token_loss(logp, old, A, reference)
                    )
        loss = torch.stack(terms).mean()
        loss.backward()
        gradient = {}
        for part, module in self.parts.items():
            for name, x in module.named_parameters():
                where = f"{part}/{name}" if len(self.parts) > 1 else name
                if x.grad is not None:
                    gradient[where] = x.grad.numpy()
        detached = [[x.detach().numpy() for x in group] for group in logps]
        return Result(float(loss.detach()), detached, gradient)


def token_loss(logp, old, advantage, reference):
    """PPO's objective with dual clip, and k3, of one token (arXiv:1707.06347, 1912.09729)."""
    ratio = torch.exp(logp - old)
    r = ratio.item()
    inside = min(max(r, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
    gain = ratio * advantage
    if inside * advantage < r * advantage:
        gain = torch.full_like(logp, inside * advantage)  # a clip leaves no gradient
    if advantage < 0 and gain.item() < CLIP["clip_dual"] * advantage:
        gain = torch.full_like(logp, CLIP["clip_dual"] * advantage)
    difference = reference - logp
    return -gain + KL * (torch.exp(difference) - difference - 1)


# Ours.


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""

    def zeros(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(zeros, lambda grads, _, params: (zeros(grads), grads))


def run_ours(case: Case, numbers: Numbers, folder, dtype: str) -> Result:
    devices = jax.devices()[: case.num_shards]
    mesh = make_mesh(seq=case.num_shards, devices=devices)
    cfg, model = models.load(folder, mesh=mesh)
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(dtype), params))
    optimizer = keep_gradient()
    frozen = ("vision",) if case.num_media else ()
    graphdef, state = step.init_state(model, frozen, optimizer, mesh)
    batch, index = make_batch(
        numbers.groups,
        features=numbers.features,
        advantages=numbers.advantage,
        num_rows=case.num_rows,
        num_shards=case.num_shards,
        smallest_bucket=2 * case.num_shards,
        max_row_tokens=200,
        groups_per_row=case.groups_per_row,
        order=case.order,
    )
    assert len(set(index.rows)) == case.rows_used
    passes = place(split_passes(batch, case.rows_per_pass), mesh)

    def placed(values: list[list[np.ndarray]]) -> jax.Array:
        array = scatter(index, values, batch.targets.shape).reshape(passes.targets.shape)
        return jnp.asarray(array, dtype)

    token_logps = step.make_token_logps(
        graphdef, temperature=TEMPERATURE, banned_tokens=BANNED, compute_dtype=dtype, head_chunk=4
    )
    clipped = case.loss == "clipped"
    train_step = step.make_train_step(
        token_logps,
        functools.partial(LOSSES["clipped"], **CLIP) if clipped else nll,
        optimizer,
        shardings=step.state_shardings(state),
        mesh=mesh,
        kl=KL if clipped else 0,
        kl_estimator=low_variance_kl if clipped else None,
    )
    logps, _ = step.make_pass_logps(token_logps, mesh=mesh)(step.all_params(state), passes)
    assert logps.dtype == dtype
    reference = placed(numbers.reference) if clipped else None
    old = placed(numbers.old) if clipped else None
    new, stats = train_step(state, passes, reference, old)
    assert stats["finite/grad_norm"] == (1, 1)
    assert stats["tokens"][0] == sum(map(sum, case.lengths))
    arrays = weights.by_path(new.opt_state)
    table = models.backbone_of(folder).table(cfg)
    gradient = dict(weights.to_hf(arrays, {path: table[path] for path in arrays}))
    return Result(float(stats["loss"][0]), index.per_sample(np.asarray(logps)), gradient)


@functools.cache
def checkpoint(folder, video: bool, tied: bool) -> dict[str, torch.nn.Module]:
    folder.mkdir()
    if video:
        parts = write_vila(folder, tied=tied)
        return {name: part for name, part in parts.items() if name != "vision_tower"}
    return {"llm": write_text(folder, tied=tied)}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in FAST else pytest.mark.slow)
        for name in CASES
        for dtype in BOUND
    ],
)
def test_a_group_row_equals_separate_sequences(checkpoints, name, dtype):
    assert jax.device_count() == 8
    case = CASES[name]
    video = case.num_media > 0
    folder = checkpoints / f"video={video}, tied={case.tied}"
    parts = checkpoint(folder, video, case.tied)
    numbers = make_numbers(case, width=128)
    with torch.no_grad():
        logps = Witness(parts, "float64").logps(numbers)
    numbers = near(numbers, [[x.numpy() for x in group] for group in logps])
    want = Witness(parts, dtype).run(case, numbers)
    with jax.enable_x64(dtype == "float64"):
        got = run_ours(case, numbers, folder, dtype)
    for ours, theirs in zip(got.logps, want.logps, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=LOGP_ATOL[dtype])
    assert abs(got.loss - want.loss) <= BOUND[dtype] * abs(want.loss)
    assert got.gradient.keys() == want.gradient.keys()
    error = {
        name: np.linalg.norm(got.gradient[name] - x) / np.linalg.norm(x)
        for name, x in want.gradient.items()
    }
    worst = max(error, key=error.get)
    assert error[worst] <= BOUND[dtype], worst
