"""Means, intervals and differences of judged answers, against scipy, loops and numbers by hand."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from longrl_jax import scores
from longrl_jax.options import ANY_NUMBER
from longrl_jax.types import Example

EXACT = 1e-12  # the same formula in another order, float64


def row(name, right, *, kind="plot", video="", sample=0, mode="greedy"):
    reward = None if right is None else {"total": right, "video_qa/accuracy": right}
    row = {"id": name, "kind": kind, "video": video, "reward": reward}
    return row | {"sample": sample, "mode": mode}


@pytest.mark.parametrize(("right", "count"), [(0, 5), (5, 5), (1, 1), (130, 400), (399, 400)])
def test_right_or_wrong_answers_have_wilsons_interval(right, count):
    got = scores.interval([[1.0]] * right + [[0.0]] * (count - right))
    want = stats.binomtest(right, count).proportion_ci(0.95, method="wilson")
    np.testing.assert_allclose([got["low"], got["high"]], [want.low, want.high], atol=EXACT)
    assert got["mean"] == pytest.approx(right / count) and got["n"] == count


def test_interval_of_sampled_means_agrees_with_a_bootstrap_over_questions():
    rng = np.random.default_rng(0)
    chance_N = rng.beta(0.6, 0.8, 300)  # some questions are easy, most are hard
    drawn = (rng.random((300, 8)) < chance_N[:, None]).astype(float)
    got = scores.interval(drawn.tolist())
    means = drawn.mean(axis=1)
    want = stats.bootstrap([means], np.mean, rng=1, method="percentile").confidence_interval
    assert got["mean"] == pytest.approx(drawn.mean())
    np.testing.assert_allclose([got["low"], got["high"]], [want.low, want.high], atol=0.004)
    # 2400 answers are not 2400 questions
    low, high = scores.wilson(drawn.mean(), drawn.size)
    assert got["high"] - got["low"] > 1.5 * (high - low)


def test_questions_that_share_a_film_count_less_than_as_many_films():
    answers = [[float(film % 3 == 0)] for film in range(100) for _ in range(4)]  # all or none right
    films = [f"film {film}" for film in range(100) for _ in range(4)]
    low, high = scores.wilson(0.34, 100)  # as if there were 100 questions
    got = scores.interval(answers, films)
    np.testing.assert_allclose([got["low"], got["high"]], [low, high], atol=0.002)
    assert scores.interval(answers)["low"] > got["low"] + 0.03
    alone = scores.interval(answers, ["one film"] * 400)
    assert (alone["mean"], alone["low"]) == (0.34, None)  # says nothing about other films
    whole = scores.interval([[1.0]] * 400, films)  # no spread: as many draws as films
    np.testing.assert_allclose(whole["low"], scores.wilson(1.0, 100)[0])


def test_a_reward_outside_0_to_1_has_the_normal_interval():
    got = scores.interval([[-1.0], [3.0], [2.0], [0.0]])
    half = 1.959963984540054 * np.std([-1, 3, 2, 0], ddof=1) / 2
    assert got == pytest.approx({"mean": 1.0, "low": 1 - half, "high": 1 + half, "n": 4})
    assert scores.interval([[2.5]]) == {"mean": 2.5, "low": None, "high": None, "n": 1}


def test_summary_by_kind_and_pass_at_r():
    questions = [
        [row("a", 1.0, kind="goal"), row("a", 0.0, kind="goal", sample=1)],
        [row("b", 0.0), row("b", 0.0, sample=1)],
        [row("c", 1.0), row("c", None, sample=1)],  # one answer could not be judged
        [row("d", None, kind=""), row("d", None, kind="", sample=1)],
        [row("e", 0.0), row("e", None, sample=1)],  # perhaps that one was right: no pass@2
    ]
    got = scores.summary(questions)
    part = "video_qa/accuracy"
    means = {(k, p): (s["mean"], s["n"]) for k, parts in got.items() for p, s in parts.items()}
    assert list(got) == ["all", "goal", "other", "plot"] and got["other"] == {}
    assert means["all", part] == (pytest.approx((0.5 + 0 + 1 + 0) / 4), 4)
    assert means["all", f"{part}/pass@2"] == (pytest.approx(1 / 2), 2)  # of a and b
    assert means["goal", part] == (0.5, 1) and means["goal", f"{part}/pass@2"] == (1.0, 1)
    assert (
        means["plot", "total"] == (pytest.approx(1 / 3), 3) and ("all", "total/pass@2") not in means
    )


def test_scores_by_tag_and_by_scorer_are_those_of_a_loop():
    rng = np.random.default_rng(3)
    questions = []
    for i in range(60):
        tags = {"duration": ("short", "long")[i % 2]} | ({"task": f"t{i % 3}"} if i > 20 else {})
        drawn = [
            row(f"q{i}", float(rng.random() < 0.6), sample=k)
            | {"tags": tags, "scores": {"official": [0.0, 1.0, None][rng.integers(3)]}}
            for k in range(3)
        ]
        questions.append(drawn)
    got = scores.summary(questions, report_by=("task", "duration"), several=scores.EVERY)
    names = ["all", "plot", "task: t0", "task: t1", "task: t2", "duration: short", "duration: long"]
    assert sorted(got) == sorted(names) and list(got)[:2] == names[:2]
    for name in names:
        official, every, right = [], [], []
        for rows in questions:
            tag, _, value = name.partition(": ")
            if value and rows[0]["tags"].get(tag) != value:
                continue
            said = [r["scores"]["official"] for r in rows if r["scores"]["official"] is not None]
            if said:  # a question that nobody judged counts in no score
                official.append(sum(said) / len(said))
            if len(said) == 3:
                every.append(float(all(x == 1 for x in said)))
            right.append(sum(r["reward"]["video_qa/accuracy"] for r in rows) / 3)
        for part, want in (
            ("official/accuracy", official),
            ("official/accuracy/all@3", every),
            ("video_qa/accuracy", right),
        ):
            assert got[name][part]["n"] == len(want)
            assert got[name][part]["mean"] == pytest.approx(sum(want) / len(want))
    missing = sum(r["scores"]["official"] is None for rows in questions for r in rows)
    assert scores.unjudged(questions) == {"official": missing} and missing > 10
    questions[0][0]["reward"] = None
    assert scores.unjudged(questions)["rewards"] == 1


def test_gains_are_over_the_questions_that_both_have_judged():
    ours = {f"q{i}": [row(f"q{i}", float(i > 0))] for i in range(4)}
    theirs = {f"q{i}": [row(f"q{i}", 0.0 if i < 3 else None)] for i in range(1, 5)}
    got = scores.gains(ours, theirs, "video_qa/accuracy")  # q1 and q2
    assert got["all"] == got["plot"] == {"mean": 1.0, "low": None, "high": None, "n": 2}
    assert scores.gains(ours, theirs, "official/accuracy") == {}


def test_paired_difference_is_the_t_interval_of_the_differences():
    rng = np.random.default_rng(1)
    before = rng.integers(0, 2, 40).astype(float)
    after = np.maximum(before, rng.integers(0, 2, 40))
    a, b = ({f"q{i}": x for i, x in enumerate(xs)} for xs in (after, before))
    want = stats.ttest_rel(after, before).confidence_interval(0.95)
    got = scores.paired_difference(dict(reversed(a.items())), b)
    np.testing.assert_allclose([got["low"], got["high"]], [want.low, want.high], atol=EXACT)
    thrice = [{f"{n} {k}": x for n, x in xs.items() for k in range(3)} for xs in (a, b)]
    films = {name: name.split()[0] for name in thrice[0]}
    shared = scores.paired_difference(*thrice, films)  # three questions a film that are one
    assert shared["mean"] == pytest.approx(got["mean"])
    np.testing.assert_allclose(shared["high"] - shared["low"], got["high"] - got["low"], rtol=1e-9)
    assert scores.paired_difference({"p": 1.0, "q": 1.0}, {"p": 0.0, "q": 0.0})["low"] is None
    with pytest.raises(ValueError, match=r"40 and 39 .* not the same ones \(1 in one alone.*'q0'"):
        scores.paired_difference(a, {name: x for name, x in b.items() if name != "q0"})


def test_difference_of_two_folders(tmp_path):
    for name, right in (("sft", [0, 0, 1, 0]), ("grpo", [1, 0, 1, 1])):
        (tmp_path / name / "answers").mkdir(parents=True)
        rows = [
            row(f"q{i}", float(x), kind="goal" if i < 2 else "plot", video=f"{i}.mp4")
            for i, x in enumerate(right)
        ]
        text = "".join(json.dumps(r) + "\n" for r in rows)
        (tmp_path / name / "answers" / "greedy.jsonl").write_text(text)
    part = "video_qa/accuracy"
    after, before = tmp_path / "grpo", tmp_path / "sft"
    got = scores.difference(str(after), before, mode="greedy", part=part)
    assert {kind: (s["mean"], s["n"]) for kind, s in got.items()} == {
        "all": (0.5, 4), "goal": (0.5, 2), "plot": (0.5, 2),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"there is no .*grpo/answers/no_video\.jsonl"):
        scores.difference(after, before, mode="no_video", part=part)
    with pytest.raises(ValueError, match="'accuracy' is no part of the scores; choose of"):
        scores.difference(after, before, mode="greedy", part="accuracy")
    path = after / "answers" / "greedy.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(
        ValueError, match=r"grpo/answers/greedy\.jsonl:4 is damaged; delete the file"
    ):
        scores.difference(after, before, mode="greedy", part=part)


def test_one_letter_and_chance():
    def ask(answer, kind, question="which ? red = A blue = B green = C"):
        return Example(id=f"{kind} {answer}", question=question, answer=answer, kind=kind)

    four = "What did a man do?\nA. run\nB. sit\nC. eat\nD. A cat came"
    examples = [ask("A", "goal"), ask("B", "goal"), ask("B", "plot"), ask("C", "plot", four)]
    free = ask("a red pad", "plot", "What did he want? A man")
    got = scores.one_letter([*examples, free])
    assert (got["all"]["letter"], got["all"]["mean"], got["all"]["n"]) == ("B", 0.5, 4)
    assert got["all"]["shares"] == {"A": 0.25, "B": 0.5, "C": 0.25}
    assert got["goal"]["mean"] == 0.5 and got["goal"]["low"] < 0.5 < got["goal"]["high"]
    chance = scores.chance([*examples, free])
    assert chance["all"] == {"mean": pytest.approx((3 / 3 + 1 / 4) / 4), "n": 4}
    assert chance["plot"] == {"mean": pytest.approx((1 / 3 + 1 / 4) / 2), "n": 2}
    assert scores.one_letter([free]) == {} == scores.chance([free])
    any_number = four.replace("?", f"? {ANY_NUMBER}")
    several = [ask(answer, "goal", any_number) for answer in ("A, C", "none", "B")]
    assert scores.chance(several)["all"] == {"mean": 1 / 16, "n": 3}
    assert scores.one_letter(several) == {}  # no letter names several
    vitamin = ask("A", "plot", "Where is vitamin E in?\nA. nuts\nB. salt\nC. ice\nD. tea")
    assert scores.chance([vitamin])["all"]["mean"] == 0.25
    long, short = (("duration", "long"),), (("duration", "short"),)
    tagged = [dataclasses.replace(e, tags=short if i else long) for i, e in enumerate(examples)]
    got = scores.one_letter(tagged, ("duration",))
    assert (got["duration: long"]["letter"], got["duration: long"]["mean"]) == ("A", 1.0)
    assert got["duration: short"]["mean"] == pytest.approx(2 / 3) and got["all"]["mean"] == 0.5
    assert scores.chance(tagged, ("duration",))["duration: long"]["n"] == 1
    constant = scores.one_answer([*examples, free])
    assert constant["goal"]["mean"] == 0.5 and constant["plot"]["mean"] == pytest.approx(1 / 3)
    assert (constant["all"]["mean"], constant["all"]["n"]) == (pytest.approx(2 / 5), 5)
