"""Qwen2 (and 2.5), Qwen3 and Llama: the text decoder of the VILA family, and models of their own.

They differ in KINDS and in what a config.json says; the rest is one decoder.
Source: arXiv:2407.10671, 2505.09388, 2307.09288; transformers models/{qwen2,qwen3,llama}
(layout and numbers).
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from longrl_jax.models import hf_files, layers
from longrl_jax.models.rope import Rope, parse_rope, rotate
from longrl_jax.models.weights import Param
from longrl_jax.sharding import attend, constrain, num_parts

FOLDERS = ("",)
"""Sub-folders of a checkpoint that hold tensors."""
LLM_FOLDER = ""
"""Sub-folder that the engine opens."""
TEXT_MODULE = "model."
"""How names of the decoder begin inside transformers' model."""
HEAD = "lm_head.weight"
MLP_CHUNK = 16384
"""Most tokens of one device whose MLP states exist at the same time, in both directions. Six arrays
of [tokens, 18944] lived together in the backward pass of a 7B model (docs/measured.md 1.8)."""
IGNORED = ("model.layers.*.self_attn.rotary_emb.inv_freq",)
"""Patterns of tensor names that we neither use nor change: Llama-2's files hold the rates."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """What the code of a model_type fixes, without a word in config.json."""

    qkv_bias: bool = False
    qk_norm: bool = False
    head_dim: int | None = None
    """Where config.json has none; None: width / heads."""


KINDS = {
    "qwen2": Kind(qkv_bias=True),
    "qwen3": Kind(qk_norm=True, head_dim=128),
    "llama": Kind(),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a decoder, from its config.json."""

    vocab_size: int
    width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    norm_eps: float
    rope: Rope
    tied: bool
    """The head is the transpose of the token table."""
    qkv_bias: bool = True
    qk_norm: bool = False
    """Every head of q and k goes through a norm before the rotation."""


