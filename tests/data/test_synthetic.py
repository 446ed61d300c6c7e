import collections
import dataclasses
import functools
import hashlib
import json
import math
import re

import av
import numpy as np
import pytest

from longrl_jax.data import prompts, stories, synthetic
from longrl_jax.data.longvideo_reason import open_records
from longrl_jax.data.stories import (
    CHOICE_KINDS,
    COLORS,
    FPS,
    FREE_KINDS,
    KINDS,
    NUM_FRAMES,
    Story,
    Visitor,
)
from longrl_jax.data.synthetic import SIZE

CLIPS, VALIDATION, LESSONS, SEED = 8, 4, 12, 3
NEAR = 20
"""Pixel values this near to a colour are that colour: five standard deviations of the noise (3),
and a bit; two of the world's colours differ by 75 in one channel at least."""
NEAR_DECODED = 60
"""The same after H.264, which halves the resolution of colours and so blurs every edge."""
MEAN_ERROR = 4.0
"""Of 255: mean |decoded - drawn|. Measured 3.1; the noise, which the codec drops, is 2.4 of it."""
AREA_SHARE = 0.12
"""A shape of radius 10 on a pixel grid has its geometric area up to its rim of about 50 pixels."""

STORY = Story(
    visitors=(
        Visitor(color="red", shape="circle", side="left", enter=0, leave=11),
        Visitor(color="blue", shape="cross", side="bottom", enter=12, leave=23),
        Visitor(color="green", shape="triangle", side="right", enter=24, leave=35),
        Visitor(color="orange", shape="square", side="top", enter=36, leave=47),
    ),
    pads=("purple", "yellow", "red", "green"),
    goal=2,
    walker_enter=54,
)


def places(frame_HW3, color, near=NEAR):
    """Returns the (y, x) of the pixels of a colour, pads left out."""
    close = np.abs(frame_HW3.astype(int) - COLORS.get(color, (250, 250, 250))).max(-1) <= near
    edge = synthetic.PAD_SIZE + 1
    for rows in (slice(0, edge), slice(SIZE - edge, SIZE)):
        for columns in (slice(0, edge), slice(SIZE - edge, SIZE)):
            close[rows, columns] = False
    return np.argwhere(close)


