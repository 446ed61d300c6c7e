"""Every benchmark in its published shape through `python -m longrl_jax.evaluate --benchmark`."""

import csv
import json
import os
import shutil
import subprocess
import sys

import pyarrow
import pytest
from chat_server import ChatServer
from pyarrow import parquet

from longrl_jax import config
from longrl_jax.benchmarks import BENCHMARKS

FOUR = ["red", "blue", "green", "violet"]
SRT = '1\n00:00:00,000 --> 01:00:00,000\n<font color="white" size=".72c">red circle</font>\n'
FILMS = {  # where the two films of a benchmark lie
    "longvideo_reason": "longvila_videos/{}.mp4",
    "video_mme": "data/{}.mp4",
    "video_mme_subtitles": "data/{}.mp4",
    "longvideobench": "videos/{}.mp4",
    "longvideobench_subtitles": "videos/{}.mp4",
    "next_qa": "NExTVideo/{}.mp4",
    "perception_test": "videos/{}.mp4",
    "vnbench": "VNBench_new/{}.mp4",
    "activitynet_qa": "all_test/v_{}.mp4",
}


def long_video_reason(root):
    rows = [
        {
            "problem_id": i,
            "problem": "which pad ?\nA. red\nB. blue\nC. green\nD. violet",
            "data_type": "video",
            "problem_type": "spatial",
            "reasoning": "",
            "videos": f"longvila_videos/{i}.mp4",
            "answer": "<answer>B</answer>",
        }
        for i in (0, 1)
    ]
    (root / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return "test.jsonl"


def video_mme(root):
    (root / "subtitle").mkdir()
    for i in (0, 1):
        (root / f"subtitle/{i}.srt").write_text(SRT)
    rows = [
        {
            **{"video_id": f"00{i}", "videoID": str(i), "question_id": f"00{i}-1", "answer": "A"},
            **{"duration": ("short", "long")[i], "domain": "Knowledge", "sub_category": "Law"},
            **{"task_type": "Counting Problem", "question": "which pad ?", "url": ""},
            "options": [f"{letter}. {pad}" for letter, pad in zip("ABCD", FOUR, strict=True)],
        }
        for i in (0, 1)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "test-00000-of-00001.parquet")
    return "test-00000-of-00001.parquet"


def longvideobench(root):
    (root / "subtitles").mkdir()
    told = [{"start": "00:00:31.000", "end": "00:00:55.000", "line": "red circle"}]
    rows = [
        {
            **{"id": f"{i}_0", "video_path": f"{i}.mp4", "subtitle_path": f"{i}_en.json"},
            **{"question": "which pad ?", "candidates": FOUR[: 2 + i], "correct_choice": 1},
            **{"question_category": "T2E", "topic_category": "NP", "level": "L1"},
            **{"duration_group": 60, "duration": 64.0, "starting_timestamp_for_subtitles": 30},
        }
        for i in (0, 1)
    ]
    for i in (0, 1):
        (root / f"subtitles/{i}_en.json").write_text(json.dumps(told))
    (root / "lvb_val.json").write_text(json.dumps(rows))
    return "lvb_val.json"


def next_qa(root):
    with (root / "test.csv").open("w", newline="") as file:
        names = ["video", "frame_count", "width", "height", "question", "answer", "qid", "type"]
        table = csv.writer(file)
        table.writerow([*names, "a0", "a1", "a2", "a3", "a4"])
        for i in (0, 1):
            table.writerow([i, 64, 32, 32, "which pad ?", i, 0, ("CW", "TN")[i], *FOUR, "brown"])
    return "test.csv"


def perception_test(root):
    rows = [
        {
            **{"video_name": str(i), "question_id": 0, "question": "which pad ?", "answer_id": i},
            **{"options": FOUR[:3], "area": "physics", "reasoning": "descriptive", "tag": ["m"]},
        }
        for i in (0, 1)
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), root / "validation.parquet")
    return "validation.parquet"


