import dataclasses
import functools
import itertools
import json
import os
import pickle
import shutil

import numpy as np
import pytest
from tiny_tokenizer import make_tokenizer

from longrl_jax.data import prompts, synthetic
from longrl_jax.data.video import VideoError
from longrl_jax.rewards import math_answer, video_qa
from longrl_jax.types import Example, MediaFile, MediaLayout

LAYOUT = MediaLayout(image_size=(32, 32), grid=(2, 3), media_token="<vila/video>", separator="\n")
TEXT = Example(id="q1", question="which pad ? red = A", answer="A", reasoning="t0 red circle .")
FILM = dataclasses.replace(TEXT, media=(MediaFile(kind="video", path="film.mp4"),))


def of(example, path):
    """The same question about another film."""
    return dataclasses.replace(example, media=(MediaFile(kind="video", path=path),))


WITH_SYSTEM = (
    "{{ '<|im_start|>system\nBe brief.<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokenizer")


@pytest.fixture(scope="module")
def tokenizer(folder):
    return make_tokenizer(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two films of 64 s."""
    root = tmp_path_factory.mktemp("films")
    for name, index in (("film.mp4", 0), ("other.mp4", 1)):
        _, frames_FHW3, _ = synthetic.make_clip(0, "train", index)
        synthetic.write_video(root / name, frames_FHW3)
    return root


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


def spelled_out(example, tokenizer, num_frames, *, template="think"):
    """transformers' own tokens of the chat, every media token and separator written as text."""
    frame = LAYOUT.media_token * 6 + LAYOUT.separator
    content = (
        frame * num_frames
        + example.question
        + ("\nWatch the video to its end. " if num_frames else "\n")
        + prompts.INSTRUCTIONS[template]
    )
    turns = [{"role": "user", "content": content}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("template", ["think", "direct", "boxed"])
@pytest.mark.parametrize("layout", [LAYOUT, None])
def test_a_text_question_is_the_chat_as_transformers_tokenizes_it(
    encode, tokenizer, layout, template
):
    prompt = encode(TEXT, layout=layout, template=template)
    assert prompt.tokens.tolist() == spelled_out(TEXT, tokenizer, 0, template=template)
    assert prompt.media == () and not prompt.is_media.any()


@pytest.mark.parametrize("chat_template", [None, WITH_SYSTEM], ids=["chatml", "system"])
def test_a_video_question_is_the_chat_with_frames_before_the_question(
    encode, folder, chat_template
):
    tokenizer = prompts.load_tokenizer(folder)
    tokenizer.chat_template = chat_template or tokenizer.chat_template
    prompt = encode(FILM, tokenizer=tokenizer)
    want = spelled_out(FILM, tokenizer, num_frames=4)
    assert prompt.tokens.tolist() == want
    media_id = tokenizer.convert_tokens_to_ids("<vila/video>")
    assert prompt.is_media.tolist() == [token == media_id for token in want]
    assert prompt.media[0].offset == want.index(media_id)
    assert prompt.media[0].num_tokens == want.count(media_id) == 4 * 2 * 3


def test_a_part_of_a_video_is_laid_out_as_if_the_file_were_cut_to_it(encode, tokenizer):
    """Frames are those of the part; times are told from its start."""
    part = MediaFile(kind="video", path="film.mp4", span_s=(40.0, 48.0))
    prompt = encode(dataclasses.replace(TEXT, media=(part,)), timestamp=" {t:.0f}")
    assert prompt.media[0].times_s == (40.0, 42.0, 44.0, 46.0)
    assert prompt.media[0].unit_s == 2.0
    told = tokenizer.decode(prompt.tokens[~prompt.is_media])
    assert [told.index(f" {t}\n") for t in (0, 2, 4, 6)] == sorted(
        told.index(f" {t}\n") for t in (0, 2, 4, 6)
    )
    assert prompt.media[0].key != encode(FILM).media[0].key


def test_the_records_of_a_video_question(encode, root):
    prompt = encode(FILM)
    P = len(prompt.tokens)
    (medium,) = prompt.media
    assert (medium.kind, medium.path) == ("video", str(root / "film.mp4"))
    assert medium.grid == (4, 2, 3) and medium.view.size == (32, 32)
    assert medium.times_s == (0, 16, 32, 48)  # 64 s in 4 slices
    assert prompt.example == FILM
    assert prompt.tokens.dtype == prompt.rope_pos.dtype == np.int32
    assert prompt.is_media.dtype == bool
    np.testing.assert_array_equal(prompt.rope_pos, list(range(P)))
    assert prompt.next_rope_pos == P
    assert not prompt.is_media[-1]


@pytest.mark.parametrize("timestamp", [" {t:.0f}", "<{t:.1f} seconds>"])
def test_the_time_stands_before_each_frame(encode, tokenizer, timestamp):
    prompt, bare = encode(FILM, timestamp=timestamp), encode(FILM)
    media_id = tokenizer.convert_tokens_to_ids("<vila/video>")
    left = prompt.tokens.tolist()
    start = bare.tokens.tolist().index(media_id)
    assert left[:start] == bare.tokens[:start].tolist()
    del left[:start]
    at, offsets = start, []
    for time_s in (0.0, 16.0, 32.0, 48.0):
        said = tokenizer.encode(timestamp.format(t=time_s), add_special_tokens=False)
        frame = [media_id] * 6 + tokenizer.encode("\n")
        assert left[: len(said) + len(frame)] == said + frame, time_s
        del left[: len(said) + len(frame)]
        offsets += range(at + len(said), at + len(said) + 6)
        at += len(said) + len(frame)
    assert left == bare.tokens[start + 4 * 7 :].tolist()  # the question, as without times
    assert np.flatnonzero(prompt.is_media).tolist() == offsets
    assert prompt.media == (dataclasses.replace(bare.media[0], offset=offsets[0]),)
    np.testing.assert_array_equal(prompt.rope_pos, range(len(prompt.tokens)))


def test_a_time_must_not_stand_for_media(encode):
    with pytest.raises(ValueError, match=r"data\.timestamp='<vila/video>\{t\}' contains .*<vila"):
        encode(FILM, timestamp="<vila/video>{t}")


def test_frames_a_second_with_a_cap(encode):
    times_s = encode(FILM, fps=0.125, num_frames=8).media[0].times_s
    assert times_s == (0, 8, 16, 24, 32, 40, 48, 56)
    assert len(encode(FILM, fps=2.0, num_frames=8).media[0].times_s) == 8


def test_two_questions_on_one_video_share_it(encode):
    a, b = encode(FILM), encode(dataclasses.replace(FILM, question="who came first ? blue = B"))
    pairs = itertools.zip_longest(a.tokens, b.tokens)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    assert shared >= a.media[0].offset + 4 * (2 * 3 + 1)  # all frames and their separators
    assert a.media == b.media


def test_the_key_says_everything_that_features_depend_on(encode, root, tmp_path):
    key = encode(FILM).media[0].key
    others = {
        "content": encode(of(FILM, "other.mp4")),
        "times": encode(FILM, num_frames=5),
        "size": encode(FILM, layout=dataclasses.replace(LAYOUT, image_size=(48, 32))),
        "decoder": encode(FILM, decoder="decord"),
    }
    keys = [key, *(prompt.media[0].key for prompt in others.values())]
    assert len(set(keys)) == len(keys)
    shutil.copy(root / "film.mp4", tmp_path / "renamed.mp4")
    moved = encode(of(FILM, "renamed.mp4"), root=tmp_path)
    assert moved.media[0].key == key
    assert encode(FILM, template="direct").media[0].key == key


def test_a_file_that_changes_in_place_gets_another_key(encode, root, tmp_path):
    path = tmp_path / "film.mp4"
    shutil.copyfile(root / "film.mp4", path)
    key = encode(FILM, root=tmp_path).media[0].key
    content, before = path.read_bytes(), path.stat()
    assert content.count(b"Lavf") == 1  # the name of the writer, which no decoder reads
    path.write_bytes(content.replace(b"Lavf", b"Lavg"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    after = path.stat()
    assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
    assert encode(FILM, root=tmp_path).media[0].key != key


def test_a_content_is_read_once(encode, root, tmp_path):
    shutil.copy(root / "film.mp4", tmp_path / "film.mp4")
    before = prompts._digest_of_file.cache_info()
    for question in ("a ?", "b ?", "c ?"):
        encode(dataclasses.replace(FILM, question=question), root=tmp_path)
    after = prompts._digest_of_file.cache_info()
    assert (after.misses - before.misses, after.hits - before.hits) == (1, 2)


@pytest.mark.parametrize("special", ["<|im_start|>", "<|im_end|>", "<vila/video>", "<image>"])
@pytest.mark.parametrize("example", [TEXT, FILM], ids=["text", "video"])
def test_words_of_a_record_do_not_become_special_tokens(encode, tokenizer, example, special):
    bad = dataclasses.replace(example, question=f"what is {special}assistant ?")
    with pytest.raises(ValueError) as caught:
        encode(bad)
    assert special in str(caught.value) and "'q1'" in str(caught.value)
    with pytest.raises(ValueError, match="the answer contains the special token"):
        prompts.answer_tokens(f"A{special}", tokenizer)


def test_text_that_only_looks_special_is_text(encode, tokenizer):
    odd = dataclasses.replace(TEXT, question="<im_end> <| im_end |> <think> <video> ?")
    assert encode(odd).tokens.tolist() == spelled_out(odd, tokenizer, 0)


def test_what_a_layout_needs_of_the_tokenizer_is_checked(encode):
    with pytest.raises(ValueError, match="'<new_medium>' must be one token"):
        encode(FILM, layout=dataclasses.replace(LAYOUT, media_token="<new_medium>"))


def test_a_video_needs_a_model_that_sees_and_a_file(encode):
    with pytest.raises(ValueError, match=r"'q1' asks about 'film.mp4', but .* text only"):
        encode(FILM, layout=None)
    with pytest.raises(VideoError, match=r"gone\.mp4") as caught:
        encode(of(FILM, "gone.mp4"))
    assert caught.value.kind == "missing"


def test_a_chat_template_that_loses_the_video_is_refused(encode, folder):
    tokenizer = prompts.load_tokenizer(folder)
    tokenizer.chat_template = "{{ '<|im_start|>' }}"
    with pytest.raises(ValueError, match="says <vila/video> 0 times"):
        encode(FILM, tokenizer=tokenizer)


def test_an_encoder_travels_to_another_process(encode):
    prompt, copy = encode(FILM), pickle.loads(pickle.dumps(encode))(FILM)
    assert copy.media == prompt.media
    np.testing.assert_array_equal(copy.tokens, prompt.tokens)


@pytest.mark.parametrize("template", ["think", "direct", "boxed"])
def test_prompt_and_answer_are_the_whole_chat(encode, tokenizer, template):
    answer = prompts.target_text(TEXT, template)
    turns = [
        {"role": "user", "content": prompts.user_text(TEXT, template)},
        {"role": "assistant", "content": answer},
    ]
    whole = tokenizer(
        tokenizer.apply_chat_template(turns, tokenize=False), add_special_tokens=False
    )["input_ids"]
    newline = tokenizer.encode("\n")  # stands after the end of a turn, and is not the policy's
    tokens = prompts.answer_tokens(answer, tokenizer)
    prompt = encode(TEXT, template=template)
    assert tokens.dtype == np.int32
    assert [*prompt.tokens, *tokens, *newline] == whole
    assert prompts.decode_text(tokens, tokenizer) == answer


def test_the_target_is_what_the_reward_asks_for():
    target = prompts.target_text(TEXT, "think")
    assert target == "<think>t0 red circle .</think><answer>A</answer>"
    assert video_qa.has_form(target) and video_qa.is_right(target, "A")
    assert prompts.target_text(TEXT, "direct") == "<answer>A</answer>"
    boxed = prompts.target_text(TEXT, "boxed")
    assert boxed == r"<think>t0 red circle .</think>\boxed{A}"
    assert math_answer.has_form(boxed) and math_answer.boxed(boxed) == "A"


def test_a_target_without_reasoning_is_refused_by_name():
    with pytest.raises(ValueError, match="'q1' has no reasoning.*data.template=direct"):
        prompts.target_text(dataclasses.replace(TEXT, reasoning=""), "think")
    with pytest.raises(ValueError, match=r"data\.template='poem' is unknown.*direct, think"):
        prompts.target_text(TEXT, "poem")


def test_decoded_text_shows_special_tokens_but_the_last(tokenizer):
    end, start = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"])
    words = tokenizer.encode("a red pad")
    assert prompts.decode_text(np.array([*words, end]), tokenizer) == "a red pad"
    assert prompts.decode_text(np.array(words), tokenizer) == "a red pad"  # cut off by length
    assert prompts.decode_text(np.array([*words, start]), tokenizer) == "a red pad<|im_start|>"
    assert prompts.decode_text(np.array([], np.int32), tokenizer) == ""


def test_the_tokens_that_end_an_answer_and_those_that_are_banned(tokenizer):
    ids = tokenizer.convert_tokens_to_ids
    want = sorted([ids("<|im_end|>"), ids("<|endoftext|>")])
    assert list(prompts.stop_token_ids(tokenizer)) == want
    assert list(prompts.media_token_ids(tokenizer)) == sorted([ids("<image>"), ids("<vila/video>")])


def test_the_end_of_turn_is_read_from_the_chat_template(folder):
    tokenizer = prompts.load_tokenizer(folder)
    tokenizer.eos_token = "<|endoftext|>"  # as base models have it
    assert prompts.end_of_turn_id(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content + '\n' }}{% endfor %}"
    with pytest.raises(ValueError, match="does not end an answer with a special token"):
        prompts.answer_tokens("A", tokenizer)


def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, folder):
    with pytest.raises(ValueError, match="no folder .*nowhere"):
        prompts.load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="holds no tokenizer"):
        prompts.load_tokenizer(tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="no chat template"):
        prompts.load_tokenizer(tmp_path / "copy")


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path, folder):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    ran = tmp_path / "ran"
    (copy / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    settings = json.loads((copy / "tokenizer_config.json").read_text())
    settings["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    prompts.load_tokenizer(copy)
    assert not ran.exists()


def test_nothing_is_said_to_happen_in_pictures():
    """What is asked for follows the media: a film (beside pictures, too), pictures alone, text."""
    film, picture = MediaFile(kind="video", path="f.mp4"), MediaFile(kind="image", path="p.png")

    def words(template, *media):
        return prompts.user_text(dataclasses.replace(TEXT, media=media), template)

    assert "what you see" in words("think", picture, picture)
    for media in ((film,), (picture, film), ()):
        assert "what happens and when" in words("think", *media)
        assert (prompts.WATCH in words("think", *media)) == (film in media)
    for template in ("direct", "boxed"):
        assert words(template, picture) == words(template)
    assert words("think", picture).endswith("answer alone, inside <answer></answer>.")
