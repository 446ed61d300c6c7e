"""`python -m longrl_jax.train` as a person types it: what a mistake looks like."""

import subprocess
import sys

from longrl_jax import config


def train(cfg, tmp_path, *overrides):
    """Runs the command in a process of its own; cfg is written to a file first."""
    path = tmp_path / "experiment.yaml"
    path.write_text(config.to_yaml(cfg))
    command = [sys.executable, "-m", "longrl_jax.train", str(path), *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_a_mistake_is_one_line_and_its_folder_stays_free(configured, tmp_path):
    cfg = configured("tiny_cpu_grpo.yaml")
    done = train(cfg, tmp_path, "rewards={vide_qa: 1.0}")
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()
    assert "rewards='vide_qa' is unknown; choose one of free_text, judge, math_answer," in last[-2]
    assert "Traceback" not in done.stderr
    assert "Traceback" in (tmp_path / "run" / "error.txt").read_text()
    # the same command, corrected in this and wrong in another place: the folder is not locked
    done = train(cfg, tmp_path, "model.path=no/such/folder")
    assert "no/such/folder" in done.stderr and "another run" not in done.stderr
    # but a folder with steps in it is
    (tmp_path / "run" / "metrics.jsonl").write_text("{}\n")
    done = train(cfg, tmp_path)
    assert done.returncode == 1
    said = "holds another run: it was started with another model.path; choose another folder"
    assert said in done.stderr


def test_help_teaches():
    command = [sys.executable, "-m", "longrl_jax.train", "--help"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    for words in ("examples:", "metrics.jsonl", "rollout.num_samples: int = 8", "Answers drawn"):
        assert words in text
