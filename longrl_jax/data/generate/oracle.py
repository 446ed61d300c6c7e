"""An oracle, not a model: a server on loopback that answers by rules from the story it is sent.

    python -m longrl_jax.data.generate oracle --port 8100

It stands in for the large models of the stages merge, question, rewrite and verify where none can
run, on films of the synthetic family alone (data/stories.py). All that it knows is in the request:
it reads the visitors and the walker out of the captions, as wrong as these are, writes questions
about them in the words of data/stories.py, which tiny policies can read, solves such questions from
a story, and guesses without one. It cannot see pictures.
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

from longrl_jax.data.generate import clock
from longrl_jax.data.stories import (
    COLORS,
    CORNERS,
    FPS,
    LETTERS,
    SECONDS_BETWEEN,
    SIDES,
    told_time,
)

MODEL = "oracle-not-a-model"
LINE = re.compile(r"\[(\S+) - (\S+)\] (.*)")
SEEN = re.compile(rf"\b({'|'.join(COLORS)}) ({'|'.join(SIDES)}|middle)\b")
LOOK = re.compile(r"[^.]+")
WALKER = re.compile(rf"\bwhite walker to ({'|'.join(CORNERS)}) ({'|'.join(COLORS)}) pad\b")
OPTION = re.compile(r"^([A-D])\. (.*)$", re.MULTILINE)
NEIGHBOUR = re.compile(r"right (?:after|before) the (\w+)")


@dataclasses.dataclass(frozen=True)
class Visit:
    """Somebody who crosses, as the captions tell it."""

    color: str
    side: str
    """Where it was seen first; middle: it came unseen."""
    moment_s: int
    """When it is there, the first time that the captions tell; even, as stories tell times."""


@dataclasses.dataclass(frozen=True)
class Told:
    """What a story says."""

    visits: tuple[Visit, ...]
    walker: tuple[int, str, str] | None
    """The last moment that is told of it, corner, colour of the pad."""


def read_story(text: str) -> Told:
    visits: list[Visit] = []
    walker = None
    for start, end, said in LINE.findall(text):
        start_s, end_s = clock.seconds(start), clock.seconds(end)
        looks = [look for look in LOOK.findall(said) if look.strip()]
        for i, look in enumerate(looks):
            share = i / (len(looks) - 1) if i else 0.0
            moment_s = _moment(start_s, end_s, share)
            for color, place in SEEN.findall(look):
                if not visits or visits[-1].color != color:
                    visits.append(Visit(color, place, moment_s))
            for corner, color in WALKER.findall(look):
                walker = _moment(start_s, end_s, 1.0), corner, color
    return Told(tuple(visits), walker)


def _moment(start_s: float, end_s: float, share: float) -> int:
    """Returns the even second of a clip after a share of its frames: a caption tells its looks in
    order, the first of its first frame, the last of its last."""
    last_s = max(start_s, end_s - SECONDS_BETWEEN)
    return round((start_s + share * (last_s - start_s)) / SECONDS_BETWEEN) * SECONDS_BETWEEN


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
        return _retold(steps, question, _tagged("answer", text))
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
        draft: dict[str, Any] = {"question": f"{question} ?"}
        if choice:
            options = [right, *wrong[:3]]
            turn = luck % len(LETTERS)
            options = [*options[turn:], *options[:turn]]
            draft |= {"options": options, "answer": LETTERS[options.index(right)]}
        else:
            draft["answer"] = right
        draft["reasoning"] = [
            {"start": clock.told(at), "end": clock.told(at + SECONDS_BETWEEN), "text": seen}
            for at, seen in looked
        ]
        drafts.append(draft)
    return drafts


Written = tuple[str, str, list[str], list[tuple[int, str]]]
"""Question, right answer, wrong ones, steps (moment in seconds, what is seen)."""


def _temporal(told: Told) -> Iterator[Written]:
    times = collections.Counter(visit.color for visit in told.visits)
    pairs = list(itertools.pairwise(told.visits))
    named = [(a, "after", b) for a, b in pairs] + [(b, "before", a) for a, b in pairs]
    for known, word, right in named:
        if times[known.color] > 1 or known.color == right.color:
            continue
        others = [color for color in COLORS if color not in (known.color, right.color)]
        others.sort(key=lambda color: times[color] == 0)  # those who come are better decoys
        question = f"which visitor came right {word} the {known.color}"
        yield question, right.color, others, _arrivals(told)


def _goal(told: Told) -> Iterator[Written]:
    if told.walker:
        at, corner, color = told.walker
        others = [other for other in COLORS if other != color]
        question = "which pad is the white walker trying to reach"
        yield question, color, others, [(at, f"white walker to {corner}")]


def _plot(told: Told) -> Iterator[Written]:
    first = [visit.color for visit in told.visits[:3]]
    if len(set(first)) < 3:
        return
    orders = [" ".join(order) for order in itertools.permutations(first)]
    question = "in which order do the first three visitors come"
    yield question, orders[0], orders[1:], _arrivals(told)


def _spatial(told: Told) -> Iterator[Written]:
    times = collections.Counter(visit.color for visit in told.visits)
    for visit in told.visits:
        if times[visit.color] == 1 and visit.side in SIDES:
            wrong = [side for side in SIDES if side != visit.side]
            question = f"from which side does the {visit.color} come"
            yield question, visit.side, wrong, [(visit.moment_s, visit.color)]


def _arrivals(told: Told) -> list[tuple[int, str]]:
    return [(visit.moment_s, visit.color) for visit in told.visits]


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
    known = {
        f"{text} ?": right for write in WRITERS.values() for text, right, _, _ in write(told)
    }.get(asked)
    if options:
        letters = [letter for letter, text in options if text == known]
        return letters[0] if letters else LETTERS[luck % len(LETTERS)]
    return known or [*COLORS, *SIDES][luck % (len(COLORS) + len(SIDES))]


def _retold(steps: str, question: str, answer: str) -> str:
    """Returns a reasoning as data/stories.py has it: moments and what they show, the answer, and
    where there are options its letter."""
    looked = [(clock.seconds(start), seen) for start, _, seen in LINE.findall(steps)]
    seen = "".join(f"{told_time(round(at) * FPS)} {what}" for at, what in looked)
    if known := NEIGHBOUR.search(question):
        seen += f". {known[0].replace('the ', '')} is"
    elif "which order" in question:
        seen += ". order is"
    elif "which side" in question:
        seen += " from"
    letters = [letter for letter, text in OPTION.findall(question) if text == answer]
    return " ".join([seen, answer, *(f"= {letter}" for letter in letters[:1])])


def _condensed(notes: str) -> Iterator[dict[str, str]]:
    """Two neighbouring notes become one, without what is seen in the middle of the field."""
    lines = LINE.findall(notes)
    for first in range(0, len(lines), 2):
        pair = lines[first : first + 2]
        said = [x.strip() for _, _, text in pair for x in text.split(".") if x.strip()]
        kept = [x for x in dict.fromkeys(said) if not x.endswith(("middle", "nobody"))]
        yield {"start": pair[0][0], "end": pair[-1][1], "text": ". ".join(kept or said[:1]) + "."}
