"""The generation as a whole against a scripted server: faults cost neither work nor money."""

import collections
import dataclasses
import json
import os
import resource
import textwrap
import types
from pathlib import Path

import clips
import generation
import pyarrow.parquet as pq
import pytest
from chat_server import ChatServer, hang, status, text, truncated

from longrl_jax import chat, data
from longrl_jax.chat import client
from longrl_jax.data.generate import __main__ as command
from longrl_jax.data.generate import budget, package, run, settings

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)


def generate(path, *more, stage="all"):
    """Returns the exit status."""
    with pytest.raises(SystemExit) as caught:
        command.main([stage, str(path), *more])
    return caught.value.code


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A generation that nothing disturbs."""
    folder = tmp_path_factory.mktemp("clean")
    with ChatServer(generation.answer) as server:
        assert generate(generation.make(folder, server.base_url)) == 0
        bodies = {json.dumps(asked.body, sort_keys=True) for asked in server.asked}
        assert server.num_paid == server.num_asked == len(bodies)  # equal stories are asked once
        paid, asked = server.num_paid, list(server.asked)
    files = generation.package(folder)
    return types.SimpleNamespace(folder=folder, files=files, paid=paid, asked=asked)


def test_the_package_is_longvideo_reason(clean):
    """Read by the loader of the published data; parquet and JSON lines hold the same."""
    records = generation.records(clean.folder)
    opened = data.SOURCES["longvideo_reason"](clean.folder, "out/package/train.jsonl")
    kinds = collections.Counter()
    for i, record in enumerate(records):
        example = opened[i]
        kinds[example.kind] += 1
        assert tuple(record) == package.FIELDS
        assert (clean.folder / example.media[0].path).is_file()
        assert example.answer in "ABCD" and example.reasoning and "\nA. " in example.question
    assert kinds == {"temporal": 2, "goal": 2, "plot": 2, "spatial": 2}
    folder = clean.folder / "out" / "package"
    assert pq.read_table(folder / "data" / "train.parquet").to_pylist() == records
    open_ended = generation.records(clean.folder, "openended")
    assert pq.read_table(folder / "data" / "openended.parquet").to_pylist() == open_ended
    assert {row["answer"] for row in open_ended} >= {"<answer>yellow</answer>"}
    ids = [row["problem_id"] for row in [*records, *open_ended]]
    assert len(set(ids)) == len(ids)
    card = (folder / "README.md").read_text()
    assert "| train | 8 |" in card and "data.train=out/package/train.jsonl" in card


def test_questions_rest_on_moments_of_the_film(clean):
    """What the oracle reads out of the story is what CAPTIONS shows at that time."""
    lines = (clean.folder / "out" / "package" / "steps.jsonl").read_text().splitlines()
    looked = [(x["start_s"], x["text"]) for line in lines for x in json.loads(line)["steps"]]
    assert {start_s for start_s, words in looked if "walker" in words} == {48}  # the clip's last
    assert {start_s for start_s, words in looked if words == "blue"} == {10}


def test_a_second_run_asks_nothing(clean):
    with ChatServer(generation.answer) as server:
        assert generate(generation.make(clean.folder, server.base_url)) == 0
        assert server.num_asked == 0
    assert generation.package(clean.folder) == clean.files


def test_a_package_of_more_questions_stays_while_films_wait(clean, capsys):
    path = clean.folder / "config.yaml"
    made = max((clean.folder / "out" / "work" / "verify").glob("*.json"))
    away = made.rename(clean.folder / "away.json")
    try:
        assert generate(path, stage="package") == 1
        said = capsys.readouterr().out
        assert said.startswith("package: 8 questions of 1 of 2 films; the 16 that lie in ")
        assert len(said.splitlines()) == 1
        assert generation.package(clean.folder) == clean.files
    finally:
        away.rename(made)
    assert generate(path, stage="package") == 0


def test_only_what_depends_on_a_change_is_asked_again(tmp_path):
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url)
        assert generate(path) == 0
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "plot.txt").write_text("It is about the order of things.")
        before = server.num_asked
        assert generate(path, f"texts={tmp_path / 'mine'}") == 0
        again = [generation.stage_of(x) for x in server.asked[before:]]
        # in two forms, for both films at once; the answers are the same: nothing follows
        assert again == ["question"] * 2
        generation.film(tmp_path / "films" / "new.mp4", size=(48, 64))
        before = server.num_asked
        assert generate(path, f"texts={tmp_path / 'mine'}") == 0
        again = collections.Counter(generation.stage_of(x) for x in server.asked[before:])
        assert again["caption"] == generation.NUM_CLIPS
        assert not again["question"]  # its story is that of the others
        assert len(generation.records(tmp_path)) == 12


FAULTS = {
    "429": status(429, retry_after=0.02),
    "500": status(500),
    "time-out": hang(5),
    "truncated body": truncated(),
    "truncated JSON": text('{"questions": [{"quest', finish_reason="length"),
}
USELESS = ("truncated body", "truncated JSON")
"""Those that are asked again with another seed."""


def test_faults_of_the_server_change_nothing(clean, tmp_path):
    """Every request of every stage first meets a fault, each in turn."""
    met = {stage: collections.Counter() for stage in generation.STAGES}

    def answer(asked):
        stage = generation.stage_of(asked)
        blind = stage == "verify" and asked.body["temperature"] > 0
        left = USELESS if blind else ()
        left += () if stage in ("question", "verify") else ("truncated JSON",)
        names = [x for x in FAULTS if x not in left]
        if asked.visit > 1:  # as the first seed is answered; only blind tries have others
            seed = asked.body["seed"] if blind else 0
            return generation.answer(dataclasses.replace(asked, body=asked.body | {"seed": seed}))
        name = names[met[stage].total() % len(names)]
        met[stage][name] += 1
        return FAULTS[name]

    with ChatServer(answer) as server:
        config = generation.make(tmp_path, server.base_url)
        assert generate(config, "servers.all.timeout_s=1", "servers.all.concurrency=16") == 0
    assert all(len(names) >= 4 for names in met.values()), met
    assert replies(tmp_path) == replies(clean.folder)
    assert generation.package(tmp_path) == clean.files


def replies(folder):
    """Returns the requests that the journals hold a useful reply to, each one; without those that
    judge guesses: a guess is asked again with another seed, and differs."""
    paths = (folder / "out" / "journal").rglob("*.jsonl")
    lines = [json.loads(line)["record"] for path in paths for line in path.open()]
    held = [(x["name"], x["key"]) for x in lines if x["kind"] == "reply"]
    assert len(set(held)) == len(held)
    return {key for name, key in held if name != "same"}


def test_a_server_that_is_gone_leaves_films_for_the_next_run(clean, tmp_path, capsys):
    def answer(asked):
        lost = generation.stage_of(asked) == "caption" and "0:30 to" in asked.text
        return status(503) if lost else generation.answer(asked)

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url)
        assert generate(path, "servers.all.max_tries=2") == 1
        assert "2 films wait for the next run (503: scripted)" in capsys.readouterr().out
        assert server.num_paid == 8  # the other clips of both
        assert not (tmp_path / "out" / "package").exists()  # nor is one of before emptied
        server.answer = generation.answer
        assert generate(path, "servers.all.max_tries=2") == 0
        assert server.num_paid == clean.paid
    assert generation.package(tmp_path) == clean.files


@pytest.mark.parametrize("fault", [hang(9), truncated("a page of the provider's")])
def test_a_film_waits_however_the_server_fails(tmp_path, fault):
    """It goes down (500, then nothing), or a page comes in place of replies."""

    def answer(asked):
        if generation.stage_of(asked) != "caption" or "0:30 to" not in asked.text:
            return generation.answer(asked)
        return status(500) if asked.visit == 1 else fault

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        more = ("servers.all.max_tries=2", "servers.all.timeout_s=2")
        assert generate(path, *more, stage="split") == 0
        assert generate(path, *more, stage="caption") == 1
        assert not (tmp_path / "out" / "rejects.jsonl").read_text()
        server.answer = generation.answer
        assert generate(path, *more, stage="caption") == 0
        assert server.most_paid == 1 + (not fault.seconds)


def test_replies_that_are_odd_text_cost_no_more_than_themselves(tmp_path):
    """Halves of emoji, in a caption and as an escape in JSON, and JSON that nests deeply."""

    def answer(asked):
        said, stage = generation.answer(asked), generation.stage_of(asked)
        if stage == "question" and '"goal"' in asked.text:
            return '{"questions": [{"question": "\\ud83d what is that ?"}]}'
        if stage == "question" and '"plot"' in asked.text:
            return '{"questions": [' + "[" * 400 + "]" * 400 + "]}"
        return said + " \ud83d" if stage == "caption" else said

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1, question={"forms": ["open"]})
        assert generate(path, "servers.all.max_tries=1") == 0
    assert {row["problem_type"] for row in generation.records(tmp_path, "openended")} == {
        "temporal",
        "spatial",
    }
    rejects = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(row["kind"], row["reason"]) for row in rejects if "kind" in row} == {
        ("goal", "question: bad form"),
        ("plot", "question: no reply"),
    }


def test_give_up_takes_what_failed_as_rejected(tmp_path):
    def answer(asked):
        lost = generation.stage_of(asked) == "caption" and "0:30 to" in asked.text
        return status(503) if lost else generation.answer(asked)

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        assert generate(path, "--give-up", "servers.all.max_tries=1") == 0
    rejects = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert rejects[0] == {
        "stage": "caption",
        "film": "film 0.mp4",
        "reason": "caption: no reply",
        "detail": "503: scripted",
        "clip": [30, 40],
    }
    assert not any("purple" in row["problem"] for row in generation.records(tmp_path, "openended"))


def test_questions_that_fail_their_checks_are_kept_with_the_reason(tmp_path):
    """Blind: the server knows the goal without the story. Wrong: it fails the plot with it."""

    def answer(asked):
        if generation.stage_of(asked) == "verify" and "cannot see" in asked.text:
            if "white walker" in asked.text:
                right = [line for line in asked.text.splitlines() if line.endswith(". yellow")]
                return json.dumps({"answer": right[0][0] if right else "yellow"})
            return json.dumps({"answer": "none"})  # no letter: a bad reply, not a right one
        if generation.stage_of(asked) == "verify" and "in which order" in asked.text:
            return json.dumps({"answer": "yellow"}) if "<story>" in asked.text else "{}"
        return generation.answer(asked)

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        assert generate(path, "question.forms=[open]") == 0
    assert {row["problem_type"] for row in generation.records(tmp_path, "openended")} == {
        "temporal",
        "spatial",
    }
    rejects = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert {(row["question"]["kind"], row["reason"]) for row in rejects} == {
        ("goal", "verify: right without the story"),
        ("plot", "verify: no reply"),
    }


@pytest.mark.parametrize(
    "said", ['{"answer": "cannot know"}', '{"answer": null}', "I cannot see the film."]
)
def test_a_blind_try_that_names_no_option_is_not_right(said, tmp_path):
    def answer(asked):
        blind = generation.stage_of(asked) == "verify" and "cannot see" in asked.text
        return said if blind else generation.answer(asked)

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        assert generate(path, "question.forms=[choice]", "servers.all.max_tries=1") == 0
    assert len(generation.records(tmp_path)) == 4
    assert not (tmp_path / "out" / "rejects.jsonl").read_text()


def test_no_request_is_sent_that_could_pass_max_usd(tmp_path):
    prices = {
        "usd_per_million_prompt_tokens": 10.0,
        "usd_per_million_completion_tokens": 10.0,
    }
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        tree = [f"servers.all.{name}={value}" for name, value in prices.items()]
        said = str(generate(path, *tree))
        assert "0.0000 USD are left of max_usd" in said and server.num_asked == 0
        cfg = settings.load(path, [*tree, "max_usd=0.25"])
        said = str(generate(path, *tree, "max_usd=0.25"))
        assert "USD are left of max_usd, which the next request could pass" in said
        first = server.num_asked
        assert first > 0 and 0 < run.spent(cfg).usd <= 0.25
        assert generate(path, *tree, "max_usd=100") == 0
        assert server.most_paid <= 2  # blind answers differ in their seed alone


def test_a_server_that_says_no_tokens_is_taken_to_have_used_the_most(tmp_path):
    requests = [
        chat.Request(messages=({"role": "user", "content": str(i)},), max_tokens=1000)
        for i in range(40)
    ]
    journal = tmp_path / "j.jsonl"
    more = {"frame_tokens": 0, "journal": journal, "check": None, "name": "stage"}
    with ChatServer(lambda asked: text("yes", usage=False)) as server:
        cfg = chat.ChatConfig(
            base_url=server.base_url,
            model="any",
            max_tries=1,
            usd_per_million_completion_tokens=10,
        )
        for _ in range(2):  # a cent a reply; the second run spends nothing more
            left_usd = 0.105 - chat.spent(journal).usd
            with pytest.raises(ValueError, match=r"0\.0050 USD are left of max_usd"):
                budget.Budget(left_usd).ask(requests, cfg, **more)
            assert server.num_asked == 10 and chat.spent(journal).usd == pytest.approx(0.1)


def test_a_full_disk_stops_it_in_words_and_the_next_run_goes_on(clean, tmp_path):
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url)
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))  # as a full disk: a write fails
        try:
            said = str(generate(path))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert "cannot be written" in said and len(said.splitlines()) == 1
        in_flight = 4
        assert generate(path) == 0
        assert clean.paid <= server.num_paid <= clean.paid + in_flight
    assert generation.package(tmp_path) == clean.files
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_bad_films_are_left_out_by_name(tmp_path):
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        folder = tmp_path / "films"
        (folder / "empty.mp4").write_bytes(b"")
        clips.cut(folder / "film 0.mp4", folder / "cut.mp4", part=0.6)
        (folder / "twin.mp4").write_bytes((folder / "film 0.mp4").read_bytes())
        (tmp_path / "secret.mp4").write_bytes((folder / "film 0.mp4").read_bytes())
        (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.mp4")).write_bytes(b"x")  # Latin-1
        assert generate(path) == 0
        assert server.num_paid <= 60  # the twin costs nothing
    rejects = [json.loads(x) for x in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    reasons = {row["film"]: row["reason"] for row in rejects if row["reason"].startswith("film")}
    assert reasons["empty.mp4"] == "film: empty" and reasons["link.mp4"] == "film: outside"
    assert reasons["cut.mp4"] in ("film: unreadable", "film: truncated", "film: corrupt")
    assert reasons["twin.mp4"] == "film: twin" and reasons["caf\udce9.mp4"] == "film: odd name"
    assert {row["videos"] for row in generation.records(tmp_path)} == {"films/film 0.mp4"}


def test_films_are_split_and_open_questions_of_held_out_ones_stand_apart():
    def film(number):
        about = {"film": f"{number}.mp4", "sha256": f"{number:064x}"}
        item = {"id": "1", "kind": "goal", "form": "x", "question": "Q", "reasoning": "R"}
        item |= {"steps": [], "seen": [], "blind": []}
        choice = item | {"options": list("wxyz"), "answer": "B"}
        return about, [choice, item | {"options": [], "answer": "free"}]

    cfg = types.SimpleNamespace(
        videos="a/films",
        out="a/out",
        seed=0,
        package=settings.PackageConfig(validation=0.2, test=0.3),
    )
    rows, _, _ = package.rows_of(cfg, [film(i) for i in range(400)])
    films = {split: {row["videos"] for row in records} for split, records in rows.items()}
    assert films["openended"] == films["train"]
    assert films["openended_held_out"] == films["test"] | films["validation"]
    assert not films["train"] & films["test"] and not films["validation"] & films["test"]
    assert 0.24 < len(films["test"]) / 400 < 0.36 and 0.14 < len(films["validation"]) / 400 < 0.26
    fewer, _, _ = package.rows_of(cfg, [film(i) for i in range(200)])  # films that come later
    assert {row["videos"] for row in fewer["test"]} <= films["test"]


def test_the_films_may_be_named_through_a_parent_or_a_link(tmp_path, monkeypatch):
    """data.root holds the films that the records name, or training would refuse every one."""
    for name in ("disk/films", "work"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "films").symlink_to(tmp_path / "disk" / "films")
    monkeypatch.chdir(tmp_path / "work")
    for videos in ("../disk/films", "../films"):
        cfg = types.SimpleNamespace(
            videos=videos, out="out", seed=0, package=settings.PackageConfig()
        )
        item = {"kind": "goal", "question": "Q", "reasoning": "R", "options": [], "answer": "x"}
        rows, _, _ = package.rows_of(cfg, [({"film": "1.mp4", "sha256": "0" * 64}, [item])])
        (record,) = [row for records in rows.values() for row in records]
        assert (package.root_of(cfg), record["videos"]) == (tmp_path, "disk/films/1.mp4")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("question.kinds=[temporal, causal]", "question.kinds='causal' is unknown; choose one of"),
        ("caption.server=big", "caption.server='big' is unknown; choose one of all"),
        ("split.min_clip_s=20", "split.min_clip_s=20.0 is over split.clip_s=10.0"),
        ("servers.all.concurency=3", "unknown config key servers.all.concurency; did you mean"),
        ("texts=nowhere", "texts=nowhere is no folder"),
        ("videos=nowhere", "videos=nowhere is no folder"),
        ("max_usd=-1", "max_usd=-1.0 must be 0"),
    ],
)
def test_a_wrong_config_is_refused_before_anything_is_asked(override, said, clean, tmp_path):
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        code = str(generate(path, override))
        assert said in code and len(code.splitlines()) == 1 and server.num_asked == 0


def test_the_configs_and_the_guide_s_own_are_configs(tmp_path):
    guide = (ROOT / "docs" / "generate.md").read_text()
    block = guide.partition("## Your films\n\n")[2].partition("\n\n`estimate`")[0]
    (tmp_path / "mine.yaml").write_text(textwrap.dedent(block))
    table = (ROOT / "configs" / "README.md").read_text()
    paths = sorted((ROOT / "configs" / "generate").glob("*.yaml"))
    assert len(paths) > 1 and all(f"generate/{path.name}" in table for path in paths)
    for path in [*paths, tmp_path / "mine.yaml"]:
        settings.load(path, [])


def test_a_text_that_asks_for_what_there_is_not_is_refused(tmp_path):
    with ChatServer(generation.answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "caption.txt").write_text("Say what happens to $whom.")
        said = str(generate(path, f"texts={tmp_path / 'mine'}"))
        assert "caption.txt asks for 'whom', but $end, $frames, $start are known here" in said
        (tmp_path / "mine" / "captoin.txt").write_text("x")
        assert "captoin.txt replaces nothing" in str(generate(path, f"texts={tmp_path / 'mine'}"))
        assert server.num_asked == 0


def test_the_estimate_is_no_less_than_what_it_takes(clean, capsys):
    cfg = settings.load(clean.folder / "config.yaml", [])
    assert generate(clean.folder / "config.yaml", stage="estimate") == 0
    shown = capsys.readouterr().out
    totals = run.spent(cfg)
    from longrl_jax.data.generate import estimate

    rows = estimate.bill(cfg, ["film 0.mp4", "film 1.mp4"])
    assert sum(row["requests"] for row in rows) >= totals.replies
    assert sum(row["prompt_tokens"] for row in rows) >= totals.prompt_tokens
    assert sum(row["reply_tokens"] for row in rows) >= totals.completion_tokens
    assert "every request once" in shown and "on top" in shown and "caption" in shown
