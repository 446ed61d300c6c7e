"""Layers that the backbones share, and the scan over stacked layers.

Parameters are float32. A layer computes in the type of its input; norms, rotation and softmax in
at least float32 (`wide`).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

REMAT: dict[str, Callable[..., Any]] = {
    "nothing": jax.checkpoint_policies.nothing_saveable,
    "attention": jax.checkpoint_policies.save_only_these_names("attention"),
    "everything": jax.checkpoint_policies.everything_saveable,
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["layer_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
"""What a layer keeps for the backward pass, by the name in model.remat. "offload" keeps as much as
"nothing", the layer's input, but in the host's memory."""


class Linear(nnx.Module):
    """x @ kernel + bias; the kernel is [in, out], the transpose of torch's weight."""

    def __init__(
        self,
        width_in: int,
        width_out: int,
        *,
        bias: bool = True,
        std: float | None = None,
        rngs: nnx.Rngs,
    ):
        """std: of the random kernel; None: 1 / sqrt(width_in)."""
        std = 1 / math.sqrt(width_in) if std is None else std
        self.kernel = nnx.Param(std * rngs.params.normal((width_in, width_out)))
        self.bias = nnx.Param(jnp.zeros(width_out)) if bias else None
        self.lora: Adapter | None = nnx.data(None)  # models.lora.attach sets it

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        y = x @ self.kernel.get_value().astype(x.dtype)
        if self.lora is not None:
            y += self.lora(x)
        return y if self.bias is None else y + self.bias.get_value().astype(x.dtype)


class Adapter(nnx.Module):
    """scale * x @ a @ b: a trained change, of low rank, of the kernel that it stands beside.

    Source: LoRA, arXiv:2106.09685 section 4.1.
    """

    def __init__(self, a: Float[Array, "... i r"], b: Float[Array, "... r o"], *, scale: float):
        self.a = nnx.LoRAParam(a)
        self.b = nnx.LoRAParam(b)
        self.scale = scale

    def __call__(self, x: Float[Array, "... i"]) -> Float[Array, "... o"]:
        x_r = self.scale * (x @ self.a.get_value().astype(x.dtype))
        return x_r @ self.b.get_value().astype(x.dtype)


class RmsNorm(nnx.Module):
    """Source: transformers Qwen2RMSNorm: the scale is applied in the type of the input."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... S"]) -> Float[Array, "... S"]:
        y = wide(x)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return y.astype(x.dtype) * self.scale.get_value().astype(x.dtype)


class LayerNorm(nnx.Module):
    """torch.nn.LayerNorm over the last dim."""

    def __init__(self, width: int, *, eps: float):
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width))
        self.bias = nnx.Param(jnp.zeros(width))

    def __call__(self, x: Float[Array, "... S"]) -> Float[Array, "... S"]:
        y = wide(x)
        y = y - y.mean(axis=-1, keepdims=True)
        y = y * jax.lax.rsqrt(jnp.square(y).mean(axis=-1, keepdims=True) + self.eps)
        return (y * self.scale.get_value() + self.bias.get_value()).astype(x.dtype)


def wide(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns x in float32, or float64 where it is that already."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def full_attention(
    q: Float[Array, "F T N H"], k: Float[Array, "F T N H"], v: Float[Array, "F T N H"]
) -> Float[Array, "F T N H"]:
    """Every token of a frame sees every other one; frames do not see each other."""
    score_FNTS = jnp.einsum("FTNH,FSNH->FNTS", q, k, preferred_element_type=wide(q).dtype)
    weight_FNTS = jax.nn.softmax(score_FNTS / math.sqrt(q.shape[-1]), axis=-1)
    return jnp.einsum("FNTS,FSNH->FTNH", weight_FNTS.astype(v.dtype), v)


def stack(num_layers: int, make: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs) -> Any:
    """Returns one module whose parameters hold num_layers layers on dim 0."""

    @nnx.split_rngs(splits=num_layers)
    @nnx.vmap(in_axes=0, out_axes=0, transform_metadata={nnx.PARTITION_NAME: None})
    def make_all(layer_rngs: nnx.Rngs) -> nnx.Module:
        return make(layer_rngs)

    return make_all(rngs)


def scan(
    layers: Any,
    x: Array,
    apply: Callable[[Any, Array], Array],
    *,
    remat: str = "nothing",
    num_layers: int | None = None,
) -> Array:
    """Folds x through the stacked layers; only the first num_layers of them where it is given.

    One layer is compiled, whatever their number. remat is a name in REMAT.
    """
    if remat not in REMAT:
        raise ValueError(f"model.remat={remat!r} is unknown; choose one of {', '.join(REMAT)}")
    graphdef, state = nnx.split(layers)

    def body(x: Array, layer: nnx.State) -> tuple[Array, None]:
        return apply(nnx.merge(graphdef, layer), checkpoint_name(x, "layer_input")), None

    def body_at(x: Array, i: Array) -> tuple[Array, None]:
        # by index: a slice of the stack would copy all the weights
        return body(x, jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i, 0, False), state))

    if num_layers is not None:
        return jax.lax.scan(body_at, x, jnp.arange(num_layers))[0]
    body = jax.checkpoint(body, policy=REMAT[remat], prevent_cse=False)
    return jax.lax.scan(body, x, state)[0]
