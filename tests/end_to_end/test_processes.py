"""Several processes, each with devices of its own, are one run: here two on one machine (gloo)."""

import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import killed_run
import numpy as np
import pytest
from safetensors.numpy import load_file

from longrl_jax import checkpoint, config, journal, rewards, run_folder, step
from longrl_jax.advantages import ADVANTAGES
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import make_mesh
from longrl_jax.stages import grpo, sampling, sft
from longrl_jax.stages import policy as opened

ROOT = Path(__file__).parents[2]
RTOL = 1e-5  # float32, sums in another order; measured 3e-7 in metrics, 4e-7 in parameters
MAX_GAP = 1e-4  # as in test_loop.py
TIMEOUT_S = 600
UNHURT = ("none", "0")  # arguments of killed_run.py
ONE_BY_EIGHT = "mesh={fsdp: 4, seq: 2, simulated: true}"


def start(cfg: config.Config, tmp_path: Path, script: str, *args: Sequence[str], slurm=False):
    """Starts a script of this folder, with the config, as both processes of a run.

    args: of each one. They are told where the other one is, or asked to find it in the variables
    that srun sets.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for process in range(2):
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # else 8 devices
        mesh = dataclasses.replace(cfg.mesh, processes=2)
        if slurm:
            environment |= {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "localhost"}
            environment |= {"SLURM_NTASKS": "2", "SLURM_PROCID": str(process)}
            environment |= {"SLURM_LOCALID": "0", "JAX_COORDINATOR_PORT": port}
        else:
            mesh = dataclasses.replace(mesh, process=process, coordinator=f"127.0.0.1:{port}")
        path = tmp_path / f"{Path(cfg.run.dir).name}_{process}.yaml"
        path.write_text(config.to_yaml(dataclasses.replace(cfg, mesh=mesh)))
        command = [sys.executable, str(Path(__file__).with_name(script)), str(path)]
        started.append(
            subprocess.Popen(
                [*command, *args[process]],
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                cwd=ROOT,
            )
        )
    return started


def finish(started, *, wanted: Sequence[int] = (0, 0)) -> list[str]:
    """Waits for all of them; returns what they said."""
    try:
        said = [process.communicate(timeout=TIMEOUT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text, code in zip(started, said, wanted, strict=True):
        assert process.returncode == code, f"{process.returncode}\n{text[-3000:]}"
    return said


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).open()]


def exported(folder: Path) -> dict[str, np.ndarray]:
    files = sorted((folder / "export").rglob("*.safetensors"))
    return {f"{f.parent.name}/{k}": x for f in files for k, x in load_file(f).items()}


@pytest.mark.slow
@pytest.mark.parametrize("adapters", ["model.lora_rank=0", "model.lora_rank=4"])
def test_two_processes_of_four_devices_learn_what_one_of_eight_does(configured, tmp_path, adapters):
    """In the last step process 0 has nothing: the film of its only prompt is none."""
    settings = (
        ONE_BY_EIGHT,
        "batch={groups: 2, max_row_tokens: 512, smallest_bucket: 64}",
        "run.num_steps=5",
        "data.validation=",
        "model.compute_dtype=float32",
        "optimizer={learning_rate: 0.001}",
        adapters,
    )
    one, two = (
        configured(
            "tiny_cpu_sft.yaml",
            *settings,
            f"run.dir={tmp_path / name}",
            f"store.path={tmp_path / name}_store",  # else the second run encodes nothing
        )
        for name in ("one", "two")
    )
    finish(start(two, tmp_path, "killed_run.py", UNHURT, UNHURT))
    sft.run(one)
    a, b = tmp_path / "one", tmp_path / "two"
    steps = lines(a), lines(b)
    assert [row["step"] for row in steps[1]] == [1, 2, 3, 4, 5]
    for want, got in zip(*steps, strict=True):
        media = {name for name in want if name.startswith("media/")}
        for name in media:  # a film that both need in this step may be encoded by both
            assert want[name] <= got[name] <= 2 * want[name], name
        others = {k for k in want if not k.startswith(("time/", "compilations"))} - media
        for name in others:
            np.testing.assert_allclose(got[name], want[name], rtol=RTOL, err_msg=name)
    assert sum(row["media/encoded_frames"] for row in steps[0]) > 0
    assert lines(a, "refused.jsonl") == lines(b, "refused.jsonl") != []
    assert [row["groups"] for row in steps[1]] == [2, 2, 2, 2, 1]
    tensors = exported(a), exported(b)
    assert tensors[0].keys() == tensors[1].keys()
    for name, want in tensors[0].items():
        # a bias of all keys shifts all scores nearly alike: its gradient is rounding, and Adam
        # makes a step of full length of it
        if not name.endswith("k_proj.bias"):
            assert np.linalg.norm(tensors[1][name] - want) <= RTOL * np.linalg.norm(want), name


@pytest.mark.slow
def test_two_processes_that_pack_their_own_examples_learn_what_one_does(configured, tmp_path):
    """Which examples share a row differs, what is learned does not."""
    one, two = (
        configured(
            "tiny_cpu_sft.yaml",
            "mesh={fsdp: 2, seq: 4, simulated: true}",
            "batch={groups: 8, max_row_tokens: 512, smallest_bucket: 64, pack: true}",
            "data.validation=",
            "optimizer={learning_rate: 0.001}",
            f"run.dir={tmp_path / name}",
            f"store.path={tmp_path / name}_store",
        )
        for name in ("one", "two")
    )
    finish(start(two, tmp_path, "killed_run.py", UNHURT, UNHURT))
    sft.run(one)
    a, b = tmp_path / "one", tmp_path / "two"
    for want, got in zip(lines(a), lines(b), strict=True):
        for name in ("loss", "grad_norm", "tokens", "groups", "refused"):
            np.testing.assert_allclose(got[name], want[name], rtol=RTOL, err_msg=name)
        assert min(want["pack/examples_per_row"], got["pack/examples_per_row"]) > 1.5
    tensors = exported(a), exported(b)
    for name, want in tensors[0].items():
        if not name.endswith("k_proj.bias"):  # as above
            assert np.linalg.norm(tensors[1][name] - want) <= RTOL * np.linalg.norm(want), name


@pytest.mark.slow
def test_a_checkpoint_of_one_layout_is_read_by_another(configured, tmp_path):
    """8 devices -> 4 -> 2 processes of 4 -> 8, bit for bit."""
    cfg = configured("tiny_cpu_sft.yaml", ONE_BY_EIGHT)
    policy, state = opened.open_policy(cfg)
    optimizer = make_optimizer(cfg.optimizer, 10)
    grads = jax.tree.map(lambda x: jax.numpy.cos(x * 1e3), state.params)  # each number its own
    _, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = dataclasses.replace(state, opt_state=opt_state, step=state.step + 7)
    want = [np.asarray(x) for x in trained(state)]
    eight = checkpoint.save(tmp_path / "eight" / "checkpoints", state, step=1, about={})

    four_devices = make_mesh(fsdp=2, seq=2, devices=jax.devices()[:4])
    spread = jax.tree.map(
        lambda x: jax.device_put(
            np.zeros(x.shape, x.dtype), jax.sharding.NamedSharding(four_devices, x.sharding.spec)
        ),
        state,
    )
    back = checkpoint.restore(eight, spread)
    assert all(x.sharding.device_set <= set(jax.devices()[:4]) for x in trained(back))
    assert_equal(back, want)
    four = checkpoint.save(tmp_path / "four" / "checkpoints", back, step=1, about={})

    two = tmp_path / "two" / "checkpoints"
    finish(start(cfg, tmp_path, "relayout.py", *[(str(four), str(two))] * 2, slurm=True))
    assert_equal(checkpoint.restore(two / "step_00000001", state), want)


def trained(state: step.TrainState) -> list[jax.Array]:
    return jax.tree.leaves((state.params, state.opt_state, state.step))


def assert_equal(state: step.TrainState, want: list[np.ndarray]) -> None:
    for got, x in zip(trained(state), want, strict=True):
        np.testing.assert_array_equal(got, x)


def test_a_process_without_a_group_has_its_part_of_rewards_and_sums(configured):
    entry = journal.Entry(groups=[], parts=[], sums={})
    cfg = configured("tiny_cpu_grpo.yaml")
    _, valid_GR = grpo.totals(cfg, entry)
    assert set(grpo.sampled_sums(cfg, entry).values()) == {(0, 0)}
    single = configured(
        "tiny_cpu_grpo.yaml", "rollout.num_samples=1", "algorithm.advantage=reinforce_plus_plus"
    )
    assert set(grpo.sampled_sums(cfg, entry)) - set(grpo.sampled_sums(single, entry)) == {
        "reward/mixed"
    }
    others = np.array([[True, True, False, True]]).astype(valid_GR.dtype)  # as of_all_groups does
    advantage_GR = ADVANTAGES["grpo"](np.array([[1.0, 0, 9, 0]]), others)
    assert advantage_GR[0, 0] > 0 and advantage_GR[0, 2] == 0


@pytest.mark.slow
def test_grpo_in_two_processes_is_killed_and_goes_on_as_one(configured, tmp_path):
    """Each with its own vLLM; what both have sampled is in one journal, which one process reads.

    kill -9 of process 1 ends process 0 (the other way round JAX may be first to end its client).
    """
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        ONE_BY_EIGHT,
        "rewards={spaces: 1.0}",
        "algorithm.kl=0.01",
        "optimizer={learning_rate: 0.01}",
        "run.num_steps=3",
        "run.eval_every=1",
        "run.checkpoint_every=1",
    )
    run = Path(cfg.run.dir)
    run.mkdir()
    apart = dataclasses.replace(cfg, mesh=config.MeshConfig(fsdp=2, simulated=True))
    hurt = start(apart, tmp_path, "killed_run.py", UNHURT, ("update", "2"))
    said, _ = finish(hurt, wanted=(1, -signal.SIGKILL))
    assert "process 0 lost another one, whose own words say why" in said
    assert [meta["step"] for _, meta in run_folder.metas(run)] == [1]
    assert run_folder.journaled_steps(run) == (2,)
    assert [row["step"] for row in lines(run)] == [1]
    answered = {row["id"] for row in lines(run, "evaluation_answers.jsonl")}
    assert len(answered) == 4  # two of each process

    rolled_out = []
    roll_out = sampling.roll_out

    def noted(*args, **kwargs):
        rolled_out.append(1)
        return roll_out(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "roll_out", noted)
        patch.setitem(rewards.REWARDS, "spaces", killed_run.count_spaces)
        grpo.run(cfg)
    assert len(rolled_out) == 1  # step 3
    steps, answers = lines(run), lines(run, "rollouts.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 for row in steps)
    gaps = [row["gap/max"] for row in steps]
    assert max(gaps) < MAX_GAP  # every engine had the weights of its step
    for row in steps:
        seeds = [
            sampling.sample_seed(cfg.seed, row["step"], place) + sample
            for place in range(row["groups"])
            for sample in range(cfg.rollout.num_samples)
        ]
        assert [x["seed"] for x in answers if x["step"] == row["step"]] == seeds


@pytest.mark.slow
def test_dynamic_sampling_in_two_processes_ends_when_both_have_their_groups(configured, tmp_path):
    """Each fills its own rows; one that has done so waits, and asks nothing. The KL to the policy
    without adapters is in every token's reward, whitened over both."""
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        "mesh={fsdp: 2, simulated: true}",
        "rollout.num_samples=2",
        "rewards={parity: 1.0}",
        "algorithm={filter_by: parity/odd, max_tries: 8, advantage: reinforce_plus_plus, kl: 0.01, "
        "kl_in: reward}",
        "model.lora_rank=4",
        "optimizer={learning_rate: 0.01}",
        "run.num_steps=3",
        "data.validation=",
    )
    finish(start(cfg, tmp_path, "killed_run.py", UNHURT, UNHURT))
    run = Path(cfg.run.dir)
    steps, answers = lines(run), lines(run, "rollouts.jsonl")
    assert [row["step"] for row in steps] == [1, 2, 3]
    waited = refused = 0
    for row in steps:
        assert row["groups"] == 4 and row["grad_norm"] > 0 and row["gap/max"] < MAX_GAP
        fates = ("kept", "surplus", "too_low", "too_high", "unjudged")
        assert row["filter/drawn"] == sum(row[f"filter/{fate}"] for fate in fates)
        could = 4 * row["filter/tries"] - (row["refused"] - refused)
        assert row["filter/drawn"] <= could
        waited, refused = waited + could - row["filter/drawn"], row["refused"]
        odd = [x["reward"]["parity/odd"] for x in answers if x["step"] == row["step"]]
        assert (np.reshape(odd, (4, 2)).sum(axis=1) == 1).all()
    assert waited, steps  # prompts that nobody asked, since their process had its groups already
    kls = [row["kl"] for row in steps]
    assert kls[0] < MAX_GAP and min(kls[1:]) > 10 * MAX_GAP  # adapters begin as nothing
    adapters = load_file(run / "adapter" / "adapter_model.safetensors")
    assert adapters and all(x.any() for x in adapters.values())  # gathered from both
