"""What the difficulty filter keeps, how it splits that, and what its journal survives."""

import json
import re
import types

import numpy as np
import pytest
from test_bad_input import full_disk

from longrl_jax.data import difficulty, pass_rates
from longrl_jax.data.pass_rates import Bounds, verdict
from longrl_jax.report import difficulty as page
from longrl_jax.report import svg

PART = "video_qa/accuracy"


def row(*values, name="q", kind="goal", films=("f",)):
    """A judged question whose answers have these accuracies; None: not judged."""
    rewards = [
        None if v is None else {"total": 9.0, "video_qa/format": 1.0, PART: v} for v in values
    ]
    row = {"id": name, "kind": kind, "video": "v", "films": list(films), "answer": "A"}
    finish = ["stop"] * len(values)
    return row | {"rewards": rewards, "finish_reasons": finish, "texts": ["x"] * len(values)}


def test_verdicts_are_those_of_a_loop_over_the_answers():
    rng = np.random.default_rng(0)
    for _ in range(300):
        k, above, below = (
            rng.integers(2, 12),
            *sorted(rng.choice(np.arange(0, 1.05, 0.1), 2, False)),
        )
        judged = rng.random((k,)) < 0.8
        right = rng.random((k,)) < rng.random()
        values = [float(r) if j else None for r, j in zip(right, judged, strict=True)]
        least = int(rng.integers(1, k + 1))
        said = verdict(row(*values), Bounds(above=above, below=below, min_valid=least))
        num_right, num_judged = int((right & judged).sum()), int(judged.sum())
        assert (said["pass"], said["k"], said["valid"]) == (num_right, k, num_judged)
        if num_judged < least:
            want = "invalid"
        elif num_right / num_judged <= above:
            want = "too_hard"
        elif num_right / num_judged >= below:
            want = "too_easy"
        else:
            want = "kept"
        assert said["reason"] == want and said["kept"] == (want == "kept")


@pytest.mark.parametrize(
    ("values", "bounds", "reason"),
    [
        ([0, 0, 0, 0], {}, "too_hard"),
        ([1, 1, 1, 1], {}, "too_easy"),
        ([1, 0, 0, 0], {}, "kept"),
        ([None] * 4, {}, "invalid"),  # a judge that is down does not make a question hard
        ([0, None, None, None], {"min_valid": 2}, "invalid"),
        ([1, None, None, None], {"min_valid": 1}, "too_easy"),
        ([1, 1, 1, 0], {"below": 0.75}, "too_easy"),  # the bound itself is out
        ([1, 0, 0, 0, 0, 0, 0, 0, 0, 0], {"above": 0.1}, "too_hard"),
        ([0.4, 0.6, 0.5, 0.9], {"right_from": 0.5}, "kept"),  # graded accuracies
        ([0.4, 0.6, 0.5, 0.9], {}, "too_hard"),
    ],
)
def test_what_a_question_is(values, bounds, reason):
    assert verdict(row(*values), Bounds(**bounds))["reason"] == reason


def test_parts_of_one_film_are_one_film(tmp_path):
    """Questions about spans of a film have other frames, and other entries in the store."""
    (tmp_path / "a.mp4").write_bytes(b"film")
    (tmp_path / "copy.mp4").write_bytes(b"film")
    (tmp_path / "b.mp4").write_bytes(b"another")
    found = []
    for name, key in (("a.mp4", "0 to 5 s"), ("copy.mp4", "5 to 9 s"), ("b.mp4", "0 to 5 s")):
        medium = types.SimpleNamespace(path=str(tmp_path / name), key=key)
        found.append(difficulty.films_of(types.SimpleNamespace(media=(medium,))))
    assert found[0] == found[1] != found[2]


