"""Which film stands in for which, how questions are split, and what a person reads."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from longrl_jax import benchmarks, config, evaluate, scores
from longrl_jax.evaluate import answering, choices, sweep, tables
from longrl_jax.evaluate import plan as planned
from longrl_jax.stages import evaluation, questions
from longrl_jax.types import Example, Prompt

CONFIG = Path(__file__).parents[1] / "configs" / "tiny_cpu_grpo.yaml"


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
        part = "video_qa/accuracy"
        goal, long = {part: score(mean / 2, 4)}, {part: score(mean / 4, 2)}
        return {"all": parts, "goal": goal, "duration: long": long}

    return {
        "checkpoint": "runs/x/export",
        "step": 7,
        "benchmark": "",
        "questions": 8,
        "refused": 2,
        "counts": {"other_video": {"asked": 8, "answered": 6, "unjudged": {"rewards": 3}}},
        "shuffled_minus_greedy": {"video_qa/accuracy": score(-0.05)},
        "judged_by": {"scorers": [], "rewards": {"video_qa": 1.0}, "report_by": []},
        "modes": {
            "greedy": mode(0.6),
            "sampled": mode(0.5, **{"video_qa/accuracy/pass@4": score(0.8)}),
            "shuffled": mode(0.4),
            "other_video": mode(0.3),
        },
        "baselines": {
            "one_letter": {"all": {"letter": "C"} | score(0.25)},
            "chance": {"all": {"mean": 0.25, "n": 8}},
        },
        "skipped": {"no_video": "a reason"},
        "settings": {"--samples": 4, "--shuffles": 2},
    }


def test_the_table_is_aligned_and_says_what_is_missing():
    lines = tables.table(found()).splitlines()
    assert lines[0] == "runs/x/export (step 7): 8 questions, 2 refused"
    # modes and baselines by part, those of accuracy alone under it
    starts = [lines[2].index(part) for part in ("video_qa/accuracy", "video_qa/format")]
    for line, cells in zip(
        lines[3:10],
        [
            ("60.0 (50-70)", "90.0 (80-100)"),
            ("50.0 (40-60)", "90.0 (80-100)"),
            ("80.0 (70-90)", "-"),
            ("40.0 (30-50)", "90.0 (80-100)"),
            ("30.0 (20-40)", "90.0 (80-100)"),
            ("25.0 (15-35) C", "-"),
            ("25.0", "-"),
        ],
        strict=True,
    ):
        assert [line[start:].split("  ")[0] for start in starts] == list(cells)
    names = ["greedy", "mean@4", "pass@4", "shuffled", "other video", "one letter", "chance"]
    assert [line.split("  ")[0] for line in lines[3:10]] == names
    # then every accuracy by kind, modes and baselines as columns
    assert lines[11] == "video_qa/accuracy"
    title, accuracy, goal, tag = lines[12:16]
    starts = [title.index(column) for column in names]
    cells = ["60.0 (50-70)", "50.0 (40-60)", "80.0 (70-90)", "40.0 (30-50)", "30.0 (20-40)"]
    for start, cell in zip(starts, [*cells, "25.0 (15-35) C", "25.0"], strict=True):
        assert accuracy[start:].startswith(cell)
    assert goal.split()[:3] == ["goal", "4", "30.0"] and goal.split()[-2:] == ["-", "-"]
    assert tag.split()[:4] == ["duration:", "long", "2", "15.0"]
    assert "no video" not in "".join(lines[:16])
    assert lines[16:] == [
        "video_qa/accuracy, options shuffled minus greedy on the same questions: -5.0 (-15 to +5)",
        "no_video is left out: a reason",
        "other_video: 6 of 8 could be asked",
        "other_video: rewards could not judge 3 answers, which count in no score; the same command "
        "tries again",
    ]


def write_answers(folder, right):
    """Writes greedy answers to four questions, as an evaluation leaves them."""
    (folder / "answers").mkdir(parents=True)
    rows = [
        {"id": f"q{i}", "kind": "goal" if i < 2 else "plot", "video": f"{i}.mp4", "sample": 0}
        | {"answer": "A", "reward": {"video_qa/accuracy": float(x), "total": 0.5}}
        | {"scores": {"official": float(x or i == 3), "strict": None}}
        for i, x in enumerate(right)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "answers" / "greedy.jsonl").write_text(text)
    by_kind = scores.summary([[row] for row in rows])
    judges = {"scorers": ["official", "strict"], "rewards": {}, "report_by": []}
    return {"modes": {"greedy": by_kind}, "judged_by": judges}


def test_a_reward_whose_code_has_changed_judges_anew(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("raise RuntimeError('run too early')\n")
    code = tmp_path / "mine" / "scores.py"
    monkeypatch.syspath_prepend(tmp_path)
    cfg = config.load(
        CONFIG, ["rewards={'mine.scores:f': 1.0, overlong: 1.0}", "rollout.overlong_tokens=2"]
    )
    told = []
    for text in ("def f(items): ...\n", "def f(items): return items\n"):
        code.write_text(text)
        told.append(planned.judges_of(cfg, planned.Plan(out=tmp_path)))
    assert told[0]["code"] != told[1]["code"] and all(told[0]["code"].values())
    longer = dataclasses.replace(cfg.rollout, overlong_tokens=cfg.rollout.overlong_tokens + 1)
    cfg = dataclasses.replace(cfg, rollout=longer)
    assert planned.judges_of(cfg, planned.Plan(out=tmp_path)) != told[1]


def test_an_evaluation_that_nobody_judged_is_no_point_of_a_sweep(tmp_path):
    def variant(frames):
        plan = planned.Plan(out=tmp_path / f"{frames}_frames")
        return choices.Variant(cfg=None, plan=plan, num_frames=frames)

    todo = [variant(frames) for frames in (4, 8, 16)]
    away = found() | {"modes": {"greedy": {"all": {}, "plot": {}}}, "complete": True}
    judged = found() | {"complete": True}
    assert sweep.write(todo, [away, away, judged], tmp_path) == []
    assert sweep.write(todo, [judged, away, judged], tmp_path) == [
        tmp_path / "sweep.json",
        tmp_path / "sweep.svg",
    ]
    points = json.loads((tmp_path / "sweep.json").read_text())["points"]
    assert [point["frames"] for point in points] == [4, 16]


def test_answers_that_were_deleted_are_written_again(tmp_path):
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}")
    (tmp_path / "validation.jsonl").write_text("")
    cfg = config.load(CONFIG, [f"model.path={tmp_path / 'weights'}", f"data.root={tmp_path}"])
    plan = planned.Plan(out=tmp_path)
    write_answers(tmp_path, [1, 1, 0, 0])
    found = planned.begun(cfg, plan) | {"complete": True, "modes": {"greedy": {}}}
    (tmp_path / "scores.json").write_text(json.dumps(found))
    assert planned.begun(cfg, plan)["complete"]
    (tmp_path / "answers" / "greedy.jsonl").unlink()
    assert not planned.begun(cfg, plan)["complete"]


def test_two_evaluations_are_compared_question_by_question(tmp_path):
    for name, right in (("direct", [0, 0, 1, 0]), ("thinking", [1, 1, 1, 0])):
        write_answers(tmp_path / name, right)
    lines = tables.compared(tmp_path / "thinking", tmp_path / "direct").splitlines()
    want = {
        "official/accuracy": ["all 4 +50.0 (-42 to +142)", "goal 2 +100.0", "plot 2 +0.0"],
        "video_qa/accuracy": ["all 4 +50.0 (-42 to +142)", "goal 2 +100.0", "plot 2 +0.0"],
    }  # the differences 1, 1, 0, 0: 0.5 +- t_3 * 0.577 / 2
    for part, rows in want.items():
        place = lines.index(part) + 2
        assert [" ".join(line.split()) for line in lines[place : place + 3]] == rows
    assert "strict/accuracy" not in lines  # nobody judged it
    for name in ("direct", "thinking"):  # a mode that the judge was away for is left out alone
        row = {"id": "q0", "kind": "goal", "video": "", "sample": 0, "reward": None}
        (tmp_path / name / "answers" / "no_video.jsonl").write_text(json.dumps(row) + "\n")
    assert tables.compared(tmp_path / "thinking", tmp_path / "direct").splitlines() == lines
    with pytest.raises(ValueError, match="hold no mode that both were asked in"):
        tables.compared(tmp_path / "thinking", tmp_path)


def test_evaluations_side_by_side_say_what_thinking_adds(tmp_path):
    folders = {name: tmp_path / name for name in ("thinking", "direct")}
    found = {
        name: write_answers(folders[name], right)
        for name, right in (("thinking", [1, 1, 1, 0]), ("direct", [0, 0, 1, 0]))
    }
    names = {"thinking": "thinking, 8 frames", "direct": "direct, 8 frames"}
    lines = tables.side_by_side(
        {names[name]: one for name, one in found.items()},
        {names[name]: folder for name, folder in folders.items()},
    ).splitlines()
    place = lines.index("greedy, video_qa/accuracy")
    title, whole, goal, _ = lines[place + 1 : place + 5]
    columns = [*names.values(), "8 frames, thinking - direct"]
    starts = [title.index(column) for column in columns]
    assert [whole[start:].split("  ")[0].split(" (")[0] for start in starts] == [
        "75.0", "25.0", "+50.0",
    ]  # fmt: skip
    assert [goal[start:].split("  ")[0].split(" (")[0] for start in starts] == [
        "100.0", "0.0", "+100.0",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--samples=-1"], "'-1' must be a whole number from 0 on"),
        (["--examples=none"], "'none' must be a whole number from 1 on"),
        (["--temperature=0"], "'0' must be a number from 0.01 on"),
        (["--temperature=nan"], "'nan' must be a number from 0.01 on"),
        (["--shuffles=x"], "'x' must be a whole number from 0 on"),
        (["--frames=8,none"], "'none' must be a whole number from 1 on"),
        (["--thinking=perhaps"], "'perhaps' must be on, off or both"),
        (["--benchmark=a,,b"], "'a,,b' must be names, each once, with commas between"),
        (["--benchmark=a=1.json,a=2.json"], "must be names, each once, with commas between"),
    ],
)
def test_a_wrong_option_says_what_is_wanted(arguments, message, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["x.yaml", *arguments])
    assert message in capsys.readouterr().err


def test_where_scores_go_and_which_step_they_are_of(tmp_path):
    plan = planned.Plan(out=tmp_path)
    assert [how.name for how in answering.modes(plan)] == [
        "greedy", "sampled", "shuffled", "no_video", "other_video",
    ]  # fmt: skip
    plain = dataclasses.replace(plan, num_samples=0, num_shuffles=0, baselines=False)
    assert [how.name for how in answering.modes(plain)] == ["greedy"]
    export = tmp_path / "sft" / "export"
    assert planned.step_of(str(export)) is None
    export.mkdir(parents=True)
    (tmp_path / "sft" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    assert planned.step_of(str(export)) == 2 and planned.step_of(str(tmp_path / "sft")) is None


def asked_for(*words):
    """The evaluations of a command line on configs/tiny_cpu_grpo.yaml."""
    return choices.variants(evaluate.parser().parse_intermixed_args([str(CONFIG), *words]))


def test_every_variant_has_a_config_and_a_folder_of_its_own():
    (plain,) = asked_for("--out=x")
    assert (plain.plan.out, plain.words, plain.cfg.data.num_frames) == (Path("x"), (), 32)
    got = asked_for("--out=x", "--thinking=both", "--frames=64,16", "data.fps=2")
    said = [
        (v.plan.out.as_posix(), v.cfg.data.template, v.cfg.data.num_frames, v.cfg.data.fps)
        for v in got
    ]
    assert said == [
        ("x/thinking/16_frames", "think", 16, 0.0),
        ("x/thinking/64_frames", "think", 64, 0.0),
        ("x/direct/16_frames", "direct", 16, 0.0),
        ("x/direct/64_frames", "direct", 64, 0.0),
    ]


def test_a_benchmark_sets_what_the_command_line_does_not(monkeypatch, tmp_path):
    known = benchmarks.BENCHMARKS["longvideo_reason"]
    quick = dataclasses.replace(known, template="direct", num_frames=12, max_tokens=16)
    monkeypatch.setitem(benchmarks.BENCHMARKS, "quick", quick)
    room = ["batch.max_row_tokens=20000", "rollout.max_model_len=9000"]
    (got,) = asked_for("--benchmark=quick", "--out=x", *room)
    assert got.plan.out == Path("x/quick") and got.plan.benchmark == "quick"
    data, tokens = got.cfg.data, got.cfg.rollout.max_tokens
    assert (data.source, data.template, data.num_frames, tokens) == (
        "longvideo_reason", "direct", 12, 16,
    )  # fmt: skip
    assert data.root == "data/tiny" and data.validation == "validation.jsonl"
    words = ["data.num_frames=3", "rollout.max_tokens=5", "--thinking=both"]
    on, off = asked_for("--benchmark=quick", *words, *room)
    assert (on.cfg.data.num_frames, on.cfg.rollout.max_tokens) == (3, 5)
    assert (on.cfg.data.template, off.cfg.data.template) == ("think", "direct")
    (on,) = asked_for("--benchmark=quick", "--thinking=on", *room)
    assert on.cfg.rollout.max_tokens == 48  # 16 leave no room for reasons: as the config says
    # several: each in its folder under data.root, its file as named
    root = f"data.root={tmp_path}"
    got = asked_for("--benchmark=quick=a.jsonl,longvideo_reason", root, *room)
    assert [(v.cfg.data.root, v.cfg.data.validation) for v in got] == [
        (f"{tmp_path}/quick", "a.jsonl"),
        (f"{tmp_path}/longvideo_reason", "validation.jsonl"),
    ]
    (tmp_path / "quick").mkdir()
    (one,) = asked_for("--benchmark=all", root, *room)
    assert (one.plan.benchmark, one.cfg.data.root) == ("quick", f"{tmp_path}/quick")
    with pytest.raises(ValueError, match="--benchmark='mine' is unknown; choose one of"):
        asked_for("--benchmark=mine")
    with pytest.raises(ValueError, match="--benchmark all: data.root=data/none holds no folder"):
        asked_for("--benchmark=all", "data.root=data/none")
