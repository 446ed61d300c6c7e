import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from longrl_jax.data import loader, prompts, synthetic
from longrl_jax.data.longvideo_reason import RecordError, open_records
from longrl_jax.data.refused import RefusedLog
from longrl_jax.data.stories import CHOICE_KINDS
from longrl_jax.data.video import VideoError
from longrl_jax.types import Example, MediaFile, MediaLayout, Prompt

NUM_RECORDS = 10
LAYOUT = MediaLayout(image_size=(8, 8), grid=(1, 2), media_token="<vila/video>", separator="\n")


def numbered(example: Example) -> Prompt:
    """Stands for encode_prompt where only the order matters; refuses what it is told to."""
    if example.answer == "refuse":
        raise ValueError(f"{example.id} is refused")
    tokens = np.array([int(example.id)], np.int32)
    return Prompt(
        example=example,
        tokens=tokens,
        is_media=np.zeros(1, bool),
        rope_pos=np.zeros(1, np.int32),
        next_rope_pos=1,
    )


@pytest.fixture
def source(tmp_path):
    return write_source(tmp_path, [record(i) for i in range(NUM_RECORDS)])


def record(i, **fields):
    return {"id": i, "question": "what ?", "answer": "A"} | fields


def write_source(root, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    (root / "train.jsonl").write_text("\n".join(lines) + "\n")
    return open_records(root, "train.jsonl")


def nobody(record, error, *, step):
    raise AssertionError(f"step {step}: {record} refused: {error}")


def numbers(source, *, seed=0, groups=4, first_step=0, num_steps=10, told=nobody, part=None):
    """Returns the record numbers of every step, None where one was refused."""
    steps = loader.prompts(
        source,
        numbered,
        seed=seed,
        groups=groups,
        first_step=first_step,
        num_steps=num_steps,
        workers=0,
        on_refused=told,
        part=part,
    )
    return [[p and int(p.tokens[0]) for p in step] for step in steps]


def test_every_epoch_is_another_order_of_all_records(source):
    stream = sum(numbers(source, groups=4, num_steps=10), [])  # 40 = 4 epochs of 10
    epochs = [stream[i : i + NUM_RECORDS] for i in range(0, 40, NUM_RECORDS)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(NUM_RECORDS))
    assert len(set(map(tuple, epochs))) == 4


def test_steps_are_slices_of_one_stream(source):
    fours = numbers(source, groups=4, num_steps=9)
    twelves = numbers(source, groups=12, num_steps=3)  # more than the source has
    assert sum(fours, []) == sum(twelves, [])


class Noted:
    """A source that notes which records were read."""

    def __init__(self, source):
        self._source = source
        self.read = []

    def __len__(self):
        return len(self._source)

    def __getitem__(self, index):
        self.read.append(index)
        return self._source[index]


@pytest.mark.parametrize("bounds", [(0, 2, 4), (0, 1, 1, 4), (0, 1, 2, 3, 4)])
def test_processes_read_parts_of_the_steps_of_one(source, bounds):
    whole = numbers(source)
    parts = []
    for start, stop in itertools.pairwise(bounds):
        noted = Noted(source)
        parts.append(numbers(noted, part=range(start, stop)))
        assert len(noted.read) == (stop - start) * len(whole)  # none of another's is read
    assert [sum(step, []) for step in zip(*parts, strict=True)] == whole


@pytest.mark.parametrize("first_step", [0, 1, 4, 9])
def test_a_run_may_enter_anywhere(source, first_step):
    entered = numbers(source, first_step=first_step, num_steps=10 - first_step)
    assert entered == numbers(source)[first_step:]


def test_the_order_is_of_the_seed(source):
    assert numbers(source, seed=1) == numbers(source, seed=1) != numbers(source, seed=2)


@pytest.mark.parametrize("num_records", [1, 2])
def test_tiny_sources_repeat(tmp_path, num_records):
    source = write_source(tmp_path, [record(i) for i in range(num_records)])
    stream = sum(numbers(source, groups=3, num_steps=4), [])
    assert sorted(stream) == sorted(list(range(num_records)) * (12 // num_records))


def test_no_steps_are_none(source):
    assert numbers(source, num_steps=0) == []


def test_a_refused_record_leaves_its_place_empty(tmp_path):
    good = numbers(write_source(tmp_path, [record(i) for i in range(NUM_RECORDS)]))
    records = [record(i) for i in range(NUM_RECORDS)]
    records[3], records[7] = record(3, answer="refuse"), '{"id": 7'
    told = []
    got = numbers(
        write_source(tmp_path, records),
        first_step=2,
        num_steps=8,
        told=lambda record, error, *, step: told.append((step, record, type(error))),
    )
    assert got == [[None if n in (3, 7) else n for n in step] for step in good[2:]]
    assert [step for step, _, _ in told] == [
        number
        for number, step in enumerate(good, start=1)
        if number > 2
        for n in step
        if n in (3, 7)
    ]
    for _, what, kind in told:
        if kind is RecordError:
            assert what == "train.jsonl:8"
        else:
            assert what.id == "3" and kind is ValueError


def test_a_mistake_of_the_program_is_not_a_refused_record(source):
    def broken(example):
        raise TypeError("a bug")

    with pytest.raises(TypeError, match="a bug"):
        list(
            loader.prompts(
                source,
                broken,
                seed=0,
                groups=1,
                first_step=0,
                num_steps=1,
                workers=0,
                on_refused=nobody,
            )
        )


def test_prompts_at_reads_what_it_is_asked_for(tmp_path):
    source = write_source(tmp_path, [record(0), record(1, answer="refuse"), record(2)])
    told = []
    asked = loader.prompts_at(
        source,
        numbered,
        np.array([2, 1, 0, 2]),
        on_refused=lambda record, error, *, step: told.append((record.id, str(error), step)),
    )
    assert [p and p.example.id for p in asked] == ["2", None, "0", "2"]
    assert told == [("1", "1 is refused", 0)]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    """Twelve real records, of which four are bad, each in its own way; and an encoder."""
    root = tmp_path_factory.mktemp("films")
    synthetic.write_dataset(root, clips=3, validation=0, seed=0)
    lines = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] in CHOICE_KINDS]  # four a film
    lines[1]["question"] += " <|im_end|>"
    lines[4]["video"] = "videos/gone.mp4"
    (root / "videos" / "noise.mp4").write_bytes(b"noise" * 100)
    lines[6]["video"] = "videos/noise.mp4"
    lines[9]["video"] = "../outside.mp4"
    encode = functools.partial(
        prompts.encode_prompt,
        tokenizer=make_tokenizer(root / "tokenizer"),
        layout=LAYOUT,
        num_frames=4,
        fps=0,
        decoder="pyav",
        template="think",
        root=root,
    )
    return write_source(root, lines), encode


BAD = {
    "train-0-goal": ValueError,
    "train-1-temporal": VideoError,
    "train-1-plot": VideoError,
    "train.jsonl:10": RecordError,
}


def run_films(films, log, *, workers, first_step=0):
    source, encode = films
    return list(
        loader.prompts(
            source,
            encode,
            seed=5,
            groups=4,
            first_step=first_step,
            num_steps=5 - first_step,
            workers=workers,
            on_refused=log,
        )
    )


def same(a: Prompt | None, b: Prompt | None) -> bool:
    if a is None or b is None:
        return a is b
    fields = [f.name for f in dataclasses.fields(Prompt)]
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in fields)


