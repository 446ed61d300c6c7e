"""benchmarks/ablation.py: its tables, plot and base questions, on numbers that are seen by eye."""

import importlib
import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from longrl_jax import scores

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILMS = ("a.mp4", "a.mp4", "b.mp4", "b.mp4")
RIGHT = {
    "base": "1100",
    "sft_only_0": "1110",
    "sft_only_1": "1010",
    "rl_only_0": "1000",
    "rl_only_1": "0000",
    "sft_+_rl_0": "1111",
    "sft_+_rl_1": "1111",
}
"""Is the answer of a run to each of four questions right?"""
SAID = "<2s> red left.<8s> red right.<16s> nobody.<56s> white walker to top-left."


@pytest.fixture
def ablation(tmp_path, monkeypatch):
    """The script, in a folder that holds the scored runs of two seeds."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module("ablation")
    for run, right in RIGHT.items():
        for into in (module.OWN, module.OTHER):
            if into == module.OWN or not run.endswith("_1"):
                write_scores(module.RUNS / run / into, right if into == module.OWN else "0000")
        if "rl" in run:
            lines = [
                {
                    "step": step,
                    "reward/video_qa/format": float(step > 5),
                    "reward/video_qa/accuracy": step / 10,
                    "reward/mixed": 0.5,
                    "answer/tokens": 20,
                }
                for step in range(1, 11)
            ]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (module.RUNS / run / "metrics.jsonl").write_text(text)
    return module


def write_scores(folder: Path, right: str) -> None:
    folder.mkdir(parents=True)
    found: dict = {"complete": True, "modes": {}}
    for mode in ("greedy", "sampled", "no_video", "other_video"):
        asked = [
            {
                "id": str(i),
                "kind": "goal" if i % 2 else "plot",
                "video": film,
                "mode": mode,
                "sample": 0,
                "answer": "A",
                "reward": {"video_qa/accuracy": float(x), "video_qa/format": 1.0},
            }
            for i, (film, x) in enumerate(zip(FILMS, right, strict=True))
        ]
        found["modes"][mode] = scores.summary([[row] for row in asked])
        (folder / "answers").mkdir(exist_ok=True)
        lines = "".join(json.dumps(row) + "\n" for row in asked)
        (folder / "answers" / f"{mode}.jsonl").write_text(lines)
    (folder / "scores.json").write_text(json.dumps(found))


def test_tables_hold_means_over_questions_and_seeds(ablation):
    lines = ablation.tables(ablation.finished(2))
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    first = {row[0]: row[1:] for row in cells[2:6]}
    assert list(first) == ["base", "SFT only", "RL only", "SFT + RL"]
    assert [row[1].split()[0] for row in first.values()] == ["50.0", "62.5", "12.5", "100.0"]
    assert [row[3] for row in first.values()] == ["50.0", "75.0, 50.0", "25.0, 0.0", "100.0, 100.0"]
    assert all(row[5].startswith("0.0 ") for row in first.values())  # in the other form
    gains = {row[0]: row[1:] for row in cells[13:19]}
    assert gains["SFT only - base"][0] == "+2.1"
    assert gains["RL only - base"][1].startswith("-37.5 (")
    assert gains["SFT + RL - SFT only"][2] == "+25.0, +50.0"
    assert ["RL only", "0.0", "25.0"] in cells  # by kind: goal, plot
    assert ["SFT + RL", "0.0 to 100.0", "30.0 to 80.0", "50.0 to 50.0", "20.0 to 20.0"] in cells


def test_a_run_that_is_not_scored_yet_is_left_out(ablation):
    path = ablation.RUNS / "rl_only_1" / ablation.OWN / "scores.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"complete": False}))
    found = ablation.finished(2)
    assert [run.name for run in found["RL only"]] == ["rl_only_0"]
    assert "-25.0 (" in "".join(x for x in ablation.tables(found) if x.startswith("| RL only - b"))


def test_plot_has_a_dot_at_every_mean(ablation):
    picture = ElementTree.fromstring(ablation.plot(ablation.finished(2)))
    circles = [node.attrib for node in picture.iter() if node.tag.endswith("circle")]
    x = [float(node["cx"]) for node in circles if node["r"] == "5"]
    ticks = {
        node.text: float(node.attrib["x"]) for node in picture.iter() if node.tag.endswith("text")
    }
    at_0, at_100 = ticks["0"], ticks["100"]
    assert [round(100 * (v - at_0) / (at_100 - at_0), 1) for v in x] == [50.0, 62.5, 12.5, 100.0]
    assert sum(node["r"] == "2.5" for node in circles) == 7


def test_base_questions_are_answered_directly(ablation, tmp_path):
    asked = {"id": "0-goal", "question": "where ? red = A", "answer": "A", "video": "0.mp4"}
    lesson = {
        "id": "0-0-looking",
        "question": "who is there when ? which pad is top-left ?",
        "answer": "red",
        "video": "0.mp4",
        "reasoning": f"{SAID} top-left red",
    }
    (tmp_path / "train.jsonl").write_text(json.dumps(asked) + "\n")
    (tmp_path / "looking.jsonl").write_text(json.dumps(lesson) + "\n")
    ablation.write_base_questions(tmp_path)
    found = [json.loads(line) for line in (tmp_path / ablation.DIRECT).open()]
    assert found[0] == asked
    assert [(x["question"], x["answer"]) for x in found[1:]] == [
        (
            "who is there when ?",
            SAID,
        ),
        ("what colour is the visitor at <2s> ?", "red"),
        ("what colour is the visitor at <8s> ?", "red"),
    ]
    assert "reasoning" not in found[1]
    assert [json.loads(line) for line in (tmp_path / ablation.MOMENTS).open()] == found[-1:]
