"""Backbones: a checkpoint folder to a model on the mesh, and back."""

import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from longrl_jax.models import decoder, hf_files, qwen2_5_vl, vila, weights
from longrl_jax.models.weights import to_host as to_host
from longrl_jax.platform import disk_error

BACKBONES: dict[str, ModuleType] = {
    **dict.fromkeys(decoder.KINDS, decoder),
    "qwen2_5_vl": qwen2_5_vl,
    "llava_llama": vila,
    "vila": vila,
}
"""model_type of a config.json -> the module that knows it."""
Parameters = nnx.Module | nnx.State | Mapping[str, Any]
"""A model, its state, or {path: array or weights.Merged}."""
COPIED = (".json", ".jinja", ".txt", ".md", ".model", "")
"""Ends of the files that an export takes over as they are."""
BAR_DELAY_S = 3
"""Seconds before loading shows a progress bar."""


def backbone_of(source: Path | str | Mapping[str, Any], *, where: str = "") -> ModuleType:
    """Returns the module that understands a checkpoint folder, or the object of a config.json."""
    if not isinstance(source, Mapping):
        where = f"{source}/config.json"
        source = hf_files.read_json(Path(source) / "config.json")
    model_type = source.get("model_type")
    if not isinstance(model_type, str) or model_type not in BACKBONES:
        raise ValueError(
            f"{where}: model_type={model_type!r} is unknown; "
            f"choose a checkpoint of {', '.join(sorted(BACKBONES))}"
        )
    return BACKBONES[model_type]


def find_folder(path: Path | str) -> Path:
    """Returns the Hugging Face folder that a path means: itself, or huggingface/ in a checkpoint of
    Long-RL or EasyR1 (.../global_step_N, or its actor/).

    Raises ValueError where that holds no weights yet: theirs are pickled, which may run code, and
    are never opened.
    """
    path = Path(path)
    inside = ("huggingface", "actor/huggingface")
    folder = next((path / sub for sub in inside if (path / sub / "config.json").is_file()), path)
    steps = sorted(path.glob("global_step_*"), key=lambda step: (len(step.name), step.name))
    if steps and not (path / "config.json").exists():
        raise ValueError(f"{path} holds {len(steps)} checkpoints; name one of them: {steps[-1]}")
    pickles = sorted(folder.parent.glob("model_world_size_*_rank_*.pt"))
    if folder.name == "huggingface" and pickles and not any(folder.rglob("*.safetensors")):
        raise ValueError(
            f"{folder} holds no weights yet, they are in {pickles[0].name} beside it, which may "
            "run code and is never opened here; merge them in Long-RL or EasyR1 first: python3 "
            f"scripts/model_merger.py --local_dir {folder.parent}"
        )
    return folder


def load(folder: Path | str, *, mesh: jax.sharding.Mesh | None = None) -> tuple[Any, Any]:
    """Returns (config, model) of a checkpoint folder; parameters are float32, placed on the mesh,
    of which every process reads its own part.

    Raises ValueError for whatever a table does not account for: a missing or left-over tensor, a
    wrong shape, a NaN.
    """
    folder = Path(folder)
    backbone = backbone_of(folder)
    cfg = backbone.read_config(folder)
    graphdef, abstract = nnx.split(nnx.eval_shape(lambda: backbone.Model(cfg, rngs=nnx.Rngs(0))))
    table = backbone.table(cfg)
    tensors = hf_files.open_tensors(folder, backbone.FOLDERS)
    rows: Iterator[tuple[str, Any]]
    if mesh is None:
        rows = weights.from_hf(abstract, table, tensors, ignored=backbone.IGNORED)
    else:
        places = weights.shardings(abstract, table, mesh)
        rows = weights.placed(abstract, table, tensors, places, ignored=backbone.IGNORED)
    bar = tqdm(rows, desc="parameters", total=len(table), delay=BAR_DELAY_S, leave=False)
    try:
        arrays: dict[str, jax.Array] = {
            path: x if isinstance(x, jax.Array) else jax.numpy.asarray(x) for path, x in bar
        }
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from None
    return cfg, nnx.merge(graphdef, weights.with_arrays(abstract, arrays))


