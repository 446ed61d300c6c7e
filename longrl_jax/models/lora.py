"""LoRA: a trained change of low rank beside every frozen kernel of the language model.

Source: arXiv:2106.09685 section 4.1; huggingface/peft (start, names and files of an adapter).
A kernel W [i, o] acts as W + scale * a @ b, with a [i, r], b [r, o] and scale = alpha / r.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from longrl_jax.models import arrays_of, decoder, hf_files, layers, weights, write_whole
from longrl_jax.models.weights import Merged, Param

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
"""Files of an adapter, as peft calls them."""
PEFT = "base_model.model."
"""How peft's names begin; the rest is the module's name in transformers' model."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lora:
    """Which kernels have adapters, and of which rank."""

    rank: int
    alpha: float
    targets: tuple[str, ...]
    """Names of kernels of a decoder layer: q, k, v, o, gate, up, down."""

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def table(backbone: ModuleType, cfg: Any, lora: Lora) -> dict[str, Param]:
    """Returns the row of every a and b, with peft's names."""
    rows = {}
    for path, row in decoder.table(backbone.text_config(cfg)).items():
        stem, _, leaf = path.rpartition(".")
        if leaf != "kernel" or stem.rpartition(".")[2] not in lora.targets:
            continue
        module = row.hf.removesuffix(".weight").replace(decoder.TEXT_MODULE, backbone.TEXT_MODULE)
        dim_in, dim_out = row.dims
        rank_a, rank_b = (None if dim == "embed" else "rank" for dim in row.dims)
        for name, hf, dims in (("a", "A", (dim_in, rank_a)), ("b", "B", (rank_b, dim_out))):
            at = f"{PEFT}{module}.lora_{hf}.weight"
            rows[f"{stem}.lora.{name}"] = Param(at, dims, transpose=(1, 0))
    return rows


def shapes(
    model: nnx.Module, rows: Mapping[str, Param], lora: Lora, mesh: jax.sharding.Mesh | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns {path: float32 shape} of every a and b, with its place on the mesh."""
    kernels, out = arrays_of(model), {}
    for path in rows:
        stem, _, name = path.rpartition(".lora.")
        num_layers, width_in, width_out = kernels[f"{stem}.kernel"].shape
        if lora.rank > min(width_in, width_out):
            raise ValueError(
                f"model.lora_rank={lora.rank} is over the rank of {stem}, a kernel of {width_in} x "
                f"{width_out}; lower it, or take it out of model.lora_targets"
            )
        pair = (width_in, lora.rank) if name == "a" else (lora.rank, width_out)
        out[path] = jax.ShapeDtypeStruct((num_layers, *pair), jnp.float32)
    if mesh is None:
        return out
    places = weights.shardings(out, rows, mesh)
    return {
        path: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[path])
        for path, x in out.items()
    }


def start(wanted: Mapping[str, jax.ShapeDtypeStruct], *, seed: int) -> dict[str, jax.Array]:
    """Returns the arrays of `shapes`, in their places: a uniform within 1 / sqrt(i), b zero.

    So the model is its base at first. Source: peft LoraLayer.reset_lora_parameters
    (kaiming_uniform_ with a=sqrt(5)). The numbers depend on no mesh.
    """

    def make() -> dict[str, jax.Array]:
        out, key = {}, jax.random.key(seed)
        for n, (path, x) in enumerate(wanted.items()):
            out[path] = jnp.zeros(x.shape, x.dtype)
            if path.endswith(".a"):
                bound = 1 / math.sqrt(x.shape[-2])
                mine = jax.random.fold_in(key, n)
                out[path] = jax.random.uniform(mine, x.shape, x.dtype, -bound, bound)
        return out

    return jax.jit(make, out_shardings={path: x.sharding for path, x in wanted.items()})()


def attach(model: nnx.Module, arrays: Mapping[str, Any], lora: Lora) -> None:
    """Puts adapters of these arrays (or shapes) beside the kernels of a model."""
    for path in arrays:
        stem, _, name = path.rpartition(".lora.")
        if name == "a":
            linear: Any = model
            for part in stem.split("."):
                linear = getattr(linear, part)
            linear.lora = layers.Adapter(arrays[path], arrays[f"{stem}.lora.b"], scale=lora.scale)


def base(params: nnx.State) -> nnx.State:
    """Returns the parameters but adapters: those of the model with adapters off, uncopied."""
    _, others = nnx.split_state(params, nnx.LoRAParam, ...)
    return others


def merged(params: nnx.State, lora: Lora | None) -> dict[str, Any]:
    """Returns {path: array} of the model without adapters that computes the same.

    Nothing is computed here: a kernel with an adapter is a weights.Merged, which an export or a
    push turns into an array layer by layer. None: there are no adapters.
    """
    arrays: dict[str, Any] = weights.by_path(params)
    if lora is None:
        return arrays
    out = {}
    for path, x in weights.by_path(base(params)).items():
        stem = path.removesuffix(".kernel")
        a, b = (arrays.get(f"{stem}.lora.{name}") for name in "ab")
        out[path] = x if a is None else Merged(x, a, b, lora.scale)
    return out


def save(
    folder: Path,
    params: nnx.State,
    backbone: ModuleType,
    cfg: Any,
    lora: Lora,
    *,
    base_folder: Path,
) -> None:
    """Writes the adapters alone as a folder that peft opens, of float32 tensors; it appears whole.

    base_folder: of the language model that they change, as `transformers` opens it.
    """
    tree = peft_config(backbone, lora, base_folder=str(base_folder))

    def write(partial: Path) -> None:
        arrays, rows = _adapters(params, backbone, cfg, lora)
        specs, tensors = weights.specs(arrays, rows), weights.to_hf(arrays, rows)
        hf_files.write_tensors(partial, specs, tensors, shard_size_bytes=sys.maxsize)  # one file
        (partial / hf_files.SINGLE).rename(partial / TENSORS)
        (partial / CONFIG).write_text(json.dumps(tree, indent=2) + "\n")

    write_whole(folder, write)


def tensors_of(params: nnx.State, backbone: ModuleType, cfg: Any, lora: Lora) -> Any:
    """Yields (peft's name, array on the host) of every adapter; all processes gather together."""
    return weights.to_hf(*_adapters(params, backbone, cfg, lora))


def _adapters(
    params: nnx.State, backbone: ModuleType, cfg: Any, lora: Lora
) -> tuple[dict[str, Any], weights.Table]:
    rows, arrays = table(backbone, cfg, lora), weights.by_path(params)
    return {path: arrays[path] for path in rows}, rows


def peft_config(backbone: ModuleType, lora: Lora, *, base_folder: str) -> dict[str, Any]:
    """Returns what adapter_config.json says: peft's LoraConfig."""
    names = [f"{name}_proj" for name in lora.targets]
    targets: list[str] | str = names
    if backbone.TEXT_MODULE != decoder.TEXT_MODULE:  # a tower beside it has modules of these names
        start = backbone.TEXT_MODULE.replace(".", r"\.")
        targets = rf"{start}layers\.\d+\.\w+\.({'|'.join(names)})"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_folder,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha.is_integer() else lora.alpha,  # as peft's
        "target_modules": targets,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
