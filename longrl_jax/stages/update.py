"""From groups to an update: rows in passes on the mesh, the loss of the config, the NaN stop."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from longrl_jax import batching, packing, processes, step
from longrl_jax.config import Config, pick
from longrl_jax.losses import KL_ESTIMATORS, LOSSES, MEANS, nll
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import attend
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Batch, Rollout


def make_passes(
    cfg: Config,
    policy: Policy,
    groups: Sequence[Rollout],
    features: Sequence[np.ndarray | None],
    advantages: Sequence[np.ndarray],
) -> tuple[Batch, batching.Index]:
    """Lays a step's groups out as rows and places them on the mesh in passes. A row holds one
    group, or with batch.pack as many as fit.

    Every process gives its own groups, none perhaps, for the rows of its own devices. Returns also
    where the tokens of its samples went.
    """
    rows, index = make_host_passes(cfg, groups, features, advantages)
    return batching.place(rows, policy.mesh), index


def make_host_passes(
    cfg: Config,
    groups: Sequence[Rollout],
    features: Sequence[np.ndarray | None],
    advantages: Sequence[np.ndarray],
) -> tuple[Batch, batching.Index]:
    """Returns the passes of make_passes as numpy arrays, on no device."""
    rows, index = batching.make_batch(
        groups,
        features=features,
        advantages=advantages,
        num_rows=num_rows(cfg) // processes.count(),
        num_shards=cfg.mesh.seq,
        smallest_bucket=cfg.batch.smallest_bucket,
        max_row_tokens=cfg.batch.max_row_tokens,
        # where a step has one row a group whatever is shared, rows would only grow
        share_videos=cfg.batch.pack,
        agree=_agree if processes.count() > 1 else None,
        packed=packed(cfg),
    )
    return batching.split_passes(rows, rows_per_pass(cfg) // processes.count()), index


def packed(cfg: Config) -> packing.Packed | None:
    """Returns how this process packs its rows; None: a row a group."""
    if not cfg.batch.pack:
        return None
    samples = cfg.rollout.num_samples if cfg.stage == "grpo" else 1
    return packing.Packed(
        rows_per_pass=rows_per_pass(cfg) // processes.count(),
        num_sequences=num_rows(cfg) // processes.count() * samples,
    )


def filling(index: batching.Index) -> dict[str, tuple[float, float]]:
    """Returns (sum, count) of how full this process's rows are: `pack/fill`, the share of places
    that are computed and hold a token, and `pack/examples_per_row`."""
    return {
        "pack/fill": (index.num_tokens, index.num_places),
        "pack/examples_per_row": (len(index.rows), len(set(index.rows))),
    }


def _agree(shape: packing.RowShape) -> packing.RowShape:
    told = processes.gather(dataclasses.asdict(shape))
    shapes = [packing.RowShape(**{**x, "rope_dims": tuple(x["rope_dims"])}) for x in told]
    return packing.common_shape(shapes)


def num_rows(cfg: Config) -> int:
    """Returns the rows of a step (packed: the most): batch.groups, rounded up to whole passes over
    the devices."""
    whole = cfg.batch.rows_per_pass or cfg.mesh.rows
    return math.ceil(cfg.batch.groups / whole) * whole


def rows_per_pass(cfg: Config) -> int:
    """Returns batch.rows_per_pass where it is set or rows are packed; 0: a step is one pass."""
    return cfg.batch.rows_per_pass or (cfg.mesh.rows if cfg.batch.pack else 0)


def make_token_logps(
    cfg: Config, policy: Policy, *, temperature: float, adapters: bool = True
) -> step.TokenLogps:
    """Returns log p of the targets under the distribution that the engine samples from.

    adapters: of the policy; False: of parameters without adapters (open_reference).
    """
    return step.make_token_logps(
        policy.graphdef if adapters else policy.base_graphdef,
        temperature=temperature,
        banned_tokens=policy.banned_tokens,
        remat=cfg.model.remat,
        compute_dtype=policy.compute_dtype,
        stage=policy.stage,
        attention=functools.partial(attend, **dataclasses.asdict(cfg.attention)),
    )


def make_grpo_update(cfg: Config, policy: Policy, state: step.TrainState) -> step.TrainStep:
    """Returns the update of the config's loss, with its KL term and the engine's gap."""
    algorithm = cfg.algorithm
    loss = functools.partial(
        pick(LOSSES, algorithm.loss, "algorithm.loss"),
        clip_low=algorithm.clip_low,
        clip_high=algorithm.clip_high,
        clip_dual=algorithm.clip_dual,
    )
    mean = pick(MEANS, algorithm.loss_mean, "algorithm.loss_mean")
    return step.make_train_step(
        make_token_logps(cfg, policy, temperature=cfg.rollout.temperature),
        loss,
        make_optimizer(cfg.optimizer, cfg.run.num_steps),
        shardings=step.state_shardings(state),
        mesh=policy.mesh,
        kl=algorithm.kl if algorithm.kl_in == "loss" else 0.0,
        kl_estimator=pick(KL_ESTIMATORS, algorithm.kl_estimator, "algorithm.kl_estimator"),
        mean=functools.partial(mean, max_tokens=cfg.rollout.max_tokens),
        skip_empty=cfg.batch.pack,
    )


def make_token_kls(
    cfg: Config,
) -> Callable[[Batch, jax.Array, batching.Index], list[list[np.ndarray]]]:
    """Returns (passes, reference log p, index) -> KL estimate of every token, [rollout][sample].

    Between the engine, which is the policy that has drawn them, and the reference.
    """
    algorithm = cfg.algorithm
    estimate = jax.jit(pick(KL_ESTIMATORS, algorithm.kl_estimator, "algorithm.kl_estimator"))

    def token_kls(passes: Batch, reference_nBA: jax.Array, index: batching.Index):
        kl_nBA = estimate(passes.engine_logps, reference_nBA)
        return index.per_sample(batching.local_rows(kl_nBA))

    return token_kls


def make_sft_update(cfg: Config, policy: Policy, state: step.TrainState) -> step.TrainStep:
    """Returns the update of maximum likelihood on the reference answers."""
    return step.make_train_step(
        make_token_logps(cfg, policy, temperature=1.0),
        nll,
        make_optimizer(cfg.optimizer, cfg.run.num_steps),
        shardings=step.state_shardings(state),
        mesh=policy.mesh,
        engine_gap=False,
        skip_empty=cfg.batch.pack,
    )


def make_pass_logps(cfg: Config, policy: Policy, *, adapters: bool = True) -> step.CountedJit:
    """Returns (params, passes) -> (log p of the targets, entropy), both [n, B, A]; adapters as in
    make_token_logps."""
    temperature = cfg.rollout.temperature
    token_logps = make_token_logps(cfg, policy, temperature=temperature, adapters=adapters)
    return step.make_pass_logps(token_logps, mesh=policy.mesh, skip_empty=cfg.batch.pack)


def stop_if_not_finite(
    means: Mapping[str, float], *, number: int, save: Callable[[], None]
) -> None:
    """Raises FloatingPointError that names what is NaN or infinite, and the step.

    The update of that step has changed nothing (step.make_train_step), so the state is the one
    before it; `save` keeps it.
    """
    bad = [name for name in ("loss", "grad_norm") if not math.isfinite(means[name])]
    if bad:
        save()
        raise FloatingPointError(
            f"step {number}: {' and '.join(bad)} not finite "
            f"({', '.join(f'{name}={means[name]}' for name in bad)}); the weights of step "
            f"{number - 1} are in the run's export/. "
            "Lower optimizer.learning_rate or optimizer.max_grad_norm"
        )