def test_worker_processes_change_nothing(films):
    logs = {0: [], 2: []}
    runs = {}
    for workers, log in logs.items():
        runs[workers] = run_films(
            films,
            lambda record, error, *, step, log=log: log.append(
                (step, getattr(record, "id", record), type(error), str(error))
            ),
            workers=workers,
            first_step=1,
        )
    assert all(
        same(a, b)
        for step, other in zip(runs[0], runs[2], strict=True)
        for a, b in zip(step, other, strict=True)
    )
    assert logs[0] == logs[2]
    assert len(runs[0]) == 4 and any(p is not None and p.media for p in runs[0][0])
    assert not multiprocessing.active_children()


@pytest.mark.slow  # starts processes a second time
def test_leaving_early_ends_the_workers(films):
    source, encode = films
    steps = loader.prompts(
        source,
        encode,
        seed=0,
        groups=2,
        first_step=0,
        num_steps=1000,
        workers=1,
        on_refused=lambda record, error, *, step: None,
    )
    with contextlib.closing(steps):
        assert len(next(steps)) == 2
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_every_refused_record_is_a_row_of_the_log(films, tmp_path):
    path = tmp_path / "run" / "refused.jsonl"
    with RefusedLog(path) as log:
        steps = run_films(films, log.add, workers=0)
        rows = [json.loads(line) for line in path.read_text().splitlines()]  # before it is closed
        assert log.count == len(rows) == sum(p is None for step in steps for p in step)
    for row in rows:
        assert list(row) == ["step", "id", "video", "type", "kind", "message"]
        assert row["type"] == BAD[row["id"]].__name__
        assert sum(p is None for p in steps[row["step"] - 1]) == sum(
            other["step"] == row["step"] for other in rows
        )
    by_id = {row["id"]: row for row in rows}
    assert set(by_id) == set(BAD)  # 20 places of 5 steps show every one of 12 records
    assert by_id["train-1-temporal"]["kind"] == "missing"
    assert by_id["train-1-temporal"]["video"] == "videos/gone.mp4"
    assert by_id["train-1-plot"]["kind"] == "unreadable"
    assert "<|im_end|>" in by_id["train-0-goal"]["message"]
    assert "../outside.mp4" in by_id["train.jsonl:10"]["message"]


def test_a_log_that_is_opened_again_goes_on(tmp_path):
    path = tmp_path / "refused.jsonl"
    example = Example(
        id="a", question="q ?", answer="A", media=(MediaFile(kind="video", path="v.mp4"),)
    )
    for run in (1, 2):
        with RefusedLog(path) as log:
            log.add(example, ValueError("no"), step=run)
            log.add("train.jsonl:3", VideoError("cut", "truncated"), step=run)
            assert log.count == 2 * run
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 4
    assert rows[2] == {
        "step": 2,
        "id": "a",
        "video": "v.mp4",
        "type": "ValueError",
        "kind": "",
        "message": "no",
    }
    assert (rows[1]["id"], rows[1]["kind"]) == ("train.jsonl:3", "truncated")


def test_a_record_of_the_evaluations_is_listed_once_a_run(tmp_path):
    path = tmp_path / "refused.jsonl"
    for count in (1, 1, 2):  # opened again, as a run that goes on does
        with RefusedLog(path) as log:
            for _ in range(2):
                log.add("validation.jsonl:3", ValueError("no"), step=0)
                if count == 2:
                    log.add("validation.jsonl:4", ValueError("no"), step=0)
            assert log.count == count
    assert len(path.read_text().splitlines()) == 2
