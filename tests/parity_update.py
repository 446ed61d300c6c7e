"""One step of AdamW by both sides, from the same checkpoint, groups and stored features."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from our_side import keep_gradient, run_update
from parity_backbones import Questions
from tiny_groups import make_group
from torch_side import Numbers, Side, all_logps, open_side, token_mean, torch_update

from longrl_jax import models
from longrl_jax.config import OptimizerConfig
from longrl_jax.optimizer import make_optimizer

OPTIMIZER = OptimizerConfig(learning_rate=1e-3, weight_decay=0.1, max_grad_norm=1.0)
"""The norm is over 1, so it clips."""
CLEAR = 1e-5
"""Of the largest gradient: Adam's first step is as long as the learning rate however small a
gradient is, so where that is rounding its sign is, too. A number with more is clear."""
LENGTHS = ((4, 2), (3, 5), (1, 6))


@dataclasses.dataclass(frozen=True)
class Found:
    """Differences of an update; see CLEAR."""

    gradient: dict[str, float]
    """|difference| / |gradient| of every tensor, clipped."""
    clear: np.ndarray
    """|difference| of every updated number whose gradient is clear."""
    others: np.ndarray
    """The same of all others, those without any gradient included."""
    clear_share: float
    """Of the numbers whose gradient is not 0."""
    moved: np.ndarray
    """Largest change of every tensor."""


def make_numbers(folder: Path, side: Side) -> Numbers:
    """Groups of two answers to each question, old log-probabilities near those of the policy."""
    cfg = models.backbone_of(folder).read_config(folder)
    questions, rng = Questions(folder, cfg), np.random.default_rng(1)
    groups, features = [], []
    for asked, lengths in zip(questions.ask(), LENGTHS, strict=False):
        answers = [questions.some_words(n) for n in lengths]
        groups.append(make_group(asked.prompt, *answers))
        stored = [
            side.stored(frames, medium).float().numpy()
            for frames, medium in zip(asked.frames, asked.prompt.media, strict=True)
        ]
        features.append(np.concatenate(stored) if stored else None)
    advantage = [rng.normal(size=2).astype(np.float32) for _ in groups]
    numbers = Numbers(groups, features, advantage, [], [], questions.banned, side.stage)
    with torch.no_grad():
        logps = [[x.numpy() for x in group] for group in all_logps(side, numbers)]

    def near(most: float) -> list[list[np.ndarray]]:
        return [[x + rng.uniform(-most, most, len(x)) for x in group] for group in logps]

    return dataclasses.replace(numbers, old=near(0.6), reference=near(1.0))


def compare(folder: Path) -> Found:
    """Updates the checkpoint of a folder, by torch and by us."""
    side = open_side(folder)
    numbers = make_numbers(folder, side)
    want = torch_update(side, numbers, OPTIMIZER)
    layout = {"num_rows": len(numbers.groups), "num_shards": 1}
    got = run_update(folder, numbers, make_optimizer(OPTIMIZER, 10), layout=layout)
    after = got.by_name(got.state.params)
    (adam,) = [x for x in got.state.opt_state[1] if hasattr(x, "mu")]
    gradient = {n: x / (1 - OPTIMIZER.beta1) for n, x in got.by_name(adam.mu).items()}
    assert after.keys() == want.keys()
    largest = max(np.abs(g).max() for _, g, _ in want.values())
    sizes = np.concatenate([np.abs(g).ravel() for _, g, _ in want.values()])
    apart = np.concatenate([np.abs(after[n] - x).ravel() for n, (_, _, x) in want.items()])
    clear = sizes > CLEAR * largest
    return Found(
        gradient={
            n: float(np.linalg.norm(gradient[n] - g) / np.linalg.norm(g))
            for n, (_, g, _) in want.items()
        },
        clear=apart[clear],
        others=apart[~clear],
        clear_share=float(clear.sum() / (sizes > 0).sum()),
        moved=np.array([np.abs(x - before).max() for before, _, x in want.values()]),
    )


def bfloat16_share(folder: Path) -> float:
    """Error of our gradient in bfloat16 over that of torch, both against torch in float32.

    Of the log-likelihood: a clip would cut tokens off on one side and not on the other.
    """

    def theirs(side: Side) -> dict[str, np.ndarray]:
        token_mean(all_logps(side, numbers), numbers, loss="nll").backward()
        return {name: x.grad.float().numpy() for name, x in side.trained().items()}

    exact = open_side(folder)
    numbers = make_numbers(folder, exact)
    want, rounded = theirs(exact), theirs(open_side(folder, "bfloat16"))
    layout = {"num_rows": len(numbers.groups), "num_shards": 1}
    got = run_update(folder, numbers, keep_gradient(), layout=layout, dtype="bfloat16", loss="nll")
    ours = got.by_name(got.state.opt_state)

    def error(gradient: dict[str, np.ndarray]) -> float:
        return float(np.sqrt(sum(np.square(gradient[n] - x).sum() for n, x in want.items())))

    return error(ours) / error(rounded)