def read_shape(path: Path | str) -> tuple[ModuleType, Any]:
    """Returns (backbone, config) of a checkpoint folder, with or without tensors, or of a
    config.json alone (for VILA one that holds the parts' configs, as `convert init` takes)."""
    path = find_folder(path)
    if path.is_dir():
        backbone = backbone_of(path)
        return backbone, backbone.read_config(path)
    tree = hf_files.read_json(path)
    backbone = backbone_of(tree, where=str(path))
    return backbone, backbone.parse_config(tree, where=str(path))


def abstract(backbone: ModuleType, cfg: Any, *, mesh: jax.sharding.Mesh) -> Any:
    """Returns the model that `load` would, of float32 shapes and places alone; reads no tensor."""
    model = nnx.eval_shape(lambda: backbone.Model(cfg, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model)
    places = weights.shardings(state, backbone.table(cfg), mesh)
    arrays = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=places[name])
        for name, x in weights.by_path(state).items()
    }
    return nnx.merge(graphdef, weights.with_arrays(state, arrays))


def save(
    folder: Path | str,
    model: Parameters,
    cfg: Any,
    source_folder: Path | str,
    *,
    dtype: np.dtype | None = None,
    shard_size_bytes: int = hf_files.SHARD_SIZE_BYTES,
) -> None:
    """Writes a checkpoint folder that `transformers`, vLLM and `load` read.

    Everything but our tensors is copied from source_folder: configs, tokenizer, and tensors that
    we do not use. A tensor has the type that it has there, or `dtype`. The folder appears whole or
    not at all.
    """
    folder, source = Path(folder), Path(source_folder)
    backbone = backbone_of(source)
    tensors = hf_files.open_tensors(source, backbone.FOLDERS)
    table, arrays = backbone.table(cfg), arrays_of(model)

    def write(partial: Path) -> None:
        copy_text_files(source, partial, {sub: sub for sub in ("", *backbone.FOLDERS)})
        if dtype is not None:
            set_dtype(partial, ("", *backbone.FOLDERS), dtype)
        write_parts(
            partial,
            backbone,
            table,
            arrays,
            dtype_of=lambda name: dtype or tensors[name].dtype,
            source=tensors,
            shard_size_bytes=shard_size_bytes,
        )

    write_whole(folder, write)


def llm_folder(folder: Path | str) -> Path:
    """Returns the sub-folder that the engine opens: the language model with its tokenizer."""
    return Path(folder) / backbone_of(folder).LLM_FOLDER


