"""All jitted training code: the state, token log-probabilities, and the update."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from longrl_jax.losses import token_weights
from longrl_jax.sharding import attend, constrain, num_parts
from longrl_jax.types import Batch, Stats

NEG_INF = -1e30  # logit of a banned token; finite, so that p * logit is 0 and not nan
HEAD_CHUNK = 1024
"""Tokens of one device whose logits exist at the same time."""
COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"
TokenLogps = Callable[[nnx.State, Batch], tuple[Array, Array]]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "frozen", "opt_state", "step"],
    meta_fields=[],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training changes, and the parameters that it does not."""

    params: Any
    """nnx.State of the trained parts; the update consumes its arrays (they are donated)."""
    frozen: Any
    """nnx.State of the frozen parts; never donated."""
    opt_state: Any
    step: Any
    """int32: updates made."""


class CountedJit:
    """A jitted function that runs on a mesh, and the number of programs compiled for it."""

    def __init__(
        self, function: Callable[..., Any], *, mesh: jax.sharding.Mesh | None, **options: Any
    ):
        """options are those of jax.jit."""
        self._program = jax.jit(function, **options)
        self._mesh = mesh
        self.num_compilations = 0

    def __call__(self, *args: Any) -> Any:
        events = _compile_events()
        before = len(events)
        with self._on_mesh():
            result = self._program(*args)
        self.num_compilations += len(events) - before
        return result

    def trace(self, *args: Any) -> Any:
        """Returns jax.stages.Traced of these arrays, which may be jax.ShapeDtypeStructs: the very
        program that a call would run, to be compiled or counted without running it."""
        with self._on_mesh():
            return self._program.trace(*args)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """The update of make_train_step."""

    program: CountedJit

    def __call__(
        self,
        state: TrainState,
        passes: Batch,
        reference_logps: Float[Array, "n B A"] | None = None,
        old_logps: Float[Array, "n B A"] | None = None,
    ) -> tuple[TrainState, Stats]:
        """Makes one update from all passes; state.params and state.opt_state are consumed.

        passes: a Batch with a leading dim (batching.split_passes), gradients are summed over it.
        old_logps: of the policy that the ratio starts from; None: the policy as it is.
        """
        trained = state.params, state.opt_state, state.step
        trained, stats = self.program(trained, state.frozen, passes, reference_logps, old_logps)
        params, opt_state, step = trained
        return TrainState(params, state.frozen, opt_state, step), stats

    def trace(
        self, state: TrainState, passes: Batch, reference_logps: Any = None, old_logps: Any = None
    ) -> Any:
        """See CountedJit.trace; the arguments are those of a call, with shapes for arrays."""
        trained = state.params, state.opt_state, state.step
        return self.program.trace(trained, state.frozen, passes, reference_logps, old_logps)

    @property
    def num_compilations(self) -> int:
        return self.program.num_compilations


def init_state(
    model: nnx.Module,
    frozen_parts: Collection[str],
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh | None = None,
) -> tuple[nnx.GraphDef, TrainState]:
    """Splits a model into trained and frozen parts (its attributes) and starts the optimizer.

    Arrays that are not placed on the mesh are replicated. The state takes the model's arrays over:
    the first update deletes the trained ones.
    """

    graphdef, frozen, params = _split_parts(model, frozen_parts)
    step = jnp.zeros((), jnp.int32)
    if mesh is not None:
        everywhere = NamedSharding(mesh, PartitionSpec())

        def placed(x: jax.Array) -> jax.Array:
            on_mesh = isinstance(x.sharding, NamedSharding) and x.sharding.mesh == mesh
            return x if on_mesh else jax.device_put(x, everywhere)

        params, frozen, step = jax.tree.map(placed, (params, frozen, step))
    places = _optimizer_places(optimizer, params, step)
    opt_state = jax.jit(optimizer.init, out_shardings=places)(params)
    return graphdef, TrainState(params=params, frozen=frozen, opt_state=opt_state, step=step)


def abstract_state(
    model: nnx.Module,
    frozen_parts: Collection[str],
    optimizer: optax.GradientTransformation,
    mesh: jax.sharding.Mesh,
) -> tuple[nnx.GraphDef, TrainState]:
    """Returns what init_state would, of shapes and places alone: nothing is allocated.

    The model's arrays are jax.ShapeDtypeStructs with a sharding (models.abstract).
    """
    graphdef, frozen, params = _split_parts(model, frozen_parts)
    everywhere = NamedSharding(mesh, PartitionSpec())
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
    opt_state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(optimizer.init, params),
        _optimizer_places(optimizer, params, step),
    )
    return graphdef, TrainState(params=params, frozen=frozen, opt_state=opt_state, step=step)


