"""An oracle, not a model: a server on loopback that answers by rules from the story it is sent.

    python -m longrl_jax.data.generate oracle --port 8100

It stands in for the large models of the stages merge, question, rewrite and verify where none can
run, on films of the synthetic family alone (data/stories.py). All that it knows is in the request:
it reads the visitors and the walker out of the captions, as wrong as these are, writes questions
about them, solves such questions from a story, and guesses without one. It cannot see pictures.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from longrl_jax.data.stories import COLORS, CORNERS, LETTERS, SIDES

MODEL = "oracle-not-a-model"
LINE = re.compile(r"\[(\S+) - (\S+)\] (.*)")
SEEN = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SIDES)}|middle)\b")
WALKER = re.compile(rf"\bwhite walker to ({'|'.join(CORNERS)}) ({'|'.join(COLORS)}) pad\b")
OPTION = re.compile(r"^([A-D])\. (.*)$", re.MULTILINE)
ORDINALS = ("First", "Then", "After that", "Later", "Finally")


@dataclasses.dataclass(frozen=True)
class Visit:
    """Somebody who crosses, as the captions tell it."""

    color: str
    side: str
    """Where it was seen first; middle: it came unseen."""
    start: str
    end: str
    """Of the line that tells of it first."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a story says."""

    visits: tuple[Visit, ...]
    walker: tuple[str, str, str, str] | None
    """Start and end of the last line that tells of it, corner, colour of the pad."""


def read_story(text: str) -> Told:
    visits: list[Visit] = []
    walker = None
    for start, end, said in LINE.findall(text):
        for color, place in SEEN.findall(said):
            if not visits or visits[-1].color != color:
                visits.append(Visit(color, place, start, end))
        for corner, color in WALKER.findall(said):
            walker = start, end, corner, color
    return Told(tuple(visits), walker)


def reply(messages: list[dict[str, Any]], seed: int) -> str:
    """Returns what the oracle says to a chat; the same to the same."""
    text = "\n".join(_words(message["content"]) for message in messages)
    luck = int(hashlib.sha256(f"{seed}\n{text}".encode()).hexdigest()[:12], 16)
    story, question = _tagged("story", text), _tagged("question", text)
    if notes := _tagged("notes", text):
        return json.dumps({"notes": list(_condensed(notes))})
    if kind := re.search(r'of the kind "(\w+)"', text):
        asked = re.search(r"Write (\d+)", text)
        count = int(asked[1]) if asked else 1
        choice = "multiple-choice" in text
        return json.dumps(
            {"questions": _questions(read_story(story), kind[1], count, choice, luck)}
        )
    if steps := _tagged("steps", text):
        return _retold(steps, _tagged("answer", text))
    if candidate := _tagged("candidate", text):
        same = sorted(re.findall(r"\w+", candidate.lower())) == sorted(
            re.findall(r"\w+", _tagged("reference", text).lower())
        )
        return json.dumps({"same": same})
    if question:
        return json.dumps({"answer": solved(read_story(story), question, luck)})
    return "I am an oracle for synthetic stories, and find none in this request."


