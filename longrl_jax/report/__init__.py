"""One HTML file that shows a run, or several side by side; it opens without a network.

A part whose file is missing is left out; what could not be read is named at the foot of the page.
Every text is escaped by the template, and the page's policy forbids fetching and foreign scripts.
"""

import base64
import datetime
import hashlib
import os
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import jinja2
from markupsafe import Markup

from longrl_jax.report import curves, evaluations, folders, samples, tables

NAME = "report.html"


def write(folder: Path) -> Path:
    """Writes folder/report.html of one run and returns its path."""
    return write_page([Path(folder)], Path(folder) / NAME)


def write_page(run_folders: Sequence[Path], out: Path) -> Path:
    """Writes one page about all runs (curves overlaid, columns side by side) and returns `out`.

    Raises ValueError for a folder that is no run folder.
    """
    html = render([folders.read(Path(folder)) for folder in run_folders])
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f"{out.name}.partial")  # a reader never sees half a page
    partial.write_text(html, encoding="utf-8")
    os.replace(partial, out)
    return out


def default_out(run_folders: Sequence[Path]) -> Path:
    """Returns where a page about these runs belongs: the run, or the folder they share."""
    if len(run_folders) == 1:
        return run_folders[0] / NAME
    return Path(os.path.commonpath([folder.resolve() for folder in run_folders])) / NAME


def render(runs: Sequence[folders.Run]) -> str:
    """Returns the page's HTML."""
    names = folders.short_names([run.folder for run in runs])
    script = _own_file("page.js")
    problems = [problem for run in runs for problem in run.problems]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    groups = [samples.groups(run, per_step=3 if len(runs) == 1 else 1) for run in runs]
    return environment.from_string(_own_file("page.html.jinja")).render(
        title=str(runs[0].folder) if len(runs) == 1 else f"{len(runs)} runs compared",
        made=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        css=Markup(_own_file("page.css")),
        script=Markup(script),
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        runs=[tables.header(run, name) for run, name in zip(runs, names, strict=True)],
        differences=tables.differences(runs),
        cards=tables.cards(runs),
        curves=curves.main(runs, names),
        other_curves=curves.other(runs, names),
        trained=evaluations.during_training(runs, names),
        gains=evaluations.gains(runs, names, problems),
        compared=evaluations.compared(runs, names),
        evaluated=evaluations.evaluated(runs, names),
        sweeps=evaluations.sweeps(runs, names, problems),
        samples=groups,
        times=[tables.times(run) for run in runs],
        refused=[tables.refused(run) for run in runs],
        files=[tables.files(run) for run in runs],
        problems=problems,
    )


def _own_file(name: str) -> str:
    return resources.files(__name__).joinpath(name).read_text(encoding="utf-8")
