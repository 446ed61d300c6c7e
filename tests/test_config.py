"""Configs: what is refused, and how the message helps."""

import json
from pathlib import Path

import pytest

from longrl_jax import config
from longrl_jax.sharding import KERNELS, KINDS

GENERATIONS = "generate"  # a folder of configs of data.generate: tests/data/test_generate_run.py
CONFIGS = sorted(
    path
    for path in (Path(__file__).parents[1] / "configs").rglob("*.yaml")
    if path.parent.name != GENERATIONS
)
SMALL = """
stage: grpo
model: {path: some/folder}
data: {root: data}
run: {dir: runs/x}
optimizer: {learning_rate: 1e-6}
"""


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def test_overrides_win_and_numbers_are_numbers(path):
    cfg = config.load(path, ["mesh.seq=8", "model.frozen=[vision, projector]", "algorithm.kl=1e-2"])
    assert cfg.mesh.seq == 8 and cfg.algorithm.kl == 0.01 and cfg.optimizer.learning_rate == 1e-6
    assert cfg.model.frozen == ("vision", "projector")


def test_the_resolved_config_is_a_config(path, tmp_path):
    judge = "judge={base_url: 'http://localhost:8000/v1', model: m}"
    cfg = config.load(path, ["rewards={judge: 0.5, my_package.rewards:mine: 1.0}", judge])
    assert cfg.rewards == {"judge": 0.5, "my_package.rewards:mine": 1.0}
    (tmp_path / "resolved.yaml").write_text(config.to_yaml(cfg))
    assert config.load(tmp_path / "resolved.yaml") == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("mesh.sqe=8", r"unknown config key mesh\.sqe; did you mean mesh\.seq\?"),
        ("mesh.seq=eight", "mesh.seq wants int, got 'eight'"),
        ("mesh.seq=0", "mesh.seq=0 must be positive"),
        ("mesh.seq=true", "mesh.seq wants int, got True"),
        ("mesh=8", "mesh must be a mapping, got 8"),
        ("attention.kind=rings", "attention.kind='rings' is unknown; choose one of 2d, ring, ulys"),
        (
            "attention.kernel=cudnn",
            "attention.kernel='cudnn' is unknown; choose one of pallas, xla",
        ),
        ("attention.ulysses=-1", "attention.ulysses=-1 must be 0 or more"),
        ("attention.block_size=-1", "attention.block_size=-1 must be 0 or more"),
        (
            "attention={kernel: pallas, block_size: 24}",
            "attention.block_size=24 must be a power of 2, and at least 16, for attention.kernel",
        ),
        ("attention.ulysses=2", "attention.ulysses=2 is for attention.kind=2d, the kind is ring"),
        ("attention={kind: 2d, ulysses: 3}", "attention.ulysses=3 does not divide mesh.seq=1"),
        ("mesh={seq: 8, processes: 2}", r"does not divide mesh.data \* mesh.fsdp = 1: a row's dev"),
        ("mesh={fsdp: 2, processes: 2, process: 1}", "mesh.process=1 and mesh.coordinator=''"),
        (
            "mesh={fsdp: 2, processes: 2, process: 2, coordinator: 'a:1'}",
            r"mesh.process=2 must be 0 to 1",
        ),
        ("stage=ppo", "stage='ppo' is unknown; choose one of grpo, perception, sft"),
        ("rollout.num_samples=1", "at least 2"),
        ("model.frozen=[]", "lacks 'vision'"),
        ("model.frozen=[vision, text, projector]", "nothing is left to train"),
        ("model.frozen=[tower]", "model.frozen='tower' is unknown"),
        ("model.lora_rank=-1", r"model.lora_rank=-1 must be 0 \(no adapters\) or more"),
        ("model={path: x, lora_rank: 4, lora_targets: []}", "must name kernels, each once"),
        ("model={path: x, lora_rank: 4, lora_targets: [q, q]}", "must name kernels, each once"),
        ("model={path: x, lora_rank: 4, lora_targets: [head]}", "'head' is unknown; choose one of"),
        ("model={path: x, lora_rank: 4, lora_alpha: 0}", "model.lora_alpha=0.0 must be positive"),
        ("model={path: x, lora_rank: 4, frozen: [vision, text]}", "names text, whose adapters"),
        ("rollout.tensor_parallel=2", "needs rollout.process=worker"),
        ("rollout.python=other/bin/python", "needs rollout.process=worker"),
        ("rollout.temperature=0.001", "at least 0.01"),
        ("rollout.temperature=.inf", "rollout.temperature wants a finite number, got inf"),
        ("optimizer.beta2=1.5", r"optimizer.beta2=1.5 must be in \[0, 1\)"),
        ("optimizer.warmup_steps=101", "is longer than run.num_steps=100"),
        ("seed=-1", "seed=-1 must be 0 or more"),
        ("rollout.num_samples=64", "leave no room for a prompt in batch.max_row_tokens=4096"),
        ("run.dir=[a", "is not valid YAML"),
        ("rollout.max_tokens=5000", "leaves no room for a prompt"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate wants a number, got 'fast'"),
        ("rewards={}", "rewards is empty"),
        ("algorithm.filter_by=accuracy", "is of no reward of this run; .* of one of video_qa"),
        ("algorithm={filter_low: 0.5, filter_high: 0.5}", "nothing lies between them"),
        ("algorithm={kl: 0.1, kl_in: reward}", "grpo knows one an answer; use advantage=reinforce"),
        ("algorithm.kl_in=both", "algorithm.kl_in='both' is unknown; choose one of loss, reward"),
        ("algorithm.max_tries=0", "algorithm.max_tries=0 must be positive"),
        ("rollout.overlong_tokens=65", "must be 0 to rollout.max_tokens=64"),
        ("rewards={judge: 1.0}", "rewards.judge needs a model that judges: judge.base_url=''"),
        ("judge={base_url: 'http://me:key@x/v1', model: m}", "holds more than an address"),
        ("judge.timeout_s=0", "timeout_s=0.0 must be positive"),
        ("rewards={overlong: 1.0}", "rewards.overlong needs rollout.overlong_tokens"),
        ("data.num_frames=9000", "over 8192"),
        ("data.timestamp=now", r"data.timestamp='now' must hold \{t\}, the time in seconds"),
        ("data.timestamp=' {s}'", r"data.timestamp=' \{s\}' must hold"),
        ("data.timestamp=' {}'", r"data.timestamp=' \{\}' must hold"),
        ("data.timestamp=' {t'", r"data.timestamp=' \{t' must hold"),
        ("data.timestamp=' {t:d}'", r"data.timestamp=' \{t:d\}' must hold"),
        ("data.timestamp=' {t[0]}'", r"data.timestamp=' \{t\[0\]\}' must hold"),
        ("data.timestamp=' {t.s}'", r"data.timestamp=' \{t.s\}' must hold"),
        ("mesh.seq", "not of the form section.key=value"),
    ],
)
def test_bad_values_are_refused_by_name(path, override, message):
    with pytest.raises(ValueError, match=message):
        config.load(path, [override])


