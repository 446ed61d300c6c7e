"""`longrl_jax.evaluate` on the export of a real run: real films, real vLLM."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import yaml

from longrl_jax import config, evaluate, rewards, scores
from longrl_jax.data import prompts
from longrl_jax.data.refused import RefusedLog
from longrl_jax.evaluate import answering
from longrl_jax.evaluate import plan as planned
from longrl_jax.stages import evaluation, questions, sft
from longrl_jax.stages import policy as opened

PARTS = ("letters/share", "total", "video_qa/accuracy", "video_qa/format")


def lines(path):
    return [json.loads(line) for line in path.open()]


def share_of_letters(items):
    """A reward that a policy which has only begun to learn gets something of."""
    shares = [sum(c.isalpha() for c in item.text) / max(len(item.text), 1) for item in items]
    return [{"total": share, "share": share} for share in shares]


@pytest.fixture
def trained(configured, world, tmp_path, monkeypatch):
    """(run folder, config that evaluates its export); the first held-out film is broken."""
    monkeypatch.setitem(rewards.REWARDS, "letters", share_of_letters)
    data = tmp_path / "data"
    shutil.copytree(world / "data", data, symlinks=True)
    held_out = lines(data / "validation.jsonl")
    broken = held_out[0] | {"id": "broken", "video": "videos/broken.mp4"}
    (data / "held_out.jsonl").write_text(
        "".join(json.dumps(record) + "\n" for record in [broken, *held_out])
    )
    cfg = configured(
        "tiny_cpu_sft.yaml",
        f"data.root={data}",
        "data.validation=held_out.jsonl",
        "run.num_steps=6",
        "run.eval_examples=9",
        "optimizer={learning_rate: 0.01, warmup_steps: 2}",
        "rewards={video_qa: 1.0, letters: 1.0}",
        "rollout.process=inline",
    )
    folder = tmp_path / "run"
    sft.run(cfg)
    (folder / "resolved.yaml").write_text(config.to_yaml(cfg))
    overrides = [f"model.path={folder / 'export'}"]
    return folder, config.load(folder / "resolved.yaml", overrides)


def contents(folder):
    """{path: bytes} of all that an evaluation has written."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


@pytest.fixture
def vllm_is_imported():
    """Its log handlers keep the stdout of the import, which must not be a test's own."""
    from rollout_bridge import vllm_engine  # noqa: F401


def run(cfg, plan, model):
    return answering.run(cfg, plan, planned.begun(cfg, plan), model)


@pytest.mark.slow
def test_scores_of_an_export(trained, monkeypatch, capsys):
    folder, cfg = trained
    plan = planned.Plan(out=planned.default_out(cfg), num_samples=2, num_shuffles=2)
    assert plan.out == folder / "evaluate" / "run"
    monkeypatch.setattr(evaluation, "MAX_QUESTIONS", 4)
    with answering.opened(cfg) as model:
        found = run(cfg, plan, model)
        check_scores(folder, cfg, plan, found)
        check_resumes(cfg, plan, found, model, monkeypatch)

    # asked for again, it only reads; other settings are refused by name
    resolved, override = str(folder / "resolved.yaml"), f"model.path={cfg.model.path}"
    words = [resolved, "--samples=2", "--examples=9", override]  # options may stand between
    evaluate.main([*words, "--shuffles=2"])
    shown = capsys.readouterr().out
    assert "mean@2" in shown and "in all 2 orders" in shown
    with pytest.raises(
        SystemExit, match="holds an evaluation with another --samples, --shuffles, seed; choose"
    ):
        evaluate.main([*words, "--samples=3", "seed=4"])


