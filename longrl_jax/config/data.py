"""The sections `data` and `store`: which questions, and how their media are read and kept."""

import dataclasses
import re

from longrl_jax.config.checks import check_filled, check_one_of, check_positive

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
        check_filled(f"data.mix: file of {self.name}", self.file)
        check_positive(f"data.mix: weight of {self.name}", self.weight)
        if self.template:
            check_one_of(f"data.mix: template of {self.name}", self.template, TEMPLATES)


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
        check_filled("data.root", self.root)
        check_filled("data.train", self.train)
        check_one_of("data.decoder", self.decoder, ("pyav", "decord"))
        check_one_of("data.template", self.template, TEMPLATES)
        check_one_of("data.subtitles", self.subtitles, ("", "above", "between"))
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
        check_positive("data.decoder_processes", self.decoder_processes)
        check_positive("data.decode_timeout_s", self.decode_timeout_s)
        if self.loader_workers < 0:
            raise ValueError(f"data.loader_workers={self.loader_workers} must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """Where the embeddings of videos are kept between steps and runs."""

    path: str = "cache/embeddings"
    """Folder of the embedding store; shared by runs."""
    max_gib: float = 20.0
    """The least recently used entries are deleted beyond this size."""

    def __post_init__(self):
        check_filled("store.path", self.path)
        check_positive("store.max_gib", self.max_gib)


def _check_mix(data: "DataConfig") -> None:
    names = [part.name for part in data.mix]
    if len(set(names)) < len(names):
        raise ValueError(f"data.mix names {names}: every name must be another")
    if data.mix and data.train != DataConfig.train:
        raise ValueError(
            f"data.train={data.train!r} and data.mix both say what is trained on; take data.train "
            "out, and make it an entry of data.mix"
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
