"""longrl_jax.check: what it says when something is wrong, with things really wrong."""

import os
import time

import pytest

from longrl_jax.check import __main__ as check
from longrl_jax.check import loop, parts
from longrl_jax.check.parts import GIB, Setup

HANG_S = 300
DEAF = """
import rollout_bridge

def deaf(engines, weights, version):
    for engine in engines:
        engine.version = version

rollout_bridge.sync_all = deaf
"""
"""Of a sitecustomize.py: every push is lost."""


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    """Without what this process was given for its own 8 devices (conftest.py)."""
    for name in ("XLA_FLAGS", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)


def make_setup(folder, **changed) -> Setup:
    settings = {"folder": str(folder), "on_cpu": True, "num_devices": 2, "free_gib": 0.0}
    return Setup(**settings | changed)


def test_a_failure_is_named_and_what_does_not_need_it_goes_on(tmp_path, capsys):
    arguments = ["--cpu", "--devices", "2", "--free-gib", "1e6", "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="1 of 4 failed: machine"):
        check.main([*arguments, "--only", "machine", "collectives", "store"])
    said = capsys.readouterr().out
    assert said.count("PASS") == 3 and said.count("FAIL") == 1
    report = (tmp_path / "report.md").read_text()
    assert report.startswith("# longrl_jax check: 3 PASS, 1 FAIL, 0 SKIPPED")
    for words in (
        r"| machine | FAIL |",
        "GiB of memory are free, under --free-gib 1e+06**",
        "If it fails: end the processes that hold the memory",
        "- jax 0.10",  # what was measured before it failed
        "- all-to-all: right,",
        "--free-gib 1e6",  # the command
    ):
        assert words in report, words


def test_a_check_that_needs_a_failed_one_is_skipped(tmp_path, monkeypatch):
    """An unknown flag makes XLA end the process: nothing is raised, the log has its words."""
    monkeypatch.setenv("XLA_FLAGS", "--xla_no_such_flag=1")
    with pytest.raises(SystemExit, match="1 of 2 failed: devices"):
        check.main(["--cpu", "--devices=2", "--out", str(tmp_path), "--only", "collectives"])
    report = (tmp_path / "report.md").read_text()
    assert "its process ended with exit status 1" in report
    assert "Unknown flag" in report.partition("```")[2]
    assert "it needs what devices checks" in report


def test_a_hang_is_ended_and_said(tmp_path):
    result = check.run("devices", make_setup(tmp_path), limit_s=0.1)
    assert result.status == "FAIL" and result.reason == "no end within 0 s; it was ended"
    alive = [
        line
        for line in os.popen("ps -eo args").read().splitlines()
        if str(tmp_path) in line and "--child" in line
    ]
    assert not alive


def test_time_that_is_over_is_a_failure(tmp_path):
    with pytest.raises(SystemExit, match="1 of 1 failed"):
        check.main(["--cpu", "--minutes=0", "--out", str(tmp_path), "--only", "machine"])
    assert "not begun: the time (--minutes) was over" in (tmp_path / "report.md").read_text()


def test_without_a_gpu_it_says_so_and_tries_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no nvidia-smi
    with pytest.raises(SystemExit, match="1 of 14 failed: machine"):
        check.main(["--out", str(tmp_path)])
    report = (tmp_path / "report.md").read_text()
    assert "nvidia-smi finds no GPU" in report and report.count("no GPU was found") == 2 * 13


def test_gpus_are_read_from_what_nvidia_smi_says(tmp_path, monkeypatch):
    """Two lines as the driver's tool writes them (its manual: --format=csv,noheader,nounits)."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\n"
        "echo 'NVIDIA A100-SXM4-80GB, 550.54.15, 81920, 81000, 8.0'\n"
        "echo 'NVIDIA A100-SXM4-80GB, 550.54.15, 81920, 512, 8.0'\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    first, second = parts.gpus()
    assert first["name"] == "NVIDIA A100-SXM4-80GB" and second["memory.free"] == "512"
    setup = make_setup(tmp_path, on_cpu=False, gpu=first["name"], free_gib=72.0)
    said: list[str] = []
    with pytest.raises(ValueError, match=r"under --free-gib 72 are free on GPUs \[1\]"):
        parts.machine(setup, said.append)
    assert any("driver_version 550.54.15" in line for line in said)


@pytest.mark.parametrize(("used", "holds"), [(0.4, False), (0.6, True), (1.1, True), (1.3, False)])
def test_memory_is_judged_on_both_sides(used, holds):
    said: list[str] = []
    share = loop.MEMORY_SHARE[False]
    if holds:
        loop.judge_memory(10 * used * GIB, 10 * GIB, share, said.append)
    else:
        with pytest.raises(ValueError, match=f"{10 * used:.3f} GiB taken, 10.000 planned"):
            loop.judge_memory(10 * used * GIB, 10 * GIB, share, said.append)
    assert len(said) == 1


@pytest.mark.slow
def test_engines_that_do_not_start_or_hold_other_weights(tmp_path, monkeypatch):
    work = tmp_path / "work"
    work.mkdir()
    for name in ("media", "checkpoints"):
        assert check.run(name, make_setup(work), limit_s=HANG_S).status == "PASS"
    nowhere = str(tmp_path / "no_python")
    result = check.run("engine", make_setup(work, engine_python=nowhere), limit_s=HANG_S)
    assert result.status == "FAIL" and "rollout.python=" in result.reason
    assert "cannot be started" in result.reason
    # an environment without vllm: the worker's own trace is in the log
    bare = tmp_path / "python"
    bare.write_text('#!/bin/sh\nexec /usr/bin/env python3 -S "$@"\n')
    bare.chmod(0o755)
    result = check.run("engine", make_setup(work, engine_python=str(bare)), limit_s=HANG_S)
    assert result.status == "FAIL" and "died in start" in result.reason
    assert any("No module named" in line for line in result.log)
    (tmp_path / "sitecustomize.py").write_text(DEAF)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    started_s = time.monotonic()
    result = check.run("engine", make_setup(work), limit_s=HANG_S)
    assert time.monotonic() - started_s < HANG_S
    assert result.status == "FAIL" and "after push 1 greedy tokens lose" in result.reason
    report = check.report("command", make_setup(work), {"engine": result}, 1)
    assert "1 FAIL" in report and "greedy tokens lose" in report and "- push 1:" in report
