"""Checks the CUDA extras of pyproject.toml without a GPU and without installing anything.

Each case is resolved with `pip install --dry-run`; then the file lists of the wheels that pip chose
are compared: no installed file may belong to two packages (docs/design.md section 6). A list is
read from the end of a wheel by HTTP range requests; where a server refuses them, the wheel passes
through a temporary file. Names and versions are printed, never an address.

    python benchmarks/cuda_extras.py     # two to three minutes; exit 1 if an extra fails a check
"""

import argparse
import configparser
import datetime
import functools
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO

from tqdm import tqdm

ROOT = Path(__file__).parents[1]
TAIL_BYTES = 2**18  # holds the whole file list of most wheels, so one request is enough
MAIN_PACKAGES = re.compile(r"jax(lib|-cuda.*)?|torch|triton|vllm|nvidia-.*")
PROMISED = ("cuda12", "cuda12 engine", "cuda13")  # the other case says why cuda12 has no vllm
KINDS = (
    "different bytes",
    "different `__init__.py`",
    "known slip",
    "equal bytes",
    "equal `__init__.py`",
)
HARMFUL = KINDS[:2]
KNOWN_SLIPS = {  # path -> why it harms nobody that two packages write it
    "build_backend.py": "builds a wheel; neither they nor vllm import it",
}
Collisions = dict[tuple[str, tuple[str, ...]], list[str]]  # (kind, packages) -> paths


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pyproject", type=Path, default=ROOT / "pyproject.toml", metavar="FILE")
    parser.add_argument("--constraints", type=Path, metavar="FILE", help="pins for pip (its -c)")
    parser.add_argument(
        "--max-paths", type=int, default=3, metavar="N", help="paths shown for a pair of packages"
    )
    args = parser.parse_args()

    rows: list[tuple] = [("case", "packages", "files", *KINDS), ("---",) * 8]
    details: list[str] = []
    all_good = True
    for name, requirements in (bar := tqdm(cases(args.pyproject).items(), unit="case")):
        bar.set_description(f"{name}: pip resolves")
        try:
            packages = resolve(requirements, args.constraints)
        except ValueError as error:
            rows.append((name, f"FAILED: {error}", *[""] * 6))
            all_good &= name not in PROMISED
            continue
        wheels = tqdm(packages.items(), desc="reading file lists", unit="wheel", leave=False)
        files = {package: wheel_files(url) for package, (_, url) in wheels}
        found = collisions(files)
        counts = [sum(len(x) for (k, _), x in found.items() if k == kind) for kind in KINDS]
        rows.append((name, len(packages), sum(map(len, files.values())), *counts))
        details += [f"\n## {name}\n", main_versions(packages), *describe(found, args.max_paths)]
        all_good &= name not in PROMISED or not any(kind in HARMFUL for kind, _ in found)
    pip = _pip("--version").stdout.partition(" from")[0]
    print(
        f"{datetime.date.today()}, Python {platform.python_version()}, {platform.machine()}, {pip}."
    )
    print("The last five columns count the files that two packages write.\n")
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    print("\n".join(details))
    sys.exit(not all_good)


def cases(pyproject: Path) -> dict[str, list[str]]:
    """Returns the requirements of each environment; the engine's has no CUDA build of jax."""
    project = tomllib.loads(pyproject.read_text())["project"]
    base, extras = project["dependencies"], project["optional-dependencies"]
    vllm = [line for line in extras["cuda13"] if re.match(r"vllm\b", line)]
    return {
        "cuda12": base + extras["cuda12"],
        "cuda12 engine": base + vllm,
        "cuda13": base + extras["cuda13"],
        "cuda12 + vllm": base + extras["cuda12"] + vllm,
    }


def resolve(requirements: Sequence[str], constraints: Path | None) -> dict[str, tuple[str, str]]:
    """Returns name -> (version, address of the wheel), sorted by name.

    Raises ValueError with pip's reason, or if pip chose a CPU build.
    """
    options = ["--dry-run", "--ignore-installed", "--only-binary=:all:", "--use-feature=fast-deps"]
    options += ["--no-cache-dir", *(["-c", str(constraints)] if constraints else [])]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder, "report.json")
        done = _pip("install", *options, f"--report={report}", *requirements)
        if done.returncode:
            lines = [x.strip() for x in (done.stdout + done.stderr).splitlines()]
            reason = [x for x in lines if re.search(" depends on |user requested", x)]
            reason = reason or [x for x in lines if x.startswith("ERROR") and "://" not in x]
            raise ValueError("pip finds no set of versions: " + "; ".join(reason))
        found = json.loads(report.read_text())["install"]
    packages = {
        x["metadata"]["name"]: (x["metadata"]["version"], x["download_info"]["url"])
        for x in sorted(found, key=lambda x: x["metadata"]["name"].lower())
    }
    for name, (version, _) in packages.items():
        if version.endswith("+cpu"):
            raise ValueError(
                f"pip chose {name} {version}, a CPU build, which says nothing about a GPU machine; "
                "leave out the index that offers it (PIP_CONFIG_FILE=/dev/null, no PIP_FIND_LINKS)"
            )
    return packages