def vnbench(root):
    rows = [
        {
            **{"video": f"/VNBench_new/{i}.mp4", "question": "how many ?", "gt": 1, "length": 64.0},
            **{"options": [*range(1, 5)][k:] + [*range(1, 5)][:k], "gt_option": "ADCB"[k]},
            **{"type": ("cnt_edit1", "cnt_insert")[i], "try": k, "needle_time": [3.0]},
        }
        for i in (0, 1)
        for k in range(4)
    ]
    (root / "VNBench-main-4try.json").write_text(json.dumps(rows))
    return "VNBench-main-4try.json"


def activitynet_qa(root):
    rows = [
        {
            **{"video_name": str(i), "question_id": f"v_{i}_0", "question": "which pad is red"},
            **{"answer": "the left one", "type": "5"},
        }
        for i in (0, 1)
    ]
    (root / "test.json").write_text(json.dumps(rows))
    return "test.json"


WRITE = {
    **{"longvideo_reason": long_video_reason, "vnbench": vnbench, "next_qa": next_qa},
    **{"video_mme": video_mme, "video_mme_subtitles": video_mme},
    **{"longvideobench": longvideobench, "longvideobench_subtitles": longvideobench},
    **{"perception_test": perception_test, "activitynet_qa": activitynet_qa},
}


@pytest.fixture
def sets(world, tmp_path):
    """(folder with a folder a benchmark, NAME=FILE of each); two films of 64 s in every one."""
    named = []
    for name, film in FILMS.items():
        for i, source in enumerate(sorted((world / "data" / "videos").glob("0000*.mp4"))[:2]):
            path = tmp_path / "sets" / name / film.format(i)
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, path)
        named.append(f"{name}={WRITE[name](tmp_path / 'sets' / name)}")
    return tmp_path / "sets", named


@pytest.mark.slow
def test_every_benchmark_is_asked_and_scored(configured, sets, tmp_path):
    root, named = sets
    cfg = configured("tiny_cpu_sft.yaml", "mesh={}", f"data.root={root}", "rollout.process=inline")
    (tmp_path / "cfg.yaml").write_text(config.to_yaml(cfg))
    out = tmp_path / "scores"
    small = ["data.num_frames=8", "rollout={max_tokens: 12, max_model_len: 1024}"]
    small += ["batch.max_row_tokens=2048"]
    command = [sys.executable, "-m", "longrl_jax.evaluate", str(tmp_path / "cfg.yaml"), *small]
    command += ["--benchmark", ",".join(named), "--examples", "all", "--samples", "0"]
    with ChatServer(lambda asked: '{"pred": "yes", "score": 4}') as server:
        command += ["--out", str(out), f"judge.base_url={server.base_url}", "judge.model=scripted"]
        alone = os.environ | {"XLA_FLAGS": ""}  # not the eight devices of the tests
        done = subprocess.run(command, capture_output=True, text=True, env=alone)
        assert done.returncode == 0, done.stderr[-3000:]
        assert server.most_paid == 1
    for name in FILMS:
        assert f", {name}: " in done.stdout, name
    for name in FILMS:
        found = json.loads((out / name / "scores.json").read_text())
        assert found["complete"] and found["refused"] == 0, name
        everything = found["modes"]["greedy"]["all"]
        official = "judge" if BENCHMARKS[name].judge else "official"
        assert everything[f"{official}/accuracy"]["n"] == 2, name
        assert official == "official" or everything["judge/accuracy"]["mean"] == 1
        assert everything["strict/accuracy"]["mean"] == 0, name  # random weights have no form
        kinds = " ".join(found["modes"]["greedy"])
        assert all(tag in kinds for tag in BENCHMARKS[name].report_by), (name, kinds)
        asked = {"greedy", "no_video", "other_video", *["shuffled"] * (official == "official")}
        assert set(found["modes"]) == asked, name
    answers = [
        json.loads(line)
        for line in (out / "vnbench" / "answers" / "greedy.jsonl").read_text().splitlines()
    ]
    assert len(answers) == 8 and len({answer["id"] for answer in answers}) == 8
    told = {
        name: json.loads(line)["prompt"]["tokens"]
        for name in FILMS
        for line in (out / name / "answers" / "greedy.jsonl").read_text().splitlines()[:1]
    }
    assert told["video_mme_subtitles"] > told["video_mme"]
    assert told["longvideobench_subtitles"] > told["longvideobench"]
