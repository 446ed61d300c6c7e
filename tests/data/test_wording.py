"""The words around a question, to the letter, and templates that cannot be used."""

import dataclasses

import pytest

from longrl_jax import config
from longrl_jax.data import prompts, wording
from longrl_jax.data.wording import Words
from longrl_jax.types import Example, MediaFile

FILM = (MediaFile(kind="video", path="film.mp4"),)
CHOICE = Example(id="q", question="Who?\nA. he\nB. she", answer="A", media=FILM)
THINK = (
    "Watch the video to its end. First say step by step what happens and when, inside "
    "<think></think>. Then give the answer alone, inside <answer></answer>."
)
DIRECT = "Watch the video to its end. Give the answer alone, inside <answer></answer>."
TOLD = "Subtitles of the video:\nHello\nyou all\n\n"


@pytest.mark.parametrize(
    ("name", "template", "said", "want"),
    [
        ("plain", "think", "", f"Who?\nA. he\nB. she\n{THINK}"),
        ("plain", "direct", "", f"Who?\nA. he\nB. she\n{DIRECT}"),
        (
            *("choice", "think", ""),
            f"Who?\nA. he\nB. she\nOne option is right; its letter is the answer.\n{THINK}",
        ),
        (
            *("choice", "direct", "Hello\nyou all"),
            f"{TOLD}Who?\nA. he\nB. she\nOne option is right; its letter is the answer.\n{DIRECT}",
        ),
        (
            *("short", "direct", ""),
            f"Who?\nA. he\nB. she\nThe answer is one word or a few.\n{DIRECT}",
        ),
    ],
)
def test_our_wordings(name, template, said, want):
    assert prompts.user_text(CHOICE, template, Words(wording=name), said) == want


def template_of(folder, text):
    path = folder / "template.jinja"
    path.write_text(text)
    return Words(template_file=str(path))


def test_a_template_file_takes_the_place_of_a_wording(tmp_path):
    words = template_of(
        tmp_path,
        "{% if subtitles %}[{{ subtitles }}] {% endif %}Q: {{ question }} O: {{ options }}\n"
        "{% if thinking %}Think.{% else %}{{ instruction }}{% endif %}\n",
    )
    assert prompts.user_text(CHOICE, "think", words) == "Q: Who? O: A. he\nB. she\nThink."
    assert (
        prompts.user_text(CHOICE, "direct", words, "Hi")
        == f"[Hi] Q: Who? O: A. he\nB. she\n{DIRECT}"
    )
    open_question = dataclasses.replace(CHOICE, question="Who?")
    assert prompts.user_text(open_question, "think", words) == "Q: Who? O: \nThink."
    whole = template_of(tmp_path / "..", "{{ question }}!")
    assert prompts.user_text(CHOICE, "think", whole) == "Who?\nA. he\nB. she!"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{{ question }} {{ optoins }}", "it names {{ optoins }}, which is unknown; did you mean"),
        ("{{ question }} {{ film }}", "known are question, options, subtitles"),
        ("{{ options }}", "it does not name {{ question }}"),
        ("{{ question }} {{ question }}", "it says the question 2 times as it is, not 1"),
        ("{{ question | upper }}", "it says the question 0 times as it is, not 1"),
        ("{% if thinking %}{{ question }}{% endif %}", "it says the question 0 times"),
        ("a\n{{ question", "line 2: "),
        ("{{ question.__class__.__mro__ }}{{ question }}", "is unsafe"),
        ("{{ question }}{% for i in range(10**9) %}x{% endfor %}", "Range too big"),
        ("{% include 'other' %}{{ question }}", "no loader"),
    ],
)
def test_a_template_that_cannot_be_used_is_refused_before_anything_is_asked(tmp_path, text, why):
    words = template_of(tmp_path, text)
    with pytest.raises(ValueError) as raised:
        wording.check(words.wording, words.template_file)
    assert why in str(raised.value)
    assert f"data.template_file={tmp_path}" in str(raised.value)


def test_an_unknown_wording_and_a_missing_file():
    with pytest.raises(ValueError, match="data.wording='plian' is unknown; choose one of choice"):
        wording.check("plian", "")
    with pytest.raises(ValueError, match="data.template_file=/none: it cannot be read"):
        wording.check("plain", "/none")


def test_a_template_file_is_named_from_the_folder_of_the_config(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text(
        "stage: grpo\nmodel: {path: m}\nrun: {dir: r, num_steps: 1}\n"
        "data: {root: d, template_file: mine/t.jinja}\n"
    )
    want = str(tmp_path / "mine" / "t.jinja")
    assert config.load(path).data.template_file == want
    (tmp_path / "deep").mkdir()
    again = tmp_path / "deep" / "resolved.yaml"
    again.write_text(config.to_yaml(config.load(path)))
    assert config.load(again).data.template_file == want
    with pytest.raises(ValueError, match="data.subtitles='below'"):
        config.load(path, ["data.subtitles=below"])
