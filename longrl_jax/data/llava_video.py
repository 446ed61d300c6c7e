"""Questions of LLaVA-Video-178K: a JSON array of conversations about a video.

Source: the card of lmms-lab/LLaVA-Video-178K, and public loaders of it: id, data_source, video and
conversations of turns {"from": "human" or "gpt", "value"}, the first of which begins with <image>
(some copies: <video>) for the film. Every question of a conversation is a record of its own.
"""

import functools
import re
from pathlib import Path
from typing import Any

from longrl_jax.data import fields
from longrl_jax.data.fields import RecordError, Records, shown
from longrl_jax.data.rows import JsonArray
from longrl_jax.types import Example, MediaFile

PLACEHOLDER = re.compile(r"\s*<(?:image|video)>\s*")
OPTION = re.compile(r"^\(?([A-Z])[.):]\s", re.MULTILINE)
"""The beginning of an option's line."""
LETTER = re.compile(r"\(?([A-Z])(?:[.):](?:\s.*)?)?", re.DOTALL)
"""An answer by letter: "B", "B." and "B. The red one" are all B."""
FORM = re.compile(
    r"\s*Please (?:respond with only the letter of the correct answer"
    r"|provide your answer by stating the letter followed by the full option)\.\s*\Z"
)
"""Ends of questions that ask for a form of the answer, which is the template's to ask for."""


def open_records(root: Path, file: str) -> Records:
    """Opens root/file; the path of a video is its field `video`, under root."""
    root = Path(root)
    return Records(JsonArray(root, file, _turns), functools.partial(to_example, root=root))


def to_example(row: Any, *, root: Path, where: str) -> Example:
    """Turns one question of a conversation, as `_turns` gives it, into an Example."""
    if not isinstance(row, tuple):
        raise RecordError(
            where,
            f"{shown(row)} must have conversations, a list of turns in which human and gpt take "
            "turns, each with a value",
        )
    tree, turn, num_turns = row
    human, gpt = tree["conversations"][2 * turn : 2 * turn + 2]
    asked = fields.text(human, "value", where)
    words = PLACEHOLDER.sub("", asked, count=1).strip()
    if turn == 0 and words == asked:
        raise RecordError(where, f"value={shown(asked)} has no <image>, where the video stands")
    if PLACEHOLDER.search(words):
        raise RecordError(where, f"value={shown(asked)} shows a second video; one can be asked of")
    words, answer = FORM.sub("", words), fields.text(gpt, "value", where)
    if not words:
        raise RecordError(where, f"value={shown(asked)} has no words; it must ask something")
    options = OPTION.findall(words)
    if len(options) > 1:
        answer = _letter(answer, options, where)
    path = fields.text(tree, "video", where)
    fields.check_inside("video", path, root, where)
    name = fields.identifier(tree, "id", where)
    return Example(
        id=f"{name}-{turn}" if num_turns > 1 else name,
        question=words,
        answer=answer,
        kind="choice" if len(options) > 1 else "open",
        media=(MediaFile(kind="video", path=path),),
        tags=fields.tags(data_source=fields.label(tree, "data_source", where)),
    )


def _letter(answer: str, options: list[str], where: str) -> str:
    match = LETTER.fullmatch(answer)
    if match is None or match[1] not in options:
        raise RecordError(
            where, f"value={shown(answer)} must begin with one of the letters {', '.join(options)}"
        )
    return match[1]


def _turns(tree: Any) -> list[Any]:
    """Returns (conversation, number of a question, their number) for each; a malformed conversation
    is one row, itself."""
    said = tree.get("conversations") if isinstance(tree, dict) else None
    if not isinstance(said, list) or not said or len(said) % 2:
        return [tree]
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in said]
    if speakers != ["human", "gpt"] * (len(said) // 2):
        return [tree]
    return [(tree, turn, len(said) // 2) for turn in range(len(said) // 2)]
