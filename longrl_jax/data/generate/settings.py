"""The config of a generation: frozen dataclasses, read from YAML."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from longrl_jax import records, strict_yaml
from longrl_jax.chat import ChatConfig
from longrl_jax.config import pick

KINDS = ("temporal", "goal", "plot", "spatial")
"""Kinds of questions; the words of published records (problem_type), each a file of texts/."""
FORMS = ("choice", "open")
"""Multiple choice with options A to D, and open-ended."""


def _at_least(key: str, value: float, least: float) -> None:
    if not (value >= least and math.isfinite(value)):
        raise ValueError(f"{key}={value} must be {least} or more")


def _some_of(key: str, values: tuple[str, ...], known: tuple[str, ...]) -> None:
    for value in values:
        pick(dict.fromkeys(known), value, key)
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{key}={list(values)} must name some of {', '.join(known)}, each once")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SplitConfig:
    """How a film is cut into clips. Nothing is written: a clip is a start and an end."""

    clip_s: float = 10.0
    """Seconds of a clip."""
    min_clip_s: float = 5.0
    """What is left at the end of a film is a clip of its own if it has so many seconds; a shorter
    rest belongs to the clip before."""

    def __post_init__(self):
        _at_least("split.clip_s", self.clip_s, 0.1)
        _at_least("split.min_clip_s", self.min_clip_s, 0)
        if self.min_clip_s > self.clip_s:
            raise ValueError(
                f"split.min_clip_s={self.min_clip_s} is over split.clip_s={self.clip_s}; lower it"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionConfig:
    """How a clip is described."""

    server: str
    """Name of the server; it takes pictures, or, with `checkpoint`, prompt embeddings."""
    frames: int = 8
    """Frames of a clip that are shown, at the starts of equal slices of it."""
    frame_px: int = 448
    """Longest side of a frame that is sent, in pixels; smaller films are not enlarged."""
    jpeg_quality: int = 85
    """1 to 95."""
    frame_tokens: int = 300
    """Prompt tokens that a frame costs at most, for the estimate of `max_usd`."""
    temperature: float = 0.0
    max_tokens: int = 300
    """Longest caption."""
    checkpoint: str = ""
    """Folder of a VILA checkpoint whose frames are encoded here and sent as prompt embeddings to a
    vLLM server of its language model (`generate serve`); empty: JPEGs, as any server takes them."""
    question: str = "Describe what happens."
    """What that checkpoint is asked."""
    template: str = "direct"
    """As data.template of a training config; the words in <answer> are the caption."""
    timestamp: str = ""
    """As data.timestamp of a training config; told from the start of the clip."""
    devices: int = 1
    """Of this machine, all that JAX sees; a checkpoint's frames are split over them."""

    def __post_init__(self):
        for name, least in (
            ("frames", 1),
            ("frame_px", 16),
            ("frame_tokens", 0),
            ("max_tokens", 1),
            ("devices", 1),
        ):
            _at_least(f"caption.{name}", getattr(self, name), least)
        _at_least("caption.temperature", self.temperature, 0)
        if not 1 <= self.jpeg_quality <= 95:
            raise ValueError(f"caption.jpeg_quality={self.jpeg_quality} must be 1 to 95")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """The captions of a film as one story that fits."""

    server: str = ""
    """Condenses stories that are too long; empty: such films are rejected."""
    story_tokens: int = 24000
    """Longest story, in tokens as counted here (a token is TOKEN_CHARACTERS letters)."""
    temperature: float = 0.0
    max_tokens: int = 4000
    """Longest reply; a part of a story is condensed to it."""

    def __post_init__(self):
        _at_least("merge.story_tokens", self.story_tokens, 20)
        _at_least("merge.max_tokens", self.max_tokens, 1)
        _at_least("merge.temperature", self.temperature, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionConfig:
    """Which questions are asked about a story."""

    server: str
    kinds: tuple[str, ...] = KINDS
    forms: tuple[str, ...] = FORMS
    per_kind: int = 1
    """Questions of each kind and form about a film."""
    temperature: float = 0.7
    max_tokens: int = 4000

    def __post_init__(self):
        _some_of("question.kinds", self.kinds, KINDS)
        _some_of("question.forms", self.forms, FORMS)
        _at_least("question.per_kind", self.per_kind, 1)
        _at_least("question.max_tokens", self.max_tokens, 1)
        _at_least("question.temperature", self.temperature, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewriteConfig:
    """Reasonings in the order of one who watches."""

    server: str
    temperature: float = 0.7
    max_tokens: int = 2000

    def __post_init__(self):
        _at_least("rewrite.max_tokens", self.max_tokens, 1)
        _at_least("rewrite.temperature", self.temperature, 0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """A second model answers, with the story and without."""

    server: str
    blind_tries: int = 3
    """Answers without the story; a question that is right every time is rejected. 0: not asked."""
    blind_temperature: float = 1.0
    max_tokens: int = 300

    def __post_init__(self):
        _at_least("verify.blind_tries", self.blind_tries, 0)
        _at_least("verify.blind_temperature", self.blind_temperature, 0)
        _at_least("verify.max_tokens", self.max_tokens, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackageConfig:
    """Shares of the films; where a film goes depends on its content and `seed` alone."""

    validation: float = 0.02
    test: float = 0.05

    def __post_init__(self):
        if not (self.validation >= 0 and self.test >= 0 and self.validation + self.test <= 1):
            raise ValueError(
                f"package.validation={self.validation} and package.test={self.test} must be shares "
                "of the films, at most 1 together"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """A generation."""

    videos: str
    """Folder of films, searched to its bottom; data.root of the packaged records."""
    out: str
    """Folder that the work and the package (OUT/package) go to."""
    seed: int = 0
    max_usd: float = 0.0
    """No request is sent that could take the cost over this, of all that was replied, at the prices
    of `servers`; 0: only servers without prices. A server that bills for requests whose reply never
    came (a time-out, a cut connection) may bill more: nobody here sees those tokens."""
    texts: str = ""
    """Folder with files that take the place of those of the same name in longrl_jax/data/generate/
    texts: the words of every request."""
    servers: dict[str, ChatConfig]
    """Servers by names of your choice; see below."""
    split: SplitConfig = dataclasses.field(default_factory=SplitConfig)
    caption: CaptionConfig
    merge: MergeConfig = dataclasses.field(default_factory=MergeConfig)
    question: QuestionConfig
    rewrite: RewriteConfig
    verify: VerifyConfig
    package: PackageConfig = dataclasses.field(default_factory=PackageConfig)

    def __post_init__(self):
        for name in ("videos", "out"):
            if not getattr(self, name).strip():
                raise ValueError(f"{name} is empty and would mean the folder you stand in; name it")
        _at_least("max_usd", self.max_usd, 0)
        for stage in ("caption", "merge", "question", "rewrite", "verify"):
            name = getattr(self, stage).server
            if name or stage != "merge":
                pick(self.servers, name, f"{stage}.server")


def load(path: Path, overrides: list[str]) -> GenerateConfig:
    """Reads a file; overrides are `section.key=value`. Raises ValueError that names the key."""
    tree = strict_yaml.read(path)
    for item in overrides:
        strict_yaml.override(tree, item)
    return records.build(GenerateConfig, tree)


def settings_of(cfg: GenerateConfig, stage: str) -> dict[str, Any]:
    """Returns all of the config that a stage's outcome depends on; not where a server is."""
    section = getattr(cfg, stage, None)
    tree = dataclasses.asdict(section) if section is not None else {}
    for free in ("frame_tokens", "devices"):
        tree.pop(free, None)
    name = tree.pop("server", "")
    return tree | {"model": cfg.servers[name].model if name else "", "seed": cfg.seed}
