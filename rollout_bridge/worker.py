"""vLLM in a process of its own, behind the same methods as VllmEngine.

Prompts and weights travel through shared memory (one copy), everything else (names, shapes,
samples) through a socket pair. The learner's process imports neither vLLM nor torch.
`python -m rollout_bridge.worker FD` is the other end; WorkerEngine starts it.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from longrl_jax.config import RolloutConfig
from longrl_jax.types import Sample
from rollout_bridge import weight_sync
from rollout_bridge.engines import (
    EngineError,
    check_request,
    from_arrays,
    sync_all,
    to_arrays,
)
from rollout_bridge.weight_sync import Named, SharedFile

POLL_S = 0.5
"""How soon the death of the worker is noticed if its socket outlives it."""
EXIT_S = 20.0
"""How long a worker may take to close its engine before it is killed."""
ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "EngineError": EngineError}
"""What a worker's error becomes at the learner; it travels as texts, never as an object."""
Failure = dict[str, str]
"""Of a worker's error: type (a name in ERRORS), message, trace."""


class WorkerEngine:
    """An engine of cfg.tensor_parallel devices (on CPU: processes), owned by a worker process."""

    own_process = True

    def __init__(
        self,
        llm_dir: Path | str,
        *,
        cfg: RolloutConfig,
        seed: int,
        banned_tokens: Sequence[int] = (),
        stop_tokens: Sequence[int] = (),
        replica: int = 0,
        wait: bool = True,
    ):
        """Starts the worker; with wait=False, `wait_ready` must be called before anything else."""
        self.name = f"rollout worker {replica} on {llm_dir}"
        self.cfg = cfg
        self.version: int | None = 0
        self.shapes = weight_sync.expected_shapes(llm_dir)
        mine, theirs = socket.socketpair()
        with theirs:
            self._process = _start(cfg, replica, theirs.fileno())
        self._shared = SharedFile()
        self._connection = Connection(mine.detach())
        self._send("start", str(llm_dir), cfg, seed, tuple(banned_tokens), tuple(stop_tokens))
        if wait:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Waits until the model is loaded; once, after wait=False. Closes if that fails."""
        try:
            self._receive("start")
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        num_samples: int,
        temperature: float,
        max_tokens: int,
        seeds: Sequence[int],
    ) -> list[tuple[Sample, ...]]:
        """As VllmEngine.generate."""
        if self.version is None:
            raise EngineError(f"a push to {self.name} broke off: its weights are a mixture; sync")
        vocab, hidden = self.shapes[weight_sync.EMBEDDING]
        check_request(
            prompts,
            seeds,
            hidden_and_vocab=(hidden, vocab),
            max_model_len=self.cfg.max_model_len,
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        arrays, notes = to_arrays(prompts)
        rows = self._shared.write(arrays)
        settings = {
            "num_samples": num_samples,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "seeds": [int(seed) for seed in seeds],
        }
        samples = self._call("generate", self._shared.path, rows, notes, settings)
        self._shared.clear()
        return samples

    def sync(self, weights: Iterable[Named], version: int) -> None:
        """As VllmEngine.sync."""
        sync_all([self], weights, version)

    def start_sync(self) -> None:
        self.version = None
        self._call("start_sync")

    def load(self, layer: Sequence[Named]) -> None:
        rows = self._shared.write([array for _, array in layer])
        self._call("load_shared", self._shared.path, [name for name, _ in layer], rows)

    def finish_sync(self, version: int) -> None:
        self._call("finish_sync", version)
        self._shared.clear()
        self.version = version

    def prefix_cache_stats(self) -> dict[str, int]:
        """As VllmEngine.prefix_cache_stats."""
        return self._call("prefix_cache_stats")

    def close(self) -> None:
        """Ends the worker; a second call does nothing."""
        self._connection.close()  # the worker reads the end of the stream and closes its engine
        try:
            self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._shared.close()

    def _call(self, method: str, *args: Any) -> Any:
        self._send(method, *args)
        return self._receive(method)

    def _send(self, method: str, *args: Any) -> None:
        try:
            self._connection.send((method, args))
        except (BrokenPipeError, ConnectionResetError):
            self._raise_death(method)

    def _receive(self, method: str) -> Any:
        try:
            while not self._connection.poll(POLL_S):
                if self._process.poll() is not None and not self._connection.poll(0):
                    self._raise_death(method)
            failure, value = self._connection.recv()
        except (EOFError, ConnectionResetError):
            self._raise_death(method)
        if failure is not None:
            raise _error_of(failure, f"{self.name}, in {method}", pid=self.pid)
        return value

    def _raise_death(self, method: str) -> None:
        try:
            code = self._process.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        raise EngineError(
            f"{self.name} (pid {self.pid}) died in {method} with {how}; what it wrote is above. "
            "SIGKILL is most often the kernel's answer to too little memory: lower "
            "rollout.kv_cache_gib or rollout.max_model_len"
        ) from None


def _error_of(failure: Failure, where: str, *, pid: int) -> Exception:
    """Returns the learner's error for a worker's, with the worker's trace as its note."""
    error = ERRORS[failure["type"]](f"{where}: {failure['message']}")
    trace = failure["trace"].rstrip()
    error.add_note(f"trace of the worker (pid {pid}):\n{trace}")
    return error


