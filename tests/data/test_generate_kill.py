"""A generation killed (kill -9) while a stage asks: the same command ends as if nothing was."""

import collections
import os
import signal
import subprocess
import sys

import generation
import pytest
from chat_server import ChatServer

STORY_TOKENS = 55
"""So few that the stage merge asks, too."""


def start(path):
    command = [sys.executable, "-m", "longrl_jax.data.generate", "all", str(path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process):
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err[-2000:]
    return out


@pytest.mark.slow
def test_kill_9_in_every_stage_loses_nothing_and_pays_nothing_twice(tmp_path):
    """The second request of every stage kills its process, which waits for it; of merge the first,
    since both films have the same story."""
    changes = {"merge": {"story_tokens": STORY_TOKENS}}
    with ChatServer(generation.answer) as server:
        folder = tmp_path / "clean"
        ended(start(generation.make(folder, server.base_url, **changes)))
        wanted, paid = generation.package(folder), server.num_paid
    stages = {generation.stage_of(asked) for asked in server.asked}
    assert stages == {*generation.STAGES, "merge"}

    killed: list[str] = []
    asked_of: collections.Counter[str] = collections.Counter()
    process: subprocess.Popen

    def answer(asked):
        stage = generation.stage_of(asked)
        asked_of[stage] += 1
        if stage not in killed and asked_of[stage] == (1 if stage == "merge" else 2):
            killed.append(stage)
            os.kill(process.pid, signal.SIGKILL)
        return generation.answer(asked)

    folder = tmp_path / "killed"
    with ChatServer(answer) as server:
        # one request at a time, so that what is in flight when it dies is one
        changes["servers"] = {
            "all": {"base_url": server.base_url, "model": "any", "concurrency": 1}
        }
        path = generation.make(folder, server.base_url, **changes)
        while True:
            process = start(path)
            process.communicate(timeout=120)
            if process.returncode == 0:
                break
            assert process.returncode == -signal.SIGKILL
        assert sorted(killed) == sorted(stages)
        assert paid <= server.num_paid <= paid + len(killed)  # in flight when it was killed
    assert generation.package(folder) == wanted


@pytest.mark.slow
def test_kill_9_between_stages_and_films(tmp_path):
    """Killed by the clock, wherever it stands then; two generations in one folder are refused."""
    with ChatServer(generation.answer) as server:
        folder = tmp_path / "clean"
        ended(start(generation.make(folder, server.base_url)))
        wanted, paid = generation.package(folder), server.num_paid
    with ChatServer(generation.answer) as server:
        folder = tmp_path / "killed"
        path = generation.make(folder, server.base_url)
        for number_of_files in range(2, 14, 3):
            process = start(path)
            while process.poll() is None:
                if len(list(folder.rglob("work/*/*.json"))) >= number_of_files:
                    process.kill()
            process.communicate()
        ended(start(path))
        assert server.num_paid <= paid + 4 * 4  # four kills, four requests in flight
    assert generation.package(folder) == wanted


@pytest.mark.slow
def test_a_second_generation_in_the_folder_is_refused(tmp_path):
    first: list[subprocess.Popen] = []

    def answer(asked):
        if not first:
            first.append(start(path))
            out, err = first[0].communicate(timeout=60)
            assert first[0].returncode == 1 and "in use by another generation" in err, (out, err)
        return generation.answer(asked)

    with ChatServer(answer) as server:
        path = generation.make(tmp_path, server.base_url, films=1)
        ended(start(path))
    assert first
