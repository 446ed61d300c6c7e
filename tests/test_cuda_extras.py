"""benchmarks/cuda_extras.py: what a wheel installs, who shares a file (tiny wheels, offline)."""

import functools
import http.server
import importlib.util
import re
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "cuda_extras.py"
spec = importlib.util.spec_from_file_location("cuda_extras", SCRIPT)
assert spec and spec.loader
cuda_extras = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cuda_extras)


def make_wheel(folder: Path, name: str, files: dict[str, str], requires: str = "", version="1.0"):
    info = f"{name}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}"
    about = "Wheel-Version: 1.0\nGenerator: hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = files | {f"{info}/METADATA": metadata, f"{info}/WHEEL": about}
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.mkdir(f"{name}_empty")  # a folder is not a file that is installed
        for entry, text in files.items():
            wheel.writestr(entry, text)
    return path


@pytest.fixture
def wheels(tmp_path):
    """Two packages that share one file of each kind."""
    one = {
        "nvidia/__init__.py": "",
        "nvidia/lib/libcudnn.so.9": "for CUDA 12",
        "nvidia/lib/LICENSE": "same",
        "build_backend.py": "one",
        "space/__init__.py": "one",
        "only_one.py": "",
        "one-1.0.dist-info/entry_points.txt": "[console_scripts]\nserve = one:main\nRun = one:f\n",
        "one-1.0.data/platlib/nvidia/lib/libnccl.so.2": "nccl 1",
        "one-1.0.data/scripts/tool": "#!python\n",
        "one-1.0.data/data/share/one.txt": "",
        "one-1.0.data/headers/one.h": "",
    }
    two = {
        "nvidia/__init__.py": "",
        "nvidia/lib/libcudnn.so.9": "for CUDA 13",
        "nvidia/lib/LICENSE": "same",
        "nvidia/lib/libnccl.so.2": "nccl 2",
        "build_backend.py": "two",
        "space/__init__.py": "two",
        "two-1.0.dist-info/entry_points.txt": "[console_scripts]\nserve = two:main\n",
        "two-1.0.data/data/bin/tool": "other",
    }
    return {
        "one": make_wheel(tmp_path, "one", one),
        "two": make_wheel(tmp_path, "two", two, "Requires-Dist: one\n"),
    }


def test_collisions_are_sorted_by_harm(wheels):
    files = {name: cuda_extras.wheel_files(path.as_uri()) for name, path in wheels.items()}
    both = ("one", "two")
    assert cuda_extras.collisions(files) == {
        ("different bytes", both): [
            "PREFIX/bin/serve",
            "PREFIX/bin/tool",
            "nvidia/lib/libcudnn.so.9",
            "nvidia/lib/libnccl.so.2",
        ],
        ("different `__init__.py`", both): ["space/__init__.py"],
        ("known slip", both): ["build_backend.py"],
        ("equal bytes", both): ["nvidia/lib/LICENSE"],
        ("equal `__init__.py`", both): ["nvidia/__init__.py"],
    }
    assert cuda_extras.collisions({"one": files["one"]}) == {}


def test_wheel_files_are_those_that_pip_writes(wheels, tmp_path):
    prefix = tmp_path / "prefix"
    pip = [sys.executable, "-m", "pip", "install", "--no-index", "--no-deps", "--no-compile"]
    subprocess.run(
        [*pip, "--ignore-installed", "-q", f"--prefix={prefix}", wheels["one"]], check=True
    )
    written = {f"PREFIX/{x.relative_to(prefix)}" for x in prefix.rglob("*") if x.is_file()}
    # pip's headers folder holds the Python version, and these files only say how it was installed.
    written = {re.sub(r"include/site/python3\.\d+/", "include/", x) for x in written}
    written = {re.sub(r"PREFIX/lib/python3\.\d+/site-packages/", "", x) for x in written}
    written -= {f"one-1.0.dist-info/{x}" for x in ("INSTALLER", "REQUESTED", "direct_url.json")}
    assert set(cuda_extras.wheel_files(wheels["one"].as_uri())) == written


class RangeServer(http.server.SimpleHTTPRequestHandler):
    """Serves a folder; understands one Range, as package indexes do, and counts the bytes sent."""

    sent_bytes = 0

    def do_GET(self):
        data = Path(self.translate_path(self.path)).read_bytes()
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start = int(first) if first else max(len(data) - int(last), 0)
        part = data[start : int(last) + 1] if first else data[start:]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{start + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        RangeServer.sent_bytes += len(part)

    def log_message(self, *args):
        pass


class PlainServer(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.mark.parametrize("handler", [RangeServer, PlainServer])
def test_a_wheel_over_http_is_read_as_from_disk(handler, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_extras, "TAIL_BYTES", 2**10)  # the list must not fit, to seek too
    files = {f"big/{i}.bin": "x" * 10_000 for i in range(100)}
    files["big-1.0.dist-info/entry_points.txt"] = "[console_scripts]\nserve = big:main\n"
    wheel = make_wheel(tmp_path, "big", files)
    serve = functools.partial(handler, directory=tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/{wheel.name}"
        got = cuda_extras.wheel_files(url)
        server.shutdown()
    assert got == cuda_extras.wheel_files(wheel.as_uri())
    assert len(got) == 105  # 100 files, 4 of dist-info, 1 script
    if handler is RangeServer:
        assert RangeServer.sent_bytes < wheel.stat().st_size / 10


@pytest.fixture
def offline(wheels, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))


def test_resolve_follows_dependencies(offline, wheels):
    got = cuda_extras.resolve(["two"], None)
    assert got == {name: ("1.0", path.as_uri()) for name, path in wheels.items()}


def test_resolve_says_what_contradicts(offline, tmp_path):
    pins = tmp_path / "pins.txt"
    pins.write_text("one==2.0\n")
    with pytest.raises(ValueError, match=r"pip finds no set.*one==2\.0"):
        cuda_extras.resolve(["two"], pins)


def test_resolve_refuses_a_cpu_build(offline, tmp_path):
    make_wheel(tmp_path, "kernels", {}, version="9.0+cpu")
    with pytest.raises(ValueError, match=r"kernels 9\.0\+cpu, a CPU build"):
        cuda_extras.resolve(["kernels"], None)


def test_cases_are_the_extras_of_the_project():
    cases = cuda_extras.cases(ROOT / "pyproject.toml")
    gpu_parts = {
        name: sorted(x.split(">")[0] for x in lines if re.match(r"vllm|jax\[", x))
        for name, lines in cases.items()
    }
    assert gpu_parts == {
        "cuda12": ["jax[cuda12]"],
        "cuda12 engine": ["vllm==0.32.0"],
        "cuda13": ["jax[cuda13]", "vllm==0.32.0"],
        "cuda12 + vllm": ["jax[cuda12]", "vllm==0.32.0"],
    }