def _start(cfg: RolloutConfig, replica: int, connection_fd: int) -> subprocess.Popen:
    python = cfg.python or sys.executable
    try:
        return subprocess.Popen(
            [python, "-m", "rollout_bridge.worker", str(connection_fd)],
            pass_fds=[connection_fd],
            env=_environment(cfg, replica),
            stdin=subprocess.DEVNULL,
        )
    except OSError as error:
        raise ValueError(
            f"rollout.python={cfg.python!r} cannot be started ({error.strerror}); name the "
            "interpreter of an environment that holds vllm"
        ) from None


def _environment(cfg: RolloutConfig, replica: int) -> dict[str, str]:
    """The learner's environment, and what only a worker needs."""
    env = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # this process is the engine's
        "JAX_PLATFORMS": "cpu",  # records come from a file that imports jax; no device is made
    }
    root, path = Path(__file__).parents[1], os.environ.get("PYTHONPATH")
    if not cfg.python or (root / "pyproject.toml").exists():  # else packages that are not its own
        env["PYTHONPATH"] = str(root) if not path else f"{root}{os.pathsep}{path}"
    if names := _gpus(cfg, replica, _visible_gpus()):
        env["CUDA_VISIBLE_DEVICES"] = ",".join(names)
    if cfg.tensor_parallel > 1:
        env["VLLM_CPU_OMP_THREADS_BIND"] = _cpu_binding(cfg, replica)
    return env


def _visible_gpus() -> list[str]:
    """GPUs that this process may use; none on a machine without."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [name for name in visible.split(",") if name not in ("", "-1")]
    return [str(i) for i, _ in enumerate(Path("/dev").glob("nvidia[0-9]*"))]


def _gpus(cfg: RolloutConfig, replica: int, visible: Sequence[str]) -> list[str]:
    """GPUs of a replica: the next tensor_parallel ones of the visible; none where there is none."""
    if visible and len(visible) < cfg.replicas * cfg.tensor_parallel:
        raise ValueError(
            f"rollout.replicas={cfg.replicas} times rollout.tensor_parallel={cfg.tensor_parallel} "
            f"wants more GPUs than the {len(visible)} visible ones"
        )
    return list(visible[replica * cfg.tensor_parallel : (replica + 1) * cfg.tensor_parallel])


def _cpu_binding(cfg: RolloutConfig, replica: int) -> str:
    """Cores of each tensor-parallel rank ("0,1|2,3"), or nobind where there are too few."""
    cores = sorted(os.sched_getaffinity(0))
    ranks = cfg.tensor_parallel
    if len(cores) >= ranks * cfg.replicas:
        share = len(cores) // cfg.replicas
        cores = cores[replica * share : (replica + 1) * share]
    if len(cores) < ranks:
        return "nobind"
    each = len(cores) // ranks
    return "|".join(",".join(map(str, cores[r * each : (r + 1) * each])) for r in range(ranks))


def _serve(connection: Connection) -> None:
    """Answers calls until the learner closes its end, or dies."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    from rollout_bridge.vllm_engine import VllmEngine

    engine: VllmEngine | None = None
    try:
        while True:
            method, args = connection.recv()
            reply: tuple[Failure | None, Any]
            try:
                if method == "start":
                    llm_dir, cfg, seed, banned, stop = args
                    engine = VllmEngine(
                        llm_dir, cfg=cfg, seed=seed, banned_tokens=banned, stop_tokens=stop
                    )
                    reply = None, None
                else:
                    assert engine is not None
                    reply = None, _answer(engine, method, args)
            except (ValueError, RuntimeError) as error:  # others end the process, with a trace
                kind = ValueError if isinstance(error, ValueError) else EngineError
                failure = {"type": kind.__name__, "message": str(error)}
                reply = failure | {"trace": traceback.format_exc()}, None
            connection.send(reply)
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the learner is gone
    finally:
        if engine is not None:
            engine.close()


def _end_with(learner_pid: int) -> None:
    """Ends a worker that is too busy to read that its learner is gone."""
    while os.getppid() == learner_pid:
        time.sleep(POLL_S)
    time.sleep(EXIT_S)
    os._exit(1)


def _answer(engine: Any, method: str, args: tuple[Any, ...]) -> Any:
    if method == "generate":
        path, rows, notes, settings = args
        return engine.generate(from_arrays(weight_sync.read(path, rows), notes), **settings)
    return getattr(engine, method)(*args)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
