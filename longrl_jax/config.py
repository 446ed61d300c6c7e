"""Run configuration: the dataclasses that mirror a file in configs/, and its loader."""

import dataclasses
import json
import math
import re
import types
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from longrl_jax import records, strict_yaml

X = TypeVar("X")
DEFAULT_FRAMES = 16
"""data.num_frames where neither the config nor the checkpoint says it."""
MAX_SEED = 2**32 - 1
"""Grain takes no larger one."""
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""All kernels of a decoder layer."""
MAX_SIMULATED_DEVICES = 512
"""Each is threads and buffers of this machine; a mistyped number must not take it down."""


def pick(table: Mapping[str, X], name: str, key: str) -> X:
    """Returns table[name]; an unknown name lists the known ones."""
    if name not in table:
        raise ValueError(f"{key}={name!r} is unknown; choose one of {', '.join(sorted(table))}")
    return table[name]


def _positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key}={value} must be positive")


def _filled(key: str, value: str) -> None:
    if not value.strip():
        raise ValueError(
            f"{key}={value!r} is empty and would mean the folder you stand in; name it"
        )


def _one_of(key: str, value: str, names: Sequence[str]) -> None:
    pick(types.MappingProxyType(dict.fromkeys(names)), value, key)


def _check_processes(mesh: "MeshConfig") -> None:
    if mesh.rows % mesh.processes:
        raise ValueError(
            f"mesh.processes={mesh.processes} does not divide mesh.data * mesh.fsdp = {mesh.rows}: "
            "a row's devices (mesh.seq * mesh.tensor) must be of one process; raise mesh.data or "
            "mesh.fsdp and lower mesh.seq or mesh.tensor"
        )
    if (mesh.process >= 0) != bool(mesh.coordinator):
        raise ValueError(
            f"mesh.process={mesh.process} and mesh.coordinator={mesh.coordinator!r}: give both, or "
            "neither and start with srun"
        )
    if not -1 <= mesh.process < mesh.processes:
        raise ValueError(
            f"mesh.process={mesh.process} must be 0 to {mesh.processes - 1} (mesh.processes - 1)"
        )


def _check_lora(model: "ModelConfig") -> None:
    if model.lora_rank < 0:
        raise ValueError(f"model.lora_rank={model.lora_rank} must be 0 (no adapters) or more")
    _positive("model.lora_alpha", model.lora_alpha)
    for name in model.lora_targets:
        _one_of("model.lora_targets", name, LORA_TARGETS)
    if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
        raise ValueError(
            f"model.lora_targets={list(model.lora_targets)} must name kernels, each once; without "
            "adapters set model.lora_rank=0"
        )
    if "text" in model.frozen:
        raise ValueError(
            f"model.frozen={list(model.frozen)} names text, whose adapters model.lora_rank="
            f"{model.lora_rank} trains (its own weights are frozen anyway); take it out"
        )


def _check_mix(data: "DataConfig") -> None:
    names = [part.name for part in data.mix]
    if len(set(names)) < len(names):
        raise ValueError(f"data.mix names {names}: every name must be another")
    if data.mix and data.train != DataConfig.train:
        raise ValueError(
            f"data.train={data.train!r} and data.mix both say what is trained on; take data.train "
            "out, and make it an entry of data.mix"
        )


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


def _check_timestamp(text: str) -> None:
    try:
        good = not text or text.format(t=1.0) != text.format(t=1000.0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        good = False
    if not good:
        raise ValueError(
            f"data.timestamp={text!r} must hold {{t}}, the time in seconds, in the form of "
            "Python's str.format, e.g. ' {t:.0f}'"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy. Its sizes come from the checkpoint's config.json, never from here."""

    path: str
    """Hugging Face folder of the starting checkpoint (python -m longrl_jax.convert makes some), or
    a merged global_step_N of Long-RL or EasyR1 (docs/from_long_rl.md)."""
    reference: str = ""
    """Folder of the reference policy for the KL term; empty: the starting checkpoint."""
    frozen: tuple[str, ...] = ("vision",)
    """Parts that are not trained: vision, projector, text. The vision tower must be among them.
    With adapters (lora_rank) the language model's own weights are frozen without being named here:
    [vision] trains adapters and projector, [vision, projector] adapters alone."""
    lora_rank: int = 0
    """Rank of the LoRA adapters that are trained in place of the language model; 0: none. Engine
    and RUN/export get them merged, RUN/adapter holds them alone (peft's format); the KL term's
    reference is the model without them."""
    lora_alpha: float = 16.0
    """The product of an adapter counts lora_alpha / lora_rank times."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Kernels of every layer that have an adapter: q, k, v, o, gate, up, down."""
    compute_dtype: str = "bfloat16"
    """float32 or bfloat16: type of matmuls. Parameters, softmax and losses stay float32."""
    remat: str = "nothing"
    """What a layer keeps for the backward pass: nothing (but its input), attention (its output),
    everything, or offload (its input, in the host's memory)."""

    def __post_init__(self):
        _filled("model.path", self.path)
        _one_of("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        _one_of("model.remat", self.remat, ("nothing", "attention", "everything", "offload"))
        for part in self.frozen:
            _one_of("model.frozen", part, ("vision", "projector", "text"))
        if "vision" not in self.frozen:
            raise ValueError(
                f"model.frozen={list(self.frozen)} lacks 'vision': frames are encoded once and "
                "cached, so the tower gets no gradient; add vision to model.frozen"
            )
        if {"projector", "text"} <= set(self.frozen):
            raise ValueError("model.frozen names every part, nothing is left to train; drop one")
        if self.lora_rank:
            _check_lora(self)

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Parts whose own weights are not trained, whatever adapters are."""
        return (*self.frozen, "text") if self.lora_rank else self.frozen


TEMPLATES = ("think", "direct", "boxed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixConfig:
    """One of several sources of training records."""

    name: str
    """Of its counts in the metrics, data/<name>; letters, digits, and - _ between them."""
    file: str
    """File of records, under data.root (and `root` here)."""
    source: str = "longvideo_reason"
    """Format of the records: a name in longrl_jax.data.SOURCES."""
    weight: float = 1.0
    """Its share of the records of a run is weight / the sum of all weights."""
    root: str = ""
    """Folder under data.root that the file and its media lie under; empty: data.root itself."""
    template: str = ""
    """How its questions are put; empty: data.template."""
    rewards: dict[str, float] = dataclasses.field(default_factory=dict)
    """What judges its answers (GRPO), by the names that `rewards` takes; empty: `rewards`."""

    def __post_init__(self):
        if not re.fullmatch(r"[A-Za-z0-9]+(?:[-_][A-Za-z0-9]+)*", self.name):
            raise ValueError(f"data.mix: name={self.name!r} must be letters, digits, - and _")
        _filled(f"data.mix: file of {self.name}", self.file)
        _positive(f"data.mix: weight of {self.name}", self.weight)
        if self.template:
            _one_of(f"data.mix: template of {self.name}", self.template, TEMPLATES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which questions are read, and how their videos are sampled."""

    root: str
    """Folder that every path of the data set lies under; a path that leaves it is refused."""
    train: str = "train.jsonl"
    """File of training records, under root."""
    validation: str = ""
    """File of held-out records, under root; empty: no evaluation."""
    source: str = "longvideo_reason"
    """Format of the records: a name in longrl_jax.data.SOURCES."""
    mix: tuple[MixConfig, ...] = ()
    """Several sources of training records, mixed by weight, in place of data.train; source and
    template then are those of data.validation."""
    template: str = "think"
    """How a question is put to the model: think (reasoning, then an answer in tags), direct (the
    answer alone) or boxed (reasoning, then an answer in \\boxed{}, for the reward math_answer)."""
    wording: str = "plain"
    """Words around the question: plain, choice or short (longrl_jax.data.wording)."""
    template_file: str = ""
    """Jinja2 template in place of `wording`, relative to the folder of the config; it says
    {{ question }} and perhaps {{ options }}, {{ subtitles }}, {{ instruction }}, {{ thinking }}."""
    subtitles: str = ""
    """Where the film's subtitles stand, if it has any: above (the question; those on the screen at
    the sampled times) or between (the frames); empty: nowhere."""
    num_frames: int = 0
    """Frames of a video when fps is 0; the most frames of a video when fps is set. 0: as
    num_video_frames in the config.json of model.path (VILA), with its fps where fps is 0 here; 16
    where it says none."""
    fps: float = 0.0
    """Frames a second; 0: num_frames spread evenly over the video."""
    frame_pool: int = 0
    """Frames whose tokens are averaged (VILA's TSP); 1: none; 0: as the checkpoint says it."""
    min_pixels: int = 0
    """Fewest pixels of a frame where its size follows the film's (Qwen2.5-VL); 0: the backbone's
    own, 100352."""
    max_pixels: int = 0
    """Most pixels of such a frame; 0: the backbone's own, 602112. A token is 28 x 28 of them in two
    frames."""
    image_min_pixels: int = 0
    """Fewest pixels of an image where its size follows the file's (Qwen2.5-VL); 0: as
    preprocessor_config.json says, 3136 in published checkpoints."""
    image_max_pixels: int = 0
    """Most pixels of such an image; 0: as preprocessor_config.json says, 12845056 in published
    checkpoints, 16384 tokens."""
    timestamp: str = ""
    """Text before every frame, with {t} for its time in seconds, as in Qwen3-VL: " {t:.0f}" or
    "<{t:.1f} seconds>"; empty: none."""
    decoder: str = "pyav"
    """pyav or decord."""
    decoder_processes: int = 1
    """Processes that decode video files while the devices encode."""
    decode_timeout_s: float = 120.0
    """Longest time that one file may take to decode before it is refused."""
    loader_workers: int = 0
    """Grain worker processes that tokenize prompts and probe files; 0: in this process."""

    def __post_init__(self):
        _filled("data.root", self.root)
        _filled("data.train", self.train)
        _one_of("data.decoder", self.decoder, ("pyav", "decord"))
        _one_of("data.template", self.template, TEMPLATES)
        _one_of("data.subtitles", self.subtitles, ("", "above", "between"))
        _check_mix(self)
        for name in ("num_frames", "frame_pool"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be 0 or more")
        if self.num_frames > 8192:
            raise ValueError(f"data.num_frames={self.num_frames} is over 8192, the most we decode")
        if not 0 <= self.fps <= 1000:
            raise ValueError(f"data.fps={self.fps} must be 0 (uniform) to 1000")
        for name in ("min_pixels", "max_pixels", "image_min_pixels", "image_max_pixels"):
            if getattr(self, name) < 0:
                raise ValueError(f"data.{name}={getattr(self, name)} must be 0 or more")
        _check_timestamp(self.timestamp)
        _positive("data.decoder_processes", self.decoder_processes)
        _positive("data.decode_timeout_s", self.decode_timeout_s)
        if self.loader_workers < 0:
            raise ValueError(f"data.loader_workers={self.loader_workers} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """Devices on each mesh axis; the product is the number of devices."""

    data: int = 1
    """Copies of the model."""
    fsdp: int = 1
    """Devices that share parameters, optimizer state and rows."""
    seq: int = 1
    """Devices that share one long sequence (attention.kind says how) and one video's frames."""
    tensor: int = 1
    """Devices that share heads and MLP width."""
    simulated: bool = False
    """Simulate that many devices on the CPU."""
    processes: int = 1
    """Processes that share the devices evenly, one a host: the same command, started on each. Rows
    belong to processes, so this must divide data * fsdp (seq and tensor stay inside a host)."""
    process: int = -1
    """Which of them this one is, from 0; -1: Slurm (or Open MPI) knows."""
    coordinator: str = ""
    """HOST:PORT that process 0 listens at; empty: Slurm (or Open MPI) knows."""

    def __post_init__(self):
        for axis in ("data", "fsdp", "seq", "tensor", "processes"):
            _positive(f"mesh.{axis}", getattr(self, axis))
        _check_processes(self)
        if self.simulated and self.num_devices > MAX_SIMULATED_DEVICES:
            raise ValueError(
                f"mesh.* asks for {self.num_devices} simulated devices, over "
                f"{MAX_SIMULATED_DEVICES}, the most that one machine should play; lower mesh.*"
            )

    @property
    def num_devices(self) -> int:
        return self.rows * self.seq * self.tensor

    @property
    def rows(self) -> int:
        """Rows that are computed at a time, each by seq * tensor devices."""
        return self.data * self.fsdp


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """How the devices of mesh.seq attend over the rows that they share; the numbers are equal."""

    kind: str = "ring"
    """ring: keys and values go round the devices. ulysses: a device takes all tokens for some of
    the heads, whose number mesh.seq must divide. 2d: neighbours share heads, their groups make a
    ring."""
    ulysses: int = 0
    """Neighbours that share heads with kind=2d, a divisor of mesh.seq; 0: the most that divide the
    heads."""
    kernel: str = "xla"
    """xla, or pallas: a Triton kernel for GPUs. A CPU can only interpret it, which is slow."""
    block_size: int = 0
    """Tokens on each side of a tile; 0: the kernel's own (xla 512, pallas 64, a power of 2). On a
    CPU 128 is faster for xla (benchmarks/results/ring_attention_cpu2_202611.md)."""

    def __post_init__(self):
        _one_of("attention.kind", self.kind, ("ring", "ulysses", "2d"))
        _one_of("attention.kernel", self.kernel, ("xla", "pallas"))
        for name in ("ulysses", "block_size"):
            if getattr(self, name) < 0:
                raise ValueError(f"attention.{name}={getattr(self, name)} must be 0 or more")
        size = self.block_size
        if size and self.kernel == "pallas" and (size < 16 or size & (size - 1)):
            raise ValueError(
                f"attention.block_size={size} must be a power of 2, and at least 16, for "
                "attention.kernel=pallas; 0 takes its own"
            )
        if self.ulysses and self.kind != "2d":
            raise ValueError(
                f"attention.ulysses={self.ulysses} is for attention.kind=2d, the kind is "
                f"{self.kind}; change one"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How a step's prompts become rows."""

    groups: int = 8
    """Prompts of one step (one update)."""
    rows_per_pass: int = 0
    """Rows of one forward/backward pass; gradients are summed over passes. 0: all in one, or with
    pack one a device (mesh.data * mesh.fsdp)."""
    pack: bool = False
    """Fill rows with as many groups as fit into max_row_tokens; none sees another, and numbers stay
    those of a row a group. Questions on one video share its tokens. Rows have four lengths, up to
    max_row_tokens (and a bit over, where what is shared needs it); metrics pack/fill and
    pack/examples_per_row say how full they are."""
    max_row_tokens: int = 4096
    """Longest row: shared prefix and all branches. A longer group is refused by name."""
    smallest_bucket: int = 128
    """Both parts of a row (prefix, answers) are padded to one of few multiples of this number of
    tokens (packing.bucket), so that few lengths, and few compilations, occur."""

    def __post_init__(self):
        for name in ("groups", "max_row_tokens", "smallest_bucket"):
            _positive(f"batch.{name}", getattr(self, name))
        if self.rows_per_pass < 0:
            raise ValueError(f"batch.rows_per_pass={self.rows_per_pass} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The vLLM engine and how it samples."""

    num_samples: int = 8
    """Answers drawn for one prompt (R)."""
    temperature: float = 1.0
    """Of sampling; the learner divides its logits by the same number."""
    max_tokens: int = 64
    """Longest answer, in tokens."""
    overlong_tokens: int = 0
    """For the reward `overlong`: it falls from 0 to -1 over the last so many of max_tokens."""
    replicas: int = 1
    """Engines that share a step's prompts; a group never splits."""
    tensor_parallel: int = 1
    """Devices (or CPU processes) of one engine."""
    process: str = "inline"
    """inline: vLLM in the learner's process; worker: in processes of its own, shared memory."""
    python: str = ""
    """Interpreter of the worker processes, where vLLM lives in an environment of its own (as beside
    the cuda12 extra); that environment needs longrl_jax's packages too. Empty: the learner's."""
    dtype: str = "bfloat16"
    """float32 or bfloat16: what the engine computes in."""
    kv_cache_gib: float = 1.0
    """Key/value cache of one CPU engine."""
    gpu_memory_utilization: float = 0.4
    """Share of each GPU that vLLM takes; ignored on CPU."""
    max_model_len: int = 1024
    """Longest prompt plus answer that the engine takes."""

    def __post_init__(self):
        for name in ("num_samples", "temperature", "max_tokens", "replicas", "tensor_parallel"):
            _positive(f"rollout.{name}", getattr(self, name))
        _positive("rollout.kv_cache_gib", self.kv_cache_gib)
        if self.temperature < 0.01:
            raise ValueError(
                f"rollout.temperature={self.temperature} must be at least 0.01: vLLM raises lower "
                "ones to that, and the learner would divide by another number"
            )
        _one_of("rollout.process", self.process, ("inline", "worker"))
        _one_of("rollout.dtype", self.dtype, ("float32", "bfloat16"))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]"
            )
        if self.tensor_parallel > 1 and self.process == "inline":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} needs rollout.process=worker"
            )
        if self.python and self.process == "inline":
            raise ValueError(f"rollout.python={self.python!r} needs rollout.process=worker")
        if not 0 <= self.overlong_tokens <= self.max_tokens:
            raise ValueError(
                f"rollout.overlong_tokens={self.overlong_tokens} must be 0 to rollout.max_tokens="
                f"{self.max_tokens}"
            )
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len={self.max_model_len}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Names in ADVANTAGES, LOSSES, MEANS and KL_ESTIMATORS, and their numbers."""

    advantage: str = "grpo"
    """What a reward is compared with. grpo: the mean of its group, over the group's deviation.
    dr_grpo: the mean alone. rloo: the mean of the group's others. reinforce_plus_plus: the mean and
    deviation of all tokens of the step. reinforce_plus_plus_baseline: the same, after the mean of
    the group is taken away."""
    loss: str = "clipped"
    """clipped: PPO's, by token. gspo: the same with the ratio of the whole answer (no dual clip).
    cispo: log p times the clipped ratio, whose gradient is stopped; every token has a gradient."""
    loss_mean: str = "token"
    """Over all passes of a step. token: every token counts the same (DAPO). sequence: every answer
    does, whatever its length (GRPO, GSPO). fixed: tokens over answers * rollout.max_tokens
    (Dr.GRPO)."""
    clip_low: float = 0.2
    """Lower clip of the probability ratio: 1 - clip_low. While a step is one update, the ratio is 1
    and none of the three clips has an effect."""
    clip_high: float = 0.2
    """Upper clip of the probability ratio: 1 + clip_high."""
    clip_dual: float = 3.0
    """Bound on the loss of a token with negative advantage (dual clip of loss=clipped)."""
    kl: float = 0.0
    """Weight of the KL term to the reference; 0 loads no reference and computes none."""
    kl_estimator: str = "low_variance"
    """Of one token: low_variance (k3, bounded), kl (k1), abs, or mse (k2)."""
    kl_in: str = "loss"
    """loss: a term of the loss. reward: taken from the reward of every token, so that a token is
    told of the KL of all that follow; for advantage=reinforce_plus_plus."""
    filter_by: str = ""
    """Dynamic sampling (DAPO): a group is kept if filter_low < mean of this over its answers <
    filter_high, and prompts are asked on until batch.groups are kept. A metric of `reward/`: total,
    or e.g. video_qa/accuracy, of a reward that every source of data.mix has. Empty: every group is
    kept, batch.groups prompts are asked."""
    filter_low: float = 0.01
    filter_high: float = 0.99
    max_tries: int = 20
    """With filter_by: most times that batch.groups prompts are asked for one step, which is then
    made from what was kept."""

    def __post_init__(self):
        _one_of("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        if not 0 < self.clip_low < 1:
            raise ValueError(f"algorithm.clip_low={self.clip_low} must be in (0, 1)")
        _positive("algorithm.clip_high", self.clip_high)
        _positive("algorithm.max_tries", self.max_tries)
        if self.clip_dual <= 1:
            raise ValueError(f"algorithm.clip_dual={self.clip_dual} must be over 1")
        if self.kl < 0:
            raise ValueError(f"algorithm.kl={self.kl} must be 0 or more")
        if self.kl and self.kl_in == "reward" and self.advantage != "reinforce_plus_plus":
            raise ValueError(
                f"algorithm.kl_in=reward gives every token a reward of its own, and "
                f"algorithm.advantage={self.advantage} knows one an answer; use "
                "advantage=reinforce_plus_plus, or kl_in=loss"
            )
        if self.filter_low >= self.filter_high:
            raise ValueError(
                f"algorithm.filter_low={self.filter_low} must be under algorithm.filter_high="
                f"{self.filter_high}: nothing lies between them"
            )

    @property
    def needs_group(self) -> bool:
        """Whether an answer is compared with others to the same prompt."""
        return self.advantage != "reinforce_plus_plus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and clipping."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str = "constant"
    """constant, or cosine (to 0 at run.num_steps)."""
    weight_decay: float = 0.0
    """Decoupled; matrices only, norms and biases are left alone."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        _positive("optimizer.learning_rate", self.learning_rate)
        _positive("optimizer.max_grad_norm", self.max_grad_norm)
        _one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError(
                f"optimizer.beta1={self.beta1} and optimizer.beta2={self.beta2} must be in [0, 1), "
                f"optimizer.eps={self.eps} positive"
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optimizer.warmup_steps and optimizer.weight_decay must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A model behind an OpenAI-compatible server, and how it may be asked."""

    base_url: str = ""
    """Of the server, e.g. https://api.openai.com/v1 or http://localhost:8000/v1 (vllm serve)."""
    model: str = ""
    """Its name there. Replies are kept by it: another model under the same name is not noticed."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server of this machine needs none. Empty: no key."""
    concurrency: int = 8
    """Requests at a time."""
    requests_per_minute: float = 0.0
    """Most requests a minute, evenly spread, tries counted; 0: no limit."""
    timeout_s: float = 120.0
    """Longest time for one try."""
    max_tries: int = 5
    """Most times that one request is sent: after 429, 500, 502, 503, 504, a connection that breaks,
    a time-out, and a reply that will not do (which is paid for)."""
    usd_per_million_prompt_tokens: float = 0.0
    """Price, for the cost that is shown."""
    usd_per_million_completion_tokens: float = 0.0

    def __post_init__(self):
        url = urllib.parse.urlsplit(self.base_url)
        if self.base_url and (url.scheme not in ("http", "https") or not url.hostname):
            raise ValueError(f"base_url={self.base_url!r} must begin with http:// or https://")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError(
                f"base_url of {url.hostname} holds more than an address (a user, a key, a query); "
                "put the key into the environment variable that api_key_env names"
            )
        for name in ("concurrency", "timeout_s", "max_tries"):
            _positive(name, getattr(self, name))
        for name in (
            "requests_per_minute",
            "usd_per_million_prompt_tokens",
            "usd_per_million_completion_tokens",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where the embeddings of videos are kept between steps and runs."""

    path: str = "cache/embeddings"
    """Folder of the embedding store; shared by runs."""
    max_gib: float = 20.0
    """The least recently used entries are deleted beyond this size."""

    def __post_init__(self):
        _filled("store.path", self.path)
        _positive("store.max_gib", self.max_gib)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is and where it writes."""

    dir: str
    """Run folder. The same command on the folder of an unfinished run goes on with it; a folder
    that holds another run is refused."""
    num_steps: int = 100
    """Updates."""
    eval_every: int = 0
    """Steps between evaluations on data.validation; 0: after the last step only."""
    eval_examples: int = 64
    """Questions of one evaluation."""
    export_dtype: str = ""
    """float32 or bfloat16: type of every tensor of RUN/export; empty: as in model.path."""
    export: bool = True
    """Write the trained model as a Hugging Face folder at the end (RUN/export)."""
    checkpoint_every: int = 20
    """Steps between checkpoints (RUN/checkpoints); the last step always makes one. 0: only that.
    Rollouts and rewards of the steps between are journaled, so they are lost in no case."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    best_metric: str = ""
    """Score of the evaluation, e.g. video_qa/accuracy: the checkpoint where it is highest is made
    and kept, too. Empty: none."""
    wandb: str = ""
    """Weights & Biases project that gets the metrics (needs the wandb extra); empty: none."""

    def __post_init__(self):
        if self.export_dtype:
            _one_of("run.export_dtype", self.export_dtype, ("float32", "bfloat16"))
        _positive("run.num_steps", self.num_steps)
        _positive("run.eval_examples", self.eval_examples)
        _positive("run.keep", self.keep)
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name}={getattr(self, name)} must be 0 or more")


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
        _one_of("stage", self.stage, ("perception", "sft", "grpo"))
        _filled("run.dir", self.run.dir)
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
