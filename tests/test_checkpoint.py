"""Checkpoints: whole or absent, onto another mesh, and refused where they do not belong."""

import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from longrl_jax import checkpoint, run_folder, step
from longrl_jax.config import OptimizerConfig
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import make_mesh

WEIGHTS = ("fsdp", "seq")


class Model(nnx.Module):
    def __init__(self, width, rngs):
        self.vision = nnx.Linear(8, 8, rngs=rngs)
        self.text = nnx.Linear(8, width, rngs=rngs)


def make_state(*, seed=0, width=16, **axes):
    """A trained text part over all devices, its Adam state with it, and a frozen tower."""
    mesh = make_mesh(**axes)
    model = Model(width, nnx.Rngs(seed))
    state = nnx.state(model)
    over = NamedSharding(mesh, PartitionSpec(WEIGHTS))
    nnx.update(model, jax.tree.map(lambda x: jax.device_put(x, over), state))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=0.1), 10)
    _, made = step.init_state(model, ["vision"], optimizer, mesh)
    return made, optimizer


def updated(state, optimizer):
    """After an update by fixed gradients, so that every number of the state is its own."""
    grads = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size).reshape(x.shape)), state.params)
    changes, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = jax.tree.map(jnp.add, state.params, changes)
    return step.TrainState(params, state.frozen, opt_state, state.step + 1)


def trained(state):
    return jax.tree.leaves((state.params, state.opt_state, state.step))


@pytest.fixture
def saved(tmp_path):
    """(folder of checkpoints, the state that the only one, of step 1, holds)."""
    state = updated(*make_state(fsdp=2, seq=4))
    folder = tmp_path / run_folder.CHECKPOINTS
    checkpoint.save(folder, state, step=1, about={"scores": {"total": 0.5}})
    return folder, state


@pytest.mark.parametrize("axes", [{"fsdp": 2, "seq": 4}, {"fsdp": 8}, {"data": 4, "seq": 2}])
def test_a_state_comes_back_on_any_mesh(saved, axes):
    folder, state = saved
    new, _ = make_state(seed=1, **axes)
    places = jax.tree.map(lambda x: x.sharding, trained(new))
    frozen = new.frozen
    back = checkpoint.restore(folder / "step_00000001", new)
    assert jax.tree.structure(back) == jax.tree.structure(new)
    for got, want, place in zip(trained(back), trained(state), places, strict=True):
        np.testing.assert_array_equal(got, want)
        assert got.dtype == want.dtype and got.sharding == place
    assert back.frozen is frozen and int(back.step) == 1
    assert all(x.is_deleted() for x in trained(new))  # never both in memory


def test_another_model_or_optimizer_is_refused(saved):
    folder, _ = saved
    with pytest.raises(ValueError, match="is of another model or optimizer"):
        checkpoint.restore(folder / "step_00000001", make_state(width=24, fsdp=8)[0])


def files_of(folder):
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def test_every_damaged_file_is_named(saved, tmp_path):
    folder, _ = saved
    files = [path for path in files_of(folder) if path.name != run_folder.META]
    assert len(files) > 5
    state, _ = make_state(fsdp=8)
    for path in files:
        content = path.read_bytes()
        for damage in (content[:-1], bytes([content[0] ^ 1]) + content[1:]):
            path.write_bytes(damage)
            with pytest.raises(ValueError, match=rf"is damaged: .*{path.name}"):
                checkpoint.restore(folder / "step_00000001", state)
        path.write_bytes(content)
    files[0].unlink()
    with pytest.raises(ValueError, match=rf"damaged: .*{files[0].name}.* remove .*step_00000001"):
        checkpoint.restore(folder / "step_00000001", state)


def test_one_that_is_broken_off_is_never_found_and_swept(saved, monkeypatch):
    folder, state = saved

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "write_synced", full)
    with pytest.raises(ValueError, match="step 2 cannot be written .*No space left.* make room"):
        checkpoint.save(folder, state, step=2, about={})
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]
    monkeypatch.undo()
    shutil.copytree(
        folder / "step_00000001", folder / ".step_00000002.partial"
    )  # a kill's leavings
    assert [meta["step"] for _, meta in run_folder.metas(folder.parent)] == [1]
    checkpoint.sweep(folder)
    assert [p.name for p in folder.iterdir()] == ["step_00000001"]


def test_everything_is_on_disk_when_it_returns(saved, tmp_path, monkeypatch):
    """Every byte of every file and every name, those of the folders above it included, was synced
    after it was written: a machine that loses power has all of the checkpoint."""
    _, state = saved
    synced, fsync = {}, os.fsync

    def recorded(handle):
        fsync(handle)
        stat, path = os.fstat(handle), Path(f"/proc/self/fd/{handle}").readlink()
        names = {p.name for p in path.iterdir()} if path.is_dir() else set()
        synced[stat.st_ino] = names or stat.st_size

    monkeypatch.setattr(os, "fsync", recorded)
    made = checkpoint.save(tmp_path / "new" / "run" / "checkpoints", state, step=1, about={})
    monkeypatch.undo()
    above = [path for path in made.parents if path.is_relative_to(tmp_path)]
    paths = [*above, made, *made.rglob("*")]
    assert len([path for path in paths if path.is_dir()]) > 5
    for path in paths:
        stat = path.stat()
        if path.is_dir():
            assert {p.name for p in path.iterdir()} <= synced[stat.st_ino], path
        else:
            assert synced[stat.st_ino] == stat.st_size, path


@pytest.mark.parametrize(
    ("keep", "metric", "left"),
    [(2, "", [4, 5]), (2, "score", [2, 4, 5]), (1, "score", [2, 5]), (9, "", [1, 2, 3, 4, 5])],
)
def test_the_newest_and_the_best_stay(tmp_path, keep, metric, left):
    folder = tmp_path / run_folder.CHECKPOINTS
    for number, score in enumerate((0.1, 0.7, None, 0.7, 0.3), start=1):
        made = folder / f"step_{number:08d}"
        made.mkdir(parents=True)
        scores = None if score is None else {"score": score}
        meta = {"format": run_folder.FORMAT, "step": number, "scores": scores}
        (made / run_folder.META).write_text(json.dumps(meta))
    checkpoint.prune(folder, keep=keep, best_metric=metric)
    assert [meta["step"] for _, meta in run_folder.metas(tmp_path)] == left


def test_a_checkpoint_takes_the_bytes_that_are_foretold(saved):
    folder, state = saved
    params = 8 * 16 + 16
    assert checkpoint.num_bytes(state) == 3 * params * 4 + 3 * 4  # Adam; its counts, and the step
    arrays = sum(path.stat().st_size for path in folder.rglob("d/*"))
    assert arrays >= 3 * params * 4 * 0.5  # zstd may gain a little, not half, on such numbers
