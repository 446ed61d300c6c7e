"""Which film stands in for which, how questions are split, and what a person reads."""

import dataclasses

import numpy as np
import pytest

from longrl_jax import evaluate
from longrl_jax.stages import evaluation, questions
from longrl_jax.types import Example, Prompt


@pytest.mark.parametrize("count", [2, 3, 7, 100])
def test_every_film_is_shown_for_another_one(count):
    films = [f"{i}.mp4" for i in range(count)]
    for seed in range(20):
        other = questions.other_films(films, seed=seed)
        assert sorted(other) == sorted(other.values()) == sorted(films)
        assert all(film != shown for film, shown in other.items())
    if count > 3:
        drawn = [questions.other_films(films, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]


def test_one_film_has_no_other():
    assert questions.other_films(["a.mp4"], seed=0) == {} == questions.other_films([], seed=0)


def prompt(num_tokens):
    tokens = np.zeros(num_tokens, np.int32)
    return Prompt(
        example=Example(id=str(num_tokens), question="?", answer="A"),
        tokens=tokens,
        is_media=tokens > 0,
        rope_pos=tokens,
        next_rope_pos=0,
    )


def test_batches_keep_both_limits(monkeypatch):
    monkeypatch.setattr(evaluation, "MAX_QUESTIONS", 3)
    monkeypatch.setattr(evaluation, "MAX_PROMPT_TOKENS", 10)
    asked = [prompt(n) for n in (1, 2, 3, 4, 5, 6, 50, 1)]
    sizes = [[len(p.tokens) for p in batch] for batch in evaluation.batches(asked)]
    assert sizes == [[1, 2, 3], [4, 5], [6], [50], [1]]


def found():
    def score(mean, n=8):
        return {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "n": n}

    def mode(mean, **more):
        parts = {"video_qa/accuracy": score(mean), "video_qa/format": score(0.9)} | more
        return {"all": parts, "goal": {"video_qa/accuracy": score(mean / 2, 4)}}

    return {
        "checkpoint": "runs/x/export",
        "step": 7,
        "questions": 8,
        "refused": 2,
        "counts": {"other_video": {"asked": 8, "answered": 6}},
        "modes": {
            "greedy": mode(0.6),
            "sampled": mode(0.5, **{"video_qa/accuracy/pass@4": score(0.8)}),
            "other_video": mode(0.3),
        },
        "baselines": {
            "one_letter": {"all": {"letter": "C"} | score(0.25)},
            "chance": {"all": {"mean": 0.25, "n": 8}},
        },
        "skipped": {"no_video": "a reason"},
        "settings": {"--samples": 4},
    }


def test_the_table_is_aligned_and_says_what_is_missing():
    lines = evaluate.table(found()).splitlines()
    assert lines[0] == "runs/x/export (step 7): 8 questions, 2 refused"
    title, accuracy, goal, form = lines[2], lines[4], lines[5], lines[7]
    columns = ("greedy", "mean@4", "pass@4", "other video", "one letter", "chance")
    starts = [title.index(column) for column in columns]
    cells = ["60.0 (50-70)", "50.0 (40-60)", "80.0 (70-90)", "30.0 (20-40)", "25.0 (15-35) C"]
    for start, cell in zip(starts, [*cells, "25.0"], strict=True):
        assert accuracy[start:].startswith(cell)
    assert goal.split()[:3] == ["goal", "4", "30.0"] and goal.split()[-2:] == ["-", "-"]
    assert form.split()[:3] == ["all", "8", "90.0"] and "25.0" not in form
    assert "no video" not in title
    assert lines[-2:] == ["no_video is left out: a reason", "other_video: 6 of 8 could be asked"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples=-1"], "'-1' must be a whole number from 0 on"),
        (["--examples=none"], "'none' must be a whole number from 1 on"),
        (["--temperature=0"], "'0' must be a number from 0.01 on"),
        (["--temperature=nan"], "'nan' must be a number from 0.01 on"),
    ],
)
def test_a_wrong_option_says_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["x.yaml", *arguments])
    assert message in capsys.readouterr().err


def test_where_scores_go_and_which_step_they_are_of(tmp_path):
    plan = evaluate.Plan(out=tmp_path)
    assert [how.name for how in evaluate.modes(plan)] == [
        "greedy", "sampled", "no_video", "other_video",
    ]  # fmt: skip
    plain = dataclasses.replace(plan, num_samples=0, baselines=False)
    assert [how.name for how in evaluate.modes(plain)] == ["greedy"]
    export = tmp_path / "sft" / "export"
    assert evaluate.step_of(str(export)) is None
    export.mkdir(parents=True)
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert evaluate.step_of(str(export)) == 2 and evaluate.step_of(str(tmp_path / "sft")) is None
