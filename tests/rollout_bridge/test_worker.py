"""The worker process: what happens when one side dies, and that nothing is left behind.

What it computes is tested in test_vllm_engine.py and test_weight_sync.py, on every kind of engine.
"""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from tiny_qwen2 import (
    BANNED,
    CFG,
    ROOT,
    STOP,
    assert_same,
    child,
    fresh_prompt,
    greedy,
    named_weights,
    sample,
)

import rollout_bridge
from rollout_bridge.worker import WorkerEngine, _cpu_binding, _gpus, _visible_gpus

HANG_S = 120  # longer than anything here takes; only a hang reaches it
SETTINGS = {"seed": 0, "banned_tokens": BANNED, "stop_tokens": STOP}


def tree(pid: int) -> set[int]:
    """pid and all processes below it."""
    found, todo = {pid}, [pid]
    while todo:
        pid = todo.pop()
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            with contextlib.suppress(OSError):
                new = {int(word) for word in task.read_text().split()} - found
                found |= new
                todo += new
    return found


def shared_memory_of(pids: set[int]) -> set[Path]:
    """Named files of shared memory that the processes have open or mapped."""
    paths = set()
    for pid in pids:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            name = line.split(maxsplit=5)[-1].removesuffix(" (deleted)")
            paths |= {Path(name)} if name.startswith("/dev/shm/") else set()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                name = os.readlink(link).removesuffix(" (deleted)")
                paths |= {Path(name)} if name.startswith("/dev/shm/") else set()
    return paths


