"""The page of a difficulty filter: how many questions have which pass rate, overall and by kind."""

from collections.abc import Mapping
from importlib import resources
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup

from longrl_jax.report import svg

TEMPLATE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>Difficulty of {{ checkpoint }}</title>
<style>{{ css }}</style>
</head>
<body>
<h1>How hard the questions are for {{ checkpoint }}</h1>
<p class="lead">{{ samples }} answers to a question. Kept: {{ above }} &lt; pass rate &lt;
{{ below }}, split by {{ split_by }} into {{ sft }} for SFT and {{ rl }} for RL. {{ refused }}
records could not be asked. {{ cut_off }} of the answers were cut off.</p>
<div class="legend" style="margin-bottom: 8px"><span><i class="key c0"></i>kept</span>
<span><i class="key faint"></i>dropped</span></div>
<div class="charts">
{% for kind, counts, chart in kinds %}
<figure class="card chart"><h3>{{ kind }}</h3>
<p>{{ counts.kept }} kept, {{ counts.too_hard }} too hard, {{ counts.too_easy }} too easy,
{{ counts.invalid }} invalid</p>{{ chart }}</figure>
{% endfor %}
</div>
</body>
</html>
"""


def render(summary: Mapping[str, Any]) -> str:
    """Returns the page of a summary.json of longrl_jax.data.difficulty."""
    samples = summary["samples"]
    charts = []
    for kind, counts in summary["kinds"].items():
        bins = counts["histogram"]
        chart = svg.histogram(
            np.array([bins["kept"], bins["dropped"]]).T,
            label=f"questions of {kind} by right answers",
            x_name=f"right answers of {samples}",
        )
        charts.append((kind, counts, chart))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    css = resources.files("longrl_jax.report").joinpath("page.css").read_text(encoding="utf-8")
    return environment.from_string(TEMPLATE).render(
        {name: value for name, value in summary.items() if name != "kinds"},
        css=Markup(css),
        kinds=charts,
        cut_off=svg.short(summary["answers_cut_off"], percent=True),
    )