def test_the_accuracy_must_be_clear():
    two = row(1, 0)
    two["rewards"] = [{"total": 0.0, "a/accuracy": 1.0, "b/accuracy": 0.0}] * 2
    with pytest.raises(ValueError, match=r"have 2 accuracies; name with --part .* a/accuracy, b"):
        verdict(two, Bounds())
    assert verdict(two, Bounds(part="a/accuracy"))["pass"] == 2
    with pytest.raises(ValueError, match="--part c is no part of the rewards; choose one of total"):
        verdict(two, Bounds(part="c"))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"num_samples": 1}, "--samples 1 must be 2 or more"),
        ({"rl_share": 1.5}, "--rl-share 1.5 must be 0 to 1"),
        ({"bounds": Bounds(min_valid=11)}, "--min-valid 11 must be 1 to --samples 10"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tmp_path, wrong, words):
    with pytest.raises(ValueError, match=words):
        difficulty.Plan(out=tmp_path, **wrong)
    with pytest.raises(ValueError, match=r"--above 0.5 and --below 0.5 must be 0 <= above < below"):
        Bounds(above=0.5, below=0.5)


def films_of(num_records):
    """Films with 1 to 6 records, a record about two films that joins theirs, texts without any."""
    rng = np.random.default_rng(1)
    films, number = [], 0
    while len(films) < num_records:
        films += [[f"film {number}"]] * int(rng.integers(1, 7))
        number += 1
    return [["film 0", "film 5"], [], *films, []]


@pytest.mark.parametrize("share", [0.0, 0.5, 2 / 3, 1.0])
def test_a_split_by_film_has_no_film_on_both_sides(share):
    films = films_of(200)
    for_rl = pass_rates.split(films, rl_share=share, by_film=True, seed=3)
    sides = [{f for shown, rl in zip(films, for_rl, strict=True) if rl == side for f in shown}
             for side in (False, True)]  # fmt: skip
    assert not sides[0] & sides[1]
    assert abs(sum(for_rl) - share * len(films)) <= 6  # half of the largest group, 12 records
    assert for_rl[0] == for_rl[2]  # film 0
    again = pass_rates.split(films, rl_share=share, by_film=True, seed=3)
    other = pass_rates.split(films, rl_share=share, by_film=True, seed=4)
    assert again == for_rl and (other != for_rl) == (0 < share < 1)


def test_a_split_by_question_mixes_films():
    films = films_of(200)
    for_rl = pass_rates.split(films, rl_share=0.5, by_film=False, seed=0)
    sides = [{f for shown, rl in zip(films, for_rl, strict=True) if rl == side for f in shown}
             for side in (False, True)]  # fmt: skip
    assert sides[0] & sides[1] and abs(sum(for_rl) - len(films) / 2) <= 0.5


def test_the_histogram_counts_every_valid_question_once():
    answers = [[0] * 4, [1] * 4, [1, 0, 0, 0], [1, 1, None, None], [1, 0, None, 0], [None] * 4]
    rows = [row(*values, kind=kind) for values in answers for kind in ("goal", "plot", "plot")]
    lines = [{"kind": r["kind"]} | verdict(r, Bounds(min_valid=2)) for r in rows]
    counts = pass_rates.counted(lines, 4)
    assert list(counts) == ["all", "goal", "plot"]
    assert {k: counts["goal"][k] for k in pass_rates.REASONS} == {
        "kept": 2, "too_easy": 2, "too_hard": 1, "invalid": 1,
    }  # fmt: skip
    assert counts["goal"]["histogram"] == {"kept": [0, 2, 0, 0, 0], "dropped": [1, 0, 0, 0, 2]}
    assert counts["all"]["histogram"]["kept"] == [0, 6, 0, 0, 0]
    summary = {"checkpoint": "<b>", "samples": 4, "above": 0.0, "below": 1.0, "refused": 0}
    summary |= {"answers_cut_off": 0.25, "split_by": "film", "sft": 2, "rl": 4, "kinds": counts}
    html = page.render(summary)
    assert "&lt;b&gt;" in html and "<b>" not in html and html.count("<svg") == 3
    assert "2 kept, 1 too hard, 2 too easy" in html and "25% of the answers" in html


