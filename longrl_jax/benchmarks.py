"""The field's benchmarks: where their records come from, how they are asked and scored.

python -m longrl_jax.evaluate CONFIG --benchmark NAME. docs/benchmarks.md says what was published.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl_jax import scores
from longrl_jax.config import ChatConfig
from longrl_jax.data import vnbench
from longrl_jax.rewards import activitynet_qa, scorers
from longrl_jax.rewards.scorers import Scorer
from longrl_jax.types import Scored

Judge = Callable[[Sequence[Scored], ChatConfig, Path], Sequence[Mapping[str, float | None]]]
"""(answers, who judges, file that keeps the verdicts) -> scores by name of each."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What an evaluation on a benchmark needs to know of it."""

    source: str
    """Format of its records: a name in longrl_jax.data.SOURCES."""
    template: str = "think"
    """data.template that it is asked with; direct: without reasoning."""
    wording: str = "choice"
    """data.wording that it is asked with."""
    subtitles: str = ""
    """data.subtitles that it is asked with."""
    scorers: Mapping[str, Scorer]
    """Name -> scorer; `official` as the public code does it, `strict` as we do."""
    judge: Judge | None = None
    """Scores more of an open answer by asking the model of the config's section `judge`."""
    report_by: tuple[str, ...] = ()
    """Names in Example.tags that scores are reported by, beside its kind."""
    together: str = ""
    """Name in Example.tags that rotations of one question share: it is right only if all are."""
    rotations: int = 1
    """How many there are of each."""
    num_frames: int
    """Frames of a video in the paper's evaluation."""
    max_tokens: int = 1024
    """Tokens of the longest answer."""
    url: str
    """Where its records and films are published."""


HUB = "https://huggingface.co/datasets"
OF_LMMS_EVAL = {
    name: {"official": scorers.said(scorer), "strict": scorers.strict}
    for name, scorer in {
        "video_mme": scorers.video_mme,
        "longvideobench": scorers.longvideobench,
        "next_qa": scorers.next_qa,
        "perception_test": scorers.perception_test,
        "vnbench": scorers.vnbench,
    }.items()
}
VIDEO_MME = Benchmark(
    source="video_mme",
    scorers=OF_LMMS_EVAL["video_mme"],
    report_by=("duration", "domain", "sub_category"),
    num_frames=512,
    url=f"{HUB}/lmms-lab/Video-MME",
)
LONGVIDEOBENCH = Benchmark(
    source="longvideobench",
    scorers=OF_LMMS_EVAL["longvideobench"],
    report_by=("duration_group", "topic_category", "level"),
    num_frames=32,
    url=f"{HUB}/longvideobench/LongVideoBench",
)
BENCHMARKS: dict[str, Benchmark] = {
    "longvideo_reason": Benchmark(
        source="longvideo_reason",
        wording="plain",
        scorers={"official": scorers.longvideo_reason, "strict": scorers.strict},
        num_frames=512,
        url=f"{HUB}/LongVideo-Reason/longvideo-reason",
    ),
    "video_mme": VIDEO_MME,
    "video_mme_subtitles": dataclasses.replace(VIDEO_MME, subtitles="above"),
    "longvideobench": LONGVIDEOBENCH,
    "longvideobench_subtitles": dataclasses.replace(LONGVIDEOBENCH, subtitles="between"),
    "next_qa": Benchmark(
        source="nextqa",
        scorers=OF_LMMS_EVAL["next_qa"],
        report_by=("type",),
        num_frames=32,
        url=f"{HUB}/lmms-lab/NExTQA",
    ),
    "perception_test": Benchmark(
        source="perception_test",
        scorers=OF_LMMS_EVAL["perception_test"],
        report_by=("reasoning", "tag"),
        num_frames=32,
        url=f"{HUB}/lmms-lab/PerceptionTest_Val",
    ),
    "vnbench": Benchmark(
        source="vnbench",
        scorers=OF_LMMS_EVAL["vnbench"],
        report_by=("task",),
        together=vnbench.ROUND,
        rotations=4,
        num_frames=128,
        url=f"{HUB}/videoniah/VNBench",
    ),
    "activitynet_qa": Benchmark(
        source="activitynet_qa",
        wording="short",
        scorers={"same_words": scorers.said(scorers.same_words), "strict": scorers.strict},
        judge=activitynet_qa.judged,
        num_frames=32,
        url=f"{HUB}/lmms-lab/ActivityNetQA",
    ),
}

Row = dict[str, Any]


def read_answers(folder: Path | str, mode: str, benchmark: str) -> dict[str, list[Row]]:
    """Returns scores.read_answers of an evaluation on a benchmark, rotations joined."""
    found = list(scores.read_answers(folder, mode).values())
    return {rows[0]["id"]: rows for rows in joined(found, BENCHMARKS[benchmark])}


def joined(questions: Sequence[Sequence[Row]], benchmark: Benchmark) -> list[list[Row]]:
    """Returns one question for all rotations of it, right only where every one of them is.

    questions: the judged answers of each, rows with id, tags, scores and reward (scores.py).
    A score of the joined answer r is the lowest of the rotations' answers r, and None if one of
    them is. Questions that lack a rotation are left out. Without `together`: the same questions.
    """
    if not benchmark.together:
        return [list(rows) for rows in questions]
    groups: dict[str, list[Sequence[Row]]] = {}
    for rows in questions:
        groups.setdefault(rows[0]["tags"][benchmark.together], []).append(rows)
    return [
        [
            rows[0]
            | {"id": name, "scores": _lowest(rows, "scores"), "reward": _lowest(rows, "reward")}
            for rows in zip(*rotations, strict=True)
        ]
        for name, rotations in groups.items()
        if len(rotations) == benchmark.rotations
    ]


def _lowest(rows: Sequence[Row], part: str) -> dict[str, float | None] | None:
    """The lowest value of each name in row[part]; None if a row has no verdict."""
    values = [row[part] for row in rows]
    if any(value is None for value in values):
        return None
    return {
        name: None if any(v[name] is None for v in values) else min(v[name] for v in values)
        for name in values[0]
    }