def check_scores(folder, cfg, plan, found):
    """The scores are those of the loop's last step, and every mode asked what it should."""
    of_loop = json.loads((folder / "evaluation.json").read_text())
    assert found["step"] == of_loop["step"] == 6
    assert 0 < of_loop["letters/share"] < 1  # a policy that says something, and not its start
    assert found["questions"] == of_loop["questions"] and found["refused"] == 1
    for kind, parts in found["modes"]["greedy"].items():
        for part in PARTS:
            name = part if kind == "all" else f"{part}/{kind}"
            got = [parts[part][bound] for bound in ("mean", "low", "high")]
            assert got == [of_loop[name], of_loop[f"{name}/low"], of_loop[f"{name}/high"]]
    texts = {row["id"]: row["text"] for row in lines(folder / "evaluation_answers.jsonl")}
    answers = {mode: scores.read_answers(plan.out, mode) for mode in found["modes"]}
    assert texts == {name: rows[0]["text"] for name, rows in answers["greedy"].items()}
    assert "broken" not in texts
    # the run's log has the intervals of the whole, not of every kind
    (logged,) = lines(folder / "evaluations.jsonl")
    assert {"total/low", "video_qa/accuracy/high"} <= set(logged)
    kind = next(kind for kind in found["modes"]["greedy"] if kind != "all")
    assert f"total/{kind}" in logged and f"total/{kind}/low" not in logged

    # every mode asked every question; blind ones about no film or another one
    films = {name: rows[0]["video"] for name, rows in answers["greedy"].items()}
    for mode, num_samples in (("sampled", 2), ("no_video", 1), ("other_video", 1)):
        rows = answers[mode]
        assert set(rows) == set(texts) and {len(r) for r in rows.values()} == {num_samples}
        shown = {name: r[0]["video"] for name, r in rows.items()}
        if mode == "no_video":
            assert shown == films  # which film was left out: the intervals are over films
        if mode == "other_video":
            assert all(shown[name] not in ("", films[name]) for name in films)
    assert "video_qa/accuracy/pass@2" in found["modes"]["sampled"]["all"]
    assert found["baselines"]["one_letter"]["all"]["n"] <= len(texts) and found["complete"]
    assert [row["id"] for row in lines(plan.out / "refused.jsonl")] == ["broken"]

    # the options of those that have some stood in two orders, and the letter followed
    greedy = {name: rows[0] for name, rows in answers["greedy"].items()}
    assert set(answers["shuffled"]) == {name for name, row in greedy.items() if row["options"]}
    for name, rows in answers["shuffled"].items():
        right = greedy[name]["options"]["ABCD".index(greedy[name]["answer"])]
        assert len(rows) == 2
        for row in rows:
            assert sorted(row["options"]) == sorted(greedy[name]["options"])
            assert row["options"]["ABCD".index(row["answer"])] == right
    assert "video_qa/accuracy" in found["shuffled_minus_greedy"]
    assert "video_qa/accuracy/all@2" in found["modes"]["shuffled"]["all"]


def check_resumes(cfg, plan, found, model, monkeypatch):
    """Cut off in the second mode, it asks the rest and nothing else, and ends in the same bytes."""
    whole = contents(plan.out)
    drawn = plan.out / "drawn"
    sampled = (drawn / "sampled.jsonl").read_bytes()
    rows = [json.loads(line) for line in sampled.splitlines()]
    assert [row["left"] for row in rows[:8]] == [7, 6, 5, 4, 3, 2, 1, 0]  # 4 questions, 2 answers
    (drawn / "sampled.jsonl").write_bytes(sampled[: len(sampled) - 5])
    for mode in ("shuffled", "no_video", "other_video"):
        (drawn / f"{mode}.jsonl").unlink()
    shutil.rmtree(plan.out / "answers")
    (plan.out / "scores.json").write_text(json.dumps(found | {"complete": False, "modes": {}}))
    asked, draw = [], evaluation.draw

    def counted(*args, mode):
        asked.extend((mode.name, prompt.example.id) for prompt in args[2])
        return draw(*args, mode=mode)

    monkeypatch.setattr(evaluation, "draw", counted)
    assert run(cfg, plan, model) == found and contents(plan.out) == whole
    last = [row["id"] for row in rows[-8::2]]  # of the batch that was cut off
    assert [name for mode, name in asked if mode == "sampled"] == last
    assert "greedy" not in {mode for mode, _ in asked}

    # other rewards judge what was said anew; no engine is needed for that
    other = dataclasses.replace(cfg, rewards={"letters": 1.0})
    deaf = dataclasses.replace(model, engines=lambda: pytest.fail("an engine was started"))
    again = run(other, plan, deaf)
    share = [again["modes"]["greedy"]["all"][part] for part in ("total", "letters/share")]
    assert share[0] == share[1] == found["modes"]["greedy"]["all"]["letters/share"]
    assert "video_qa/accuracy" not in again["modes"]["greedy"]["all"]
    assert run(cfg, plan, deaf) == found and contents(plan.out) == whole

    # a question that is put otherwise is not taken for the one that was answered
    instructions = prompts.INSTRUCTIONS | {cfg.data.template: "Say something else."}
    with monkeypatch.context() as other:
        other.setattr(prompts, "INSTRUCTIONS", instructions)
        (plan.out / "scores.json").write_text(json.dumps(found | {"complete": False}))
        with pytest.raises(ValueError, match="holds an answer to another prompt of question"):
            run(cfg, plan, model)
    (plan.out / "scores.json").write_bytes(whole["scores.json"])


