"""`make road`: its commands are ones that the tools take, finished steps are not run again, and its
servers live as long as the step that needs them. All of it was run as a whole by hand:
benchmarks/results/road_cpu2_202611.md."""

import dataclasses
import json
import re
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from longrl_jax import commands, config, evaluate, road, train
from longrl_jax.data import difficulty, embed, prompts, stories, synthetic
from longrl_jax.data.generate import __main__ as generate
from longrl_jax.data.generate import oracle, settings
from longrl_jax.data.wording import Words
from longrl_jax.evaluate import choices
from longrl_jax.options import join_options
from longrl_jax.types import MediaFile

ROOT = Path(__file__).parents[1]
PARSERS = {
    "longrl_jax.data.synthetic": synthetic._parser,
    "longrl_jax.data.generate": generate._parser,
    "longrl_jax.data.embed": embed._parser,
    "longrl_jax.data.difficulty": difficulty._parser,
    "longrl_jax.train": train._parser,
    "longrl_jax.evaluate": evaluate.parser,
}
STEPS = [step for step in road.steps() if step.command[0] in PARSERS]


@pytest.mark.parametrize("step", STEPS, ids=[step.title for step in STEPS])
def test_every_command_is_one_that_its_tool_takes(step, monkeypatch):
    monkeypatch.chdir(ROOT)
    module, *words = step.command
    parser = PARSERS[module]()
    args = parser.parse_intermixed_args(words) if module != "longrl_jax.data.generate" else None
    if module == "longrl_jax.data.generate":
        args = parser.parse_args(words)
        assert set(step.servers) == set(settings.load(args.config, []).servers)
    elif module == "longrl_jax.evaluate":
        (variant,) = choices.variants(args)
        assert variant.cfg.data.num_frames == 32 and variant.plan.benchmark == "longvideo_reason"
        assert variant.plan.out / "scores.json" == step.made
    elif module != "longrl_jax.data.synthetic":
        config.load(args.config, args.overrides)


def test_the_template_puts_a_packaged_question_as_the_start_has_learned_it():
    """The start learned from prompts with the words of ask(), without any template."""
    film = (MediaFile(kind="video", path="x.mp4"),)
    for number, kind in enumerate(stories.CHOICE_KINDS):
        rng = np.random.default_rng(number)
        asked = stories.ask(stories.make_story(rng), kind, rng, letter="B", id="x")
        stem, _, listed = asked.question.partition(" ? ")
        options = [part.strip() for part in re.split(r" = [A-D]", listed)[:4]]
        packaged = dataclasses.replace(
            asked, question=join_options(f"{stem} ?", options), media=film
        )
        words = Words(template_file=str(ROOT / "configs/road/question.jinja"))
        want = prompts.user_text(dataclasses.replace(asked, media=film), "think")
        assert prompts.user_text(packaged, "think", words) == want


def test_finished_steps_are_skipped(tmp_path, capsys):
    (tmp_path / "in.json").write_text("{}")
    made = tmp_path / "made.json"
    step = road.Step(
        title="", command=("json.tool", str(tmp_path / "in.json"), str(made)), made=made
    )
    for _ in range(2):
        road.walk([step], tmp_path / "times.jsonl")
    assert capsys.readouterr().out.count("$ python -m json.tool") == 1
    assert len((tmp_path / "times.jsonl").read_text().splitlines()) == 1
    (tmp_path / "scores.json").write_text('{"complete": false}')
    assert not road.is_made(tmp_path / "scores.json")


def test_a_failing_step_ends_the_road(tmp_path):
    step = road.Step(title="", command=("json.tool", "--nothing"), made=tmp_path / "made")
    with pytest.raises(SystemExit, match="json.tool failed with exit status 2"):
        road.walk([step], tmp_path / "times.jsonl")
    assert not (tmp_path / "times.jsonl").exists()


def test_a_server_lives_as_long_as_its_block(tmp_path):
    with commands.serving(tmp_path / "log", "longrl_jax.data.generate", "oracle") as url:
        models = json.load(urllib.request.urlopen(f"{url}/models"))
        assert models["data"][0]["id"] == oracle.MODEL
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"{url}/models")


def test_a_server_that_cannot_start_is_named(tmp_path):
    server = commands.serving(tmp_path / "log", "json.tool")  # which knows no --port
    with pytest.raises(SystemExit, match=r"json.tool ended with exit status 2; see .*log"), server:
        pass
