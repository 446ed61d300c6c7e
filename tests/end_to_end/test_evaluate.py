"""`longrl_jax.evaluate` on the export of a real run: real films, real vLLM."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from longrl_jax import config, evaluate, rewards, scores
from longrl_jax.data.refused import RefusedLog
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


@pytest.mark.slow
def test_scores_of_an_export(trained, tmp_path, monkeypatch, capsys):
    folder, cfg = trained
    plan = evaluate.Plan(out=evaluate.default_out(cfg), num_samples=2)
    assert plan.out == folder / "evaluate" / "run"
    plan.out.mkdir(parents=True)
    found = evaluate.run(cfg, plan, evaluate.begun(cfg, plan))

    # greedy is what the loop itself said after its last step, answer by answer
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
    answers = lines(plan.out / "answers.jsonl")
    assert texts == {row["id"]: row["text"] for row in answers if row["mode"] == "greedy"}
    assert "broken" not in texts
    # the run's log has the intervals of the whole, not of every kind
    (logged,) = lines(folder / "evaluations.jsonl")
    assert {"total/low", "video_qa/accuracy/high"} <= set(logged)
    kind = next(kind for kind in found["modes"]["greedy"] if kind != "all")
    assert f"total/{kind}" in logged and f"total/{kind}/low" not in logged

    # every mode asked every question; blind ones about no film or another one
    films = {row["id"]: row["video"] for row in answers if row["mode"] == "greedy"}
    for mode, num_samples in (("sampled", 2), ("no_video", 1), ("other_video", 1)):
        rows = scores.read_answers(plan.out, mode)
        assert set(rows) == set(texts) and {len(r) for r in rows.values()} == {num_samples}
        shown = {name: r[0]["video"] for name, r in rows.items()}
        if mode == "no_video":
            assert shown == films  # which film was left out: the intervals are over films
        if mode == "other_video":
            assert all(shown[name] not in ("", films[name]) for name in films)
    assert "video_qa/accuracy/pass@2" in found["modes"]["sampled"]["all"]
    assert found["baselines"]["one_letter"]["all"]["n"] <= len(texts) and found["complete"]
    assert [row["id"] for row in lines(plan.out / "refused.jsonl")] == ["broken"]

    # cut off after two modes: the others are asked, these are kept, the result is the same
    cut = found | {"complete": False}
    cut["modes"] = {mode: found["modes"][mode] for mode in ("greedy", "sampled")}
    (plan.out / "scores.json").write_text(json.dumps(cut))
    asked, answer = [], evaluation.answer
    monkeypatch.setattr(
        evaluation,
        "answer",
        lambda *args, mode: asked.append(mode.name) or answer(*args, mode=mode),
    )
    assert evaluate.run(cfg, plan, evaluate.begun(cfg, plan)) == found
    assert asked == ["no_video", "other_video"] and lines(plan.out / "answers.jsonl") == answers

    # asked for again, it only reads; other settings are refused by name
    resolved, override = str(folder / "resolved.yaml"), f"model.path={cfg.model.path}"
    command = [resolved, "--samples=2", "--examples=9", override]  # options may stand between
    evaluate.main(command)
    assert "mean@2" in capsys.readouterr().out
    with pytest.raises(
        SystemExit, match="holds an evaluation with another --samples, seed; choose"
    ):
        evaluate.main([*command, "--samples=3", "seed=4"])


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