def serve(port: int) -> ThreadingHTTPServer:
    """Returns a server on 127.0.0.1 (port 0: any free one); serve_forever() runs it."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})

        def do_POST(self):
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path != "/v1/chat/completions":
                self._send(404, {"error": {"message": f"no {self.path}"}})
                return
            try:
                asked = json.loads(body)
                said = reply(asked["messages"], int(asked.get("seed") or 0))
            except (ValueError, KeyError, TypeError) as error:
                self._send(400, {"error": {"message": f"bad request: {error!r}"}})
                return
            self._send(200, _completion(asked, said))

        def _send(self, code: int, tree: dict[str, Any]) -> None:
            content = json.dumps(tree).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    return server


def _completion(asked: dict[str, Any], said: str) -> dict[str, Any]:
    prompt = sum(len(_words(message["content"]).split()) for message in asked["messages"])
    counts = {"prompt_tokens": prompt, "completion_tokens": len(said.split())}
    return {
        "id": "oracle",
        "object": "chat.completion",
        "created": 0,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": said},
                "finish_reason": "stop",
            }
        ],
        "usage": counts | {"total_tokens": sum(counts.values())},
    }


def _words(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


def _tagged(name: str, text: str) -> str:
    found = re.findall(rf"<{name}>\n?(.*?)\n?</{name}>", text, re.DOTALL)
    return found[-1].strip() if found else ""


def _questions(told: Told, kind: str, count: int, choice: bool, luck: int) -> list[dict[str, Any]]:
    """Returns as many questions of a kind as the story has, at most `count`."""
    found = list(WRITERS[kind](told)) if kind in WRITERS else []
    if not found:
        return []
    first, drafts = luck % len(found), []
    for question, right, wrong, looked in [*found[first:], *found[:first]][:count]:
        draft: dict[str, Any] = {"question": question}
        if choice:
            options = [right, *wrong[:3]]
            turn = luck % len(LETTERS)
            options = [*options[turn:], *options[:turn]]
            draft |= {"options": options, "answer": LETTERS[options.index(right)]}
        else:
            draft["answer"] = right
        draft["reasoning"] = [{"start": a, "end": b, "text": text} for a, b, text in looked]
        drafts.append(draft)
    return drafts


Written = tuple[str, str, list[str], list[tuple[str, str, str]]]
"""Question, right answer, wrong ones, steps (start, end, what is seen)."""


def _temporal(told: Told) -> Iterator[Written]:
    times = collections.Counter(visit.color for visit in told.visits)
    for known, right in itertools.pairwise(told.visits):
        if times[known.color] > 1 or known.color == right.color:
            continue
        others = [color for color in COLORS if color not in (known.color, right.color)]
        others.sort(key=lambda color: times[color] == 0)  # those who come are better decoys
        yield (
            f"Which colour is the visitor that comes right after the {known.color} one?",
            right.color,
            others,
            [
                (known.start, known.end, f"The {known.color} visitor comes."),
                (right.start, right.end, f"The next visitor is {right.color}."),
            ],
        )


def _goal(told: Told) -> Iterator[Written]:
    if told.walker:
        start, end, corner, color = told.walker
        yield (
            "Which colour is the pad that the white walker is trying to reach?",
            color,
            [other for other in COLORS if other != color],
            [(start, end, f"The white walker heads for the {corner} corner, the {color} pad.")],
        )


def _plot(told: Told) -> Iterator[Written]:
    first = told.visits[:3]
    if len({visit.color for visit in first}) < 3:
        return
    orders = [", then ".join(visit.color for visit in x) for x in itertools.permutations(first)]
    yield (
        "In which order do the first three visitors come?",
        orders[0],
        orders[1:],
        [(visit.start, visit.end, f"A {visit.color} visitor comes.") for visit in first],
    )


def _spatial(told: Told) -> Iterator[Written]:
    times = collections.Counter(visit.color for visit in told.visits)
    for visit in told.visits:
        if times[visit.color] == 1 and visit.side in SIDES:
            yield (
                f"From which side does the {visit.color} visitor come?",
                visit.side,
                [side for side in SIDES if side != visit.side],
                [(visit.start, visit.end, f"The {visit.color} visitor comes from {visit.side}.")],
            )


WRITERS: dict[str, Callable[[Told], Iterator[Written]]] = {
    "temporal": _temporal,
    "goal": _goal,
    "plot": _plot,
    "spatial": _spatial,
}


def solved(told: Told, question: str, luck: int) -> str:
    """Returns the answer by the story; a guess where it does not say it."""
    options = OPTION.findall(question)
    asked = OPTION.sub("", question).strip()
    known = {text: right for write in WRITERS.values() for text, right, _, _ in write(told)}.get(
        asked
    )
    if options:
        letters = [letter for letter, text in options if text == known]
        return letters[0] if letters else LETTERS[luck % len(LETTERS)]
    return known or [*COLORS, *SIDES][luck % (len(COLORS) + len(SIDES))]


def _retold(steps: str, answer: str) -> str:
    said = [text for _, _, text in LINE.findall(steps)]
    parts = [
        f"{word}, {text[0].lower()}{text[1:]}"
        for word, text in zip(
            itertools.chain(ORDINALS, itertools.repeat("Then")), said, strict=False
        )
    ]
    return f"I go through the film. {' '.join(parts)} So it is: {answer}."


def _condensed(notes: str) -> Iterator[dict[str, str]]:
    """Two neighbouring notes become one, without what is seen in the middle of the field."""
    lines = LINE.findall(notes)
    for first in range(0, len(lines), 2):
        pair = lines[first : first + 2]
        said = [x.strip() for _, _, text in pair for x in text.split(".") if x.strip()]
        kept = [x for x in dict.fromkeys(said) if not x.endswith(("middle", "nobody"))]
        yield {"start": pair[0][0], "end": pair[-1][1], "text": ". ".join(kept or said[:1]) + "."}
