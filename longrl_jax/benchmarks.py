"""The field's benchmarks: where their records come from, how they are asked and scored.

python -m longrl_jax.evaluate CONFIG --benchmark NAME. docs/benchmarks.md says what was published.
"""

import dataclasses
from collections.abc import Mapping

from longrl_jax.rewards import scorers
from longrl_jax.rewards.scorers import Scorer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What an evaluation on a benchmark needs to know of it."""

    source: str
    """Format of its records: a name in longrl_jax.data.SOURCES."""
    template: str = "think"
    """data.template that it is asked with; direct: without reasoning."""
    scorers: Mapping[str, Scorer]
    """Name -> scorer; `official` as the public code does it, `strict` as we do."""
    report_by: tuple[str, ...] = ()
    """Names in Example.tags that scores are reported by, beside its kind."""
    num_frames: int
    """Frames of a video in the paper's evaluation."""
    max_tokens: int
    """Tokens of the longest answer."""
    url: str
    """Where its records and films are published."""


BENCHMARKS: dict[str, Benchmark] = {
    "longvideo_reason": Benchmark(
        source="longvideo_reason",
        scorers={"official": scorers.longvideo_reason, "strict": scorers.strict},
        num_frames=512,
        max_tokens=1024,
        url="https://huggingface.co/datasets/LongVideo-Reason/longvideo-reason",
    ),
}
