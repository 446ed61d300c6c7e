"""Answers on disk as they come: whatever a kill leaves, whole batches are kept and no more."""

import os

import pytest

from longrl_jax.evaluate.drawn import DrawnLog

BATCHES = [
    [{"id": f"q{number}", "sample": sample, "tokens": [number, 7]} for sample in range(2)]
    for number in range(3)
]


def write(path, batches=BATCHES):
    with DrawnLog(path) as log:
        for batch in batches:
            log.add(batch)
    return path.read_bytes()


def test_a_file_that_is_cut_at_any_byte_goes_on_to_the_same_bytes(tmp_path):
    whole = write(tmp_path / "whole.jsonl")
    ends = [len(write(tmp_path / f"{count}.jsonl", BATCHES[:count])) for count in range(4)]
    path = tmp_path / "cut.jsonl"
    for size in sorted(
        {*range(0, len(whole) + 1, 9), *(end + by for end in ends for by in (-1, 0))}
    ):
        if size < 0:
            continue
        path.write_bytes(whole[:size])
        num_whole = max(count for count, end in enumerate(ends) if end <= size)
        with DrawnLog(path) as log:
            rows = [row for batch in BATCHES[:num_whole] for row in batch]
            assert list(log.rows.values()) == rows
            for batch in BATCHES[num_whole:]:
                log.add(batch)
            assert len(log.rows) == 6
        assert path.read_bytes() == whole


def test_a_last_batch_that_came_to_disk_in_pieces_is_asked_again(tmp_path):
    whole = write(tmp_path / "a.jsonl")
    lines = whole.splitlines(keepends=True)
    lines[4] = b"\0" * len(lines[4])  # a page of the file that was never written
    (tmp_path / "a.jsonl").write_bytes(b"".join(lines))
    with DrawnLog(tmp_path / "a.jsonl") as log:
        assert [key[0] for key in log.rows] == ["q0", "q0", "q1", "q1"]


def test_damage_that_no_kill_explains_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    whole = write(path)
    path.write_bytes(whole.replace(b"[0, 7]", b"[9, 7]", 1))
    with pytest.raises(ValueError, match=r"a\.jsonl:1 is damaged: its checksum is wrong; remove"):
        DrawnLog(path)
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[1:]))  # as the message says
    with DrawnLog(path) as log:
        assert len(log.rows) == 5 and ("q0", 0) not in log.rows


def test_a_full_disk_is_named_with_the_way_out(tmp_path):
    path = tmp_path / "greedy.jsonl"
    whole = write(path, BATCHES[:1])
    with DrawnLog(path) as log, open("/dev/full", "wb") as full:
        os.dup2(full.fileno(), log._file.fileno())  # the kernel's own full disk
        with pytest.raises(OSError, match=r"greedy\.jsonl cannot be .*No space left.*goes on"):
            log.add(BATCHES[1])
        assert set(log.rows) == {("q0", 0), ("q0", 1)}
    assert path.read_bytes() == whole
