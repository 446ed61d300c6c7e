"""Peak memory of a command, summed over all processes that it starts.

    python benchmarks/peak_memory.py -- make demo

Twice a second the proportional set sizes (a shared page counts once, split over its users) of the
whole process tree are added up; the largest sum is printed, with the command's time.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

PERIOD_S = 0.5


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    command = parser.parse_args().command
    command = command[1:] if command[:1] == ["--"] else command
    if not command:
        sys.exit("peak_memory: name a command, e.g. -- make demo")
    started_s, peak_bytes = time.monotonic(), 0
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            peak_bytes = max(peak_bytes, sum(map(pss_bytes, tree(process.pid))))
            time.sleep(PERIOD_S)
    minutes = (time.monotonic() - started_s) / 60
    print(
        f"peak {peak_bytes / 2**30:.2f} GiB, {minutes:.1f} min, {os.cpu_count()} cores: {command}"
    )
    sys.exit(process.returncode)


def tree(pid: int) -> list[int]:
    """Returns the process and all its living descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
        children.setdefault(parent, []).append(int(entry.parent.name))
    found = [pid]
    for process in found:  # grows while it is read
        found += children.get(process, [])
    return found


def pss_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


if __name__ == "__main__":
    main()