@pytest.fixture(scope="module")
def drawn():
    return synthetic.draw(STORY, np.random.default_rng(1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world") / "tiny"
    synthetic.write_dataset(folder, clips=CLIPS, validation=VALIDATION, lessons=LESSONS, seed=SEED)
    return folder


def test_pads_have_their_colours_in_every_frame(drawn):
    assert drawn.shape == (64, 64, 64, 3) and drawn.dtype == np.uint8
    for (y, x), color in zip([(4, 4), (4, 59), (59, 4), (59, 59)], STORY.pads, strict=True):
        near = np.abs(drawn[:, y, x].astype(int) - COLORS[color]) <= NEAR
        assert near.all(), f"{color} pad at {y}, {x}"


def test_visitors_come_when_and_where_the_story_says(drawn):
    colors = {visitor.color for visitor in STORY.visitors}
    moves = {"left": (0, 1), "right": (0, -1), "top": (1, 0), "bottom": (-1, 0)}  # (down, right)
    for visitor in STORY.visitors:
        for t in range(visitor.enter, visitor.leave):
            seen = {color for color in colors if len(places(drawn[t], color))}
            assert seen == {visitor.color}, f"frame {t}"
        third = (visitor.leave - visitor.enter) // 3
        early = places(drawn[visitor.enter + third], visitor.color).mean(0)
        late = places(drawn[visitor.leave - 1 - third], visitor.color).mean(0)
        step = np.array(moves[visitor.side])
        assert (late - early) @ step > SIZE / 4  # it crossed
        assert abs((late - early) @ step[::-1]) < 1  # and did so straight
    for t in (11, 23, 35, 47, 53):  # nobody is there between two visits
        assert not any(len(places(drawn[t], color)) for color in colors), f"frame {t}"


def test_shapes_have_the_area_of_their_geometry(drawn):
    r = synthetic.VISITOR_RADIUS
    areas = {
        "circle": math.pi * r**2,
        "square": (2 * 0.85 * r) ** 2,
        "triangle": 1.8 * r * (2 * r) / 2,  # height times base
        "cross": 2 * (0.66 * r * 2 * r) - (0.66 * r) ** 2,  # two bars, their middle once
    }
    for visitor in STORY.visitors:
        middle = places(drawn[(visitor.enter + visitor.leave - 1) // 2], visitor.color)
        assert len(middle) == pytest.approx(areas[visitor.shape], rel=AREA_SHARE)


def test_the_walker_heads_for_its_pad_and_stops_before_it(drawn):
    assert not any(len(places(drawn[t], "white")) for t in range(54))
    ways = [places(drawn[t], "white").mean(0) for t in range(54, 64)]
    np.testing.assert_allclose(ways[0], [32, 32], atol=1)  # starts in the middle
    goal = np.array([59.5, 3.5])  # the bottom-left pad
    far = [np.linalg.norm(goal - way) for way in ways]
    assert far == sorted(far, reverse=True)
    assert np.linalg.norm(places(drawn[63], "white") - goal, axis=1).min() > 4  # pad: 4 to its side


OPTION = re.compile(r"(.+?) = ([A-D])(?: |$)")


def options(example):
    """Returns {letter: text}, read from the question."""
    listed = example.question.partition(" ? ")[2]
    found = {letter: text for text, letter in OPTION.findall(listed)}
    assert list(found) == ["A", "B", "C", "D"] and len(set(found.values())) == 4
    return found


def told(example, order, sides, goal, visits):
    """Answers a question from what was seen: colours in their order, {colour: side}, colour
    of goal, {colour: frames in which it is there}."""
    question = example.question
    if example.kind == "temporal":
        found = re.match(r"which visitor came right (after|before) the (\w+) \?", question)
        word, color = found.groups()
        return order[order.index(color) + (1 if word == "after" else -1)]
    if example.kind == "goal":
        assert question.startswith("which pad is the white walker trying to reach ?")
        return goal
    if example.kind == "plot":
        assert question.startswith("in which order do the first three visitors come ?")
        return " ".join(order[:3])
    if example.kind == "needle":
        second = int(re.fullmatch(r"what colour is the visitor at <(\d+)s> \?", question)[1])
        return next(color for color, frames in visits.items() if second * FPS in frames)
    if example.kind == "counting":
        assert question == "how many visitors come ?"
        return str(len(order))
    return sides[re.match(r"from which side does the (\w+) come \?", question)[1]]


def given(example):
    """Returns the text of the right answer."""
    return example.answer if example.kind in FREE_KINDS else options(example)[example.answer]


def test_answers_follow_from_the_stories():
    for index in range(60):
        story, _, asked = synthetic.make_clip(SEED, "train", index)
        order = [visitor.color for visitor in story.visitors]
        sides = {visitor.color: visitor.side for visitor in story.visitors}
        visits = {v.color: range(v.enter, v.leave) for v in story.visitors}
        corner = re.search(r"white walker to (\S+) ", stories.narration(story))[1]
        goal = story.pads[stories.CORNERS.index(corner)]
        assert [example.kind for example in asked] == list(KINDS)
        for example in asked:
            want = told(example, order, sides, goal, visits)
            assert given(example) == want, example
            end = f" {want}" if example.kind in FREE_KINDS else f" {want} = {example.answer}"
            assert example.reasoning.endswith(end)
            # who guesses has looked at nothing; who does not says when to look
            guesses = example.reasoning == stories.GUESS + end
            assert guesses != bool(re.search(r"<\d+s>", example.reasoning))


def test_reasonings_guess_as_often_as_they_should_and_change_nothing_else():
    """Of 400 questions a kind, five standard deviations of a share are 0.12 at most."""
    counts = collections.Counter()
    for index in range(400):
        (_, _, asked), (_, _, careful) = (
            synthetic.make_clip(SEED, "train", index, careful=flag) for flag in (False, True)
        )
        for example, other in zip(asked, careful, strict=True):
            assert dataclasses.replace(example, reasoning=other.reasoning) == other
            assert not other.reasoning.startswith(stories.GUESS)
            counts[example.kind] += example.reasoning.startswith(stories.GUESS)
    assert {kind: n / 400 for kind, n in counts.items()} == pytest.approx(synthetic.HASTY, abs=0.12)


def decoded(path):
    with av.open(str(path)) as container:
        return [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]


@functools.cache
def watch(path):
    return watch_scene(decoded(path))


def watch_scene(frames):
    """Says who crosses a scene in which order, from where, when, and where the walker goes: by
    pixels."""
    paths, visits = collections.defaultdict(list), collections.defaultdict(set)
    for t, frame in enumerate(frames):
        counts = {color: places(frame, color, NEAR_DECODED) for color in [*COLORS, "white"]}
        color = max(counts, key=lambda color: len(counts[color]))
        if len(counts[color]) > 40:
            paths[color].append(counts[color].mean(0))
            visits[color].add(t)
    (y, x) = paths.pop("white")[-1] - 31.5
    pad = frames[0][3 if y < 0 else 60, 3 if x < 0 else 60].astype(int)
    goal = min(COLORS, key=lambda color: np.abs(pad - COLORS[color]).max())
    sides = {}
    for color, way in paths.items():
        down, right = way[-1] - way[0]
        if abs(right) > abs(down):
            sides[color] = "left" if right > 0 else "right"
        else:
            sides[color] = "top" if down > 0 else "bottom"
    return list(paths), sides, goal, visits


def test_answers_can_be_read_off_the_films(folder):
    records = open_records(folder, "train.jsonl")
    for i in range(len(records)):
        example = records[i]
        order, sides, goal, visits = watch(folder / example.about)
        if example.kind == "needle" and int(re.search(r"<(\d+)s>", example.question)[1]) not in (
            second for frames in visits.values() for second in frames
        ):
            continue  # half out of the field: too few pixels for this watcher
        assert given(example) == told(example, order, sides, goal, visits), example


def asked_of_scene(example, start):
    """Returns the same question about the scene alone, with its own clock."""
    question = example.question.removeprefix(f"{stories.LAST_SCENE}, ")
    assert question != example.question
    question = re.sub(r"<(\d+)s>", lambda found: f"<{int(found[1]) - start}s>", question)
    return dataclasses.replace(example, question=question)


def test_only_the_last_scene_of_a_long_film_answers_its_questions(tmp_path):
    """Decoded frames of every scene are watched: the last one has the answers, the others have
    answers too, and these are right as seldom as luck is."""
    synthetic.main(
        [str(tmp_path / "long"), "--clips=2", "--validation=0", "--minutes=3", f"--seed={SEED}"]
    )
    records = open_records(tmp_path / "long", "train.jsonl")
    right = collections.defaultdict(list)
    for film in range(2):
        frames = decoded(tmp_path / "long" / records[film * len(KINDS)].about)
        assert len(frames) == 3 * 60 * FPS
        start = len(frames) - NUM_FRAMES
        for begin in range(start % NUM_FRAMES, len(frames), NUM_FRAMES):
            seen = watch_scene(frames[begin : begin + NUM_FRAMES])
            for number in range(film * len(KINDS), (film + 1) * len(KINDS)):
                alone = asked_of_scene(records[number], start // FPS)
                try:
                    answer = told(alone, *seen)
                except (ValueError, IndexError, KeyError, StopIteration):  # who is asked for
                    answer = None  # is not in this scene
                right["last" if begin == start else "earlier"].append(answer == given(alone))
    assert len(right["last"]) == len(right["earlier"]) == 12 and all(right["last"])
    assert sum(right["earlier"]) < 6  # a quarter of those that have an answer is luck


def test_times_of_a_long_film_are_those_of_its_clock():
    story, frames, asked = synthetic.make_film(SEED, "train", 0, 900)
    assert sum(1 for _ in frames) == 900 and story.start == 836
    alone, _, asked_alone = synthetic.make_clip(SEED, "train", 0)
    assert dataclasses.replace(story, start=0) == alone  # the last scene is the short film
    moved = 0
    for example, short in zip(asked, asked_alone, strict=True):
        later = re.sub(r"<(\d+)s>", lambda found: f"<{int(found[1]) + 836}s>", short.reasoning)
        assert example.reasoning == later and given(example) == given(short)
        moved += later != short.reasoning
    assert moved  # some do tell times
    _, frames, (example, *_) = synthetic.make_film(SEED, "train", 0, NUM_FRAMES)
    assert len(list(frames)) == NUM_FRAMES and example == asked_alone[0]


def test_the_narration_is_the_story_with_times():
    assert stories.narration(STORY) == (
        "<0s> red from left.<12s> blue from bottom.<24s> green from right."
        "<36s> orange from top.<54s> white walker to bottom-left red pad."
    )


def test_lessons_of_looking_say_what_frames_show(drawn):
    """Colour, place and corner of every time that is told are read off the drawn frames."""
    for seed in range(4):
        lesson = stories.lesson_looking(STORY, np.random.default_rng(seed), id="x")
        looks = re.findall(r"<(\d+)s> ([^.]+)\.", lesson.reasoning)
        assert len(looks) == stories.LOOKS
        for second, said in looks:
            frame = drawn[int(second) * FPS]
            found = {c for c in [*COLORS, "white"] if len(places(frame, c)) > 40}
            assert found <= ({said.split()[0]} - {"nobody"}), said
            if found and not said.startswith("white"):
                y, x = places(frame, said.split()[0]).mean(0) / SIZE - 0.5
                far = max(abs(y), abs(x))
                sides = ("left", "right") if abs(x) > abs(y) else ("top", "bottom")
                side = sides[int((x if abs(x) > abs(y) else y) > 0)]
                if abs(far - 0.2) > 0.03:  # else the crop at the rim decides
                    assert said.split()[-1] == (side if far > 0.2 else "middle"), (second, said)
        assert lesson.reasoning.endswith(
            " top-left purple top-right yellow bottom-left red bottom-right green"
        )
        corner = re.search(r"which pad is (\S+) \?", lesson.question)[1]
        assert lesson.answer == STORY.pads[stories.CORNERS.index(corner)]


def test_captions_say_what_a_part_of_a_film_shows(folder):
    """By hand: red leaves at the right, blue has come in at the bottom."""
    lesson = stories.lesson_caption(STORY, 8, id="x")
    assert lesson.answer == "red right. blue bottom." and lesson.media[0].span_s == (8, 16)
    last = stories.lesson_caption(STORY, 56, id="x")
    assert last.answer == "white walker to bottom-left red pad."
    written = open_records(folder, "captions.jsonl")
    spans = [written[i].media[0].span_s for i in range(8)]
    assert len(written) == 8 * CLIPS and spans == [(8 * k, 8 * k + 8) for k in range(8)]
    assert {written[i].media[0].path for i in range(8)} == {"videos/00000.mp4"}


def test_text_lessons_can_be_answered_from_their_text(folder):
    options_of, told_of = (open_records(folder, f"{n}.jsonl") for n in ("options", "told"))
    assert len(options_of) == len(told_of) == LESSONS
    for i in range(LESSONS):
        example = options_of[i]
        listed, _, wanted = example.question.partition(" ? ")[2].partition(" find ")
        found = dict(OPTION.findall(listed))
        assert example.answer == found[wanted] and not example.about
        said = dict(OPTION.findall(example.reasoning))
        assert said == found and list(said)[-1] == wanted
        example = told_of[i]
        sides = dict(re.findall(r"<\d+s> (\w+) from (\w+)\.", example.question))
        goal = re.search(r"white walker to \S+ (\w+) pad\.", example.question)[1]
        kind = example.id.rpartition("-")[2]
        asked = dataclasses.replace(
            example, kind=kind, question=example.question.partition("pad. ")[2]
        )
        want = told(asked, list(sides), sides, goal, {})
        assert given(asked) == want and not example.about


def test_letters_are_balanced_in_every_kind_and_clip(folder):
    records = open_records(folder, "train.jsonl")
    examples = [records[i] for i in range(len(records))]
    counts = collections.Counter((example.kind, example.answer) for example in examples)
    counts = {key: n for key, n in counts.items() if key[0] in CHOICE_KINDS}
    assert counts == {(kind, letter): CLIPS // 4 for kind in CHOICE_KINDS for letter in "ABCD"}
    by_film = collections.defaultdict(set)
    for example in examples:
        if example.kind in CHOICE_KINDS:
            by_film[example.about].add(example.answer)
    assert all(letters == set("ABCD") for letters in by_film.values())


def test_what_is_right_is_as_likely_as_what_is_wrong():
    """Chi-square of 400 stories; 16.3 is exceeded by a fair draw once in 1000 seeds (3 degrees)."""
    made = [stories.make_story(np.random.default_rng([9, i])) for i in range(400)]
    sides = [visitor.side for story in made for visitor in story.visitors]
    for values in ([story.goal for story in made], sides):
        counts = np.array(list(collections.Counter(values).values()))
        expected = len(values) / 4
        assert ((counts - expected) ** 2 / expected).sum() < 16.3


def test_the_options_alone_say_nothing():
    """No colour is there twice, or that would give away that one of the two is real."""
    for index in range(60):
        story, _, asked = synthetic.make_clip(SEED, "train", index)
        choices = options(asked[KINDS.index("temporal")]).values()
        assert len(set(choices)) == 4


def test_the_splits_share_no_film(folder):
    splits = [open_records(folder, f"{split}.jsonl") for split in ("train", "validation")]
    assert [len(split) for split in splits] == [CLIPS * len(KINDS), VALIDATION * len(KINDS)]
    files = [{split[i].about for i in range(len(split))} for split in splits]
    assert [len(names) for names in files] == [CLIPS, VALIDATION]
    contents = [hashlib.sha256((folder / name).read_bytes()).digest() for name in set.union(*files)]
    assert len(set(contents)) == CLIPS + VALIDATION == len(list((folder / "videos").iterdir()))
    ids = [split[i].id for split in splits for i in range(len(split))]
    assert len(set(ids)) == len(ids)


def test_films_are_h264_and_decode_to_what_was_drawn(folder):
    for split, index, number in (("train", 0, 0), ("train", 7, 7), ("validation", 2, CLIPS + 2)):
        _, want, _ = synthetic.make_clip(SEED, split, index)
        with av.open(str(folder / f"videos/{number:05d}.mp4")) as container:
            (stream,) = container.streams  # no sound
            assert stream.codec_context.name == "h264"
            assert (stream.average_rate, stream.frames) == (FPS, NUM_FRAMES)
            frames = list(container.decode(stream))
        assert [frame.time for frame in frames] == list(range(NUM_FRAMES))
        got = np.stack([frame.to_ndarray(format="rgb24") for frame in frames])
        assert np.abs(got.astype(int) - want).mean() < MEAN_ERROR


def test_the_same_seed_gives_the_same_data(folder, tmp_path):
    again, other = tmp_path / "again", tmp_path / "other"
    synthetic.write_dataset(again, clips=CLIPS, validation=VALIDATION, lessons=LESSONS, seed=SEED)
    for name in (
        "train.jsonl",
        "validation.jsonl",
        "looking.jsonl",
        "corpus.txt",
        "videos/00003.mp4",
    ):
        assert (again / name).read_bytes() == (folder / name).read_bytes(), name
    synthetic.write_dataset(other, clips=CLIPS, validation=VALIDATION, seed=SEED + 1)
    assert (other / "train.jsonl").read_bytes() != (folder / "train.jsonl").read_bytes()


def test_held_out_films_do_not_depend_on_the_number_of_others(folder, tmp_path):
    synthetic.write_dataset(tmp_path / "less", clips=1, validation=VALIDATION, seed=SEED)
    less, more = (open_records(f, "validation.jsonl") for f in (tmp_path / "less", folder))
    for i in range(len(less)):
        assert dataclasses.replace(less[i], media=more[i].media) == more[i]
        assert (tmp_path / "less" / less[i].about).read_bytes() == (
            folder / more[i].about
        ).read_bytes()


def test_the_corpus_holds_every_word_that_training_uses(folder):
    text = (folder / "corpus.txt").read_text()
    records = open_records(folder, "train.jsonl")
    for i in range(len(records)):
        for template in ("think", "direct"):
            assert prompts.user_text(records[i], template) in text
            assert prompts.target_text(records[i], template) in text


def test_the_command_says_what_it_did_and_what_is_wrong(tmp_path, capsys):
    folder = tmp_path / "data"
    synthetic.main([str(folder), "--clips", "1", "--validation", "1", "--seed", "4"])
    assert "1 films with 6 questions to train on, 1 with 6 held out" in capsys.readouterr().out
    assert json.loads((folder / "train.jsonl").read_text().splitlines()[0])["kind"] == "temporal"
    for arguments, said in (
        ([str(folder), "--clips", "1"], "already holds a data set"),
        ([str(tmp_path / "x"), "--clips", "0"], "at least 1 film"),
        ([str(tmp_path / "x"), "--clips", "99999"], "at most 100000"),
        ([str(tmp_path / "x"), "--seed", "-1"], "must be 0 or more"),
        ([str(tmp_path / "x"), "--minutes", "1"], "must be 2 to 600, or 0"),
        ([str(tmp_path / "x"), "--minutes", "9", "--lessons", "1"], "leave --minutes 9 out"),
    ):
        with pytest.raises(SystemExit, match=said):
            synthetic.main(arguments)
    assert not (tmp_path / "x").exists()
    with pytest.raises(SystemExit):
        synthetic.main(["--help"])
    assert "--validation" in capsys.readouterr().out
