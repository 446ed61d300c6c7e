"""SigLIP vision tower, as the VILA family uses it: no class token, no pooling head.

Source: arXiv:2303.15343; transformers models/siglip/modeling_siglip.py (layout and numbers).
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from longrl_jax.models import hf_files, layers
from longrl_jax.models.weights import Param
from longrl_jax.sharding import constrain

PUBLISHED_PREFIX = "vision_model."
"""Starts the tensor names of published towers; transformers from 5.0 saves them without."""
UNUSED = ("head.", "embeddings.position_ids")
"""Tensors of a tower that we do not use: kept as they are by an export."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of a tower, from its config.json."""

    image_size: int
    """Side of the pictures that the tower sees, in pixels."""
    patch_size: int
    num_channels: int
    width: int
    num_layers: int
    num_heads: int
    mlp_width: int
    norm_eps: float
    table_size: int = 0
    """Rows of the position table, which is re-sampled; 0: one a patch."""

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size


def parse_config(tree: Mapping[str, Any], *, where: str, resolution: int | None = None) -> Config:
    """Turns the object of a SigLIP vision config.json into our record; `where` is for errors.

    resolution: side of the pictures, in pixels, where it is not the file's image_size.
    """
    model_type = tree.get("model_type")
    if model_type not in ("siglip_vision_model", "siglip"):
        raise ValueError(f"{where}: model_type is {model_type!r}, this is 'siglip_vision_model'")
    tree = hf_files.part(tree, "vision_config", where) or tree
    if (act := tree.get("hidden_act", "gelu_pytorch_tanh")) != "gelu_pytorch_tanh":
        raise ValueError(f"{where}: hidden_act={act!r} is not supported, only gelu_pytorch_tanh is")
    image_size = hf_files.positive_int(tree, "image_size", where)
    patch_size = hf_files.positive_int(tree, "patch_size", where)
    cfg = Config(
        image_size=resolution or image_size,
        patch_size=patch_size,
        num_channels=tree.get("num_channels", 3),
        width=hf_files.positive_int(tree, "hidden_size", where),
        num_layers=hf_files.positive_int(tree, "num_hidden_layers", where),
        num_heads=hf_files.positive_int(tree, "num_attention_heads", where),
        mlp_width=hf_files.positive_int(tree, "intermediate_size", where),
        norm_eps=hf_files.positive_float(tree, "layer_norm_eps", 1e-6, where),
        table_size=(image_size // patch_size) ** 2 if resolution else 0,
    )
    if cfg.patch_size > (side := min(image_size, cfg.image_size)):
        raise ValueError(
            f"{where}: patch_size={cfg.patch_size} is over image_size={side}: no patch"
        )
    if cfg.num_channels != 3:
        raise ValueError(f"{where}: num_channels={cfg.num_channels}, video frames have 3")
    if cfg.width % cfg.num_heads:
        raise ValueError(
            f"{where}: hidden_size={cfg.width} does not split over "
            f"num_attention_heads={cfg.num_heads}"
        )
    return cfg


class Tower(nnx.Module):
    """Patches, learned positions, stacked layers and the final norm."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.cfg = cfg
        p, C = cfg.patch_size, cfg.num_channels
        std = 1 / math.sqrt(p * p * C)
        self.patch_kernel = nnx.Param(std * rngs.params.normal((p, p, C, cfg.width)))
        self.patch_bias = nnx.Param(jnp.zeros(cfg.width))
        self.positions = nnx.Param(
            rngs.params.normal((cfg.table_size or cfg.grid**2, cfg.width)) / math.sqrt(cfg.width)
        )
        self.layers = layers.stack(cfg.num_layers, lambda r: Layer(cfg, rngs=r), rngs)
        self.norm = layers.LayerNorm(cfg.width, eps=cfg.norm_eps)

    def __call__(
        self, pixels: Float[Array, "F Y X 3"], *, num_layers: int | None = None
    ) -> Float[Array, "F n C"]:
        """Returns the patch states after the first num_layers layers, without the final norm.

        With num_layers=None: after all layers and the final norm. Numbers are of pixels' type.
        """
        x_FnC = constrain(self.embed(pixels), "frames", None, None)
        x_FnC = layers.scan(
            self.layers,
            x_FnC,
            lambda layer, x: constrain(layer(x), "frames", None, None),
            num_layers=self.cfg.num_layers if num_layers is None else num_layers,
        )
        return self.norm(x_FnC) if num_layers is None else x_FnC

    def embed(self, pixels: Float[Array, "F Y X 3"]) -> Float[Array, "F n C"]:
        """Cuts frames into patches (rows left out at the bottom and right), adds positions."""
        F, p, n = pixels.shape[0], self.cfg.patch_size, self.cfg.grid
        if pixels.shape[1:] != (self.cfg.image_size, self.cfg.image_size, 3):
            raise ValueError(
                f"frames are {pixels.shape[1:]}, the tower wants {self.cfg.image_size} px squares "
                "of 3 channels; resize them first"
            )
        patches = pixels[:, : n * p, : n * p].reshape(F, n, p, n, p, 3)
        kernel = self.patch_kernel.get_value().astype(pixels.dtype)
        x_FnnC = jnp.einsum("Fyaxbc,abcC->FyxC", patches, kernel)
        x_FnC = x_FnnC.reshape(F, n * n, -1) + self.patch_bias.get_value().astype(pixels.dtype)
        positions = resample(self.positions.get_value(), self.cfg.grid**2)
        return x_FnC + positions.astype(pixels.dtype)


def resample(table: Float[Array, "M C"], num_positions: int) -> Float[Array, "n C"]:
    """Spreads a position table over another number of patches, linearly along the flat index.

    Source: NVlabs/VILA multimodal_encoder/vision_encoder.py, interpolate_mode "linear". There a
    place that falls on a row of the table (the first, the last) becomes 0; here it is that row.
    """
    M = table.shape[0]
    if num_positions == M:
        return table
    place = np.arange(num_positions, dtype=np.float64) / max(num_positions - 1, 1) * (M - 1)
    low = np.minimum(np.floor(place).astype(np.int32), M - 1)
    share_n1 = jnp.asarray(place - low, table.dtype)[:, None]
    return table[low] * (1 - share_n1) + table[np.minimum(low + 1, M - 1)] * share_n1


class Layer(nnx.Module):
    """One encoder layer: attention inside a frame and MLP, each behind a norm."""

    def __init__(self, cfg: Config, *, rngs: nnx.Rngs):
        self.num_heads = cfg.num_heads
        self.norm1 = layers.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.q = layers.Linear(cfg.width, cfg.width, rngs=rngs)
        self.k = layers.Linear(cfg.width, cfg.width, rngs=rngs)
        self.v = layers.Linear(cfg.width, cfg.width, rngs=rngs)
        self.o = layers.Linear(cfg.width, cfg.width, rngs=rngs)
        self.norm2 = layers.LayerNorm(cfg.width, eps=cfg.norm_eps)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, rngs=rngs)

    def __call__(self, x: Float[Array, "F n C"]) -> Float[Array, "F n C"]:
        F, n, C = x.shape
        y = self.norm1(x)
        q, k, v = (f(y).reshape(F, n, self.num_heads, -1) for f in (self.q, self.k, self.v))
        x = x + self.o(layers.full_attention(q, k, v).reshape(F, n, C))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x)), approximate=True))


def table(cfg: Config, *, hf: str) -> dict[str, Param]:
    """Returns the row of every parameter; `hf` stands before every Hugging Face name."""
    layer = hf + "encoder.layers.{i}."
    rows = {
        "patch_kernel": Param(
            hf + "embeddings.patch_embedding.weight", (None, None, None, "embed"), (2, 3, 1, 0)
        ),
        "patch_bias": Param(hf + "embeddings.patch_embedding.bias", (None,)),
        "positions": Param(hf + "embeddings.position_embedding.weight", (None, "embed")),
        "norm.scale": Param(hf + "post_layernorm.weight", (None,)),
        "norm.bias": Param(hf + "post_layernorm.bias", (None,)),
    }
    for norm in ("norm1", "norm2"):
        at = f"{layer}layer_{norm}."
        rows[f"layers.{norm}.scale"] = Param(at + "weight", (None,))
        rows[f"layers.{norm}.bias"] = Param(at + "bias", (None,))
    kernels = {
        "q": ("self_attn.q_proj.", ("embed", "heads")),
        "k": ("self_attn.k_proj.", ("embed", "heads")),
        "v": ("self_attn.v_proj.", ("embed", "heads")),
        "o": ("self_attn.out_proj.", ("heads", "embed")),
        "up": ("mlp.fc1.", ("embed", "mlp")),
        "down": ("mlp.fc2.", ("mlp", "embed")),
    }
    for name, (at, dims) in kernels.items():
        rows[f"layers.{name}.kernel"] = Param(layer + at + "weight", dims, (1, 0))
        bias_dim = None if dims[1] == "embed" else dims[1]
        rows[f"layers.{name}.bias"] = Param(layer + at + "bias", (bias_dim,))
    return {f"vision.{path}": row for path, row in rows.items()}