@pytest.mark.slow
def test_a_benchmark_with_and_without_thinking_over_frames(
    configured, vllm_is_imported, tmp_path, monkeypatch, capsys
):
    """One command, four evaluations, one engine; official and strict scores of each."""
    cfg = configured("tiny_cpu_grpo.yaml", "rollout.process=inline")
    (tmp_path / "config.yaml").write_text(config.to_yaml(cfg))
    out = tmp_path / "out"
    words = [str(tmp_path / "config.yaml"), "--benchmark=longvideo_reason", "--thinking=both"]
    words += ["--frames=8,4", "--examples=4", "--samples=0", f"--out={out}"]
    words += ["rollout.max_tokens=12", "batch.max_row_tokens=512"]
    # this process is prepared already (conftest.py), and may have imported vLLM before
    monkeypatch.setattr("longrl_jax.platform.prepare", lambda *_, **__: None)
    started, open_engines = [], opened.open_engines
    monkeypatch.setattr(
        opened, "open_engines", lambda *args: started.append(1) or open_engines(*args)
    )
    evaluate.main(words)
    assert started == [1]
    shown = capsys.readouterr().out
    assert "official/accuracy" in shown and "8 frames, thinking - direct" in shown
    assert re.search(r"n +official/accuracy +strict/accuracy", shown)  # side by side

    tree = json.loads((out / "sweep.json").read_text())
    lines_of_plot = ["longvideo_reason, thinking", "longvideo_reason, direct"]
    assert [(p["line"], p["frames"]) for p in tree["points"]] == [
        (line, frames) for line in lines_of_plot for frames in (4, 8)
    ]
    for point in tree["points"]:
        folder = out / point["folder"]
        found = json.loads((folder / "scores.json").read_text())
        rows = [rows[0] for rows in scores.read_answers(folder, "greedy").values()]
        assert len(rows) == 4 and point["part"] == "official/accuracy"
        assert point["scores"] == found["modes"]["greedy"]["all"]
        right = [row["text"].strip() == row["answer"] for row in rows]  # no tags: all of the text
        assert [row["scores"]["official"] for row in rows] == right
        assert {row["scores"]["strict"] for row in rows} == {0.0}
        assert {row["prompt"]["frames"][0] for row in rows} == {point["frames"]}
        template = {"on": "think", "off": "direct"}["on" if "thinking" in folder.parts else "off"]
        assert {row["prompt"]["template"] for row in rows} == {template}
    plot = ElementTree.parse(out / "sweep.svg").getroot()
    assert len([e for e in plot.iter() if e.get("class", "").startswith("line c")]) == 2

    monkeypatch.setattr(opened, "open_policy", lambda *_, **__: pytest.fail("it was opened again"))
    evaluate.main(words)  # all is there: it only reads
    assert shown.endswith(capsys.readouterr().out)


@pytest.mark.slow
def test_an_evaluation_that_is_killed_again_and_again_ends_in_the_same_bytes(world, tmp_path):
    """Chain of kills: half of a batch on disk, the engine amid its answers, before the scores."""
    tree = {
        "stage": "sft",
        "model": {"path": str(world / "init"), "compute_dtype": "float32"},
        "data": {"root": str(world / "data"), "validation": "validation.jsonl", "num_frames": 8},
        "mesh": {"seq": 4, "fsdp": 2, "simulated": True},
        "rollout": {"dtype": "float32", "max_tokens": 8, "max_model_len": 256},
        "store": {"path": str(world / "store")},
        "run": {"dir": str(tmp_path / "run"), "num_steps": 1},
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tree))
    script = Path(__file__).with_name("killed_evaluation.py")

    def evaluated(out, point, visit=1):
        words = [point, str(visit), str(tmp_path / "config.yaml"), f"--out={tmp_path / out}"]
        words += ["--samples=2", "--examples=8"]
        return subprocess.run([sys.executable, str(script), *words], check=False).returncode

    assert evaluated("whole", "none") == 0
    # the 2nd batch of greedy answers; a token of sampled ones; the scores of the 2nd mode
    for point, visit in (("appending", 2), ("answering", 20), ("scoring", 2)):
        assert evaluated("killed", point, visit) == -signal.SIGKILL
    assert lines(tmp_path / "killed" / "drawn" / "sampled.jsonl")
    assert evaluated("killed", "none") == 0
    whole, killed = contents(tmp_path / "whole"), contents(tmp_path / "killed")
    assert killed == whole and "drawn/sampled.jsonl" in whole


