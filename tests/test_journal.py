"""The journal gives back, to the last bit, what was written; or says why it cannot."""

import dataclasses

import numpy as np
import pytest
from tiny_groups import V, make_group, make_prompt

from longrl_jax import journal, run_folder


@pytest.fixture
def entry():
    rng = np.random.default_rng(0)
    groups = [
        make_group(make_prompt([1, 2, V, V, 3], key="film", name="a"), [4, 5, 6], [7]),
        make_group(make_prompt([1, 2], name="b"), [8], [9, 10]),
    ]
    for group in groups:
        for index, sample in enumerate(group.samples):
            sample.logps[:] = -rng.exponential(size=len(sample.logps)).astype(np.float32)
            object.__setattr__(sample, "seed", 2**31 - 5 + index)
    object.__setattr__(groups[1].samples[0], "finish_reason", "length")
    parts = [{"total": 0.1 + 0.2, "form": 1.0}, None, {"total": -1e-300, "form": 0.0}, None]
    return journal.Entry(groups=groups, parts=parts, sums={"hits": (1 / 3, 7)})


def prompts(entry):
    return [group.prompt for group in entry.groups]


def test_what_is_read_is_what_was_written(tmp_path, entry):
    journal.write(tmp_path / "journal", 7, journal.pack(entry))
    got = journal.read(tmp_path / "journal", 7, prompts(entry))
    assert got.parts == entry.parts and got.sums == entry.sums
    for one, other in zip(got.groups, entry.groups, strict=True):
        assert one.prompt is other.prompt and one.policy_version == other.policy_version
        for a, b in zip(one.samples, other.samples, strict=True):
            assert (a.finish_reason, a.seed) == (b.finish_reason, b.seed)
            for x, y in ((a.tokens, b.tokens), (a.logps, b.logps)):
                assert x.dtype == y.dtype and np.array_equal(x, y)
    assert journal.read(tmp_path / "journal", 8, prompts(entry)) is None


def split(entry, *numbers):
    """The entry as processes with so many of its groups each have it."""
    groups, parts = iter(entry.groups), iter(entry.parts)
    for number in numbers:
        mine = [next(groups) for _ in range(number)]
        of_mine = [next(parts) for group in mine for _ in group.samples]
        yield journal.Entry(groups=mine, parts=of_mine, sums={"hits": (number, 4)})


@pytest.mark.parametrize("numbers", [(1, 1), (0, 2), (2, 0), (1, 0, 1)])
def test_processes_write_one_entry_and_any_number_of_them_reads_it(tmp_path, entry, numbers):
    packed = [journal.pack(part) for part in split(entry, *numbers)]
    journal.write(tmp_path, 7, journal.join(packed))
    before = 0
    for part in [entry, *split(entry, 2, 0), *split(entry, 1, 1)]:
        before %= 2
        place = before, 2
        got = journal.read(tmp_path, 7, prompts(part), place=place)
        assert got.parts == part.parts and got.sums == {"hits": (2, 4 * len(numbers))}
        for one, other in zip(got.groups, part.groups, strict=True):
            assert one.prompt is other.prompt
            for a, b in zip(one.samples, other.samples, strict=True):
                assert a.seed == b.seed and np.array_equal(a.logps, b.logps)
                assert np.array_equal(a.tokens, b.tokens)
        before += len(part.groups)
    for asked, place in (
        (prompts(entry)[:1], (0, 3)),  # a step of more groups
        (prompts(entry)[1:], (0, 2)),  # another's place
        (prompts(entry), (1, 2)),
    ):
        with pytest.raises(ValueError, match="holds answers to other questions"):
            journal.read(tmp_path, 7, asked, place=place)


def test_no_flipped_byte_and_no_cut_goes_unseen(tmp_path, entry):
    journal.write(tmp_path, 7, journal.pack(entry))
    path = journal.path_of(tmp_path, 7)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        for damaged in (content[:at], content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"step_00000007.journal is damaged"):
                journal.read(tmp_path, 7, prompts(entry))


def test_answers_to_other_questions_are_not_taken(tmp_path, entry):
    journal.write(tmp_path, 7, journal.pack(entry))
    asked = prompts(entry)
    others = [
        asked[:1],
        asked[::-1],
        [dataclasses.replace(asked[0], tokens=asked[0].tokens + 1), asked[1]],
        [make_prompt([1, 2, V, V, 3], key="other film", name="a"), asked[1]],
    ]
    for other in others:
        with pytest.raises(ValueError, match="holds answers to other questions"):
            journal.read(tmp_path, 7, other)


def test_steps_are_forgotten_up_to_the_checkpoint(tmp_path, entry):
    for step in (3, 4, 12):
        journal.write(tmp_path, step, journal.pack(entry))
    (tmp_path / ".step_00000013.journal.partial").write_bytes(b"half")
    journal.forget(tmp_path, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000012.journal"]


def test_tries_of_a_step_have_files_of_their_own(tmp_path, entry):
    folder = tmp_path / run_folder.JOURNAL
    first, second = split(entry, 1, 1)
    journal.write(folder, 4, journal.pack(first))
    journal.write(folder, 4, journal.pack(second), attempt=2)
    journal.write(folder, 5, journal.pack(entry))
    assert journal.read(folder, 4, prompts(second), attempt=2).parts == second.parts
    assert journal.read(folder, 4, prompts(first)).parts == first.parts
    assert journal.read(folder, 4, prompts(first), attempt=3) is None
    assert run_folder.journaled_steps(tmp_path) == (4, 5)
    journal.forget(folder, 4)
    assert [path.name for path in folder.iterdir()] == ["step_00000005.journal"]
