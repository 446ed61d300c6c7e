"""The chat client against a scripted server: every reply once, whatever goes wrong between."""

import json
import threading

import pytest
from chat_server import (
    ChatServer,
    cut,
    empty_choices,
    filtered,
    hang,
    status,
    text,
    truncated,
)

from longrl_jax import chat
from longrl_jax.chat import client

SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
KEY = "sk-not-to-be-seen-0123"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch):
    monkeypatch.setattr(client, "FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def config(server, **more):
    return chat.ChatConfig(base_url=server.base_url, model="any", **more)


def request(word, **more):
    message = {"role": "user", "content": str(word)}
    return chat.Request(**({"messages": (message,), "max_tokens": 20} | more))


def numbered(asked):
    return json.dumps({"n": int(asked.text)})


def lines(path):
    return [json.loads(line)["record"] for line in path.read_text().splitlines()]


def test_replies_stand_in_the_order_asked_and_are_paid_for_once(tmp_path):
    words = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    second = threading.Event()

    def answer(asked):
        if asked.number == 2:
            second.set()
        assert second.wait(60), "the second request waits for the reply to the first"
        return numbered(asked)

    with ChatServer(answer) as server:
        for _ in range(2):
            replies = chat.ask(
                [request(word, schema=SCHEMA) for word in words],
                config(server, concurrency=4),
                journal=tmp_path / "made" / "journal.jsonl",
            )
            assert [json.loads(reply.text)["n"] for reply in replies] == words
        assert server.num_asked == server.num_paid == len(set(words))
        assert 1 < server.most_at_once <= 4
        sent = server.asked[0].body
        assert sent["response_format"]["json_schema"]["schema"] == SCHEMA
        assert (sent["model"], sent["max_tokens"], "seed" in sent) == ("any", 20, False)


SHORT_S, LONG_S = 2.0, 60.0
"""Time-outs: of the fault that is one, and of the others, which a busy machine must not add to."""
FAULTS = {
    "429 with a pause": (status(429, retry_after=0.05), 0),
    "429 with a date": (status(429, retry_after="Wed, 21 Oct 2015 07:28:00 GMT"), 0),
    "500": (status(500), 0),
    "503": (status(503), 0),
    "hangs": (hang(60), 0),
    "cut connection": (cut(), 0),
    "truncated body": (truncated(), 1),
    "breaks the schema": ('{"n": "seven"}', 1),
    "truncated JSON": (text('{"n": 7', finish_reason="length"), 1),
    "no JSON": ("seven", 1),
    "no choices": (empty_choices(), 1),
    "deep JSON": ("[" * 100_000, 1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_tried_again_and_what_was_paid_is_counted(tmp_path, name):
    fault, num_refused = FAULTS[name]
    timeout_s = SHORT_S if name == "hangs" else LONG_S
    journal = tmp_path / "journal.jsonl"
    with ChatServer(lambda asked: fault if asked.visit == 1 else '{"n": 7}') as server:
        cfg = config(server, timeout_s=timeout_s, usd_per_million_completion_tokens=1e6)
        (reply,) = chat.ask([request(7, schema=SCHEMA)], cfg, journal=journal)
        assert (reply.text, reply.tries, server.num_asked) == ('{"n": 7}', 2, 2)
        (again,) = chat.ask([request(7, schema=SCHEMA)], cfg, journal=journal)
        assert again == reply and server.num_asked == 2
    totals = chat.spent(journal)
    assert (totals.replies, totals.refused, totals.failures) == (1, num_refused, 0)
    assert totals.usd == sum(r["completion_tokens"] for r in lines(journal)) >= 2


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_stays_is_a_failure_and_asked_again_by_the_next_run(tmp_path, name):
    fault, num_refused = FAULTS[name]
    timeout_s = SHORT_S if name == "hangs" else LONG_S
    journal = tmp_path / "journal.jsonl"
    healthy = threading.Event()

    def answer(asked):
        broken = "7" in asked.text and not healthy.is_set()
        return fault if broken else numbered(asked)

    with ChatServer(answer) as server:
        cfg = config(server, timeout_s=timeout_s, max_tries=2)
        words = [1, 7, 2]
        asked = [request(word, schema=SCHEMA) for word in words]
        first, failure, last = chat.ask(asked, cfg, journal=journal)
        assert isinstance(first, chat.Reply) and isinstance(last, chat.Reply)
        assert isinstance(failure, chat.Failure) and failure.tries == 2 and failure.reason
        assert failure.reached == (name not in ("hangs", "cut connection"))
        totals = chat.spent(journal)
        assert (totals.replies, totals.refused, totals.failures) == (2, 2 * num_refused, 1)
        healthy.set()
        replies = chat.ask(asked, cfg, journal=journal)
        assert [json.loads(reply.text)["n"] for reply in replies] == words
        assert server.num_asked == 2 + 2 + 1


def test_a_reply_that_the_check_refuses_is_asked_again_with_another_seed(tmp_path):
    def even(reply):
        return None if int(reply) % 2 == 0 else ValueError(f"{reply} is odd")

    journal = tmp_path / "journal.jsonl"
    with ChatServer(lambda asked: str(asked.visit)) as server:
        (reply,) = chat.ask([request("a", seed=5)], config(server), journal=journal, check=even)
        assert reply.text == "2"
        seeds = [asked.body["seed"] for asked in server.asked]
        assert seeds[0] == 5 and 0 <= seeds[1] < 2**31 and seeds[1] != 5
        assert [r["reason"] for r in lines(journal) if r["kind"] == "refused"] == ["1 is odd"]
        # a stricter check asks again for what the journal holds
        chat.ask([request("a", seed=5)], config(server), journal=journal, check=lambda text: None)
        assert server.num_asked == 2
        strict = [ValueError("no"), None]
        (reply,) = chat.ask(
            [request("a", seed=5)], config(server), journal=journal, check=lambda _: strict.pop(0)
        )
        assert reply.text == "3"


def test_another_seed_temperature_or_schema_is_another_request_and_a_name_is_not(tmp_path):
    kinds = [{}, {"seed": 1}, {"seed": 2}, {"temperature": 0.5}, {"max_tokens": 9}, {"name": "b"}]
    with ChatServer(lambda asked: "yes") as server:
        for _ in range(2):
            chat.ask([request("a", **k) for k in kinds], config(server), journal=tmp_path / "j")
        assert server.num_asked == len(kinds) - 1


def test_a_content_filter_costs_one_request(tmp_path):
    with ChatServer(lambda asked: filtered()) as server:
        (failure,) = chat.ask([request("a")], config(server), journal=tmp_path / "j")
        assert "content filter" in failure.reason and server.num_asked == 1


def test_a_pause_holds_for_all_requests(tmp_path):
    """While the server wants to be left alone nobody asks it."""
    import time

    times = []

    def answer(asked):
        times.append(time.monotonic())
        return status(429, retry_after=0.4) if asked.number == 1 else "yes"

    with ChatServer(answer) as server:
        chat.ask([request(i) for i in range(6)], config(server, concurrency=1), journal=None)
    assert times[1] - times[0] >= 0.4 and len(times) == 7


def test_the_limit_spreads_requests_evenly():
    import time

    times = []

    def answer(asked):
        times.append(time.monotonic())
        return "yes"

    with ChatServer(answer) as server:
        cfg = config(server, requests_per_minute=1200)  # one in 50 ms
        chat.ask([request(i) for i in range(8)], cfg, journal=None)
    assert times[-1] - times[0] >= 0.9 * 7 * 0.05


REFUSALS = {
    401: "its key is read from OPENAI_API_KEY",
    403: "its key is read from OPENAI_API_KEY",
    404: "check base_url",
    400: "mend what it says",
    422: "mend what it says",
}


@pytest.mark.parametrize("code", REFUSALS)
def test_a_refusal_ends_with_the_way_out(tmp_path, code):
    said = f"no, not with {KEY}"
    with ChatServer(lambda asked: status(code, message=said)) as server:
        with pytest.raises(ValueError) as caught:
            chat.ask([request(i) for i in range(40)], config(server), journal=tmp_path / "j")
        assert server.num_asked < 20
    message = str(caught.value)
    for part in (server.base_url, "model='any'", str(code), "no, not with [key]", REFUSALS[code]):
        assert part in message
    assert KEY not in message and KEY not in (tmp_path / "j").read_text()


def test_one_request_that_is_refused_among_others_is_a_failure_of_that_one(tmp_path):
    def answer(asked):
        return status(400, message="too long") if "7" in asked.text else "yes"

    with ChatServer(answer) as server:
        cfg = config(server, concurrency=1)
        replies = chat.ask([request(i) for i in (1, 7, 2)], cfg, journal=tmp_path / "j")
        assert [isinstance(r, chat.Reply) for r in replies] == [True, False, True]
        assert "400: too long" in replies[1].reason and server.num_asked == 3


def test_a_pause_of_hours_and_an_empty_account_end_it(tmp_path):
    with (
        ChatServer(lambda asked: status(429, retry_after=7200)) as server,
        pytest.raises(ValueError, match="wants 7200 s without requests"),
    ):
        chat.ask([request("a")], config(server), journal=tmp_path / "j")


def test_replies_in_flight_are_kept_when_another_request_ends_it(tmp_path):
    """The refusal comes at once, the reply later; it is paid for, so it must not be lost."""
    journal = tmp_path / "j"

    def answer(asked):
        return status(401) if asked.text == "bad" else hang(0.3, "late, and kept")

    with ChatServer(answer) as server:
        cfg = config(server, concurrency=2)
        with pytest.raises(ValueError, match="401"):
            chat.ask([request("good"), request("bad")], cfg, journal=journal)
        (reply,) = chat.ask([request("good")], cfg, journal=journal)
        assert reply.text == "late, and kept" and server.num_asked == 2


def test_the_key_is_sent_and_stands_nowhere(tmp_path, capfd):
    def answer(asked):
        return status(500, message=f"oh {KEY}") if asked.text == "b" else "yes"

    journal = tmp_path / "j"
    with ChatServer(answer, key=KEY) as server:
        cfg = config(server, max_tries=2)
        _, failure = chat.ask(
            [request("a"), request("b")], cfg, journal=journal, progress="judging"
        )
        assert server.authorizations == {f"Bearer {KEY}"} and "[key]" in failure.reason
    shown = capfd.readouterr()
    assert "judging" in shown.err and KEY not in shown.err + shown.out + journal.read_text()


def test_a_server_elsewhere_needs_a_key_and_one_here_does_not(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # finds no server of this machine
    far = chat.ChatConfig(base_url="https://models.example/v1", model="any")
    with pytest.raises(ValueError, match=r"wants a key: set .* OPENAI_API_KEY"):
        chat.ask([request("a")], far, journal=None)
    with ChatServer(lambda asked: "yes") as server:
        (reply,) = chat.ask([request("a")], config(server), journal=None)
    assert reply.text == "yes"
    for url, local in (("http://localhost:1/v1", True), ("http://[::1]:1/v1", True)):
        assert client.is_loopback(url) == local
    assert not client.is_loopback("http://127.0.0.1.example/v1")


def test_no_server_is_a_failure_that_says_so():
    cfg = chat.ChatConfig(base_url="http://127.0.0.1:9/v1", model="any", max_tries=2)
    (failure,) = chat.ask([request("a")], cfg, journal=None)
    assert not failure.reached and "http://127.0.0.1:9/v1" in failure.reason
    with pytest.raises(
        OSError, match=r"127\.0\.0\.1:9/v1 was not reached for 32 requests in a row"
    ):
        chat.ask([request(i) for i in range(1000)], cfg, journal=None)


@pytest.mark.parametrize(
    "more, match",
    [
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"base_url": "https://me:secret@models.example/v1"}, "holds more than an address"),
        ({"base_url": "https://models.example/v1?key=secret"}, "holds more than an address"),
        ({"timeout_s": 0}, "timeout_s=0 must be positive"),
        ({"requests_per_minute": -1}, "requests_per_minute=-1 must be 0 or more"),
    ],
)
def test_a_config_that_cannot_be_is_refused(more, match):
    with pytest.raises(ValueError, match=match) as caught:
        chat.ChatConfig(**more)
    assert "secret" not in str(caught.value)


def test_json_may_stand_in_a_block():
    assert chat.json_of('```json\n{"n": 1}\n```') == chat.json_of('{"n": 1}') == {"n": 1}
    with pytest.raises(ValueError):
        chat.json_of('of course: {"n": 1}')
