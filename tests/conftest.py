"""Test set-up: 8 simulated devices, exact matmuls, a compile cache, and a time budget for CI."""

import time
from pathlib import Path

import pytest

from longrl_jax.config import MeshConfig, RolloutConfig
from longrl_jax.platform import prepare

NUM_DEVICES = 8
COMPILE_CACHE = Path(__file__).parent.parent / "cache" / "jax"


def pytest_addoption(parser):
    parser.addoption(
        "--budget-s",
        type=float,
        default=0,
        help="start no test after so many seconds, and list those left out (0: no limit)",
    )


def pytest_configure(config):
    prepare(
        MeshConfig(seq=NUM_DEVICES, simulated=True),
        RolloutConfig(),
        compilation_cache=str(COMPILE_CACHE),
    )
    import jax

    jax.config.update("jax_default_matmul_precision", "highest")
    config.started_s = time.monotonic()
    config.left_out = []


def pytest_runtest_setup(item):
    budget_s = item.config.getoption("--budget-s")
    if budget_s and time.monotonic() - item.config.started_s > budget_s:
        item.config.left_out.append(item.nodeid)
        pytest.skip(f"left out: the budget of {budget_s:.0f} s is spent")


def pytest_terminal_summary(terminalreporter, config):
    if config.left_out:
        terminalreporter.section(f"left out for lack of time: {len(config.left_out)} tests")
        for name in config.left_out:
            terminalreporter.write_line(name)