def _split_parts(
    model: nnx.Module, frozen_parts: Collection[str]
) -> tuple[nnx.GraphDef, nnx.State, nnx.State]:
    """Returns (graphdef, frozen, trained)."""

    def is_frozen(path: tuple[Any, ...], _: Any) -> bool:
        return path[0] in frozen_parts

    own = nnx.All(is_frozen, nnx.Not(nnx.LoRAParam))  # adapters train beside frozen kernels
    graphdef, frozen, *rest = nnx.split(model, own, ...)
    (params,) = rest
    if not jax.tree.leaves(params):
        raise ValueError(f"model.frozen={list(frozen_parts)} leaves nothing to train; drop a part")
    return graphdef, frozen, params


def _optimizer_places(optimizer: optax.GradientTransformation, params: Any, step: Any) -> Any:
    """Returns the sharding of every array of the optimizer's state: that of its parameter.

    Told, because jit would replicate zeros: they depend on no parameter (docs/measured.md 1.3).
    """
    return optax.tree_utils.tree_map_params(
        optimizer,
        lambda _, place: place,
        jax.eval_shape(optimizer.init, params),
        jax.tree.map(lambda x: x.sharding, params),
        transform_non_params=lambda _: step.sharding,
    )


def all_params(state: TrainState) -> nnx.State:
    """Returns trained and frozen parameters as one tree: what nnx.merge and token_logps take."""
    return nnx.merge_state(state.frozen, state.params)


def state_shardings(state: TrainState) -> TrainState:
    """Returns where every array of the state lies; make_train_step keeps it there."""
    return jax.tree.map(lambda x: x.sharding, state)


