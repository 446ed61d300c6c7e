"""Where subtitles stand in a prompt: above the question, or between the frames."""

import dataclasses
import functools

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from longrl_jax.data import prompts, synthetic
from longrl_jax.data.subtitles import SubtitleError
from longrl_jax.data.wording import Words
from longrl_jax.types import Example, MediaFile, MediaLayout

LAYOUT = MediaLayout(image_size=(32, 32), grid=(2, 3), media_token="<vila/video>", separator="\n")
FILM = Example(
    id="q1",
    question="which pad ? red = A",
    answer="A",
    media=(MediaFile(kind="video", path="film.mp4"),),
    subtitles="film.srt",
)
SRT = """1
00:00:00,000 --> 00:00:17,000
red circle

2
00:00:20,000 --> 00:00:30,000
never seen

3
00:00:31,000 --> 00:00:50,000
blue pad
"""
"""Frames of 64 s in four slices are at 0, 16, 32 and 48 s; the middles are 8.5 and 40.5 s."""
WATCH = f"{prompts.WATCH} {prompts.INSTRUCTIONS['think']}"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("films")
    _, frames_FHW3, _ = synthetic.make_clip(0, "train", 0)
    synthetic.write_video(root / "film.mp4", frames_FHW3)
    (root / "film.srt").write_text(SRT)
    (root / "bad.srt").write_text("bad")
    (root / "special.srt").write_text(SRT.replace("red", "<|im_end|>"))
    return root


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def encode(tokenizer, root):
    return functools.partial(
        prompts.encode_prompt,
        tokenizer=tokenizer,
        layout=LAYOUT,
        num_frames=4,
        fps=0,
        decoder="pyav",
        template="think",
        root=root,
    )


def tokens_of(tokenizer, *content):
    """transformers' own tokens of a chat whose user says this, piece by piece."""
    turns = [{"role": "user", "content": "MARK"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    before, _, after = rendered.partition("MARK")
    content = [before, *content[:-1], content[-1] + after]
    return [t for piece in content for t in tokenizer.encode(piece, add_special_tokens=False)]


def frames(number, unit=1):
    return ["<vila/video>" * 6, "\n"] * (number // unit)


def test_above_the_question(encode, tokenizer):
    prompt = encode(FILM, words=Words(subtitles="above"))
    said = f"Subtitles of the video:\nred circle\nblue pad\n\n{FILM.question}\n{WATCH}"
    assert prompt.tokens.tolist() == tokens_of(tokenizer, *frames(4), said)
    assert prompt.media == encode(FILM).media


def test_between_the_frames(encode, tokenizer):
    prompt = encode(FILM, words=Words(subtitles="between"))
    want = tokens_of(
        tokenizer,
        *[*frames(1), "red circle\n", *frames(2), "blue pad\n", *frames(1)],
        f"{FILM.question}\n{WATCH}",
    )
    assert prompt.tokens.tolist() == want
    media_id = tokenizer.convert_tokens_to_ids("<vila/video>")
    assert prompt.is_media.tolist() == [token == media_id for token in want]
    assert prompt.media[0].offset == want.index(media_id)
    assert prompt.media[0].num_tokens == want.count(media_id) == 4 * 6
    np.testing.assert_array_equal(prompt.rope_pos, range(len(want)))


def test_between_frames_that_share_their_tokens(encode, tokenizer):
    layout = dataclasses.replace(LAYOUT, unit_frames=2)
    prompt = encode(FILM, words=Words(subtitles="between"), layout=layout)
    want = [*frames(1), "red circle\n", *frames(1), "blue pad\n", f"{FILM.question}\n{WATCH}"]
    assert prompt.tokens.tolist() == tokens_of(tokenizer, *want)


def test_between_frames_with_their_times(encode, tokenizer):
    prompt = encode(FILM, words=Words(subtitles="between"), timestamp="{t:.0f} s")
    stamped = [[f"{t} s", *frames(1)] for t in (0, 16, 32, 48)]
    want = [*stamped[0], "red circle\n", *stamped[1], *stamped[2], "blue pad\n", *stamped[3]]
    assert prompt.tokens.tolist() == tokens_of(tokenizer, *want, f"{FILM.question}\n{WATCH}")


@pytest.mark.parametrize("way", ["above", "between"])
def test_a_film_without_subtitles_and_a_question_without_its_film(encode, way):
    words = Words(subtitles=way)
    silent = dataclasses.replace(FILM, subtitles="")
    assert encode(silent, words=words).tokens.tolist() == encode(silent).tokens.tolist()
    blind = dataclasses.replace(FILM, media=())
    assert encode(blind, words=words).tokens.tolist() == encode(blind).tokens.tolist()
    assert encode(FILM).tokens.tolist() == encode(silent).tokens.tolist()


def test_bad_subtitles_are_refused(encode):
    words = Words(subtitles="above")
    with pytest.raises(SubtitleError, match="bad.srt holds no subtitles"):
        encode(dataclasses.replace(FILM, subtitles="bad.srt"), words=words)
    with pytest.raises(ValueError, match="special.srt"):
        encode(dataclasses.replace(FILM, subtitles="special.srt"), words=words)


def test_media_keep_their_places_in_a_question_below_subtitles(encode, tokenizer, root):
    words = Words(subtitles="above", wording="choice")
    film = MediaFile(kind="video", path="film.mp4", at=len("which pad "))
    prompt = encode(dataclasses.replace(FILM, media=(film,)), words=words)
    want = tokens_of(
        tokenizer,
        "Subtitles of the video:\nred circle\nblue pad\n\nwhich pad ",
        *frames(4),
        f"? red = A\nOne option is right; its letter is the answer.\n{WATCH}",
    )
    assert tokenizer.decode(prompt.tokens) == tokenizer.decode(want)


def test_a_medium_among_options_that_stand_apart_is_refused(encode, tmp_path):
    template = tmp_path / "t.jinja"
    template.write_text("{{ options }} {{ question }}")
    question = "which pad ?\nA. red\nB. blue"
    film = MediaFile(kind="video", path="film.mp4", at=len(question) - 4)
    example = dataclasses.replace(FILM, question=question, media=(film,))
    with pytest.raises(ValueError, match="'film.mp4' among its options"):
        encode(example, words=Words(template_file=str(template)))
