"""The words of the user around a question: wordings of ours, or a template file of the user's.

Both are Jinja2 templates, rendered in its sandbox. They may name `question` (with its options, or
its words alone where `options` is named as well), `options` (lines "A. ..."), `subtitles` (one a
line), `instruction` (what data.template asks for) and `thinking` (whether that is reasoning).
"""

import dataclasses
import difflib
import functools
from pathlib import Path

import jinja2
from jinja2 import meta, sandbox

from longrl_jax.config import pick
from longrl_jax.options import join_options, split_options

SUBTITLES = """{% if subtitles %}
Subtitles of the video:
{{ subtitles }}

{% endif %}
"""
WORDINGS = {
    "plain": SUBTITLES + "{{ question }}\n{{ instruction }}",
    "choice": SUBTITLES
    + "{{ question }}\nOne option is right; its letter is the answer.\n{{ instruction }}",
    "short": SUBTITLES + "{{ question }}\nThe answer is one word or a few.\n{{ instruction }}",
}
"""data.wording -> template; `plain` is what the demo is trained on."""
NAMES = ("question", "options", "subtitles", "instruction", "thinking")
MARK = "\0question\0"
"""Stands for the question while a template is rendered, to find out where it comes to stand."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words:
    """How a question is put; the fields are those of DataConfig."""

    wording: str = "plain"
    template_file: str = ""
    subtitles: str = ""
    """Where subtitles stand, for whoever reads them: data/prompts.py."""


PLAIN = Words()


def check(wording: str, template_file: str) -> None:
    """Raises ValueError if a wording is unknown, or a template file cannot be used."""
    words = Words(wording=wording, template_file=template_file)
    for thinking in (True, False):
        render(words, question="?", subtitles="", instruction="", thinking=thinking)


def render(
    words: Words, *, question: str, subtitles: str, instruction: str, thinking: bool
) -> tuple[str, int]:
    """Returns the words of the user, and where the question begins in them.

    Raises ValueError if a template of the user's does not say the question once as it is.
    """
    template, apart = _template(words.wording, words.template_file)
    stem, options = split_options(question) if apart else (question, [])
    values = {"options": join_options("", options).strip("\n") if options else ""}
    values |= {"subtitles": subtitles, "instruction": instruction}
    try:
        text = template.render(question=MARK, thinking=thinking, **values)
    except Exception as error:  # a template of the user's may raise nearly anything
        raise _bad(words.template_file, str(error)) from None
    before, *after = text.split(MARK)
    if len(after) != 1:
        raise _bad(words.template_file, f"it says the question {len(after)} times as it is, not 1")
    return before + stem + after[0], len(before)


@functools.cache
def _template(wording: str, file: str) -> tuple[jinja2.Template, bool]:
    """Returns the template, and whether it names the options apart from the question."""
    if not file:
        text = pick(WORDINGS, wording, "data.wording")
    else:
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise _bad(file, f"it cannot be read ({error})") from None
    environment = sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    try:
        named = meta.find_undeclared_variables(environment.parse(text))
        template = environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise _bad(file, f"line {error.lineno}: {error.message}") from None
    for name in sorted(named - set(NAMES)):
        near = difflib.get_close_matches(name, NAMES, n=1)
        hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(NAMES)}"
        raise _bad(file, f"it names {{{{ {name} }}}}, which is unknown; {hint}")
    if "question" not in named:
        raise _bad(file, "it does not name {{ question }}")
    return template, "options" in named


def _bad(file: str, why: str) -> ValueError:
    return ValueError(f"data.template_file={file}: {why}; mend the template")
