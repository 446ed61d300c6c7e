"""Which numbers of metrics.jsonl are drawn, how they are called, and what they mean."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from markupsafe import Markup

from longrl_jax.report import folders, svg


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curve:
    """How a number of metrics.jsonl is shown."""

    title: str
    meaning: str = ""
    percent: bool = False
    may_be_log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chart:
    """A drawn curve with its texts."""

    title: str
    meaning: str
    svg: Markup


CURVES = {
    "reward/total": Curve(
        title="Reward", meaning="Mean of a step's sampled answers. Dots: validation."
    ),
    "accuracy": Curve(
        title="Accuracy",
        meaning="Line: sampled answers that are right. Dots: greedy validation answers, "
        "with 95 % intervals.",
        percent=True,
    ),
    "format": Curve(
        title="Format",
        meaning="Answers in the asked form. Dots: validation.",
        percent=True,
    ),
    "reward/mixed": Curve(
        title="Mixed groups",
        meaning="Questions whose answers differ in reward; where answers to one question are "
        "compared, the others teach nothing.",
        percent=True,
    ),
    "loss": Curve(title="Loss", may_be_log=True),
    "kl": Curve(title="KL to the reference", meaning="Nats a token."),
    "entropy": Curve(title="Entropy", meaning="Nats a token; near 0 nothing new is tried."),
    "grad_norm": Curve(title="Gradient norm", meaning="Before clipping.", may_be_log=True),
    "gap/max": Curve(
        title="Engine/learner gap",
        meaning="Largest difference in a token's log-probability between vLLM and the learner.",
        may_be_log=True,
    ),
    "answer/tokens": Curve(title="Answer length", meaning="Tokens, mean of a step."),
    "answer/cut_off": Curve(
        title="Answers cut off", meaning="Reached rollout.max_tokens.", percent=True
    ),
    "clip_fraction": Curve(
        title="Clipped tokens", meaning="Their ratio left the trust region.", percent=True
    ),
    "rollout/prefix_hits": Curve(
        title="Shared prefixes",
        meaning="Prompt tokens that vLLM took from its cache.",
        percent=True,
    ),
    "pack/fill": Curve(
        title="Fill of rows", meaning="Places that hold a token, not padding.", percent=True
    ),
    "pack/examples_per_row": Curve(title="Examples a row", meaning="Mean of a step."),
    "time/step_s": Curve(title="Seconds a step", meaning="Without evaluations.", may_be_log=True),
}
"""Key of metrics.jsonl, or last word of a reward part -> how it is shown, in the page's order."""
LEFT_OUT = ("step", "finite/", "time/")


def main(runs: Sequence[folders.Run], names: Sequence[str]) -> list[Chart]:
    """Draws the curves that everybody wants to see, all runs in each."""
    charts = []
    for word, curve in CURVES.items():
        keys = [word] if "/" in word else [k for k in _keys(runs) if k == word or _part(k) == word]
        for key in keys or [_validation_key(runs, word)]:
            charts.append(_chart(runs, names, key, curve, named=len(keys) > 1))
    return [chart for chart in charts if chart]


def other(runs: Sequence[folders.Run], names: Sequence[str]) -> list[Chart]:
    """Draws every other number of metrics.jsonl that ever changes."""
    keys = [
        key
        for key in _keys(runs)
        if key not in CURVES and _part(key) not in CURVES and not key.startswith(LEFT_OUT)
    ]
    charts = [_chart(runs, names, key, Curve(title=key, may_be_log=True)) for key in keys]
    return [chart for chart in charts if chart]


def evaluation_dots(run: folders.Run, key: str) -> tuple[svg.Dot, ...]:
    """Returns the validation scores of a reward part over steps; the start's own at step 0."""
    rows = list(run.evaluations)
    if run.start_evaluation and not any(row["step"] == 0 for row in rows) and rows:
        rows.insert(0, run.start_evaluation | {"step": 0})
    dots = []
    for row in rows:
        value, low, high = (folders.number(row.get(f"{key}{end}")) for end in ("", "/low", "/high"))
        if math.isfinite(value):
            low, high = (value if math.isnan(end) else end for end in (low, high))
            dots.append(svg.Dot(step=row["step"], value=value, low=low, high=high))
    return tuple(dots)


def _chart(
    runs: Sequence[folders.Run],
    names: Sequence[str],
    key: str,
    curve: Curve,
    *,
    named: bool = False,
) -> Chart | None:
    """named: several reward functions have such a part, so the title says which."""
    part = key.removeprefix("reward/") if key.startswith("reward/") else ""
    series = []
    for colour, (run, name) in enumerate(zip(runs, names, strict=True)):
        values = folders.column(run.metrics, key)
        dots = evaluation_dots(run, part) if part else ()
        if np.isfinite(values).any() or len(dots) > 1:
            steps = np.array([row["step"] for row in run.metrics], np.int64)
            series.append(
                svg.Series(name=name, colour=colour, steps=steps, values=values, dots=dots)
            )
    if not series or (curve.title == key and _constant(series)):
        return None
    drawn = svg.line_chart(
        series,
        label=f"{curve.title} by step",
        percent=curve.percent,
        may_be_log=curve.may_be_log,
    )
    title = f"{curve.title} ({part.split('/')[0]})" if named else curve.title
    return Chart(title=title, meaning=curve.meaning, svg=drawn)


def _constant(series: Sequence[svg.Series]) -> bool:
    values = np.concatenate([one.values[np.isfinite(one.values)] for one in series])
    return values.size == 0 or bool(np.ptp(values) == 0)


def _keys(runs: Sequence[folders.Run]) -> list[str]:
    """Returns the keys of all steps of all runs, in the order of first appearance."""
    return list(dict.fromkeys(key for run in runs for row in run.metrics for key in row))


def _validation_key(runs: Sequence[folders.Run], word: str) -> str:
    """Returns reward/<part> of a part named `word` that only evaluations know (SFT)."""
    keys = (key for run in runs for row in run.evaluations for key in row)
    return next((f"reward/{k}" for k in keys if k.endswith(f"/{word}") and k.count("/") == 1), word)


def _part(key: str) -> str:
    """Returns the last word of a reward part, e.g. accuracy of reward/video_qa/accuracy."""
    return key.rsplit("/", 1)[1] if key.startswith("reward/") and key.count("/") == 2 else ""
