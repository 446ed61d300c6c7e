"""Qwen2: the text decoder of the VILA family, and a model of its own for text-only work.

Source: arXiv:2407.10671; transformers models/qwen2/modeling_qwen2.py (layout and numbers).
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
from longrl_jax.models.weights import Param
from longrl_jax.sharding import attend, constrain, num_parts

FOLDERS = ("",)
"""Sub-folders of a checkpoint that hold tensors."""
LLM_FOLDER = ""
"""Sub-folder that the engine opens."""
MLP_CHUNK = 16384
"""Most tokens of one device whose MLP states exist at the same time, in both directions. Six arrays
of [tokens, 18944] lived together in the backward pass of a 7B model (docs/measured.md 1.8)."""
IGNORED: tuple[str, ...] = ()
"""Starts of tensor names that we neither use nor change."""


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
    rope_theta: float
    tied: bool
    """The head is the transpose of the token table."""


def read_config(folder: Path) -> Config:
    """Reads config.json; a field that we would have to ignore is refused by name."""
    return parse_config(hf_files.read_json(folder / "config.json"), where=str(folder))


def parse_config(tree: Mapping[str, Any], *, where: str) -> Config:
    """Turns the object of a Qwen2 config.json into our record; `where` is for errors."""
    model_type = tree.get("model_type")
    if model_type != "qwen2":
        raise ValueError(f"{where}: model_type is {model_type!r}, this decoder is 'qwen2'")
    rope = hf_files.part(tree, "rope_parameters", where)
    rope = rope or hf_files.part(tree, "rope_scaling", where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        "rope_parameters.rope_type": (rope_type, "default"),
        "use_sliding_window": (tree.get("use_sliding_window") or False, False),
        "hidden_act": (tree.get("hidden_act", "silu"), "silu"),
        "quantization_config": (tree.get("quantization_config"), None),
    }
    for name, (value, wanted) in refused.items():
        if value != wanted:
            raise ValueError(f"{where}: {name}={value!r} is not supported, only {wanted!r} is")
    width, num_heads = (
        hf_files.positive_int(tree, "hidden_size", where),
        hf_files.positive_int(tree, "num_attention_heads", where),
    )
    num_kv_heads, head_dim = num_heads, width // num_heads
    if tree.get("num_key_value_heads") is not None:
        num_kv_heads = hf_files.positive_int(tree, "num_key_value_heads", where)
    if tree.get("head_dim") is not None:
        head_dim = hf_files.positive_int(tree, "head_dim", where)
    if head_dim % 2 or (tree.get("head_dim") is None and width % num_heads):
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
        rope_theta=hf_files.positive_float({**tree, **rope}, "rope_theta", 1e4, where),
        tied=bool(tree.get("tie_word_embeddings", False)),
    )


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
            raise ValueError("a text-only Qwen2 takes no media features; use a VILA checkpoint")
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
    """Grouped-query attention with rotary positions; q, k and v have biases, o has none."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        N, K, H = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        self.q = layers.Linear(cfg.width, N * H, rngs=rngs)
        self.k = layers.Linear(cfg.width, K * H, rngs=rngs)
        self.v = layers.Linear(cfg.width, K * H, rngs=rngs)
        std = 1 / math.sqrt(N * H * 2 * cfg.num_layers)  # residuals add up to order 1 at birth
        self.o = layers.Linear(N * H, cfg.width, bias=False, std=std, rngs=rngs)

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
        H, theta = self.cfg.head_dim, self.cfg.rope_theta
        q_BTNH = layers.rotate(self.q(x).reshape(B, T, -1, H), rope_pos, theta=theta)
        k_BTKH = layers.rotate(self.k(x).reshape(B, T, -1, H), rope_pos, theta=theta)
        v_BTKH = self.v(x).reshape(B, T, -1, H)
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
        "table": Param(hf + "model.embed_tokens.weight", ("vocab", "embed")),
        "layers.norm1.scale": Param(layer + "input_layernorm.weight", (None,)),
        "layers.norm2.scale": Param(layer + "post_attention_layernorm.weight", (None,)),
        "norm.scale": Param(hf + "model.norm.weight", (None,)),
    }
    for name in ("q", "k", "v"):
        at = f"{layer}self_attn.{name}_proj."
        rows[f"layers.attn.{name}.kernel"] = Param(at + "weight", ("embed", "heads"), (1, 0))
        rows[f"layers.attn.{name}.bias"] = Param(at + "bias", ("heads",))
    rows["layers.attn.o.kernel"] = Param(
        layer + "self_attn.o_proj.weight", ("heads", "embed"), (1, 0)
    )
    for name in ("gate", "up"):
        at = f"{layer}mlp.{name}_proj.weight"
        rows[f"layers.mlp.{name}.kernel"] = Param(at, ("embed", "mlp"), (1, 0))
    rows["layers.mlp.down.kernel"] = Param(layer + "mlp.down_proj.weight", ("mlp", "embed"), (1, 0))
    if not cfg.tied:
        rows["head_kernel"] = Param(hf + "lm_head.weight", ("embed", "vocab"), (1, 0))
    return {f"text.{path}": row for path, row in rows.items()}


def text_config(cfg: Config) -> Config:
    """Returns the decoder's part of a config; here the whole."""
    return cfg


def video_layout(cfg: Config) -> None:
    """A text-only model takes no video."""


def feature_width(cfg: Config, stage: str) -> int:
    """A text-only model stores no features; refuses."""
    raise ValueError(f"a text-only Qwen2 has no media stage {stage!r}; use a VILA checkpoint")
