"""docs/from_long_rl.md: the table of config keys, and the folders that it promises to take."""

import dataclasses
import re
import shutil
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from longrl_jax import config, convert, models

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"`([^`]+)`")


def rows() -> list[tuple[str, str, str]]:
    lines = (ROOT / "docs" / "from_long_rl.md").read_text().splitlines()
    start = lines.index("| theirs | ours | note |")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start + 2 :]]
    return [(theirs, ours, note) for theirs, ours, note in cells]


def keys_of(record: type, prefix: str = "") -> set[str]:
    keys = set()
    for name, kind in typing.get_type_hints(record).items():
        if dataclasses.is_dataclass(kind):
            keys |= keys_of(kind, f"{prefix}{name}.")
        else:
            keys.add(prefix + name)
    return keys


def test_every_key_of_ours_in_the_table_exists():
    known = keys_of(config.Config)
    assert {"rollout.num_samples", "seed", "rewards"} <= known
    named = [(theirs, ours) for theirs, ours, _ in rows() if ours != "none"]
    assert len(named) > 30
    for theirs, ours in named:
        assert CODE.findall(ours), f"{theirs}: {ours!r} is neither `key` nor none"
        assert re.fullmatch(r"`[^`]+`(, `[^`]+`)*", ours), ours
        assert set(CODE.findall(ours)) <= known, f"{theirs}: {ours}"


def test_every_key_of_theirs_stands_once_and_what_we_lack_is_explained():
    theirs = [key for cell, _, _ in rows() for key in CODE.findall(cell)]
    assert len(theirs) == len(set(theirs)) > 80
    assert all(re.fullmatch(r"(data|algorithm|worker|trainer)(\.\w+)+", key) for key in theirs)
    assert all(note for _, ours, note in rows() if ours == "none")


@pytest.fixture
def start(tmp_path):
    convert.init(ROOT / "configs" / "models" / "tiny_vila.json", tmp_path / "start")
    return tmp_path / "start"


@pytest.fixture
def step_folder(start, tmp_path):
    """What a merged VILA run of Long-RL leaves: the trained language model, in bfloat16."""
    folder = tmp_path / "checkpoints" / "global_step_20"
    actor = folder / "actor"
    model = AutoModelForCausalLM.from_pretrained(start / "llm", dtype=torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight += 1
    model.save_pretrained(actor / "huggingface")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (start / "llm" / name).exists():
            shutil.copyfile(start / "llm" / name, actor / "huggingface" / name)
    torch.save({}, actor / "model_world_size_8_rank_0.pt")
    torch.save({}, actor / "model_world_size_8_rank_1.pt")
    (tmp_path / "checkpoints" / "global_step_5").mkdir()
    return folder


def test_a_merged_step_is_a_checkpoint(step_folder, capsys):
    inside = step_folder / "actor" / "huggingface"
    for path in (step_folder, step_folder / "actor", inside):
        assert models.find_folder(path) == inside
    convert.main(["inspect", str(step_folder)])
    assert capsys.readouterr().out.startswith(f"{inside}: decoder (qwen2)")
    assert models.read_shape(step_folder)[1] == models.load(inside)[0]


def test_the_language_model_of_a_step_takes_the_place_of_llm(start, step_folder, tmp_path):
    """As the page says for VILA."""
    mine = tmp_path / "mine"
    shutil.copytree(start, mine)
    shutil.rmtree(mine / "llm")
    shutil.copytree(step_folder / "actor" / "huggingface", mine / "llm")
    before, after = (models.arrays_of(models.load(folder)[1]) for folder in (start, mine))
    moved = {path for path in before if not np.array_equal(before[path], after[path])}
    assert "text.table" in moved and {path.partition(".")[0] for path in moved} == {"text"}
    merged = load_file(mine / "llm" / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(after["text.table"], merged.float().numpy())


def test_a_step_that_is_not_merged_names_the_merger(step_folder, capsys):
    inside = step_folder / "actor" / "huggingface"
    (inside / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as error:
        convert.main(["inspect", str(step_folder)])
    assert "model_world_size_8_rank_0.pt beside it, which may run code" in error.value.code
    assert error.value.code.endswith(f"scripts/model_merger.py --local_dir {step_folder / 'actor'}")
    with pytest.raises(ValueError, match="holds no weights yet"):
        models.find_folder(inside)


def test_a_folder_of_several_steps_names_the_newest(step_folder):
    with pytest.raises(ValueError, match=r"holds 2 checkpoints; name one .*global_step_20$"):
        models.find_folder(step_folder.parent)


def test_any_other_folder_is_itself(start, tmp_path):
    assert models.find_folder(start) == start
    assert models.find_folder(tmp_path / "nowhere") == tmp_path / "nowhere"
