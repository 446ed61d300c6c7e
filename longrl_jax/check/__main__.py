"""Checks a machine part by part, in ten minutes, and writes a report to paste into an issue.

python -m longrl_jax.check                  # on a GPU node; `make check-gpu` installs first
python -m longrl_jax.check --cpu            # the same code on simulated devices, small
"""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl_jax.check import loop, parts
from longrl_jax.check.parts import Setup

EXACT = {"JAX_DEFAULT_MATMUL_PRECISION": "highest"}
"""For what is compared in float32: GPUs multiply in TF32 otherwise."""
LOG_LINES = 40
"""Of a failed check's log that stand in the report."""


@dataclasses.dataclass(frozen=True)
class Check:
    """A row of CHECKS."""

    run: Callable[..., None]
    limit_s: float
    """Longer, and it hangs: its processes are ended."""
    needs: tuple[str, ...] = ()
    """Checks without whose success this one says nothing."""
    variables: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Environment variables of its process."""


CHECKS: dict[str, Check] = {
    "machine": Check(parts.machine, 60),
    "devices": Check(parts.devices, 120),
    "collectives": Check(parts.collectives, 90, ("devices",)),
    "attention": Check(parts.attention, 150, ("devices",)),
    "media": Check(parts.media, 60),
    "store": Check(parts.store, 60),
    "checkpoints": Check(parts.checkpoints, 120, ("media",)),
    "engine": Check(loop.engine, 150, ("devices", "checkpoints"), EXACT),
    "engine_compiled": Check(
        loop.engine, 180, ("devices", "checkpoints"), EXACT | {"TORCHDYNAMO_DISABLE": "0"}
    ),
    "engine_2_ranks": Check(
        functools.partial(loop.engine, tensor_parallel=2), 150, ("engine",), EXACT
    ),
    "grpo_vila_float32": Check(
        functools.partial(loop.grpo, model="vila", dtype="float32"), 150, ("engine",), EXACT
    ),
    "grpo_qwen2_5_vl_bfloat16": Check(
        functools.partial(loop.grpo, model="qwen2_5_vl", dtype="bfloat16"), 150, ("engine",)
    ),
    "plan": Check(loop.plan, 120, ("checkpoints",)),
    "memory": Check(loop.memory, 180, ("engine",)),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """What is known of one check."""

    status: str
    """PASS, FAIL or SKIPPED."""
    reason: str
    """Of FAIL and SKIPPED."""
    seconds: float
    facts: tuple[str, ...] = ()
    log: tuple[str, ...] = ()
    """Last lines of what its process wrote."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the checks, writes OUT/report.md; exits with 1 where one failed."""
    args = _parser().parse_args(argv)
    if args.child:
        _child(*args.child)
        return
    out: Path = args.out
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)  # of an earlier check
    work.mkdir(parents=True)
    setup = _setup(args, work)
    names = _with_needs(args.only) if args.only else list(CHECKS)
    command = " ".join(["python -m longrl_jax.check", *map(shlex.quote, argv or sys.argv[1:])])
    results: dict[str, Result] = {}
    slow = 2 if args.cpu else 1
    deadline_s = time.monotonic() + 60 * slow * args.minutes
    try:
        for name in names:
            sys.stdout.write(f"{name:<28}")
            sys.stdout.flush()
            left_s = deadline_s - time.monotonic()
            limit_s = args.limit_s or slow * CHECKS[name].limit_s
            results[name] = _one(name, setup, results, min(limit_s, left_s))
            said = results[name].reason.splitlines() or [""]
            sys.stdout.write(
                f"{results[name].status:<8}{results[name].seconds:6.1f} s  {said[0]}\n"
            )
    finally:
        (out / "report.md").write_text(report(command, setup, results, len(names)))
    sys.stdout.write(f"report: {out / 'report.md'}\n")
    failed = [name for name, result in results.items() if result.status == "FAIL"]
    if failed:
        sys.exit(f"check: {len(failed)} of {len(names)} failed: {', '.join(failed)}")


def report(command: str, setup: Setup, results: Mapping[str, Result], wanted: int) -> str:
    """Returns the whole report as Markdown."""
    count = {s: sum(r.status == s for r in results.values()) for s in ("PASS", "FAIL", "SKIPPED")}
    said = ", ".join(f"{number} {status}" for status, number in count.items())
    if len(results) < wanted:
        said += f", {wanted - len(results)} not begun"
    lines = [
        f"# longrl_jax check: {said}",
        "",
        f"`{command}`, commit {_commit()}, {time.strftime('%Y-%m-%d %H:%M', time.gmtime())} UTC, "
        f"{setup.num_devices} x {setup.gpu or 'simulated CPU device'}",
        "",
        "| check | result | s | |",
        "|---|---|---|---|",
    ]
    for name, r in results.items():
        first = (r.reason.splitlines() or [""])[0].replace("|", "\\|")
        lines.append(f"| {name} | {r.status} | {r.seconds:.1f} | {first} |")
    for name, r in results.items():
        about, _, where = (inspect.getdoc(_function(name)) or "").partition("\n\n")
        lines += ["", f"## {name}: {r.status}", "", " ".join(about.split()), ""]
        lines += [f"- {fact}" for fact in r.facts]
        if r.status == "FAIL":
            first, *rest = r.reason.splitlines() or [""]
            words = [*rest, "last lines of its log:", *r.log]
            lines += ["", f"**{first}**", "", " ".join(where.split()), ""]
            lines += ["```", *(line.replace("```", "'''") for line in words), "```"]
        elif r.status == "SKIPPED":
            lines += ["", r.reason]
    return "\n".join(lines) + "\n"


