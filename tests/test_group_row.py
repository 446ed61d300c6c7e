"""A group row is exact: its loss and gradients are those of R separate sequences.

The witness is `transformers` (torch, autograd): every sample runs alone, whole, behind its own copy
of the prompt, with a loss written as a loop over tokens. Ours is the real update (step.py) on rows
that share prefixes, with tokens in any order over any number of devices, in one pass or several.
"""

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
import torch
from our_side import keep_gradient, run_update
from tiny_groups import V, make_group, make_prompt
from tiny_models import write_text, write_vila
from tiny_qwen2_5_vl import VISION, write_qwen2_5_vl
from torch_side import Numbers, Side, all_logps, open_side, token_mean

from longrl_jax.models import qwen2_5_vl
from longrl_jax.packing import Packed
from longrl_jax.types import Media, View

BOUND = {"float32": 1e-5, "float64": 1e-10}
"""Of |difference| / |gradient|, for every parameter array: the project's promise."""
LOGP_ATOL = {"float32": 2e-5, "float64": 1e-12}  # logits are sums of 64 products of order 1
BANNED = (V, 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Groups and how they are laid out."""

    prompts: tuple[tuple[list[int], str], ...]
    """Tokens and key of the video, which stands where the tokens are V."""
    lengths: tuple[tuple[int, ...], ...]
    """Tokens of every sample of every group."""
    num_media: int = 0
    grid: tuple[int, int, int] = (0, 0, 0)
    """Of the film, in tokens, for Qwen2.5-VL; else it is VILA's."""
    loss: str = "clipped"
    tied: bool = True
    num_shards: int = 1
    order: str = "contiguous"
    num_rows: int = 3
    rows_per_pass: int = 0
    groups_per_row: int = 1
    packed: Packed | None = None
    rows_used: int
    """How many rows must come out filled: that the case is laid out as it says."""


TEXT = (([5, 6, 7, 8, 9], ""), ([11, 12], ""), ([13, 14, 15, 16, 17, 18, 19], ""))
TEXT_LENGTHS = ((4, 1, 6), (1, 3), (2, 5, 1, 1))
FRAMES = [1, 2, V, V, 4, V, V, 4, V, V, 4, V, V, 4]
VIDEO = (([*FRAMES, 31, 32], "a"), ([*FRAMES, 33, 34, 35], "a"), ([*FRAMES, 36], "b"))
VIDEO_LENGTHS = ((3, 1), (5, 2), (1, 4))
FILM = [92, *[V] * 6, 93]
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
    "two questions on one film, positions in three dims, spread over 2": Case(
        prompts=(([1, *FILM, 31, 32], "a"), ([1, *FILM, 33, 34, 35], "a"), ([36, 37], "")),
        lengths=VIDEO_LENGTHS, num_media=6, grid=(3, 2, 1), tied=False, num_shards=2,
        order="spread", rows_used=2,
    ),
    "packed: two films and a text in 50 places over 2, prompts cut where answers stand": Case(
        prompts=(([1, 60, *LATE], "a"), ([1, 61, *LATE], "b"), (list(range(10, 26)), "")),
        num_media=4, lengths=((9,), (5,), (3,)), loss="nll", num_shards=2, order="spread",
        packed=Packed(rows_per_pass=1, num_sequences=3), rows_used=1,
    ),
    "packed: positions in three dims, cut": Case(
        prompts=(([1, *FILM, 31, 32], "a"), ([1, *FILM, 33], "b"), (list(range(10, 26)), "")),
        num_media=6, grid=(3, 2, 1), lengths=((9,), (5,), (3,)), loss="nll", num_shards=2,
        order="spread", packed=Packed(rows_per_pass=1, num_sequences=3), rows_used=1,
    ),
    "packed: samples of three prompts": Case(
        prompts=TEXT, lengths=TEXT_LENGTHS, num_shards=2, order="spread",
        packed=Packed(rows_per_pass=1, num_sequences=9), rows_used=1,
    ),
}  # fmt: skip


FAST = {  # compiling takes 5 to 10 s a case; these have a bit of everything
    ("3 groups in one row, spread over 4", "float32"),
    (
        "packed: two films and a text in 50 places over 2, prompts cut where answers stand",
        "float32",
    ),
    ("two questions on one video, spread over 2, a pass a row, one of padding", "float64"),
}


