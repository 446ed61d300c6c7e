"""Scores by number of frames: sweep.json and its plot, one line a benchmark and way of thinking."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from longrl_jax import run_folder, scores
from longrl_jax.evaluate.choices import Variant
from longrl_jax.evaluate.plan import Found
from longrl_jax.evaluate.tables import parts_of
from longrl_jax.report import evaluations, svg

SWEEP, PLOT = "sweep.json", "sweep.svg"


def write(todo: Sequence[Variant], found: Sequence[Found], out: Path) -> list[Path]:
    """Writes sweep.json and its plot where there are two numbers of frames; returns their paths.

    An evaluation of which no answer could be judged (a judge that is away) is no point of it.
    """
    judged = [(v, one) for v, one in zip(todo, found, strict=True) if parts_of(one)]
    if len({variant.num_frames for variant, _ in judged}) < 2:
        return []
    points = [_point(variant, one, out) for variant, one in judged]
    tree = {"checkpoint": found[0]["checkpoint"], "points": points}
    chart = evaluations.sweep_chart(tree)
    run_folder.write_synced(out / SWEEP, (json.dumps(tree, indent=1) + "\n").encode())
    run_folder.write_synced(
        out / PLOT, svg.alone(chart.svg, chart.legend, chart.title, chart.note).encode()
    )
    return [out / SWEEP, out / PLOT]


def _point(variant: Variant, found: Found, out: Path) -> dict[str, Any]:
    """Returns one evaluation of a sweep: its greedy scores and blind baselines over all kinds."""
    greedy = found["modes"]["greedy"]["all"]
    parts = [part for part in parts_of(found) if part in greedy]
    baselines = {name: by_kind.get("all") for name, by_kind in found["baselines"].items()}
    return {
        "line": ", ".join(variant.words[:-1]),  # the last word is the number of frames
        "frames": variant.num_frames,
        "folder": variant.plan.out.relative_to(out).as_posix(),
        "questions": found["questions"],
        "complete": found["complete"],
        "part": next(filter(scores.is_right, parts), parts[0]),
        "scores": {part: greedy[part] for part in parts},
        "baselines": {name: score for name, score in baselines.items() if score},
    }