def llm_weights(model: Parameters, cfg: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yields (name inside llm_folder, float32 array on the host), layer after layer.

    Always with lm_head.weight: vLLM keeps a packed copy of it, tied or not (docs/measured.md 2.5).
    """
    return weights.to_hf(*_text_rows(model, cfg), copies={decoder.HEAD})


def feature_stage(frozen: Sequence[str]) -> str:
    """Returns the deepest frozen stage: its output is stored, what follows runs in the step."""
    return "projected" if "projector" in frozen else "packed"


def stage_weights(params: nnx.State, stage: str) -> dict[str, Any]:
    """Returns {path: array} of every parameter that a stored feature of `stage` depends on."""
    parts = ("vision.", "projector.") if stage == "projected" else ("vision.",)
    return {p: x for p, x in weights.by_path(params).items() if p.startswith(parts)}


def input_weights(params: nnx.State, stage: str) -> dict[str, Any]:
    """Returns {path: array} of every parameter between a token or a stored feature of `stage` and
    the language model's input."""
    parts = ("text.table",) if stage == "projected" else ("text.table", "projector.")
    return {p: x for p, x in weights.by_path(params).items() if p.startswith(parts)}


def write_parts(
    folder: Path,
    backbone: ModuleType,
    table: weights.Table,
    arrays: Mapping[str, weights.Leaf],
    *,
    dtype_of: Callable[[str], np.dtype] | None = None,
    source: Mapping[str, hf_files.Stored] | None = None,
    shard_size_bytes: int = hf_files.SHARD_SIZE_BYTES,
) -> None:
    """Writes every tensor of a model in the sub-folders of its backbone, and those of `source`
    that the model does not use."""
    weights.check_same_keys(arrays, table)  # below, each sub-folder sees its own rows only
    for sub in backbone.FOLDERS:
        start = f"{sub}/" if sub else ""
        rows, ours = _below(start, table, arrays)
        unused = {
            name: x
            for name, x in (source or {}).items()
            if name.startswith(start) and weights.matches(name, backbone.IGNORED)
        }
        specs = [
            *weights.specs(ours, rows, dtype_of=dtype_of, copies=source or ()),
            *(hf_files.Spec(name, x.dtype, x.shape) for name, x in unused.items()),
        ]
        tensors = itertools.chain(
            weights.to_hf(ours, rows, dtype_of=dtype_of, copies=source or ()),
            ((name, x[...]) for name, x in unused.items()),
        )
        hf_files.write_tensors(
            folder / sub,
            [dataclasses.replace(spec, name=spec.name.removeprefix(start)) for spec in specs],
            ((name.removeprefix(start), x) for name, x in tensors),
            shard_size_bytes=shard_size_bytes,
        )


def follow_save(model: Parameters, cfg: Any) -> None:
    """Gathers, in the other processes of a run, what `save` gathers in the one that writes."""
    backbone = next(b for b in BACKBONES.values() if isinstance(cfg, b.Config))
    for sub in backbone.FOLDERS:
        rows, ours = _below(f"{sub}/" if sub else "", backbone.table(cfg), arrays_of(model))
        for _ in weights.to_hf(ours, rows):
            pass


def _below(
    start: str, table: weights.Table, arrays: Mapping[str, weights.Leaf]
) -> tuple[weights.Table, Mapping[str, weights.Leaf]]:
    """Returns the rows whose HF names begin so, and their arrays."""
    rows = {path: row for path, row in table.items() if row.hf.startswith(start)}
    return rows, {path: arrays[path] for path in rows}


def write_whole(folder: Path, write: Callable[[Path], None], *, resumes: bool = False) -> None:
    """Calls write(temporary folder) and renames that to `folder`, which must be new or empty.

    resumes: `write` goes on with what an interrupted call has left in the temporary folder.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file, a checkpoint is a folder; name a new one")
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} exists and is not empty; name a new folder or remove it")
    partial = folder.with_name(f".{folder.name}.partial")
    if not resumes:
        shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        write(partial)
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException as error:
        keeps = (
            resumes and not isinstance(error, ValueError) and any(partial.rglob("*.safetensors"))
        )
        way_out = "free some space, or name a folder on another disk"
        if keeps:
            way_out += f" (finished files are kept in {partial}: the same command goes on)"
        said = disk_error(error, folder, way_out) if isinstance(error, OSError) else None
        if not keeps:
            shutil.rmtree(partial, ignore_errors=True)
        if said is None:
            raise
        raise said from error


def arrays_of(model: Parameters) -> dict[str, Any]:
    """Returns {path: array} of every parameter of a model, or of its state."""
    if isinstance(model, nnx.Module):
        model = nnx.state(model, nnx.Param)
    return weights.by_path(model) if isinstance(model, nnx.State) else dict(model)


def text_config(cfg: Any) -> decoder.Config:
    """Returns the language model's part of a backbone's config."""
    return next(b for b in BACKBONES.values() if isinstance(cfg, b.Config)).text_config(cfg)


def _text_rows(model: Parameters, cfg: Any) -> tuple[dict[str, Any], dict[str, weights.Param]]:
    """Returns the arrays of the part `text` and its table with the names inside llm_folder."""
    arrays = {p: x for p, x in arrays_of(model).items() if p.startswith("text.")}
    return arrays, decoder.table(text_config(cfg))


def copy_text_files(source: Path, folder: Path, folders: Mapping[str, str]) -> None:
    """Copies what stands beside the tensors: configs, tokenizer, licence. No code, no pickles.

    folders: sub-folder of source -> that of folder.
    """
    for sub, into in folders.items():
        (folder / into).mkdir(parents=True, exist_ok=True)
        for path in sorted((source / sub).iterdir()):
            named = path.suffix in COPIED and path.name not in (hf_files.INDEX, hf_files.SUMS)
            if path.is_file() and named:
                shutil.copyfile(path, folder / into / path.name)


def set_dtype(folder: Path, subfolders: Sequence[str], dtype: np.dtype) -> None:
    """Writes the type of the tensors into the configs, for readers that go by it."""
    for sub in sorted(set(subfolders)):
        path = folder / sub / "config.json"
        tree = hf_files.read_json(path)
        parts = [tree, *(x for x in tree.values() if isinstance(x, dict))]
        if not any("dtype" in part for part in parts):
            tree.setdefault("torch_dtype", "")  # the older of the two names: everyone reads it
        for part in parts:
            part |= {key: str(dtype) for key in ("dtype", "torch_dtype") if key in part}
        path.write_text(json.dumps(tree, indent=2) + "\n")
