"""platform.prepare: which flags XLA gets, and when. One that it does not know ends a process."""

import os
import subprocess
import sys

import pytest

from longrl_jax import platform
from longrl_jax.config import MeshConfig

OVERLAP = "--xla_gpu_enable_latency_hiding_scheduler=true"


@pytest.fixture
def flags(monkeypatch):
    """Returns the flags that prepare leaves, on a machine that has as many devices as the mesh."""

    def prepared(mesh: MeshConfig, before: str = "") -> list[str]:
        monkeypatch.setenv("XLA_FLAGS", before)
        monkeypatch.setattr("jax.device_count", lambda: mesh.num_devices)
        platform.prepare(mesh)
        return os.environ["XLA_FLAGS"].split()

    return prepared


def test_gpus_that_share_work_get_the_flags_of_overlap(flags):
    assert flags(MeshConfig(seq=8)) == list(platform.OVERLAP_FLAGS)
    assert flags(MeshConfig()) == []
    assert OVERLAP not in flags(MeshConfig(seq=8, simulated=True))


def test_what_a_person_has_set_is_kept(flags):
    off = "--xla_gpu_enable_latency_hiding_scheduler=false"
    assert flags(MeshConfig(fsdp=8), before=off) == [off, platform.OVERLAP_FLAGS[1]]


def test_a_plan_compiles_with_the_flags_of_training(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "2")
    platform.prepare_to_compile(8)
    assert set(platform.OVERLAP_FLAGS) <= set(os.environ["XLA_FLAGS"].split())
    monkeypatch.setenv("XLA_FLAGS", "")
    platform.prepare_to_compile(1)  # as training on one GPU, which sends nothing
    assert OVERLAP not in os.environ["XLA_FLAGS"]


def test_the_installed_xla_knows_the_flags():
    """An unknown one would end this process; the CUDA plugin is of the same version of XLA."""
    flags = " ".join(platform.OVERLAP_FLAGS)
    done = subprocess.run(
        [sys.executable, "-c", "import jax; print(jax.device_count())"],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout.strip() == "1", done.stderr[-500:]
