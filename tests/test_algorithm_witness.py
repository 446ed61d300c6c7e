"""Advantages, losses, KL estimators and the overlong reward against verl's and TRL's own values.

tests/witness/algorithms.py has computed them, in float64, with these packages in an environment of
their own. Their samples are rows; ours share rows, and passes, as they do in training.
"""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from longrl_jax import advantages, losses, rewards
from longrl_jax.types import Example, Scored

FLOAT64_RTOL = 1e-10  # the references add 1e-8 to counts of about 2,000 tokens: 5e-12
FLOAT32_RTOL = 1e-5  # relative to the largest value: float32 sums and exp
FILE = np.load(Path(__file__).parent / "witness" / "algorithms.npz", allow_pickle=False)
X = {name.removeprefix("input/"): FILE[name] for name in FILE.files if "input/" in name}
GROUPS, SAMPLES = X["reward"].shape
TOKENS = X["logp"].shape[1]
NUMBERS = {"clip_low": 0.2, "clip_high": 0.28, "clip_dual": 3.0}
NO_DUAL = NUMBERS | {"clip_dual": 1e30}  # TRL has none
KL = 0.04


@pytest.fixture(params=["float64", "float32"])
def precision(request):
    """(type, tolerance); 64 bits are on for the test alone."""
    with jax.enable_x64(request.param == "float64"):
        yield request.param, FLOAT64_RTOL if request.param == "float64" else FLOAT32_RTOL


def assert_close(got, want, rtol):
    np.testing.assert_allclose(got, want, rtol=rtol, atol=rtol * np.abs(want).max())


def valid():
    return np.ones((GROUPS, SAMPLES), bool)


@pytest.mark.parametrize("name", advantages.ADVANTAGES)
def test_advantages_equal_verl(name):
    got_GR = advantages.ADVANTAGES[name](X["reward"], valid(), X["lengths"])
    want = FILE[f"advantage/{name}"]
    mask = np.arange(TOKENS) < X["lengths"].reshape(-1, 1)
    assert_close(np.where(mask, got_GR.reshape(-1, 1), 0), want * mask, FLOAT64_RTOL)
    if not name.startswith("reinforce"):  # those compare with the whole step
        np.testing.assert_array_equal(got_GR[2], 0)  # equal rewards, which theirs may round


def test_a_kl_in_the_reward_equals_verl_in_one_process_and_in_two():
    lengths, reward = X["lengths"].reshape(-1), X["reward"].reshape(-1)
    kl = [(X["logp"] - X["reference"])[i, :n] for i, n in enumerate(lengths)]
    want = [FILE["advantage/reinforce_plus_plus_tokens"][i, :n] for i, n in enumerate(lengths)]
    ok = np.ones(len(kl), bool)
    make = functools.partial(advantages.reinforce_plus_plus_tokens, coefficient=0.01)
    for got, x in zip(make(reward, ok, kl), want, strict=True):
        assert_close(got, x, FLOAT64_RTOL)
    # sums of two processes: the second one runs with what the first one has told, and back
    parts = slice(0, 5), slice(5, None)
    told: list[list[float]] = [[], []]
    for _ in range(3):  # count, mean, square: each needs those before it
        got = []
        for me, part in enumerate(parts):
            heard, mine = iter(told[1 - me]), []

            def everywhere(x, heard=heard, mine=mine):
                mine.append(x)
                return x + next(heard, 0.0)

            got += make(reward[part], ok[part], kl[part], everywhere=everywhere)
            told[me] = mine
    for a, x in zip(got, want, strict=True):
        assert_close(a, x, FLOAT64_RTOL)


@pytest.mark.parametrize("name", losses.KL_ESTIMATORS)
def test_kl_estimators_equal_verl(name, precision):
    dtype, rtol = precision
    far, reference = (jnp.asarray(X[key], dtype) for key in ("far", "reference"))
    assert_close(losses.KL_ESTIMATORS[name](far, reference), FILE[f"kl/{name}"], rtol)


def in_rows(x, rows_per_pass):
    """[samples, tokens] -> [passes, rows, SAMPLES * tokens], one group a row, tokens shuffled."""
    order = np.random.default_rng(1).permutation(SAMPLES * TOKENS)
    return x.reshape(-1, rows_per_pass, SAMPLES * TOKENS)[..., order]


@pytest.mark.parametrize("rows_per_pass", [GROUPS, 2])
@pytest.mark.parametrize(
    ("source", "kl"),
    [
        *((f"verl/{loss}/{mean}", 0) for loss in losses.LOSSES for mean in ("token", "fixed")),
        ("trl/clipped/sequence", 0),
        ("trl/gspo/sequence", 0),
        *((f"trl/clipped/{mean}/kl", KL) for mean in losses.MEANS),
    ],
)
def test_losses_and_means_equal_verl_and_trl(source, kl, rows_per_pass, precision):
    """Value and gradient, whatever the split into passes."""
    dtype, rtol = precision
    package, loss, mean = source.split("/")[:3]
    new, old = ("far", "old_far") if package == "verl" and loss != "gspo" else ("logp", "old")
    mask = np.arange(TOKENS) < X["lengths"].reshape(-1, 1)
    sample = np.broadcast_to(np.arange(len(mask))[:, None] % SAMPLES, mask.shape)
    advantage = np.broadcast_to(X["advantage"][:, None], mask.shape)
    place = functools.partial(in_rows, rows_per_pass=rows_per_pass)
    mask, sample = place(mask), place(sample)
    logp, old, advantage, reference = (
        jnp.asarray(place(x), dtype) for x in (X[new], X[old], advantage, X["reference"])
    )
    token_loss = functools.partial(
        losses.LOSSES[loss],
        num_sequences=SAMPLES,
        **(NO_DUAL if package == "trl" else NUMBERS),
    )

    def total(logp):
        weights, divisor = losses.MEANS[mean](
            mask, sample, num_sequences=SAMPLES, max_tokens=TOKENS
        )
        value = 0
        for i in range(len(mask)):
            each, _ = token_loss(logp[i], old[i], advantage[i], mask[i], sample[i])
            if kl:
                each += kl * losses.low_variance_kl(logp[i], reference[i])
            value += jnp.where(mask[i], each * weights[i], 0).sum() / divisor
        return value

    value, gradient = jax.jit(jax.value_and_grad(total))(logp)
    assert value.dtype == dtype
    assert_close(value, FILE[f"{source}/loss"], rtol)
    assert_close(gradient, place(FILE[f"{source}/gradient"]), rtol)


@pytest.mark.parametrize("mean", losses.MEANS)
def test_an_empty_mask_weighs_nothing(mean):
    empty = np.zeros((2, 3, 8), bool)
    weights, divisor = losses.MEANS[mean](
        empty, np.zeros(empty.shape, int), num_sequences=2, max_tokens=4
    )
    assert not np.asarray(weights).any() and divisor == 0


def test_overlong_equals_trl():
    """Answers of 0 to 105 tokens, of at most 100, the last 20 of which are punished."""
    items = [
        Scored(
            example=Example(id="", question="", answer=""), text="", num_tokens=length,
            finish_reason="stop", max_tokens=100, overlong_tokens=20,
        )
        for length in range(106)
    ]  # fmt: skip
    got = [parts["total"] for parts in rewards.REWARDS["overlong"](items)]
    np.testing.assert_allclose(got, FILE["overlong"], rtol=FLOAT64_RTOL)
    assert set(got[:81]) == {0.0} and set(got[100:]) == {-1.0}
