"""Our update (step.py) on group rows, with its results by Hugging Face name."""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tiny_groups import scatter
from torch_side import CLIP, KL, TEMPERATURE, Numbers

from longrl_jax import models, step
from longrl_jax.batching import make_batch, place, split_passes
from longrl_jax.losses import LOSSES, low_variance_kl, nll
from longrl_jax.models import weights
from longrl_jax.sharding import make_mesh


@dataclasses.dataclass(frozen=True)
class Result:
    """What an update said and left."""

    loss: float
    tokens: int
    logps: list[list[np.ndarray]]
    rows: tuple[int, ...]
    """Row of each group."""
    state: step.TrainState
    by_name: Any
    """A tree of the trained parameters' paths -> {Hugging Face name: array}."""


def keep_gradient() -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""

    def zeros(params: Any) -> Any:
        return jax.tree.map(jnp.zeros_like, params)

    return optax.GradientTransformation(zeros, lambda grads, _, params: (zeros(grads), grads))


def run_update(
    folder: Path,
    numbers: Numbers,
    optimizer: optax.GradientTransformation,
    *,
    layout: Mapping[str, Any],
    rows_per_pass: int = 0,
    dtype: str = "float32",
    loss: str = "clipped",
) -> Result:
    """One update of everything behind numbers.stage.

    layout: num_rows, num_shards and more of make_batch; dtype: of products, if float64 of
    parameters, too; loss: "clipped", with a KL term, or "nll".
    """
    num_shards = layout["num_shards"]
    mesh = make_mesh(seq=num_shards, devices=jax.devices()[:num_shards])
    cfg, model = models.load(folder, mesh=mesh)
    wide = jnp.promote_types(dtype, "float32")
    graphdef, params = nnx.split(model)
    model = nnx.merge(graphdef, jax.tree.map(lambda x: x.astype(wide), params))
    frozen = ("vision",) if hasattr(model, "vision") else ()
    frozen += ("projector",) if numbers.stage == "projected" else ()
    graphdef, state = step.init_state(model, frozen, optimizer, mesh)
    batch, index = make_batch(
        numbers.groups,
        features=numbers.features,
        advantages=numbers.advantage,
        smallest_bucket=2 * num_shards,
        max_row_tokens=200,
        **layout,
    )
    passes = place(split_passes(batch, rows_per_pass), mesh)

    def placed(values: list[list[np.ndarray]]) -> jax.Array:
        array = scatter(index, values, batch.targets.shape).reshape(passes.targets.shape)
        return jnp.asarray(array, wide)

    token_logps = step.make_token_logps(
        graphdef,
        temperature=TEMPERATURE,
        banned_tokens=numbers.banned,
        compute_dtype=dtype,
        stage=numbers.stage,
        head_chunk=4,
    )
    clipped = loss == "clipped"
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
    assert logps.dtype == wide
    reference = placed(numbers.reference) if clipped else None
    old = placed(numbers.old) if clipped else None
    new, stats = train_step(state, passes, reference, old)
    assert stats["finite/grad_norm"] == (1, 1)
    table = models.backbone_of(folder).table(cfg)

    def by_name(tree: Any) -> dict[str, np.ndarray]:
        arrays = weights.by_path(tree)
        return dict(weights.to_hf(arrays, {path: table[path] for path in arrays}))

    return Result(
        loss=float(stats["loss"][0]),
        tokens=int(stats["tokens"][0]),
        logps=index.per_sample(np.asarray(logps)),
        rows=index.rows,
        state=new,
        by_name=by_name,
    )
