"""The journal of paid requests: nothing in it is lost, and nothing is paid for twice."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from chat_server import ChatServer, hang, text

from longrl_jax import chat
from longrl_jax.chat.journal import Journal, records

ROOT = Path(__file__).parents[2]
ASKER = """
import sys
from longrl_jax import chat
from pathlib import Path
base_url, journal, count, limit = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
if limit:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
requests = [
    chat.Request(messages=({"role": "user", "content": f"question {i}"},), max_tokens=9)
    for i in range(count)
]
cfg = chat.ChatConfig(base_url=base_url, model="any", concurrency=4)
try:
    replies = chat.ask(requests, cfg, journal=journal)
except (OSError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
print(*(reply.text for reply in replies), sep="\\n")
"""


def asker(server, journal, count=20, limit=0):
    """The command that asks so many questions in a process of its own."""
    return [sys.executable, "-c", ASKER, server.base_url, str(journal), str(count), str(limit)]


def run(*args, **more):
    return subprocess.run(asker(*args, **more), capture_output=True, text=True, cwd=ROOT)


def ask(server, journal, words=("a", "b", "c")):
    requests = [
        chat.Request(messages=({"role": "user", "content": word},), max_tokens=9) for word in words
    ]
    cfg = chat.ChatConfig(base_url=server.base_url, model="any")
    return [reply.text for reply in chat.ask(requests, cfg, journal=journal)]


def test_a_torn_last_line_is_cut_off_wherever_it_is_torn(tmp_path):
    journal = tmp_path / "j"
    words = ["snow \u2603 \ud83d", "b\nb", "c"]
    with ChatServer(lambda asked: f"{asked.text} \u0000 \U0001f3ac") as server:
        replies = ask(server, journal, words[:2])
        whole = journal.read_bytes()
        ask(server, journal, words)
        line = journal.read_bytes()[len(whole) :]
        before = server.num_asked
        for length in {*range(0, len(line), 37), len(line) - 1}:
            journal.write_bytes(whole + line[:length])
            assert chat.spent(journal).replies == 2
            assert ask(server, journal, words[:2]) == replies and server.num_asked == before
            assert journal.read_bytes() == whole
        ask(server, journal, words)
        assert server.num_asked == before + 1 and chat.spent(journal).replies == 3


def test_a_damaged_line_is_named(tmp_path):
    journal = tmp_path / "j"
    with ChatServer(lambda asked: asked.text) as server:
        ask(server, journal)
        lines = journal.read_bytes().splitlines(keepends=True)
        for place in range(0, len(lines[1]) - 1, 23):
            flipped = bytearray(lines[1])
            flipped[place] ^= 1
            journal.write_bytes(lines[0] + flipped + lines[2])
            with pytest.raises(ValueError, match=r"line 2 of the journal .*j is damaged"):
                ask(server, journal)
            with pytest.raises(ValueError, match="line 2"):
                chat.spent(journal)
        assert server.num_asked == 3
        journal.write_bytes(lines[0] + lines[2])  # what the message says
        ask(server, journal)
        assert server.num_asked == 4


def test_a_second_process_is_refused_by_name(tmp_path):
    journal = tmp_path / "j"
    with ChatServer(lambda asked: asked.text) as server:
        with Journal(journal):
            done = run(server, journal)
        assert done.returncode and f"the journal {journal} is in use by another" in done.stderr
        assert server.num_asked == 0
        assert run(server, journal).returncode == 0


def test_a_run_that_is_killed_goes_on_and_pays_nothing_twice(tmp_path):
    """Kills at another moment each time; the server holds replies back, so some are in flight."""
    journal = tmp_path / "j"
    count, kills = 24, 3
    came = threading.Semaphore(0)

    def answer(asked):
        came.release()
        return hang(0.02, f"to {asked.text}")

    with ChatServer(answer) as server:
        for _ in range(kills):
            process = subprocess.Popen(asker(server, journal, count), cwd=ROOT)
            for _ in range(7):
                came.acquire()
            process.send_signal(signal.SIGKILL)
            process.wait()
        kept = {record["key"] for record in records(journal)}
        done = run(server, journal, count)
        assert done.stdout.splitlines() == [f"to question {i}" for i in range(count)]
        assert kept and chat.spent(journal).replies == count
        # only what was in flight at a kill, at most `concurrency` requests, came again
        assert count <= server.num_paid <= count + 4 * kills
        before = server.num_asked
        assert run(server, journal, count).stdout == done.stdout and server.num_asked == before
        assert [r["key"] for r in records(journal)].count(next(iter(kept))) == 1


@pytest.mark.parametrize("kind", ["tmpfs", "limit"])
def test_a_full_disk_ends_it_and_loses_nothing_that_was_written(tmp_path, kind):
    """A disk of 64 KiB, as root; or a file that the system lets grow no further, as anybody."""
    folder, count, size = tmp_path / "disk", 40, 65536
    folder.mkdir()
    if kind == "tmpfs":
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
        if os.geteuid() or subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("only root may mount a small disk; the other case stands for it")
    journal = folder / "j"
    long = "word " * 500
    try:
        with ChatServer(lambda asked: text(f"{asked.text} {long}")) as server:
            limit = size if kind == "limit" else 0
            done = run(server, journal, count, limit)
            why = "No space left on device" if kind == "tmpfs" else "File too large"
            assert done.stderr.startswith("OSError")
            assert f"{journal} cannot be written" in done.stderr
            assert why in done.stderr and "what the journal holds is not asked" in done.stderr
            kept = list(records(journal))
            assert 10 < len(kept) < count and all(r["kind"] == "reply" for r in kept)
            if kind == "tmpfs":
                grow = ["mount", "-o", "remount,size=1m", str(folder)]
                subprocess.run(grow, check=True)
            paid = server.num_paid
            done = run(server, journal, count)
            assert len(done.stdout.splitlines()) == count
            assert server.num_paid == paid + count - len(kept)
            assert paid - len(kept) <= 4  # those that were in flight
            assert list(records(journal))[: len(kept)] == kept
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(folder)], check=True)


def test_what_replies_took_is_added_up(tmp_path):
    assert chat.spent(tmp_path / "none") == chat.Totals()
    usages = iter([True, False, True])
    with ChatServer(lambda asked: text("two words", usage=next(usages))) as server:
        ask(server, tmp_path / "j", ["one", "one two", "one two three"])
    totals = chat.spent(tmp_path / "j")
    seconds = sum(json.loads(x)["record"]["seconds"] for x in (tmp_path / "j").open())
    assert (totals.replies, totals.unmetered, totals.completion_tokens) == (3, 1, 4)
    assert totals.seconds == pytest.approx(seconds) and totals.usd == 0