def _one(name: str, setup: Setup, results: Mapping[str, Result], limit_s: float) -> Result:
    """Decides whether a check is made, and makes it."""
    check = CHECKS[name]
    if not setup.num_devices and name != "machine":
        return Result("SKIPPED", "no GPU was found", 0.0)
    lost = [n for n in check.needs if n in results and results[n].status != "PASS"]
    if lost:
        return Result("SKIPPED", f"it needs what {', '.join(lost)} checks", 0.0)
    if name == "engine_compiled" and results.get("engine", Result("", "", 0)).status == "PASS":
        return Result("SKIPPED", "only tried where the engine fails without torch.compile", 0.0)
    if limit_s < 1:
        return Result("FAIL", "not begun: the time (--minutes) was over", 0.0)
    return run(name, setup, limit_s=limit_s)


def run(name: str, setup: Setup, *, limit_s: float) -> Result:
    """Makes one check in a process of its own, which is ended with all its own when time is up."""
    facts_path, log_path = setup.path(f"{name}.jsonl"), setup.path(f"{name}.log")
    facts_path.touch()
    child = [name, json.dumps(dataclasses.asdict(setup)), str(facts_path)]
    started_s = time.monotonic()
    with log_path.open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "longrl_jax.check", "--child", *child],
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **CHECKS[name].variables},
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(process)
    seconds = time.monotonic() - started_s
    said = [json.loads(line) for line in facts_path.read_text().splitlines()]
    facts = tuple(text for kind, text in said if kind == "fact")
    ends = {kind: text for kind, text in said if kind != "fact"}
    tail = tuple(log_path.read_text(errors="replace").splitlines()[-LOG_LINES:])
    if code is None:
        return Result("FAIL", f"no end within {limit_s:.0f} s; it was ended", seconds, facts, tail)
    if code == 0:
        status = "SKIPPED" if "skipped" in ends else "PASS"
        return Result(status, ends.get("skipped", ""), seconds, facts, tail)
    how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    reason = ends.get("failed", f"its process ended with {how}")
    return Result("FAIL", reason, seconds, facts, tail)


def _end(process: subprocess.Popen) -> None:
    """Ends a check's process and those that it started (engines, decoders)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _child(name: str, setup: str, facts_path: str) -> None:
    """Makes one check here; every line is on the disk before the next is made."""
    with open(facts_path, "a", encoding="utf-8") as file:

        def write(kind: str, text: str) -> None:
            file.write(json.dumps([kind, text]) + "\n")
            file.flush()

        try:
            CHECKS[name].run(Setup(**json.loads(setup)), functools.partial(write, "fact"))
        except parts.Skip as skip:
            write("skipped", str(skip))
        except BaseException as error:
            text = str(error).strip()
            write("failed", text if isinstance(error, SystemExit) else _named(error, text))
            raise


def _named(error: BaseException, text: str) -> str:
    return text if type(error) is ValueError else f"{type(error).__name__}: {text}"


def _with_needs(names: Sequence[str]) -> list[str]:
    """Returns the checks, and those that they need, in the order of CHECKS."""
    found = set(names)
    for name in reversed(CHECKS):  # what a check needs stands before it
        found |= set(CHECKS[name].needs) if name in found else set()
    return [name for name in CHECKS if name in found]


def _function(name: str) -> Any:
    function = CHECKS[name].run
    return function.func if isinstance(function, functools.partial) else function


def _setup(args: argparse.Namespace, work: Path) -> Setup:
    found = [] if args.cpu else parts.gpus()
    least_gib = min((float(gpu["memory.total"]) for gpu in found), default=0.0) / 1024
    free_gib = args.free_gib or (args.cpu and 2.0) or 0.9 * least_gib
    python = args.engine_python
    return Setup(
        folder=str(work),
        on_cpu=args.cpu,
        num_devices=args.devices or (4 if args.cpu else len(found)),
        gpu=found[0]["name"] if found else "",
        engine_python=os.path.abspath(python) if python else "",
        free_gib=free_gib,
    )


def _commit() -> str:
    command = ["git", "-C", str(parts.ROOT), "describe", "--always", "--dirty"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return said.stdout.strip()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cpu", action="store_true", help="small, on simulated devices")
    parser.add_argument("--devices", type=int, default=0, help="default: all GPUs; 4 with --cpu")
    parser.add_argument(
        "--engine-python",
        default="",
        help="rollout.python: interpreter of vLLM's own environment (beside the cuda12 extra)",
    )
    parser.add_argument(
        "--free-gib",
        type=float,
        default=0.0,
        help="memory that must be free: of every GPU (default: 90 %% of it); with --cpu of this "
        "machine (default 2)",
    )
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="of all checks (default 10; --cpu doubles it)"
    )
    parser.add_argument(
        "--limit-s", type=float, default=0.0, help="of each check (default: its own)"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=list(CHECKS),
        metavar="CHECK",
        help="these, and what they need: " + ", ".join(CHECKS),
    )
    parser.add_argument("--out", type=Path, default=Path("runs/check_gpu"), help="folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    main()
