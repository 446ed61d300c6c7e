"""Random rows with every kind of visibility, and what attention on them is compared by."""

import functools

import jax
import numpy as np

ATOL = 2e-5  # float32, sums over up to 192 keys in another order; values and gradients are about 1


def random_row(rng, num_tokens, *, num_segments=2, num_padding=5):
    """Ids of one row: segments with a prefix and three branches each, padding, shuffled."""
    order, branch, segment = [], [], []
    each = (num_tokens - num_padding) // num_segments
    for number in range(1, num_segments + 1):
        prefix = int(rng.integers(each // 4, each // 2))
        cuts = np.sort(rng.choice(np.arange(1, each - prefix), 2, replace=False))
        lengths = np.diff([0, *cuts, each - prefix])
        order += [*range(prefix)] + [prefix + i for n in lengths for i in range(n)]
        branch += [0] * prefix + [r for r, n in enumerate(lengths, 1) for _ in range(n)]
        segment += [number] * each
    pad = num_tokens - len(order)
    ids = np.array([order + [0] * pad, branch + [0] * pad, segment + [0] * pad], np.int32)
    return ids[:, rng.permutation(num_tokens)]


def make_case(seed, *, B=8, T=192, N=4, K=2, H=16, dtype=np.float32):
    """(q, k, v, cotangent) and ids [3, B, T]; the last row is padding."""
    rng = np.random.default_rng(seed)
    ids = np.stack([random_row(rng, T) for _ in range(B)], axis=1)
    ids[:, -1] = 0
    arrays = [rng.normal(size=(B, T, n, H)).astype(dtype) for n in (N, K, K, N)]
    return arrays, ids


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attention, arrays, ids):
    q, k, v, cotangent = arrays
    out, pull = jax.vjp(lambda *qkv: attention(*qkv, *ids), q, k, v)
    return out, *pull(cotangent)


def compare(got, want, atol=ATOL):
    for name, a, b in zip(("value", "dq", "dk", "dv"), got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