def is_running(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    return False


def wait_until_gone(pids: set[int]) -> None:
    start = time.monotonic()
    while alive := {pid for pid in pids if is_running(pid)}:
        assert time.monotonic() - start < HANG_S, f"{alive} still run"
        time.sleep(0.1)


def start_worker(checkpoints, tensor_parallel=1, **settings) -> WorkerEngine:
    cfg = dataclasses.replace(CFG, process="worker", tensor_parallel=tensor_parallel)
    return WorkerEngine(checkpoints["tied", 0], cfg=cfg, **SETTINGS, **settings)


def test_a_worker_killed_while_it_starts_is_named(checkpoints):
    engine = start_worker(checkpoints, wait=False)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(
        RuntimeError, match=rf"pid {engine.pid}\) died in start with signal SIGKILL"
    ):
        engine.wait_ready()
    engine.close()


@pytest.mark.slow
def test_an_engine_that_cannot_start_says_why_and_leaves_no_process(checkpoints, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(
        (checkpoints["tied", 0] / "model.safetensors").read_bytes()
    )
    (tmp_path / "config.json").write_text('{"model_type": "no_such_model"}')
    cfg = dataclasses.replace(CFG, process="worker")
    before = tree(os.getpid())
    with pytest.raises(ValueError, match="(?s)rollout worker 0 on .*, in start: .*no_such_model"):
        rollout_bridge.make_engines(tmp_path, cfg, seed=0)
    assert tree(os.getpid()) <= before


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_worker_killed_while_it_generates_is_named_and_leaves_nothing(
    checkpoints, tensor_parallel
):
    engine = start_worker(checkpoints, tensor_parallel)
    processes = tree(engine.pid)
    assert len(processes) >= (1 if tensor_parallel == 1 else 3)
    shared = shared_memory_of(processes)
    threading.Timer(1.0, os.kill, [engine.pid, signal.SIGKILL]).start()
    with pytest.raises(
        RuntimeError, match=rf"pid {engine.pid}\) died in generate with signal SIGKILL"
    ):
        while True:  # until the signal hits
            sample(engine, [fresh_prompt(300)] * 4, num_samples=8, max_tokens=200)
    with pytest.raises(RuntimeError, match="died in generate with signal SIGKILL"):
        sample(engine, [fresh_prompt(3)])
    with pytest.raises(RuntimeError, match="died in start_sync"):
        engine.sync(named_weights(checkpoints["tied", 0]), version=1)
    wait_until_gone(processes)
    engine.close()
    engine.close()
    assert not {path for path in shared if path.exists()}


@pytest.mark.slow
def test_a_killed_rank_of_two_gives_an_error(checkpoints):
    engine = start_worker(checkpoints, 2)
    processes = tree(engine.pid)
    shared = shared_memory_of(processes)
    assert any(path.exists() for path in shared)
    (rank, *_) = [
        pid
        for pid in processes - {engine.pid}
        if "VLLM" in Path(f"/proc/{pid}/comm").read_text().upper()
    ]
    os.kill(rank, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="rollout worker 0"):
        sample(engine, [fresh_prompt(3)])
    engine.close()
    wait_until_gone(processes)
    assert not {path for path in shared if path.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_two_worker_replicas_answer_as_one_and_leave_nothing(checkpoints, inline, tensor_parallel):
    cfg = dataclasses.replace(CFG, process="worker", replicas=2, tensor_parallel=tensor_parallel)
    engines = rollout_bridge.make_engines(checkpoints["tied", 0], cfg, **SETTINGS)
    processes = set.union(*(tree(engine.pid) for engine in engines))
    prompts = [fresh_prompt(n) for n in (10, 140, 30, 131, 50)]
    settings = {"num_samples": 3, "temperature": 1.0, "max_tokens": 12, "seeds": [1, 20, 3, 40, 5]}
    for version in (0, 1):
        for group in (engines, [inline]):
            rollout_bridge.sync_all(
                group, iter(named_weights(checkpoints["tied", version])), version
            )
        got = rollout_bridge.generate_all(engines, prompts, **settings)
        assert_same(got, rollout_bridge.generate_all([inline], prompts, **settings))
    queries = [engine.prefix_cache_stats()["queries"] for engine in engines]
    assert queries == [2 * 3 * (10 + 30 + 50), 2 * 3 * (140 + 131)]
    shared = shared_memory_of(processes)
    for engine in engines:
        engine.close()
    wait_until_gone(processes)
    assert not {path for path in shared if path.exists()}


LEARNER = """
import dataclasses, sys, time
import numpy as np
from tiny_qwen2 import CFG, sample
from longrl_jax.platform import prepare_vllm
from rollout_bridge.worker import WorkerEngine
prepare_vllm(CFG)
cfg = dataclasses.replace(CFG, process="worker", tensor_parallel=int(sys.argv[2]))
engine = WorkerEngine(sys.argv[1], cfg=cfg, seed=0)
assert "vllm" not in sys.modules
sample(engine, [np.arange(5)])
sys.stdout.write(f"{engine.pid}\\n")
sys.stdout.flush()
time.sleep(600)
"""


@pytest.mark.slow
@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_a_worker_ends_when_its_learner_is_killed(checkpoints, tensor_parallel):
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    learner = subprocess.Popen(
        [sys.executable, "-c", LEARNER, str(checkpoints["tied", 0]), str(tensor_parallel)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    worker = int(learner.stdout.readline())
    processes = tree(worker)
    shared = shared_memory_of(processes | {learner.pid})
    learner.kill()
    learner.wait()
    wait_until_gone(processes)
    assert not {path for path in shared if path.exists()}


def test_importing_the_bridge_loads_neither_vllm_nor_torch():
    code = """
import sys
import rollout_bridge
from rollout_bridge import worker
assert not {"vllm", "torch", "transformers"} & set(sys.modules)
"""
    done = child(code)
    assert done.returncode == 0, done.stderr


def test_ranks_get_cores_of_their_own_where_there_are_enough(monkeypatch):
    def bind(num_cores, replica=0, **changes):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(num_cores)))
        cfg = dataclasses.replace(CFG, process="worker", **changes)
        return _cpu_binding(cfg, replica)

    assert bind(2, tensor_parallel=2) == "0|1"
    assert bind(5, tensor_parallel=2) == "0,1|2,3"
    assert bind(8, tensor_parallel=2, replicas=2) == "0,1|2,3"
    assert bind(8, replica=1, tensor_parallel=2, replicas=2) == "4,5|6,7"
    assert bind(2, replica=1, tensor_parallel=2, replicas=2) == "0|1"  # shared: too few
    assert bind(1, tensor_parallel=2) == "nobind"


def test_a_request_error_leaves_the_worker_running(make_engine):
    engine = make_engine("worker", "tied", 0)
    pid = engine.pid
    with pytest.raises(ValueError, match="rollout.max_model_len"):
        greedy(engine, [np.zeros(600, np.int32)])
    assert greedy(engine, [fresh_prompt(8)])
    assert engine.pid == pid


def test_an_error_of_the_worker_brings_its_trace(make_engine, checkpoints):
    """Begun behind the learner's back, a push makes the worker itself refuse to generate."""
    engine = make_engine("worker", "tied", 0)
    engine._call("start_sync")
    with pytest.raises(
        rollout_bridge.EngineError, match="in generate: a push to .*broke"
    ) as caught:
        sample(engine, [fresh_prompt(3)])
    (note,) = caught.value.__notes__
    assert note.startswith(f"trace of the worker (pid {engine.pid}):\nTraceback (most recent")
    line = (
        r'File ".*/rollout_bridge/vllm_engine\.py", line \d+, in generate\n\s+raise EngineError\('
    )
    assert re.search(line, note)
    assert note.splitlines()[-1].startswith("rollout_bridge.engines.EngineError: a push to ")
    engine.sync(named_weights(checkpoints["tied", 0]), version=0)
    with pytest.raises(ValueError, match="in generate: 0 prompts but 1 seeds") as refused:
        settings = {"num_samples": 1, "temperature": 1.0, "max_tokens": 1, "seeds": [0]}
        engine._call("generate", engine._shared.path, engine._shared.write([]), [], settings)
    assert "check_request(" in refused.value.__notes__[0]
    assert sample(engine, [fresh_prompt(3)])


def test_replicas_get_gpus_of_their_own(monkeypatch):
    cfg = dataclasses.replace(CFG, process="worker", tensor_parallel=2, replicas=2)
    assert [_gpus(cfg, replica, ["4", "5", "6", "7"]) for replica in (0, 1)] == [
        ["4", "5"],
        ["6", "7"],
    ]
    assert _gpus(cfg, 1, []) == []
    with pytest.raises(ValueError, match="more GPUs than the 3 visible ones"):
        _gpus(cfg, 0, ["0", "1", "2"])
    for value, want in (("", []), ("-1", []), ("2,3", ["2", "3"])):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
        assert _visible_gpus() == want


def test_an_interpreter_that_is_not_there_is_named(checkpoints):
    cfg = dataclasses.replace(CFG, process="worker", python="no/such/python")
    with pytest.raises(ValueError, match=r"rollout\.python='no/such/python' cannot be started"):
        WorkerEngine(checkpoints["tied", 0], cfg=cfg, **SETTINGS)


@pytest.mark.slow
def test_a_worker_runs_in_the_environment_that_the_config_names(checkpoints, tmp_path):
    """A link to this interpreter, in an environment that sees the same packages."""
    other = tmp_path / "python"
    other.write_text(
        f'#!/bin/sh\necho "$0" >> "{tmp_path}/started"\nexec "{sys.executable}" "$@"\n'
    )
    other.chmod(0o755)
    cfg = dataclasses.replace(CFG, process="worker", python=str(other))
    engine = WorkerEngine(checkpoints["tied", 0], cfg=cfg, **SETTINGS)
    try:
        assert sample(engine, [fresh_prompt(9)])[0][0].tokens.size
    finally:
        engine.close()
    assert (tmp_path / "started").read_text().strip() == str(other)
