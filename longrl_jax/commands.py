"""Commands and servers of this package, shown and run one after another: for demo and road."""

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from longrl_jax import scores

START_LIMIT_S = 600.0
"""A server that does not answer after so long has failed; vLLM needs 20 s on an idle laptop."""
STOP_LIMIT_S = 20.0
"""A server that was asked to end has so long, then it is killed."""


def run(module: str, *arguments: str) -> None:
    """Runs `python -m module arguments`; ends this process if that fails."""
    say(f"$ python -m {module} {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", module, *arguments], check=False)
    if done.returncode:
        sys.exit(f"python -m {module} failed with exit status {done.returncode}")


@contextlib.contextmanager
def serving(log: Path, module: str, *arguments: str) -> Iterator[str]:
    """Runs `python -m module arguments --port P`, P a free port, while the block lasts; yields
    its base_url once it answers. What it prints goes to `log`; all processes of its group end."""
    port = _free_port()
    command = [*arguments, "--port", str(port)]
    say(f"$ python -m {module} {shlex.join(command)} > {log} &")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", module, *command],
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # so that its children can be ended with it
        )
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait_for(server, url, f"python -m {module}", log)
        yield url
    finally:
        _end(server)


def shown(score: scores.Score) -> str:
    """Writes a score as percent with its interval."""
    text = f"{100 * (score['mean'] or 0.0):.1f} %"
    low, high = score["low"], score["high"]
    if low is not None and high is not None:
        text += f" ({100 * low:.1f} to {100 * high:.1f})"
    return text


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_for(server: subprocess.Popen, url: str, name: str, log: Path) -> None:
    limit_s = time.monotonic() + START_LIMIT_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # it is this machine
    while time.monotonic() < limit_s:
        if server.poll() is not None:
            sys.exit(f"{name} ended with exit status {server.returncode}; see {log}")
        with contextlib.suppress(OSError):
            opener.open(f"{url}/models", timeout=5).close()
            return
        time.sleep(0.5)
    sys.exit(f"{name} does not answer at {url} after {START_LIMIT_S:.0f} s; see {log}")


def _end(server: subprocess.Popen) -> None:
    """Ends a server and the processes of its group; waits for it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(STOP_LIMIT_S)
    with contextlib.suppress(ProcessLookupError):  # of vLLM, children may outlive it
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()