def read_config(folder: Path) -> Config:
    """Reads config.json; a field that we would have to ignore is refused by name."""
    return parse_config(hf_files.read_json(folder / "config.json"), where=str(folder))


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns the object of a config.json into our record; `where` is for errors."""
    model_type = tree.get("model_type")
    if not isinstance(model_type, str) or model_type not in KINDS:
        raise ValueError(
            f"{where}: model_type is {model_type!r}, this decoder is one of {', '.join(KINDS)}"
        )
    kind = KINDS[model_type]
    _refuse_unsupported(tree, where=where)
    width, num_heads = (
        hf_files.positive_int(tree, "hidden_size", where),
        hf_files.positive_int(tree, "num_attention_heads", where),
    )
    num_kv_heads, given = num_heads, kind.head_dim
    if tree.get("num_key_value_heads") is not None:
        num_kv_heads = hf_files.positive_int(tree, "num_key_value_heads", where)
    if tree.get("head_dim") is not None:
        given = hf_files.positive_int(tree, "head_dim", where)
    head_dim = given or width // num_heads
    if head_dim % 2 or (given is None and width % num_heads):
        raise ValueError(
            f"{where}: hidden_size={width} and num_attention_heads={num_heads} give heads of "
            f"{width / num_heads:g}, head_dim={tree.get('head_dim')}; a head must be whole and even"
        )
    if num_heads % num_kv_heads:
        raise ValueError(
            f"{where}: num_attention_heads={num_heads} is no multiple of "
            f"num_key_value_heads={num_kv_heads}"
        )
    return Config(
        vocab_size=hf_files.positive_int(tree, "vocab_size", where),
        width=width,
        num_layers=hf_files.positive_int(tree, "num_hidden_layers", where),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        mlp_width=hf_files.positive_int(tree, "intermediate_size", where),
        norm_eps=hf_files.positive_float(tree, "rms_norm_eps", 1e-6, where),
        rope=parse_rope(tree, where=where),
        tied=bool(tree.get("tie_word_embeddings", False)),
        qkv_bias=kind.qkv_bias,
        qk_norm=kind.qk_norm,
    )


def _refuse_unsupported(tree: Mapping[str, Any], *, where: str) -> None:
    kinds = tree.get("layer_types") or ["full_attention"]
    refused = {
        "use_sliding_window": (tree.get("use_sliding_window") or False, False),
        "layer_types": (next((x for x in kinds if x != "full_attention"), None), None),
        "hidden_act": (tree.get("hidden_act", "silu"), "silu"),
        "mlp_bias": (tree.get("mlp_bias") or False, False),
        "partial_rotary_factor": (tree.get("partial_rotary_factor") or 1.0, 1.0),
        "rope_interleaved": (tree.get("rope_interleaved") or False, False),
        "quantization_config": (tree.get("quantization_config"), None),
    }
    if tree["model_type"] != "qwen2":  # whose code knows no such field
        refused["attention_bias"] = (tree.get("attention_bias") or False, False)
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ValueError(f"{where}: {name}={value!r} is not supported, only {wanted!r} is")


class Model(nnx.Module):
    """A text-only model; its one part is `text`."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.text = Decoder(cfg, rngs=rngs)

    def embed(
        self,
        tokens: Int[Array, "B T"],
        is_media: Bool[Array, "B T"] | None = None,
        features: None = None,
        *,
        stage: str = "packed",
        compute_dtype: DTypeLike = jnp.float32,
    ) -> Float[Array, "B T D"]:
        """Looks the tokens up; backbones are called alike, hence the media arguments."""
        if features is not None:
            raise ValueError("a text-only model takes no media features; use a VILA checkpoint")
        return self.text.embed(tokens, compute_dtype=compute_dtype)

    def hidden(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        remat: str = "nothing",
        compute_dtype: DTypeLike = jnp.float32,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        """See Decoder.hidden."""
        return self.text.hidden(
            x,
            rope_pos,
            order,
            branch,
            segment,
            remat=remat,
            compute_dtype=compute_dtype,
            attention=attention,
        )

    def head(self) -> Float[Array, "D V"]:
        """Returns the kernel that turns hidden states into logits."""
        return self.text.head()


class Decoder(nnx.Module):
    """Token table, stacked layers, final norm and head."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        std = 1 / math.sqrt(cfg.width)  # logits of order 1 at birth, tied or not
        table_std = std if cfg.tied else 1.0  # as long as what the layers add to it
        self.table = nnx.Param(table_std * rngs.params.normal((cfg.vocab_size, cfg.width)))
        self.layers = layers.stack(cfg.num_layers, lambda r: Layer(cfg, rngs=r), rngs)
        self.norm = layers.RmsNorm(cfg.width, eps=cfg.norm_eps)
        self.head_kernel = (
            None if cfg.tied else nnx.Param(std * rngs.params.normal((cfg.width, cfg.vocab_size)))
        )

    def embed(
        self, tokens: Int[Array, "B T"], *, compute_dtype: DTypeLike = jnp.float32
    ) -> Float[Array, "B T D"]:
        """Looks the tokens up in the table."""
        # cast after the look-up: a token that stands in a row thousands of times ("\n" of every
        # frame) gets the sum of as many gradients, and in bfloat16 that sum stops growing
        x_BTD = constrain(self.table.get_value(), "vocab", None)[tokens]
        return constrain(x_BTD.astype(compute_dtype), "batch", "tokens", None)

    def hidden(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        remat: str = "nothing",
        compute_dtype: DTypeLike = jnp.float32,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        """Returns the states after the final norm.

        rope_pos only rotates; who sees whom is said by order, branch and segment (types.Batch).
        remat is a name in layers.REMAT; attention is sharding.attend, with its options set.
        """

        def apply(layer: Layer, x_BTD: Array) -> Array:
            return layer(x_BTD, rope_pos, order, branch, segment, attention=attention)

        x = constrain(x.astype(compute_dtype), "batch", "tokens", None)
        return self.norm(layers.scan(self.layers, x, apply, remat=remat))

    def head(self) -> Float[Array, "D V"]:
        """Returns the kernel that turns hidden states into logits (tied: the table's transpose)."""
        if self.head_kernel is None:
            return self.table.get_value().T
        return self.head_kernel.get_value()


class Layer(nnx.Module):
    """One decoder layer: attention and MLP, each behind a norm and beside a residual."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.norm1 = layers.RmsNorm(cfg.width, eps=cfg.norm_eps)
        self.attn = Attention(cfg, rngs=rngs)
        self.norm2 = layers.RmsNorm(cfg.width, eps=cfg.norm_eps)
        self.mlp = Mlp(cfg, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        y = self.attn(self.norm1(x), rope_pos, order, branch, segment, attention=attention)
        x = constrain(x + y, "batch", "tokens", None)
        return constrain(x + self.mlp(self.norm2(x)), "batch", "tokens", None)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; o has no bias."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q = layers.Linear(cfg.width, N * H, bias=cfg.qkv_bias, rngs=rngs)
        self.k = layers.Linear(cfg.width, K * H, bias=cfg.qkv_bias, rngs=rngs)
        self.v = layers.Linear(cfg.width, K * H, bias=cfg.qkv_bias, rngs=rngs)
        std = 1 / math.sqrt(N * H * 2 * cfg.num_layers)  # residuals add up to order 1 at birth
        self.o = layers.Linear(N * H, cfg.width, bias=False, std=std, rngs=rngs)
        self.q_norm = layers.RmsNorm(H, eps=cfg.norm_eps) if cfg.qk_norm else None
        self.k_norm = layers.RmsNorm(H, eps=cfg.norm_eps) if cfg.qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rope_pos: Int[Array, "B T"],
        order: Int[Array, "B T"],
        branch: Int[Array, "B T"],
        segment: Int[Array, "B T"],
        *,
        attention: Callable[..., Array] = attend,
    ) -> Float[Array, "B T D"]:
        B, T, _ = x.shape
        q_BTNH, k_BTKH, v_BTKH = (
            project(x).reshape(B, T, -1, self.cfg.head_dim) for project in (self.q, self.k, self.v)
        )
        if self.q_norm is not None and self.k_norm is not None:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        q_BTNH, k_BTKH = (rotate(y, rope_pos, self.cfg.rope) for y in (q_BTNH, k_BTKH))
        o_BTNH = attention(q_BTNH, k_BTKH, v_BTKH, order, branch, segment)
        return self.o(checkpoint_name(o_BTNH.reshape(B, T, -1), "attention"))


class Mlp(nnx.Module):
    """SwiGLU (arXiv:2002.05202)."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.gate = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        std = 1 / math.sqrt(cfg.mlp_width * 2 * cfg.num_layers)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=False, std=std, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        B, T, D = x.shape
        n = num_parts("tokens")
        chunks = _num_chunks(T // n)
        if chunks == 1:
            return self._apply(x)
        x_cBntD = jnp.moveaxis(x.reshape(B, n, chunks, T // n // chunks, D), 2, 0)
        graphdef, state = nnx.split(self)

        @jax.checkpoint
        def apply(state: nnx.State, x_BntD: Array) -> Array:
            x_BntD = constrain(x_BntD, "batch", "tokens", None, None)
            y_BntD = nnx.merge(graphdef, state)._apply(x_BntD)
            return constrain(y_BntD, "batch", "tokens", None, None)

        y_cBntD = jax.lax.map(functools.partial(apply, state), x_cBntD)
        return jnp.moveaxis(y_cBntD, 0, 2).reshape(B, T, D)

    def _apply(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


def _num_chunks(num_tokens: int) -> int:
    """Returns in how many equal parts the MLP takes one device's tokens: MLP_CHUNK or fewer each.

    Where no number up to twice the least divides the tokens, one part.
    """
    least = -(-num_tokens // MLP_CHUNK)
    return next((n for n in range(least, 2 * least + 1) if num_tokens % n == 0), 1)


def table(cfg: Config, *, hf: str = "") -> dict[str, Param]:
    """Returns the row of every parameter; `hf` stands before every Hugging Face name."""
    layer = hf + "model.layers.{i}."
    rows = {
        "table": Param(
            hf + "model.embed_tokens.weight",
            ("vocab", "embed"),
            copy=hf + HEAD if cfg.tied else "",
        ),
        "layers.norm1.scale": Param(layer + "input_layernorm.weight", (None,)),
        "layers.norm2.scale": Param(layer + "post_attention_layernorm.weight", (None,)),
        "norm.scale": Param(hf + "model.norm.weight", (None,)),
    }
    for name in ("q", "k", "v"):
        at = f"{layer}self_attn.{name}_proj."
        rows[f"layers.attn.{name}.kernel"] = Param(at + "weight", ("embed", "heads"), (1, 0))
        if cfg.qkv_bias:
            rows[f"layers.attn.{name}.bias"] = Param(at + "bias", ("heads",))
    for name in ("q_norm", "k_norm") if cfg.qk_norm else ():
        rows[f"layers.attn.{name}.scale"] = Param(f"{layer}self_attn.{name}.weight", (None,))
    rows["layers.attn.o.kernel"] = Param(
        layer + "self_attn.o_proj.weight", ("heads", "embed"), (1, 0)
    )
    for name in ("gate", "up"):
        at = f"{layer}mlp.{name}_proj.weight"
        rows[f"layers.mlp.{name}.kernel"] = Param(at, ("embed", "mlp"), (1, 0))
    rows["layers.mlp.down.kernel"] = Param(layer + "mlp.down_proj.weight", ("mlp", "embed"), (1, 0))
    if not cfg.tied:
        rows["head_kernel"] = Param(hf + HEAD, ("embed", "vocab"), (1, 0))
    return {f"text.{path}": row for path, row in rows.items()}


def text_config(cfg: Config) -> Config:
    """Returns the decoder's part of a config; here the whole."""
    return cfg


def media_layout(cfg: Config) -> None:
    """A text-only model takes no video."""


def feature_width(cfg: Config, stage: str) -> int:
    """A text-only model stores no features; refuses."""
    raise ValueError(f"a text-only model has no media stage {stage!r}; use a VILA checkpoint")
