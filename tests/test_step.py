"""The update: log-probabilities against numpy, and what passes, meshes, NaN and buckets may do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_groups import V, make_group, make_prompt, scatter

from longrl_jax import step
from longrl_jax.batching import make_batch, place, split_passes
from longrl_jax.config import OptimizerConfig
from longrl_jax.losses import LOSSES, MEANS, low_variance_kl
from longrl_jax.models import decoder, projector, siglip, vila, weights
from longrl_jax.models.rope import Rope
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import attend, make_mesh

LOGP_ATOL = 1e-5  # float32, logits of order 10
CHUNK_RTOL = 1e-5  # the same products, added up in other parts
UPDATE_BOUND = 2e-5  # |difference| / |gradient| of float32 sums over devices and passes
CLIPPED = functools.partial(LOSSES["clipped"], clip_low=0.2, clip_high=0.2, clip_dual=3.0)
BANNED = (V, 3)


def numpy_logps(h, head, targets, temperature, banned):
    """Log p and entropy of a softmax over the words that are not banned, in float64."""
    logits = h.astype(np.float64) @ head.astype(np.float64) / temperature
    logits = np.delete(logits, banned, axis=-1)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    kept = np.delete(np.arange(head.shape[1]), banned)
    at = np.searchsorted(kept, targets)
    return np.log(np.take_along_axis(p, at[..., None], -1)[..., 0]), -(p * np.log(p)).sum(-1)


def head_case(seed=0, B=2, n=2, a=7, D=16, words=23):
    rng = np.random.default_rng(seed)
    h, head = rng.normal(size=(B, n, a, D)), rng.normal(size=(D, words))
    targets = rng.choice(np.setdiff1d(np.arange(words), (5, 9)), (B, n, a))
    return h.astype(np.float32), head.astype(np.float32), targets.astype(np.int32)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("banned", [(), (5, 9)])
def test_head_equals_a_softmax_in_numpy(temperature, banned):
    h, head, targets = head_case()
    options = {"temperature": temperature, "banned_tokens": banned}
    logps, entropy = step.head_logps(h, head, targets, **options, head_chunk=1024)
    want_logps, want_entropy = numpy_logps(h, head, targets, temperature, list(banned))
    np.testing.assert_allclose(logps, want_logps, rtol=0, atol=LOGP_ATOL)
    np.testing.assert_allclose(entropy, want_entropy, rtol=0, atol=LOGP_ATOL)


@pytest.mark.parametrize("head_chunk", [1, 6])
def test_head_chunks_change_neither_values_nor_gradients(head_chunk):
    """Seven tokens of each of two rows, in chunks of one, and of three with padding at the end."""
    h, head, targets = head_case(1)
    weight = np.random.default_rng(2).normal(size=targets.shape).astype(np.float32)

    def run(head_chunk):
        def loss(h, head):
            logps, _ = step.head_logps(
                h, head, targets, temperature=0.7, banned_tokens=(5,), head_chunk=head_chunk
            )
            return (logps * weight).sum(), logps

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(h, head)

    want = run(1024)
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=CHUNK_RTOL * scale),
        run(head_chunk),
        want,
    )


def test_gradient_of_the_head_is_summed_in_float32():
    """In bfloat16, adding one chunk after the other would lose what is under 1/256 of the sum."""
    h, head, targets = head_case(3, B=1, n=1, a=512, D=8, words=11)

    def gradient(head_chunk):
        def loss(head):
            logps, _ = step.head_logps(
                h.astype(jnp.bfloat16), head, targets, temperature=1.0, banned_tokens=(),
                head_chunk=head_chunk,
            )  # fmt: skip
            return logps.sum()

        got = jax.jit(jax.grad(loss))(head)
        assert got.dtype == jnp.float32
        return np.asarray(got)

    one, many = gradient(512), gradient(1)
    assert np.linalg.norm(many - one) / np.linalg.norm(one) < 2e-3  # one rounding to bfloat16


def tiny_config() -> vila.Config:
    text = decoder.Config(
        vocab_size=99, width=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8,
        mlp_width=48, norm_eps=1e-6, rope=Rope(theta=1e4), tied=False,
    )  # fmt: skip
    vision = siglip.Config(
        image_size=16, patch_size=8, num_channels=3, width=16, num_layers=1, num_heads=2,
        mlp_width=16, norm_eps=1e-6,
    )  # fmt: skip
    return vila.Config(
        text=text,
        vision=vision,
        projector=projector.Config(kind="mlp2x_gelu", width_in=16, width_out=32),
        num_vision_layers=1,
        vision_prefix="",
    )


def make_model(mesh=None) -> vila.Model:
    """Random, of order 1 at every layer; on a mesh it lies as the table says."""
    cfg, rng = tiny_config(), np.random.default_rng(0)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: vila.Model(cfg, rngs=nnx.Rngs(0))))
    places = {} if mesh is None else weights.shardings(abstract, vila.table(cfg), mesh)
    arrays = {}
    for path, x in weights.by_path(abstract).items():
        value = rng.normal(size=x.shape) * 0.2 + path.endswith("scale")
        arrays[path] = jax.device_put(value.astype(np.float32), places.get(path))
    return nnx.merge(graphdef, weights.with_arrays(abstract, arrays))


LENGTHS = ((3, 1), (4, 4), (1, 1), (2, 5), (4, 2), (1, 3), (5, 1))


def make_passes(*, rows_per_pass=0, num_shards=1, seed=0, longer=1, mesh=None):
    """Eight rows: seven groups of two samples, two of them on videos, and one of padding.

    Returns the passes and random old log-probabilities. Another seed gives other questions.
    """
    rng = np.random.default_rng(seed)
    words = np.setdiff1d(np.arange(99), BANNED)
    groups, features = [], []
    for g, lengths in enumerate(rng.permutation(LENGTHS) if seed else LENGTHS):
        video = g < 2
        prompt = make_prompt(([V, V, V, 4] if video else []) + [7, g + 1], key=str(g))
        groups.append(make_group(prompt, *[rng.choice(words, n * longer) for n in lengths]))
        features.append(rng.normal(size=(3, 16)).astype(np.float32) if video else None)
    batch, index = make_batch(
        groups,
        features=features,
        advantages=[rng.normal(size=2).astype(np.float32) for _ in groups],
        num_rows=8,
        num_shards=num_shards,
        smallest_bucket=8,
        max_row_tokens=200,
    )
    old = [[rng.uniform(-6, -3, len(s.tokens)) for s in group.samples] for group in groups]
    passes = split_passes(batch, rows_per_pass)
    old_nBA = scatter(index, old, batch.targets.shape).reshape(passes.targets.shape)
    old_nBA = old_nBA.astype(np.float32)
    if mesh is None:
        return passes, old_nBA
    placed = place(passes, mesh)
    return placed, jax.device_put(old_nBA, placed.targets.sharding)


def adam() -> OptimizerConfig:
    """Its first moment after one update is a tenth of the gradient, exactly."""
    return OptimizerConfig(learning_rate=1e-2, max_grad_norm=1e9, beta1=0.9)


def make_trainer(
    mesh=None, *, frozen=("vision",), kl=0.0, attention=attend, loss=CLIPPED, mean="token"
):
    optimizer = make_optimizer(adam(), 10)
    graphdef, state = step.init_state(make_model(mesh), frozen, optimizer, mesh)
    token_logps = step.make_token_logps(
        graphdef, temperature=0.7, banned_tokens=BANNED, head_chunk=8, attention=attention
    )
    train_step = step.make_train_step(
        token_logps,
        loss,
        optimizer,
        shardings=step.state_shardings(state),
        mesh=mesh,
        kl=kl,
        kl_estimator=low_variance_kl,
        mean=functools.partial(MEANS[mean], max_tokens=12),
    )
    return state, token_logps, train_step


def moments(state) -> tuple[dict, dict]:
    adam_state = next(x for x in state.opt_state if hasattr(x, "nu") or isinstance(x, tuple) and x)
    adam_state = adam_state if hasattr(adam_state, "nu") else adam_state[0]
    return weights.by_path(adam_state.mu), weights.by_path(adam_state.nu)


def host(state):
    """A copy that an update cannot consume."""
    return jax.tree.map(np.array, state)


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.fixture(scope="module")
def trainer():
    """(a state's maker, token_logps, the update): one device, compiled once for the module."""
    first, token_logps, train_step = make_trainer()
    kept, places = host(first), step.state_shardings(first)
    return (lambda: jax.device_put(kept, places)), token_logps, train_step


@pytest.fixture(scope="module")
def whole(trainer) -> tuple[dict, float]:
    """The gradient (by path) and the loss of one pass on one device."""
    make_state, _, train_step = trainer
    passes, old = make_passes()
    state, stats = train_step(make_state(), passes, None, old)
    return {p: np.asarray(x) for p, x in moments(state)[0].items()}, float(stats["loss"][0])


def assert_same_gradient(state, stats, whole):
    want, loss = whole
    assert abs(float(stats["loss"][0]) - loss) <= UPDATE_BOUND * abs(loss)
    got = moments(state)[0]
    assert got.keys() == want.keys()
    for path, x in want.items():
        error = np.linalg.norm(np.asarray(got[path]) - x) / np.linalg.norm(x)
        assert error <= UPDATE_BOUND, path


def test_trained_parts_move_and_are_donated_frozen_ones_are_neither(trainer):
    make_state, _, train_step = trainer
    state = make_state()
    before = host(state)
    passes, old = make_passes()
    new, stats = train_step(state, passes, None, old)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    assert not any(x.is_deleted() for x in jax.tree.leaves(new.frozen))
    assert_same(new.frozen, before.frozen)
    assert {p.split(".")[0] for p in weights.by_path(new.frozen)} == {"vision"}
    moved = {
        path: not np.array_equal(x, weights.by_path(before.params)[path])
        for path, x in weights.by_path(new.params).items()
    }
    assert all(moved.values()), moved
    assert {path.split(".")[0] for path in moved} == {"text", "projector"}
    assert int(new.step) == 1
    assert stats["finite/loss"] == stats["finite/grad_norm"] == (1, 1)
    paths = weights.by_path(step.all_params(new))
    assert paths.keys() == weights.by_path(nnx.state(make_model())).keys()


@pytest.mark.parametrize(
    ("what", "finite"),
    [("nan in the loss", {"loss": 0, "grad_norm": 0}), ("overflow", {"loss": 1, "grad_norm": 0})],
)
def test_an_update_that_is_not_finite_changes_nothing(trainer, what, finite):
    make_state, _, train_step = trainer
    passes, old = make_passes()
    state, _ = train_step(make_state(), passes, None, old)  # with moments that are not 0
    before = host(state)
    if what == "overflow":  # the loss is about 1e30, the squares of its gradient are too large
        passes.advantage[...] *= 1e30
    else:
        old = jnp.full_like(old, jnp.nan)
    new, stats = train_step(state, passes, None, old)
    assert {name: int(stats[f"finite/{name}"][0]) for name in finite} == finite
    assert_same(new, before)
    passes, old = make_passes()
    after, stats = train_step(new, passes, None, old)
    assert stats["finite/loss"][0] and int(after.step) == 2


def test_statistics_against_numpy(trainer):
    make_state, token_logps, train_step = trainer
    passes, old = make_passes()
    logps, entropy = step.make_pass_logps(token_logps, mesh=None)(
        step.all_params(make_state()), passes
    )
    mask = passes.loss_mask
    _, stats = train_step(make_state(), passes, None, old)
    gap = np.abs(np.asarray(logps) - passes.engine_logps)[mask]
    want = {
        "tokens": (mask.sum(), 1),
        "gap/max": (gap.max(), 1),
        "gap/mean": (gap.sum(), mask.sum()),
        "entropy": (np.asarray(entropy)[mask].sum(), mask.sum()),
        "ratio": (np.exp(np.asarray(logps) - old)[mask].sum(), mask.sum()),
    }
    for name, numbers in want.items():
        np.testing.assert_allclose(stats[name], numbers, rtol=1e-4, err_msg=name)
    assert stats.keys() >= {"loss", "grad_norm", "clip_fraction", "dual_clip_fraction"}
    gradient = moments(train_step(make_state(), passes, None, old)[0])[0]
    norm = np.sqrt(sum(np.square(10 * np.asarray(x)).sum() for x in gradient.values()))
    np.testing.assert_allclose(stats["grad_norm"][0], norm, rtol=1e-4)


def test_one_program_a_bucket_and_none_after_the_warm_up(trainer):
    """Other questions and other steps: the same program while the bucket is the same."""
    make_state, _, train_step = trainer
    state, shapes, counts = make_state(), [], []
    for seed, longer in [(0, 1), (1, 1), (2, 1), (3, 9), (4, 1), (5, 9)]:
        passes, old = make_passes(seed=seed, longer=longer)
        state, _ = train_step(state, passes, None, old)
        shapes.append(passes.tokens.shape)
        counts.append(train_step.num_compilations)
    assert shapes[:3] == [shapes[4]] * 3 and shapes[3] == shapes[5] != shapes[0]
    assert counts == [1, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("rows_per_pass", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_passes_change_neither_loss_nor_gradient(whole, rows_per_pass):
    """Passes hold different numbers of tokens, one of them none: a mean of means would differ."""
    state, _, train_step = make_trainer()
    passes, old = make_passes(rows_per_pass=rows_per_pass)
    counts = passes.loss_mask.sum((1, 2))
    assert len(set(counts.tolist())) > 1
    state, stats = train_step(state, passes, None, old)
    assert_same_gradient(state, stats, whole)
    assert stats["ratio"][1] == stats["entropy"][1] == counts.sum()


@pytest.mark.slow
@pytest.mark.parametrize("mean", ["sequence", "fixed"])
def test_other_means_are_of_all_passes_and_devices(mean):
    """GSPO, whose ratio is of an answer that devices share, on one device and on eight."""
    numbers = {"clip_low": 0.2, "clip_high": 0.2, "clip_dual": 3.0}
    loss = functools.partial(LOSSES["gspo"], **numbers)
    state, token_logps, train_step = make_trainer(loss=loss, mean=mean)
    passes, old = make_passes()
    logps, _ = step.make_pass_logps(token_logps, mesh=None)(step.all_params(state), passes)
    state, stats = train_step(state, passes, None, old)
    want = {p: np.asarray(x) for p, x in moments(state)[0].items()}, float(stats["loss"][0])
    total, answers, clips = 0.0, 0, 0
    for b, row in enumerate(passes.loss_mask[0]):
        for sample in np.unique(passes.sequence[0, b][row]):
            mine = row & (passes.sequence[0, b] == sample)
            log_ratio = (np.asarray(logps, np.float64)[0, b] - old[0, b])[mine].mean()
            advantage, ratio = float(passes.advantage[0, b][mine][0]), np.exp(log_ratio)
            each = max(-advantage * ratio, -advantage * min(max(ratio, 0.8), 1.2))
            clips += mine.sum() * (each != -advantage * ratio)
            total += each if mean == "sequence" else each * mine.sum() / 12
            answers += 1
    assert answers == 14 and clips
    np.testing.assert_allclose(want[1], total / answers, rtol=1e-4)
    assert stats["clip_fraction"][0] == clips
    if mean == "fixed":  # counts answers as the other does
        return
    mesh = make_mesh(fsdp=2, seq=4)
    state, _, train_step = make_trainer(mesh, loss=loss, mean=mean)
    passes, old = make_passes(rows_per_pass=4, num_shards=4, mesh=mesh)
    state, stats = train_step(state, passes, None, old)
    assert_same_gradient(state, stats, want)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ({"data": 2, "fsdp": 2, "seq": 2}, {}),
        pytest.param({"fsdp": 2, "seq": 2, "tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"seq": 8}, {}, marks=pytest.mark.slow),
        pytest.param({"data": 8}, {}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 4, "tensor": 2}, {}, marks=pytest.mark.slow),
        pytest.param({"fsdp": 2, "seq": 4}, {"kind": "ulysses"}, marks=pytest.mark.slow),
        pytest.param({"seq": 8}, {"kind": "2d", "ulysses": 2}, marks=pytest.mark.slow),
        pytest.param({"seq": 4, "tensor": 2}, {"kind": "2d"}, marks=pytest.mark.slow),
        pytest.param({"data": 2, "seq": 4}, {"kernel": "pallas"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_mesh_does_not_change_the_update(whole, shape, options):
    """Nor does the way in which its devices share a row."""
    assert jax.device_count() == 8
    mesh = make_mesh(**shape)
    state, _, train_step = make_trainer(mesh, attention=functools.partial(attend, **options))
    placed = {p: x.sharding for p, x in weights.by_path(state.params).items()}
    assert any(not s.is_fully_replicated for s in placed.values()) or shape == {"data": 8}
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    passes, old = make_passes(
        num_shards=mesh.shape["seq"], mesh=mesh, rows_per_pass=0 if rows == 8 else 4
    )
    for number in (1, 2):
        state, stats = train_step(state, passes, None, old)
        if number == 1:
            assert_same_gradient(state, stats, whole)
        assert train_step.num_compilations == 1  # the state comes out as it went in
        for arrays in (weights.by_path(state.params), *moments(state)):
            assert {p: x.sharding for p, x in arrays.items()} == placed


def test_optimizer_state_lies_where_the_parameters_do():
    mesh = make_mesh(fsdp=2, seq=2, tensor=2)
    _, state = step.init_state(make_model(mesh), ("vision",), make_optimizer(adam(), 10), mesh)
    placed = {p: x.sharding for p, x in weights.by_path(state.params).items()}
    for arrays in moments(state):
        assert {p: x.sharding for p, x in arrays.items()} == placed
        kernel = arrays["text.layers.mlp.up.kernel"]
        assert kernel.addressable_shards[0].data.size * 8 == kernel.size
    assert state.step.sharding.is_fully_replicated


def test_a_model_that_no_table_has_placed_is_replicated():
    mesh = make_mesh(data=2, seq=4)
    _, state = step.init_state(make_model(), (), make_optimizer(adam(), 10), mesh)
    for x in jax.tree.leaves(state):
        assert x.sharding.mesh == mesh and x.sharding.is_fully_replicated


def test_kl_needs_a_reference_and_no_kl_needs_none(trainer):
    """And without old log-probabilities the policy is its own past: every ratio is 1."""
    make_state, token_logps, _ = trainer
    state, _, train_step = make_trainer(kl=0.5)
    passes, _ = make_passes()
    with pytest.raises(AssertionError, match="kl needs reference_logps"):
        train_step(make_state(), passes)
    own, _ = step.make_pass_logps(token_logps, mesh=None)(step.all_params(state), passes)
    _, stats = train_step(state, passes, own - 0.3)
    count, k3 = passes.loss_mask.sum(), np.exp(-0.3) + 0.3 - 1
    np.testing.assert_allclose(stats["kl"], (count * k3, count), rtol=1e-3)
    want = 0.5 * k3 - passes.advantage.sum() / count
    np.testing.assert_allclose(stats["loss"][0], want, rtol=1e-3)
    assert stats["ratio"][0] == stats["ratio"][1] and stats["clip_fraction"][0] == 0


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match=r"model.frozen=\['text', 'vision', 'projector'\] leaves"):
        step.init_state(
            make_model(), ["text", "vision", "projector"], make_optimizer(adam(), 10), None
        )
