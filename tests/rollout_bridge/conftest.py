"""One vLLM engine for each kind and checkpoint, shared by the tests here."""

import dataclasses

import pytest
from tiny_qwen2 import BANNED, CFG, STOP, named_weights, save_checkpoint

KINDS = [
    ("inline", "tied"),
    ("inline", "untied"),
    ("worker", "tied"),
    pytest.param(("worker_tp2", "tied"), marks=pytest.mark.slow),
    pytest.param(("worker_tp2", "untied"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """(tied or untied, version 0 or 1) -> folder."""
    root = tmp_path_factory.mktemp("qwen2")
    return {
        (head, version): save_checkpoint(
            root / f"{head}{version}", tied=head == "tied", seed=10 * version + len(head)
        )
        for head in ("tied", "untied")
        for version in (0, 1)
    }


@pytest.fixture(scope="session")
def make_engine(checkpoints):
    """Starts engines by (kind, head, version), once each, and closes them at the end."""
    started = {}

    def start(kind, head, version):
        if (kind, head, version) not in started:
            cfg = dataclasses.replace(
                CFG,
                process="inline" if kind == "inline" else "worker",
                tensor_parallel=2 if kind == "worker_tp2" else 1,
            )
            if kind == "inline":
                from rollout_bridge.vllm_engine import VllmEngine as Engine
            else:
                from rollout_bridge.worker import WorkerEngine as Engine
            started[kind, head, version] = Engine(
                checkpoints[head, version],
                cfg=cfg,
                seed=0,
                banned_tokens=BANNED,
                stop_tokens=STOP,
            )
        return started[kind, head, version]

    yield start
    for engine in started.values():
        engine.close()


@pytest.fixture(scope="session", params=KINDS, ids="-".join)
def kind_and_head(request):
    return request.param


@pytest.fixture
def head(kind_and_head):
    """tied or untied: the checkpoint of `engine`."""
    return kind_and_head[1]


@pytest.fixture
def engine(kind_and_head, make_engine, checkpoints):
    """An engine on checkpoint (head, 0), in this process, in another one, or in three."""
    kind, head = kind_and_head
    engine = make_engine(kind, head, 0)
    if engine.version != 0:  # what an earlier test left
        engine.sync(named_weights(checkpoints[head, 0]), version=0)
    return engine


@pytest.fixture
def inline(make_engine, checkpoints):
    """The inline engine on checkpoint (tied, 0)."""
    engine = make_engine("inline", "tied", 0)
    if engine.version != 0:
        engine.sync(named_weights(checkpoints["tied", 0]), version=0)
    return engine
