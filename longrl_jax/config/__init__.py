"""Run configuration: the dataclasses that mirror a file in configs/, and its loader."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from longrl_jax import records, strict_yaml
from longrl_jax.config.checks import check_filled, check_one_of, pick
from longrl_jax.config.data import TEMPLATES, DataConfig, MixConfig, StoreConfig
from longrl_jax.config.devices import AttentionConfig, BatchConfig, MeshConfig
from longrl_jax.config.model import LORA_TARGETS, ModelConfig
from longrl_jax.config.running import OptimizerConfig, RunConfig
from longrl_jax.config.sampling import AlgorithmConfig, ChatConfig, RolloutConfig

__all__ = [
    "AlgorithmConfig",
    "AttentionConfig",
    "BatchConfig",
    "ChatConfig",
    "Config",
    "DEFAULT_FRAMES",
    "DataConfig",
    "LORA_TARGETS",
    "MAX_SEED",
    "MeshConfig",
    "MixConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RolloutConfig",
    "RunConfig",
    "StoreConfig",
    "TEMPLATES",
    "describe",
    "load",
    "pick",
    "to_yaml",
]

DEFAULT_FRAMES = 16
"""data.num_frames where neither the config nor the checkpoint says it."""

MAX_SEED = 2**32 - 1
"""Grain takes no larger one."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One experiment: the mirror of a file in configs/."""

    stage: str
    """perception, sft or grpo."""
    seed: int = 0
    """Of the data order, of sampling and of everything random."""
    model: ModelConfig
    data: DataConfig
    run: RunConfig
    mesh: MeshConfig = MeshConfig()
    attention: AttentionConfig = AttentionConfig()
    batch: BatchConfig = BatchConfig()
    rollout: RolloutConfig = RolloutConfig()
    rewards: dict[str, float] = dataclasses.field(default_factory=lambda: {"video_qa": 1.0})
    """Weight of every reward, by its name in longrl_jax.rewards.REWARDS (docs/rewards.md), or a
    function of your own, my_package.my_module:my_function, which is imported and run. Entries of
    data.mix may have others."""
    judge: ChatConfig = ChatConfig()
    """Who judges answers for the reward `judge`."""
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    store: StoreConfig = StoreConfig()

    def __post_init__(self):
        check_one_of("stage", self.stage, ("perception", "sft", "grpo"))
        check_filled("run.dir", self.run.dir)
        if self.stage == "perception" and self.model.lora_rank:
            raise ValueError(
                f"model.lora_rank={self.model.lora_rank}: stage=perception trains the projector "
                "alone; set it to 0"
            )
        grouped = self.stage == "grpo" and self.algorithm.needs_group
        if grouped and self.rollout.num_samples < 2:
            raise ValueError(
                f"rollout.num_samples={self.rollout.num_samples}: algorithm.advantage="
                f"{self.algorithm.advantage} compares the answers to one prompt, so it needs at "
                "least 2"
            )
        if not 0 <= self.seed <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must be 0 or more, and at most {MAX_SEED}")
        if self.optimizer.warmup_steps > self.run.num_steps:
            raise ValueError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} is longer than "
                f"run.num_steps={self.run.num_steps}; lower it"
            )
        if self.run.best_metric and not self.data.validation:
            raise ValueError(
                f"run.best_metric={self.run.best_metric!r} needs scores: name data.validation"
            )
        answers = self.rollout.num_samples * self.rollout.max_tokens
        if self.stage == "grpo" and answers >= self.batch.max_row_tokens:
            raise ValueError(
                f"rollout.num_samples * rollout.max_tokens = {answers} answer tokens leave no room "
                f"for a prompt in batch.max_row_tokens={self.batch.max_row_tokens}; raise that"
            )
        for key, weights in self.reward_sets.items():
            _check_rewards(key, weights, self)
        _check_filter(self)
        if self.attention.ulysses and self.mesh.seq % self.attention.ulysses:
            raise ValueError(
                f"attention.ulysses={self.attention.ulysses} does not divide mesh.seq="
                f"{self.mesh.seq}; choose a divisor, or 0"
            )
        if self.batch.rows_per_pass % self.mesh.rows:
            raise ValueError(
                f"batch.rows_per_pass={self.batch.rows_per_pass} does not split over "
                f"mesh.data * mesh.fsdp = {self.mesh.rows} devices; make it a multiple"
            )
        if self.batch.pack and self.stage == "perception":
            raise ValueError(
                "batch.pack=true: stage=perception has no rows of tokens; set it to false"
            )
        if self.mesh.processes > 1 and self.stage == "perception":
            raise ValueError(
                f"mesh.processes={self.mesh.processes}: stage=perception takes minutes and runs in "
                "one process; set mesh.processes=1"
            )
        if self.batch.groups < self.mesh.processes:
            raise ValueError(
                f"batch.groups={self.batch.groups} leaves some of mesh.processes="
                f"{self.mesh.processes} without a prompt; raise it"
            )

    @property
    def reward_sets(self) -> dict[str, dict[str, float]]:
        """Weights of rewards, by the key that says them: `rewards`, and those of data.mix."""
        own = {f"data.mix[{i}].rewards": part.rewards for i, part in enumerate(self.data.mix)}
        return {"rewards": self.rewards} | {key: weights for key, weights in own.items() if weights}

    def rewards_of(self, source: str) -> dict[str, float]:
        """Returns the weights of what judges answers to questions of an entry of data.mix.

        source: Example.source; empty, as of data.validation: `rewards`.
        """
        own = [part.rewards for part in self.data.mix if part.name == source]
        return (own and own[0]) or self.rewards


