"""What a training run leaves alone stands in its export byte for byte, whatever type it has."""

import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from longrl_jax import convert
from longrl_jax.stages import sft

ROOT = Path(__file__).parents[2]
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.relative_to(folder).as_posix()}/{name}": x
        for path in sorted(folder.rglob("*.safetensors"))
        for name, x in safetensors.torch.load_file(path).items()
    }


def same_bytes(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.flatten().view(torch.uint8), y.flatten().view(torch.uint8))


def mix(folder: Path) -> None:
    """Gives the tensors of a checkpoint three types in turn, and each a negative zero."""
    for path in folder.rglob("*.safetensors"):
        state = safetensors.torch.load_file(path)
        for i, name in enumerate(sorted(state)):
            state[name] = state[name].to(TYPES[i % 3])
            state[name].view(-1)[0] = -0.0
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "frozen", "trained"),
    [
        ("vila", "vision, projector", "llm/"),
        ("vila", "vision, text", "mm_projector/"),
        ("qwen2_5_vl", "vision, projector", "./model.|./lm_head"),
    ],
)
def test_frozen_tensors_are_those_of_the_source(configured, world, tmp_path, kind, frozen, trained):
    source, pixels = tmp_path / "source", []
    if kind == "vila":
        shutil.copytree(world / "init", source)
    else:
        pixels = ["data.min_pixels=3136", "data.max_pixels=4704"]
        config_json = ROOT / "configs" / "models" / "tiny_qwen2_5_vl.json"
        convert.init(config_json, source, corpus=world / "data" / "corpus.txt")
    mix(source)
    cfg = configured(
        "tiny_cpu_sft.yaml",
        f"model.path={source}",
        f"model.frozen=[{frozen}]",
        f"store.path={tmp_path / 'store'}",
        "data.validation=",
        "data.timestamp=",
        "optimizer={learning_rate: 0.02}",
        "run.num_steps=1",
        "run.export_dtype=",
        *pixels,
    )
    sft.run(cfg)
    before, after = tensors_of(source), tensors_of(tmp_path / "run" / "export")
    assert before.keys() == after.keys()
    for name, x in before.items():
        assert (after[name].dtype, after[name].shape) == (x.dtype, x.shape), name
    moved = {name for name, x in before.items() if not same_bytes(x, after[name])}
    may_move = {name for name in before if name.startswith(tuple(trained.split("|")))}
    assert moved <= may_move < before.keys()
    kernels = {name for name in may_move if before[name].ndim > 1}
    assert kernels <= moved
    left_alone = {before[name].dtype for name in before.keys() - may_move}
    assert left_alone == set(TYPES)
    for path in source.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors":
            copy = tmp_path / "run" / "export" / path.relative_to(source)
            assert copy.read_bytes() == path.read_bytes(), path