def test_blind_prompts(configured, tmp_path):
    cfg = configured("tiny_cpu_grpo.yaml", "run.eval_examples=100")
    policy, _ = opened.open_policy(cfg, trains=False)
    with RefusedLog(tmp_path / "refused.jsonl") as refused:
        asked = questions.validation(cfg, policy, refused)
        other = questions.with_other_video(cfg, policy, asked, refused)
        blind = questions.without_video(cfg, policy, asked)
        one_film = [p for p in asked if p.media[0].key == asked[0].media[0].key]
        assert questions.with_other_video(cfg, policy, one_film, refused) == []
        text_only = [
            dataclasses.replace(p, media=(), example=dataclasses.replace(p.example, media=()))
            for p in asked
        ]
        assert questions.without_video(cfg, policy, text_only) == []
        assert questions.with_other_video(cfg, policy, text_only, refused) == []
    assert len(asked) == len(blind) == len(other) > 4 > 1 and refused.count == 0
    for prompt, without, swapped in zip(asked, blind, other, strict=True):
        assert prompt.is_media.any() and not without.is_media.any() and not without.media
        assert not np.isin(without.tokens, policy.banned_tokens).any()
        assert without.example.question == swapped.example.question == prompt.example.question
        assert swapped.media[0].key != prompt.media[0].key
        np.testing.assert_array_equal(swapped.is_media, prompt.is_media)  # as long, so as easy


def test_another_part_of_a_film_is_no_other_film(configured, world, tmp_path):
    parts = [("00000", [0, 8]), ("00000", [8, 16]), ("00001", [16, 24]), ("00001", [0, 4])]
    lines = [
        json.dumps(
            {"id": str(i), "question": "what is red ?", "answer": "2"}
            | {"video": f"videos/{film}.mp4", "span": span}
        )
        for i, (film, span) in enumerate(parts)
    ]
    (world / "data" / "parts.jsonl").write_text("\n".join(lines) + "\n")
    cfg = configured("tiny_cpu_grpo.yaml", "data.validation=parts.jsonl", "run.eval_examples=100")
    policy, _ = opened.open_policy(cfg, trains=False)
    with RefusedLog(tmp_path / "refused.jsonl") as refused:
        asked = questions.validation(cfg, policy, refused)
        other = questions.with_other_video(cfg, policy, asked, refused)
    shown = [(p.example.media[0].path[-9:-4], p.example.media[0].span_s) for p in other]
    assert shown == [("00001", (16, 24))] * 2 + [("00000", (0, 8))] * 2  # each film's first part


def test_blind_prompts_of_several_media(configured, mixed, tmp_path):
    """Every medium is another of its kind, at its place in the words."""
    cfg = configured("tiny_cpu_grpo.yaml", f"data.validation={mixed}", "run.eval_examples=100")
    policy, _ = opened.open_policy(cfg, trains=False)
    with RefusedLog(tmp_path / "refused.jsonl") as refused:
        asked = {p.example.id: p for p in questions.validation(cfg, policy, refused)}
        other = {
            p.example.id: p
            for p in questions.with_other_video(cfg, policy, list(asked.values()), refused)
        }
        blind = questions.without_video(cfg, policy, list(asked.values()))
    assert len(asked) == 6 and set(other) == set(asked) - {"text"} and refused.count == 0
    assert len(blind) == 5 and not any(p.is_media.any() for p in blind)
    for name, shown in other.items():
        for a, b in zip(asked[name].example.media, shown.example.media, strict=True):
            assert (a.kind, a.at) == (b.kind, b.at) and a.path != b.path