@functools.cache  # most wheels belong to several cases
def wheel_files(url: str) -> Mapping[str, int]:
    """Returns path -> CRC-32 of every file that installing this wheel writes.

    Paths are below site-packages, or begin with PREFIX/ (scripts, headers, data). Source: the
    binary distribution format, "The .data directory" and "Installing a wheel". A script that
    pip makes from an entry point has the CRC of what it calls. Compiled .pyc files are left out.
    """
    with open_wheel(url) as file, zipfile.ZipFile(file) as wheel:
        files = {_installed_path(x.filename): x.CRC for x in wheel.infolist() if not x.is_dir()}
        for entry in wheel.namelist():
            if re.fullmatch(r"[^/]+\.dist-info/entry_points\.txt", entry):
                files |= _entry_scripts(wheel.read(entry).decode())
    return files


def collisions(files: Mapping[str, Mapping[str, int]]) -> Collisions:
    """Finds the paths that several packages write, from package -> path -> CRC-32."""
    owners: dict[str, list[str]] = {}
    for package in sorted(files):
        for path in files[package]:
            owners.setdefault(path, []).append(package)
    found: Collisions = {}
    for path, packages in sorted(owners.items()):
        if len(packages) > 1:
            equal = len({files[package][path] for package in packages}) == 1
            found.setdefault((_kind(path, equal), tuple(packages)), []).append(path)
    return dict(sorted(found.items(), key=lambda item: (KINDS.index(item[0][0]), item[0][1])))


def main_versions(packages: Mapping[str, tuple[str, str]]) -> str:
    named = [f"{x} {version}" for x, (version, _) in packages.items() if MAIN_PACKAGES.fullmatch(x)]
    return ", ".join(named)


def describe(found: Collisions, max_paths: int) -> list[str]:
    lines = [
        "\nFiles that two packages write:\n" if found else "\nNo file belongs to two packages."
    ]
    for (kind, packages), paths in found.items():
        libraries_first = sorted(paths, key=lambda path: ".so" not in path)
        shown = ", ".join(f"`{path}`" for path in libraries_first[:max_paths])
        more = f", {len(paths) - max_paths} more" if len(paths) > max_paths else ""
        why = f": {KNOWN_SLIPS[paths[0]]}" if kind == "known slip" else ""
        lines.append(f"- {kind}: {len(paths)} of {' and '.join(packages)} ({shown}{more}){why}")
    return lines


def open_wheel(url: str) -> IO[bytes]:
    """Opens a wheel for random access and fetches only what is read, if the server allows."""
    request = urllib.request.Request(url, headers={"Range": f"bytes=-{TAIL_BYTES}"})
    with urllib.request.urlopen(request) as reply:
        if getattr(reply, "status", None) == 206:
            size_bytes = int(reply.headers["Content-Range"].rpartition("/")[2])
            return io.BufferedReader(_RangeFile(url, size_bytes, reply.read()), TAIL_BYTES)
        whole = tempfile.TemporaryFile()  # noqa: SIM115  # the caller closes it
        shutil.copyfileobj(reply, whole)
        return whole


class _RangeFile(io.RawIOBase):
    """A file behind an address; owns its position and the end that was fetched first."""

    def __init__(self, url: str, size_bytes: int, tail: bytes):
        self.url, self.size_bytes, self.tail, self.position = url, size_bytes, tail, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.position = offset + (0, self.position, self.size_bytes)[whence]
        return self.position

    def readinto(self, buffer) -> int:
        stop = min(self.position + len(buffer), self.size_bytes)
        in_tail = self.position - (self.size_bytes - len(self.tail))
        if stop <= self.position:
            return 0
        if in_tail >= 0:
            part = self.tail[in_tail : in_tail + stop - self.position]
        else:
            headers = {"Range": f"bytes={self.position}-{stop - 1}"}
            with urllib.request.urlopen(urllib.request.Request(self.url, headers=headers)) as reply:
                part = reply.read()
        buffer[: len(part)] = part
        self.position += len(part)
        return len(part)


def _installed_path(entry: str) -> str:
    found = re.fullmatch(r"([^/]+)-[^/]+\.data/([^/]+)/(.+)", entry)
    if not found:
        return entry
    package, scheme, rest = found.groups()
    if scheme in ("purelib", "platlib"):
        return rest
    folder = {"scripts": "bin/", "headers": f"include/{package}/", "data": ""}[scheme]
    site_packages = r"PREFIX/lib/python3\.\d+/site-packages/"  # data may reach into it
    return re.sub(site_packages, "", f"PREFIX/{folder}{rest}")


def _entry_scripts(text: str) -> dict[str, int]:
    parser = configparser.ConfigParser(delimiters=("=",), interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    parser.read_string(text)
    return {
        f"PREFIX/bin/{name}": zlib.crc32(target.encode())
        for section in ("console_scripts", "gui_scripts")
        if parser.has_section(section)
        for name, target in parser.items(section)
    }


def _kind(path: str, equal: bool) -> str:
    is_init = path.endswith("__init__.py")
    if equal:
        return "equal `__init__.py`" if is_init else "equal bytes"
    if path in KNOWN_SLIPS:
        return "known slip"
    return "different `__init__.py`" if is_init else "different bytes"


def _pip(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *args], capture_output=True, text=True)


if __name__ == "__main__":
    main()