def test_reinforce_plus_plus_needs_no_group(path):
    one = ["algorithm.advantage=reinforce_plus_plus", "rollout.num_samples=1"]
    assert config.load(path, one).rollout.num_samples == 1


@pytest.mark.parametrize("stage", ["sft", "perception"])
def test_overlong_needs_its_length_in_every_stage_that_answers_questions(path, stage):
    with pytest.raises(ValueError, match="rewards.overlong needs rollout.overlong_tokens"):
        config.load(path, [f"stage={stage}", "rewards={overlong: 1.0}"])


def test_perception_has_no_use_for_adapters_or_packed_rows(path):
    with pytest.raises(ValueError, match="model.lora_rank=4: stage=perception"):
        config.load(path, ["stage=perception", "model.lora_rank=4"])
    with pytest.raises(ValueError, match="batch.pack=true: stage=perception has no rows"):
        config.load(path, ["stage=perception", "batch.pack=true"])


def test_attention_names_are_those_of_the_library(path):
    """config.py cannot import them: it needs no JAX."""
    for kind in KINDS:
        assert config.load(path, [f"attention.kind={kind}"]).attention.kind == kind
    for kernel in KERNELS:
        assert config.load(path, [f"attention.kernel={kernel}"]).attention.kernel == kernel


def test_a_missing_key_is_named(path):
    path.write_text(SMALL.replace("run: {dir: runs/x}", "run: {num_steps: 3}"))
    with pytest.raises(ValueError, match=r"missing config keys: run\.dir"):
        config.load(path)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.name)
def test_every_config_of_the_project_loads(path):
    config.load(path)


def test_every_config_has_a_row_in_the_readme():
    readme = (Path(__file__).parents[1] / "configs" / "README.md").read_text()
    for path in CONFIGS:
        assert path.name in readme


def test_help_names_every_key():
    text = config.describe()
    for section, key in [("mesh", "seq"), ("rollout", "num_samples"), ("optimizer", "schedule")]:
        assert f"{section}.{key}: " in text
    assert "rewards: dict" in text and "Answers drawn for one prompt (R)." in text


@pytest.mark.parametrize(
    ("said", "overrides", "want"),
    [
        ({"num_video_frames": 256, "fps": 2.0}, [], (256, 2.0)),
        ({"num_video_frames": 256, "fps": 2.0}, ["data.fps=1"], (256, 1.0)),
        ({"num_video_frames": 256, "fps": 2.0}, ["data.num_frames=8"], (8, 0.0)),
        ({}, [], (16, 0.0)),
        (None, [], (16, 0.0)),  # no such file: said when the checkpoint is opened
    ],
)
def test_frames_left_out_are_those_of_the_checkpoint(path, tmp_path, said, overrides, want):
    if said is not None:
        (tmp_path / "config.json").write_text(json.dumps(said))
    cfg = config.load(path, [f"model.path={tmp_path}", *overrides])
    assert (cfg.data.num_frames, cfg.data.fps) == want


def test_odd_frames_of_a_checkpoint_are_named(path, tmp_path):
    for said in ({"num_video_frames": "many"}, {"fps": "fast"}):
        (tmp_path / "config.json").write_text(json.dumps(said))
        with pytest.raises(ValueError, match=f"{next(iter(said))}='(many|fast)' must be a number"):
            config.load(path, [f"model.path={tmp_path}"])