def test_bars_are_as_high_as_their_numbers():
    drawn = svg.histogram(np.array([[0, 0], [3, 1], [6, 0]]), label="x", x_name="y")
    bars = re.findall(r'height="([\d.]+)" class="fill (\w+)"', drawn)
    assert [kind for _, kind in bars] == ["c0", "faint", "c0"]
    heights = [float(height) for height, _ in bars]
    np.testing.assert_allclose(heights, np.array([3, 1, 6]) * heights[2] / 6, atol=0.11)  # printed
    assert re.findall(r'class="label over">|class="over">(\d+)<', drawn) == ["4", "6"]


def test_a_journal_survives_a_torn_line_and_names_a_damaged_one(tmp_path):
    path = tmp_path / "answers.jsonl"
    assert difficulty.read_journal(path) == {}
    rows = [row(1, 0, name=name) for name in ("a", 'b "\u2028é', "c")]
    difficulty.append(path, rows[:2])
    difficulty.append(path, rows[2:])
    plain = {r["id"]: {k: v for k, v in r.items() if k != "texts"} for r in rows}
    assert difficulty.read_journal(path) == plain
    whole = path.read_bytes()
    assert [json.loads(line)["texts"] for line in whole.splitlines()] == [["x", "x"]] * 3
    for torn in (whole[:-1], whole[:-40], whole + b"{"):
        path.write_bytes(torn)
        left = difficulty.read_journal(path)
        assert list(left) == list(plain)[: len(left)] and len(left) == (3 if torn > whole else 2)
        difficulty.append(path, rows[len(left) :])
        assert path.read_bytes() == whole
    path.write_bytes(whole.replace(b'"answer": "A"', b'"answer": "B"', 2).replace(b"B", b"A", 1))
    with pytest.raises(ValueError, match=r"answers.jsonl:2 is damaged"):
        difficulty.read_journal(path)


def test_what_nobody_judged_and_what_was_refused_is_asked_again_where_wanted(tmp_path):
    path = tmp_path / difficulty.ANSWERS
    rows = [row(1, 0, name="a"), row(1, None, name="b"), row(None, None, name="c"), row(name="d")]
    rows[3]["rewards"] = [{"total": 9.0, PART: None}]
    difficulty.append(path, rows)
    whole = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(whole) + b"{")  # torn
    (tmp_path / difficulty.SAMPLED).write_text('{"refused": 2}')
    difficulty.ask_again(tmp_path)
    assert path.read_bytes() == whole[0]
    assert not (tmp_path / difficulty.SAMPLED).exists()  # so the refused ones are read again
    difficulty.ask_again(tmp_path)
    assert path.read_bytes() == whole[0]
    counts = pass_rates.counted([], 2)
    summary = {"kinds": counts, "above": 0, "below": 1, "samples": 2, "refused": 2, "unjudged": 3}
    summary |= {"answers_cut_off": 0, "split_by": "film", "sft": 0, "rl": 0}
    summary |= {"sft_without_reasoning": 0}
    said = "answers of 3 questions could not be judged, 2 records were refused; --again asks them"
    assert said in difficulty.table(summary)
    assert "--again" not in difficulty.table(summary | {"refused": 0, "unjudged": 0})


def test_a_full_disk_under_the_journal_is_named_and_leaves_whole_lines(tmp_path):
    path = tmp_path / "answers.jsonl"
    difficulty.append(path, [row(1, 0, name="a")])
    whole = path.read_bytes()
    words = r"answers.jsonl cannot be written \(.*give the same command again: it goes on"
    for size in (len(whole), len(whole) + 100):  # nothing of it fits, or a part
        with full_disk(size), pytest.raises(OSError, match=words):
            difficulty.append(path, [row(1, 0, name="b")])
        assert path.read_bytes() == whole
    difficulty.append(path, [row(1, 0, name="b")])
    assert list(difficulty.read_journal(path)) == ["a", "b"]
