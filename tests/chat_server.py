"""A scripted OpenAI-compatible server on loopback, with faults; it counts what it is asked.

    def answer(asked: Asked) -> str | Fault:
        if asked.visit == 1:                       # the first time that this content comes
            return status(429, retry_after=0.1)
        return "yes" if "red" in asked.text else "no"

    with ChatServer(answer) as server:
        cfg = ChatConfig(base_url=server.base_url, model="any")
        ...
        assert server.num_paid == 3 and server.most_paid == 1     # nothing was paid twice

`answer` is called in threads, once a request. What it may return: a text; `status(429,
retry_after=0.2)`, `status(500)`; `hang(seconds)` (the reply comes so late); `cut()` (the connection
ends in the middle of the body); `truncated("text")` (a body whose JSON is cut); `text("...",
finish_reason="length", usage=None)`; `empty_choices()`; `filtered()` (content filter).

Asked: `body` (the request's JSON), `text` (all messages' words joined by newlines), `visit` (how
often this content has come, this time counted, from 1), `number` (of the request, from 1).
Content is the body without its seed. A request is paid when the server has made a reply to it
(status 200), whole or not, useful or not. ChatServer(key="K") answers 401 to any other key.
"""

import collections
import dataclasses
import hashlib
import json
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """One request, as it came."""

    body: dict
    visit: int
    number: int

    @property
    def text(self) -> str:
        return "\n".join(words(message["content"]) for message in self.body["messages"])


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """What the server does instead of giving a plain text; made by the functions below."""

    kind: str
    text: str = ""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0
    finish_reason: str = "stop"
    usage: bool = True


def status(code: int, *, retry_after: float | str | None = None, message: str = "scripted"):
    headers = () if retry_after is None else (("Retry-After", str(retry_after)),)
    return Fault(kind="status", status=code, headers=headers, text=message)


def hang(seconds: float, text: str = "late"):
    return Fault(kind="text", seconds=seconds, text=text)


def cut(text: str = "the connection is cut before this is whole"):
    return Fault(kind="cut", text=text)


def truncated(text: str = "the body ends before its last brace"):
    return Fault(kind="truncated", text=text)


def text(text: str, *, finish_reason: str = "stop", usage: bool = True):
    return Fault(kind="text", text=text, finish_reason=finish_reason, usage=usage)


def empty_choices():
    return Fault(kind="empty")


def filtered():
    return Fault(kind="text", text="", finish_reason="content_filter")


def words(content) -> str:
    """The text of a message, whose content may be a list of parts."""
    if isinstance(content, str):
        return content
    return "\n".join(part.get("text", "") for part in content)


class ChatServer:
    """Owner of the server's threads and of what it has counted; a context."""

    def __init__(self, answer: Callable[[Asked], "str | Fault"], *, key: str = ""):
        self.answer, self.key = answer, key
        self.asked: list[Asked] = []
        """Every request, in the order of coming."""
        self.paid: collections.Counter[str] = collections.Counter()
        """Replies made, by digest of the content."""
        self.authorizations: set[str] = set()
        self.most_at_once = 0
        """Most requests that were open at a time."""
        self._lock = threading.Lock()
        self._visits: collections.Counter[str] = collections.Counter()
        self._open = 0
        self._closing = threading.Event()

    @property
    def num_asked(self) -> int:
        return len(self.asked)

    @property
    def num_paid(self) -> int:
        return self.paid.total()

    @property
    def most_paid(self) -> int:
        """How often the content that was paid for most often was paid for."""
        return max(self.paid.values(), default=0)

    def __enter__(self) -> "ChatServer":
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                outer._serve(self)

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_):  # a client that was killed
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def _serve(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        body = json.loads(handler.rfile.read(length))
        authorization = handler.headers.get("Authorization", "")
        if handler.path != "/v1/chat/completions":
            return self._send(handler, 404, {"error": {"message": f"no {handler.path}"}})
        if self.key and authorization != f"Bearer {self.key}":
            return self._send(handler, 401, {"error": {"message": f"bad key: {authorization}"}})
        content = _digest(body)
        with self._lock:
            self.authorizations.add(authorization)
            self._visits[content] += 1
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            asked = Asked(body=body, visit=self._visits[content], number=len(self.asked) + 1)
            self.asked.append(asked)
        try:
            given = self.answer(asked)
            reply = Fault(kind="text", text=given) if isinstance(given, str) else given
            if reply.seconds:
                self._closing.wait(reply.seconds)
            if reply.status == 200:
                with self._lock:
                    self.paid[content] += 1
            self._reply(handler, asked, reply)
        finally:
            with self._lock:
                self._open -= 1

    def _reply(self, handler: BaseHTTPRequestHandler, asked: Asked, reply: Fault) -> None:
        if reply.kind == "status":
            error = {"message": reply.text, "code": None}
            return self._send(handler, reply.status, {"error": error}, reply.headers)
        prompt, completion = len(asked.text.split()), len(reply.text.split())
        tree = {
            "id": f"chatcmpl-{asked.number}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": asked.body["model"],
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": reply.text},
                    "finish_reason": reply.finish_reason,
                }
            ],
        }
        if reply.kind == "empty":
            tree["choices"] = []
        if reply.usage:
            total = prompt + completion
            tree["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": total,
            }
        self._send(handler, 200, tree, kind=reply.kind)

    def _send(self, handler, code: int, tree: dict, headers=(), kind: str = "") -> None:
        content = json.dumps(tree).encode()
        if kind == "truncated":
            content = content[: len(content) // 2]
        handler.send_response(code)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(len(content)))
        for name, value in headers:
            handler.send_header(name, value)
        handler.end_headers()
        if kind == "cut":
            handler.wfile.write(content[: len(content) // 2])
            handler.wfile.flush()
            handler.connection.shutdown(socket.SHUT_RDWR)
            handler.close_connection = True
            return
        handler.wfile.write(content)


def _digest(body: dict) -> str:
    content = {name: value for name, value in body.items() if name != "seed"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
