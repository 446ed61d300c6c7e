"""Rotations of a question count together."""

import json
import re
from pathlib import Path

import pytest

from longrl_jax import evaluate, scores
from longrl_jax.benchmarks import BENCHMARKS, joined
from longrl_jax.evaluate import choices, tables
from longrl_jax.report import evaluations, folders
from longrl_jax.types import Example

VNBENCH = BENCHMARKS["vnbench"]


def rows(question, rotation, *values, reward=True):
    return [
        {
            "id": f"{question}_{rotation}",
            "kind": "cnt_edit1",
            "video": f"{question}.mp4",
            "tags": {"question": question, "task": "counting"},
            "sample": r,
            "scores": {"official": value, "strict": 1.0},
            "reward": {"total": value} if reward else None,
        }
        for r, value in enumerate(values)
    ]


def test_a_question_is_right_only_if_all_rotations_are():
    right = [rows("a", i, 1.0) for i in range(4)]
    wrong = [rows("b", i, float(i != 2)) for i in range(4)]
    got = joined([*right[:2], *wrong, *right[2:]], VNBENCH)
    assert [[row["scores"]["official"] for row in question] for question in got] == [[1.0], [0.0]]
    assert [question[0]["id"] for question in got] == ["a", "b"]
    assert [question[0]["reward"]["total"] for question in got] == [1.0, 0.0]
    summary = scores.summary(got, report_by=VNBENCH.report_by)
    assert summary["all"]["official/accuracy"]["mean"] == 0.5


def test_answers_are_joined_by_their_number():
    got = joined([rows("a", i, 1.0, float(i < 3)) for i in range(4)], VNBENCH)
    assert [row["scores"]["official"] for row in got[0]] == [1.0, 0.0]


def test_what_cannot_be_judged_or_lacks_a_rotation():
    unjudged = [rows("a", i, None if i == 1 else 1.0, reward=i != 3) for i in range(4)]
    got = joined([*unjudged, *(rows("b", i, 1.0) for i in range(3))], VNBENCH)
    assert len(got) == 1
    assert got[0][0]["scores"] == {"official": None, "strict": 1.0}
    assert got[0][0]["reward"] is None


def write_rotations(folder, benchmark, right):
    """Writes greedy answers to two questions, of which so many rotations are right."""
    (folder / "answers").mkdir(parents=True)
    questions = [rows(name, i, float(i < n)) for name, n in right.items() for i in range(4)]
    lines = [json.dumps(row) + "\n" for question in questions for row in question]
    (folder / "answers" / "greedy.jsonl").write_text("".join(lines))
    (folder / "scores.json").write_text(json.dumps({"benchmark": benchmark}))
    return {
        "modes": {"greedy": scores.summary(joined(questions, BENCHMARKS[benchmark]))},
        "judged_by": {"scorers": ["official"]},
    }


def test_two_evaluations_are_compared_by_questions_whose_rotations_are_all_right(tmp_path):
    folders = {name: tmp_path / name for name in ("thinking", "direct")}
    right = {"thinking": {"a": 4, "b": 3}, "direct": {"a": 3, "b": 0}}  # b gains nothing
    found = {n: write_rotations(folders[n], "vnbench", right[n]) for n in folders}
    compared = tables.compared(folders["thinking"], folders["direct"]).splitlines()
    assert compared[compared.index("official/accuracy") + 2].split()[:3] == ["all", "2", "+50.0"]
    beside = tables.side_by_side(found, folders).splitlines()
    whole = next(line for line in beside if line.startswith("all"))
    assert [cell.split(" (")[0] for cell in re.split("  +", whole)] == [
        *("all", "50.0", "0.0", "+50.0"),
    ]


def test_the_gains_of_a_report_are_those_of_questions_whose_rotations_are_all_right(tmp_path):
    for name, right in {"after": {"a": 4, "b": 3}, "start": {"a": 3, "b": 2}}.items():
        folder = tmp_path / "evaluate" / name
        tree = write_rotations(folder, "vnbench", right) | {"checkpoint": name}
        (folder / "scores.json").write_text(json.dumps(tree | {"benchmark": "vnbench"}))
    (tmp_path / "resolved.yaml").write_text("model: {path: start}\n")
    problems = []
    (table,) = evaluations.gains([folders.read(tmp_path)], ["run"], problems)
    assert not problems
    assert table.rows[0][1][0].text == "+50.0 pts"  # a alone, of two


def test_other_benchmarks_are_left_alone():
    questions = [rows("a", i, 1.0) for i in range(4)]
    assert joined(questions, BENCHMARKS["video_mme"]) == questions


@pytest.mark.parametrize(("rotations", "want"), [(1, 0.25), (4, 0.25**4)])
def test_chance_of_rotations(rotations, want):
    question = "How many?\nA. 1\nB. 2\nC. 3\nD. 4"
    examples = [Example(id=str(i), question=question, answer="ABCD"[i]) for i in range(4)]
    found = scores.chance(examples, (), rotations)["all"]
    assert found == {"mean": want, "n": 4 // rotations}


ROOM = ("batch.max_row_tokens=20000", "rollout.max_model_len=9000")
CONFIG = Path(__file__).parents[1] / "configs" / "tiny_cpu_grpo.yaml"


def asked_for(*words):
    args = evaluate.parser().parse_intermixed_args([str(CONFIG), *ROOM, *words])
    (variant,) = choices.variants(args)
    return variant.cfg


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_says_how_it_is_asked(name):
    judge = ["judge.base_url=http://localhost:1/v1", "judge.model=x"]
    benchmark, cfg = BENCHMARKS[name], asked_for(f"--benchmark={name}", *judge)
    data = cfg.data
    assert (data.source, data.wording, data.subtitles, data.num_frames, data.fps) == (
        *(benchmark.source, benchmark.wording, benchmark.subtitles, benchmark.num_frames, 0.0),
    )
    own = asked_for(f"--benchmark={name}", "data.subtitles=above", "data.wording=plain", *judge)
    assert (own.data.subtitles, own.data.wording) == ("above", "plain")


def test_open_answers_need_a_judge():
    with pytest.raises(ValueError, match="activitynet_qa needs a model that judges: judge.base_ur"):
        asked_for("--benchmark=activitynet_qa", "judge.model=x")
