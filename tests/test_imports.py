"""Modules import only what stands below them (docs/design.md, "Who may import whom")."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIRST_PARTY = ("longrl_jax", "rollout_bridge")
LAYER = {  # the longest prefix counts; a module that has no row fails the test
    "longrl_jax": 0,
    "longrl_jax.types": 0,
    "longrl_jax.config": 0,
    "longrl_jax.strict_yaml": -1,  # below config
    "longrl_jax.records": -1,
    "longrl_jax.platform": 1,
    "longrl_jax.sharding": 1,
    "longrl_jax.models": 2,
    "longrl_jax.data": 2,
    "longrl_jax.data.embed": 4,
    "longrl_jax.data.difficulty": 4,
    "longrl_jax.data.generate": 4,  # it opens checkpoints
    "longrl_jax.data.pass_rates": 3,
    "longrl_jax.rewards": 2,
    "longrl_jax.advantages": 2,
    "longrl_jax.losses": 2,
    "longrl_jax.optimizer": 2,
    "longrl_jax.metrics": 2,
    "longrl_jax.scores": 2,
    "longrl_jax.options": 1,
    "longrl_jax.shuffled": 2,
    "longrl_jax.processes": 1,
    "longrl_jax.run_folder": 1,
    "longrl_jax.chat": 1.5,  # of platform's, and below the rewards
    "longrl_jax.journal": 2,
    "longrl_jax.checkpoint": 3,
    "longrl_jax.step": 3,
    "longrl_jax.batching": 3,
    "longrl_jax.packing": 2,
    "longrl_jax.encode": 3,
    "longrl_jax.benchmarks": 3,
    "rollout_bridge": 3,
    "longrl_jax.report": 3,
    "longrl_jax.train": 4,
    "longrl_jax.evaluate": 4,
    "longrl_jax.convert": 4,
    "longrl_jax.check": 4,
    "longrl_jax.demo": 4,
    "longrl_jax.road": 4,
    "longrl_jax.commands": 3,
    "longrl_jax.plan": 4,
    "longrl_jax.stages": 4,
}
DOORS = {  # a heavy package -> the only files that may import it
    "av": ("longrl_jax/data/video.py", "longrl_jax/data/synthetic.py"),
    "decord": ("longrl_jax/data/video.py",),
    "PIL": ("longrl_jax/data/image.py", "longrl_jax/data/video.py", "longrl_jax/report/samples.py"),
    "vllm": ("rollout_bridge/",),
    "torch": ("rollout_bridge/",),
    "safetensors": ("longrl_jax/models/hf_files.py",),
    "transformers": ("longrl_jax/data/prompts.py", "longrl_jax/convert.py"),
    "tokenizers": ("longrl_jax/data/prompts.py", "longrl_jax/convert.py"),
    "grain": ("longrl_jax/data/",),
    "orbax": ("longrl_jax/checkpoint.py",),
    "tensorboardX": ("longrl_jax/metrics.py",),
    "wandb": ("longrl_jax/metrics.py",),
    "pyarrow": ("longrl_jax/data/parquet.py", "longrl_jax/data/generate/package.py"),
    "openai": ("longrl_jax/chat/",),
    "aiolimiter": ("longrl_jax/chat/",),
    "math_verify": ("longrl_jax/rewards/math_verdicts.py",),
    "pysubs2": ("longrl_jax/data/subtitles.py",),
    "sympy": ("longrl_jax/rewards/math_verdicts.py",),
}
FILES = sorted([*ROOT.glob("longrl_jax/**/*.py"), *ROOT.glob("rollout_bridge/**/*.py")])


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room(module: str) -> str | None:
    """The row of LAYER that a module falls under; the bare package is only its own row."""
    parts = module.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((p for p in prefixes if p in LAYER and (p != "longrl_jax" or p == module)), None)


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_down(path):
    me = module_name(path)
    mine = room(me)
    assert mine, f"{me} has no row in LAYER: decide where it belongs (docs/design.md section 4)"
    for name in imported(path):
        if name.startswith(FIRST_PARTY):
            theirs = room(name)
            assert theirs, f"{me} imports {name}, which has no row in LAYER"
            down = (
                LAYER[theirs] < LAYER[mine] or theirs == mine or 3 <= LAYER[mine] == LAYER[theirs]
            )
            assert down, f"{me} (layer {LAYER[mine]}) may not import {name} (layer {LAYER[theirs]})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_heavy_packages_have_one_door(path):
    where = path.relative_to(ROOT).as_posix()
    for name in imported(path):
        doors = DOORS.get(name.split(".")[0])
        assert not doors or where.startswith(doors), f"{where} imports {name}; only {doors} may"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_only_layer_four_sees_the_root_config(path):
    if LAYER[room(module_name(path)) or ""] < 4 and path.parent.name != "config":
        assert "longrl_jax.config.Config" not in imported(path)