def make_numbers(case: Case, width: int) -> Numbers:
    rng = np.random.default_rng(0)
    stored = {k: rng.normal(size=(case.num_media, width)).astype(np.float32) for k in "ab"}
    allowed = np.setdiff1d(np.arange(99), BANNED)
    groups, features = [], []
    for (tokens, key), lengths in zip(case.prompts, case.lengths, strict=True):
        samples = [rng.choice(allowed, n) for n in lengths]
        prompt = make_prompt(tokens, key=key, **positions(case, tokens))
        groups.append(make_group(prompt, *samples))
        features.append(stored[key] if key else None)

    def about(low: float, high: float) -> list[list[np.ndarray]]:
        return [[rng.uniform(low, high, n) for n in lengths] for lengths in case.lengths]

    ones = case.loss == "nll"
    advantage = [np.ones(1) if ones else rng.normal(size=len(n)) for n in case.lengths]
    weights = [a.astype(np.float32) for a in advantage]
    return Numbers(groups, features, weights, about(-9, -1), about(-6, -3), BANNED)


def positions(case: Case, tokens: list[int]) -> dict[str, Any]:
    """rope_pos and next_rope_pos of a prompt of Qwen2.5-VL; nothing where they are 0, 1, 2, ..."""
    if not any(case.grid):
        return {}
    media = []
    if V in tokens:
        film = Media(
            kind="video", path="", key="", grid=case.grid, times_s=(),
            view=View(size=(0, 0), grid=case.grid[1:]), num_tokens=case.num_media,
            offset=tokens.index(V), unit_s=1.5,
        )  # fmt: skip
        media.append(film)
    rope_pos, following = qwen2_5_vl.rope_positions(
        len(tokens), media, tokens_per_second=VISION["tokens_per_second"]
    )
    return {"rope_pos": rope_pos, "next_rope_pos": following}


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


def witness(folder, dtype: str) -> Side:
    """Separate sequences through torch."""
    side = open_side(folder)
    if dtype == "float64":
        side.llm, side.dtype = in_float64(side.llm), torch.float64
        side.projector = side.projector and side.projector.double()
    return side


@functools.cache
def checkpoint(root, backbone: str, tied: bool):
    write = {"text": write_text, "vila": write_vila, "qwen2_5_vl": write_qwen2_5_vl}[backbone]
    folder = root / f"{backbone}, tied={tied}"
    write(folder, tied=tied)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if (name, dtype) in FAST else pytest.mark.slow)
        for name, case in CASES.items()
        for dtype in BOUND
        if dtype == "float32" or not any(case.grid)  # its model of torch has float32 parts
    ],
)
def test_a_group_row_equals_separate_sequences(checkpoints, name, dtype):
    assert jax.device_count() == 8
    case = CASES[name]
    backbone = "qwen2_5_vl" if any(case.grid) else "vila" if case.num_media else "text"
    folder = checkpoint(checkpoints, backbone, case.tied)
    numbers = make_numbers(case, width=128)
    exact = witness(folder, "float32" if any(case.grid) else "float64")
    with torch.no_grad():
        logps = all_logps(exact, numbers)
    numbers = near(numbers, [[x.numpy() for x in group] for group in logps])
    theirs = witness(folder, dtype)
    logps = all_logps(theirs, numbers)
    want_loss = token_mean(logps, numbers, loss=case.loss)
    want_loss.backward()
    want = {name: x.grad.numpy() for name, x in theirs.trained().items()}

    with jax.enable_x64(dtype == "float64"):
        got = run_update(
            folder,
            numbers,
            keep_gradient(),
            layout={
                "num_rows": case.num_rows, "num_shards": case.num_shards, "order": case.order,
                "groups_per_row": case.groups_per_row, "packed": case.packed,
            },
            rows_per_pass=case.rows_per_pass,
            dtype=dtype,
            loss=case.loss,
        )  # fmt: skip
        gradient = got.by_name(got.state.opt_state)
    assert len(set(got.rows)) == case.rows_used
    assert got.tokens == sum(map(sum, case.lengths))
    for of_group, theirs_of_group in zip(got.logps, logps, strict=True):
        for a, b in zip(of_group, theirs_of_group, strict=True):
            np.testing.assert_allclose(a, b.detach().numpy(), rtol=0, atol=LOGP_ATOL[dtype])
    assert abs(got.loss - want_loss.item()) <= BOUND[dtype] * abs(want_loss.item())
    assert gradient.keys() == want.keys()
    error = {
        name: np.linalg.norm(gradient[name] - x) / np.linalg.norm(x) for name, x in want.items()
    }
    worst = max(error, key=error.get)
    assert error[worst] <= BOUND[dtype], worst
