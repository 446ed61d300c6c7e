"""The import hook that lets a CUDA build of torchvision stand beside a CPU build of torch."""

import sysconfig
from pathlib import Path

import pytest
from tiny_qwen2 import child

from rollout_bridge import torchvision_shim

NAMES = {"_torchvision_shim.pth", "_torchvision_shim.py"}


def test_this_environment_imports_torchvision_transformers_and_vllm():
    code = """
import torchvision, torch
from torchvision.transforms.v2 import functional
assert functional.resize(torch.zeros(3, 8, 8), [4, 4]).shape == (3, 4, 4)
from transformers import Qwen2ForCausalLM, SiglipVisionModel
import vllm
"""
    done = child(code)
    assert done.returncode == 0, done.stderr


def run_main(action: str, folder: Path, capsys) -> str:
    torchvision_shim.main([action, "--site-packages", str(folder)])
    return capsys.readouterr().out


def test_install_and_remove_write_and_delete_two_files(tmp_path, capsys):
    other = tmp_path / "other.py"
    other.write_text("")
    for _ in range(2):  # a second call changes nothing
        assert str(tmp_path) in run_main("install", tmp_path, capsys)
        assert {path.name for path in tmp_path.iterdir()} == NAMES | {"other.py"}
    for _ in range(2):
        assert "remove" in run_main("remove", tmp_path, capsys)
        assert [path.name for path in tmp_path.iterdir()] == ["other.py"]


def test_a_python_of_that_folder_carries_the_hook(tmp_path):
    """-S skips this environment's .pth files; site.addsitedir then reads those of the folder."""
    packages = sysconfig.get_paths()["purelib"]
    code = """
import site, sys
sys.path.append(sys.argv[2])
site.addsitedir(sys.argv[1])
hooked = any(type(f).__module__ == "_torchvision_shim" for f in sys.meta_path)
assert "torch" not in sys.modules
try:
    import torchvision
    result = "imports"
except RuntimeError as error:
    result = str(error)
sys.stdout.write(f"{hooked} {result}")
"""
    program = (
        "import subprocess, sys\n"
        f"sys.exit(subprocess.call([sys.executable, '-S', '-c', {code!r}, *sys.argv[1:]]))"
    )
    torchvision_shim.install(tmp_path)
    done = child(program, tmp_path, packages)
    assert done.stdout == "True imports", done.stderr
    torchvision_shim.remove(tmp_path)
    done = child(program, tmp_path, packages)
    assert done.stdout == "False operator torchvision::nms does not exist", done.stderr


def test_an_unknown_action_is_refused(capsys):
    with pytest.raises(SystemExit):
        torchvision_shim.main(["update"])
    assert "invalid choice: 'update'" in capsys.readouterr().err