def make_token_logps(
    graphdef: nnx.GraphDef,
    *,
    temperature: float,
    banned_tokens: Sequence[int] = (),
    remat: str = "nothing",
    compute_dtype: DTypeLike = jnp.float32,
    stage: str = "packed",
    head_chunk: int = HEAD_CHUNK,
    attention: Callable[..., Array] = attend,
) -> TokenLogps:
    """Returns token_logps(params, batch) -> (log p of the targets, entropy), both [B, A].

    Of the engine's distribution: logits over temperature, banned tokens left out. Pure, to be
    jitted. remat, compute_dtype, stage and attention are the model's (models/vila.py).
    """

    def token_logps(params: nnx.State, batch: Batch) -> tuple[Array, Array]:
        model = nnx.merge(graphdef, params)
        x_BTD = model.embed(
            batch.tokens, batch.is_media, batch.features, stage=stage, compute_dtype=compute_dtype
        )
        h_BTD = model.hidden(
            x_BTD,
            batch.rope_pos,
            batch.order,
            batch.branch,
            batch.segment,
            remat=remat,
            compute_dtype=compute_dtype,
            attention=attention,
        )
        B, T, D = h_BTD.shape
        a = batch.targets.shape[1] // batch.num_shards
        h_BntD = h_BTD.reshape(B, batch.num_shards, T // batch.num_shards, D)
        targets_Bna = batch.targets.reshape(B, batch.num_shards, a)
        logps_Bna, entropy_Bna = head_logps(
            h_BntD[:, :, -a:],
            model.head(),
            targets_Bna,
            temperature=temperature,
            banned_tokens=banned_tokens,
            head_chunk=head_chunk,
        )
        logps_BA = constrain(logps_Bna.reshape(batch.targets.shape), "batch", "tokens")
        entropy_BA = constrain(entropy_Bna.reshape(batch.targets.shape), "batch", "tokens")
        return logps_BA, entropy_BA

    return token_logps


def head_logps(
    h: Float[Array, "B n a D"],
    head: Float[Array, "D V"],
    targets: Int[Array, "B n a"],
    *,
    temperature: float,
    banned_tokens: Sequence[int],
    head_chunk: int,
) -> tuple[Float[Array, "B n a"], Float[Array, "B n a"]]:
    """Log p of the targets and the entropy, in at least float32; no gradient through the latter.

    Products are made in the type of h. Logits exist for head_chunk tokens of a device at a time, in
    both directions: at 262,144 tokens and 152,064 words that is 8 GiB instead of 300
    (docs/measured.md 1.4).
    """
    wide, V = jnp.promote_types(h.dtype, jnp.float32), head.shape[1]
    allowed_V = np.ones(V, bool)
    allowed_V[list(banned_tokens)] = False

    @jax.checkpoint
    def chunk_logps(h_BncD: Array, targets_Bnc: Array) -> tuple[Array, Array]:
        # cast here and not before the scan, which adds up the gradients of chunks in this type
        head_DV = constrain(head.astype(h_BncD.dtype), None, "vocab")
        logits_BncV = jnp.einsum("BncD,DV->BncV", h_BncD, head_DV, preferred_element_type=wide)
        logits_BncV = constrain(logits_BncV / temperature, "batch", "tokens", None, "vocab")
        logits_BncV = jnp.where(allowed_V, logits_BncV, NEG_INF)
        lse_Bnc = jax.nn.logsumexp(logits_BncV, axis=-1)
        is_target_BncV = jnp.arange(V) == targets_Bnc[..., None]  # no gather: V may be split
        picked_Bnc = jnp.where(is_target_BncV, logits_BncV, 0).sum(-1)
        logp_BncV = logits_BncV - lse_Bnc[..., None]
        entropy_Bnc = -(jnp.exp(logp_BncV) * logp_BncV).sum(-1)
        return picked_Bnc - lse_Bnc, jax.lax.stop_gradient(entropy_Bnc)

    B, n, a = targets.shape
    rows = max(B // num_parts("batch"), 1)
    num_chunks = -(-a // max(head_chunk // rows, 1))
    c = -(-a // num_chunks)

    def chunked(x: Array) -> Array:
        widths = [(0, 0)] * x.ndim
        widths[2] = (0, num_chunks * c - a)
        return jnp.moveaxis(jnp.pad(x, widths).reshape(B, n, num_chunks, c, *x.shape[3:]), 2, 0)

    _, (logps, entropy) = jax.lax.scan(
        lambda _, xs: (None, chunk_logps(*xs)), None, (chunked(h), chunked(targets))
    )
    logps, entropy = (
        jnp.moveaxis(x, 0, 2).reshape(B, n, num_chunks * c)[:, :, :a] for x in (logps, entropy)
    )
    return logps, entropy


def make_pass_logps(
    token_logps: TokenLogps, *, mesh: jax.sharding.Mesh | None, skip_empty: bool = False
) -> CountedJit:
    """Returns jitted (params, passes) -> (log p, entropy), both [n, B, A], one pass at a time.

    skip_empty: compute no pass whose rows are all padding; its numbers are 0.
    """

    def or_zeros(params: nnx.State, batch: Batch) -> tuple[Array, Array]:
        return jax.lax.cond(
            batch.loss_mask.any(),
            token_logps,
            functools.partial(_zeros_like_result, token_logps),
            params,
            batch,
        )

    def pass_logps(params: nnx.State, passes: Batch) -> tuple[Array, Array]:
        one_pass = or_zeros if skip_empty else token_logps
        return jax.lax.map(functools.partial(one_pass, params), passes)

    return CountedJit(pass_logps, mesh=mesh)


def make_train_step(
    token_logps: TokenLogps,
    loss: Callable[..., tuple[Array, Stats]],
    optimizer: optax.GradientTransformation,
    *,
    shardings: TrainState,
    mesh: jax.sharding.Mesh | None,
    kl: float = 0.0,
    kl_estimator: Callable[[Array, Array], Array] | None = None,
    mean: Callable[..., tuple[Array, Array]] = token_weights,
    engine_gap: bool = True,
    skip_empty: bool = False,
) -> TrainStep:
    """Returns the update. The loss is a mean over all passes together, whatever their split.

    loss: an entry of LOSSES with its numbers bound. kl: weight of kl_estimator(logp, reference).
    mean: an entry of MEANS with its numbers bound.
    shardings: of state_shardings. engine_gap: report |engine log p - learner log p|.
    skip_empty: compute no pass whose rows are all padding.
    An update whose loss or gradient norm is not finite changes nothing; the statistics
    `finite/loss` and `finite/grad_norm` (1 or 0) say so, for the stage to stop.
    """

    def update(trained, frozen, passes, reference_logps, old_logps):
        params, opt_state, step = trained
        num_tokens = passes.loss_mask.sum()
        num_sequences = passes.num_sequences
        weights_nBA, divisor = mean(passes.loss_mask, passes.sequence, num_sequences=num_sequences)

        def pass_loss(params, one_pass):
            batch, reference, old, weights_BA = one_pass
            mask = batch.loss_mask

            def averaged(x_BA):
                return jnp.where(mask, x_BA * weights_BA, 0).sum() / jnp.maximum(divisor, 1)

            logps, entropy = token_logps(nnx.merge_state(frozen, params), batch)
            old = jax.lax.stop_gradient(logps) if old is None else old
            advantage = batch.advantage.astype(
                logps.dtype
            )  # wider in tests, else rounded to float32
            loss_BA, stats = loss(
                logps, old, advantage, mask, batch.sequence, num_sequences=num_sequences
            )
            value = averaged(loss_BA)
            stats = dict(stats) | {"entropy": _masked(entropy, mask)}
            if kl:
                assert kl_estimator is not None, "kl needs an estimator"
                assert reference is not None, "kl needs reference_logps"
                kl_BA = kl_estimator(logps, reference)
                value += kl * averaged(kl_BA)
                stats["kl"] = _masked(kl_BA, mask)
            return value, (stats, jax.lax.stop_gradient(logps))

        (value, (stats, logps)), grads = _summed(
            jax.value_and_grad(pass_loss, has_aux=True),
            params,
            (passes, reference_logps, old_logps, weights_nBA),
            None if mesh is None else shardings.params,
            skip_empty,
        )
        norm = optax.global_norm(grads)
        finite_loss, finite_norm = jnp.isfinite(value), jnp.isfinite(norm)
        changes, new_opt_state = optimizer.update(grads, opt_state, params)
        new = optax.apply_updates(params, changes), new_opt_state, step + 1
        good = finite_loss & finite_norm
        new = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, (params, opt_state, step))
        stats |= {
            "loss": (value, 1),
            "grad_norm": (norm, 1),
            "finite/loss": (finite_loss, 1),
            "finite/grad_norm": (finite_norm, 1),
            "tokens": (num_tokens, 1),
        }
        if engine_gap:
            gap = jnp.where(passes.loss_mask, jnp.abs(logps - passes.engine_logps), 0)
            stats |= {"gap/mean": (gap.sum(), num_tokens), "gap/max": (gap.max(), 1)}
        return new, stats

    kept = shardings.params, shardings.opt_state, shardings.step
    return TrainStep(CountedJit(update, mesh=mesh, donate_argnums=0, out_shardings=(kept, None)))


def _summed(pass_gradient, params, passes, places, skip_empty):
    """Runs pass after pass; sums losses, statistics and gradients, stacks log-probabilities."""
    num_passes = passes[0].tokens.shape[0]
    if num_passes == 1:
        (value, (stats, logps)), grads = pass_gradient(params, jax.tree.map(lambda x: x[0], passes))
        return (value, (stats, logps[None])), grads

    def add(total, one_pass):
        outputs, grads = pass_gradient(params, one_pass)
        return jax.tree.map(jnp.add, total, grads), outputs

    def add_or_skip(total, one_pass):
        def skip(total, _):
            return total, _zeros_like_result(add, total, one_pass)[1]

        return jax.lax.cond(one_pass[0].loss_mask.any(), add, skip, total, one_pass)

    zeros = jax.tree.map(jnp.zeros_like, params)
    if places is not None:  # told, because zeros depend on no parameter
        zeros = jax.lax.with_sharding_constraint(zeros, places)
    grads, (values, (stats, logps)) = jax.lax.scan(
        add_or_skip if skip_empty else add, zeros, passes
    )
    value, stats = jax.tree.map(lambda x: x.sum(0), (values, stats))
    return (value, (stats, logps)), grads


def _zeros_like_result(function, *args):
    """Returns zeros of the shapes that a call would return."""
    shapes = jax.eval_shape(function, *args)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _masked(x_BA: Array, mask_BA: Array) -> tuple[Array, Array]:
    return jnp.where(mask_BA, x_BA, 0).sum(), mask_BA.sum()


@functools.cache
def _compile_events() -> list[float]:
    """Grows by one, the seconds, with every program that this process compiles from now on."""
    events: list[float] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event == COMPILE_EVENT:
            events.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    return events