def _check_rewards(key: str, weights: Mapping[str, float], cfg: "Config") -> None:
    """Checks one set of rewards; key: where it stands."""
    if not weights:
        raise ValueError(f"{key} is empty; name at least one, e.g. {key}: {{video_qa: 1.0}}")
    if "judge" in weights and not (cfg.judge.base_url and cfg.judge.model):
        raise ValueError(
            f"{key}.judge needs a model that judges: judge.base_url={cfg.judge.base_url!r} "
            f"and judge.model={cfg.judge.model!r} must name an OpenAI-compatible server, e.g. "
            "http://localhost:8000/v1, and one of its models"
        )
    if "overlong" in weights and not cfg.rollout.overlong_tokens:
        raise ValueError(
            f"{key}.overlong needs rollout.overlong_tokens, the length over which it falls"
        )
    if not any(weights.values()):
        raise ValueError(f"{key}={weights}: every weight is 0; give one another weight")


def _check_filter(cfg: "Config") -> None:
    """Refuses to filter by what the answers to some questions do not have."""
    metric = cfg.algorithm.filter_by
    if metric in ("", "total"):
        return
    for source in [part.name for part in cfg.data.mix] or [""]:
        weights = cfg.rewards_of(source)
        if metric.partition("/")[0] not in weights:
            run = f"the source {source} of data.mix" if source else "this run"
            more = ", and of every source" if source else ""
            raise ValueError(
                f"algorithm.filter_by={metric!r} is of no reward of {run}; name total, or a "
                f"part <reward>/<part> of one of {', '.join(sorted(weights))}{more}"
            )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads one YAML file and applies `section.key=value` overrides (values are YAML).

    Raises ValueError that names the key for anything unknown, missing, of the wrong type or
    impossible in combination.
    """
    tree = strict_yaml.read(path)
    for item in overrides:
        strict_yaml.override(tree, item)
    cfg = _with_frames(records.build(Config, tree))
    if not cfg.data.template_file:
        return cfg
    template = str(Path(path).absolute().parent / cfg.data.template_file)
    return dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, template_file=template))


def _with_frames(cfg: Config) -> Config:
    """Fills in data.num_frames and data.fps from the checkpoint, where num_frames is 0."""
    if cfg.data.num_frames:
        return cfg
    path = Path(cfg.model.path)
    try:
        said = json.loads((path / "config.json" if path.is_dir() else path).read_text())
    except (OSError, ValueError):  # whoever opens the checkpoint says what is wrong with it
        said = {}
    said = said if isinstance(said, dict) else {}
    num_frames = said.get("num_video_frames") or DEFAULT_FRAMES
    fps = cfg.data.fps or said.get("fps") or 0.0
    for name, value, wanted in (("num_video_frames", num_frames, int), ("fps", fps, int | float)):
        if not isinstance(value, wanted) or isinstance(value, bool):
            raise ValueError(f"{path}: {name}={value!r} must be a number; set data.num_frames")
    data = dataclasses.replace(cfg.data, num_frames=num_frames, fps=float(fps))
    return dataclasses.replace(cfg, data=data)


def to_yaml(config: Config) -> str:
    """Returns the resolved config as YAML that `load` reads back to an equal config."""
    tree = dataclasses.asdict(config)
    for name in ("frozen", "lora_targets"):
        tree["model"][name] = list(tree["model"][name])
    tree["data"]["mix"] = list(tree["data"]["mix"])
    return strict_yaml.dump(tree)


def describe() -> str:
    """Returns every key with its type, default and meaning, for --help."""
    return "\n".join(["config keys:", *records.describe(Config)])
