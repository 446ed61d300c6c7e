"""Every config for a published checkpoint, run as it stands but for its sizes.

The files are found, so that a new one cannot be forgotten. Mesh, algorithm, rewards, data keys and
architecture stay; lengths, counts and widths shrink, the engine's context in proportion to the
checkpoint's, and numbers are float32. A random policy earns nothing, so it is paid for spaces, too.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image
from pyarrow import parquet

from longrl_jax import config, convert, models, rewards, train
from longrl_jax.stages import STAGES

ROOT = Path(__file__).parents[2]
MAX_GAP = 1e-4  # float32, sums in another order
MAX_MODEL_LEN, NUM_STEPS = 512, 2
SMALL = {  # a width or count of a config.json -> that of the tiny checkpoint
    "vocab_size": 640,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "mrope_section": [4, 6, 6],
    "image_size": 56,  # 4 x 4 patches: packing by 3 needs zeros at the border, as 32 x 32 do
    "depth": 2,
    "num_heads": 4,
    "out_hidden_size": 128,
    "window_size": 56,
    "fullatt_block_indexes": [1],
}
SIZES = (
    "model.compute_dtype=float32",
    "data.num_frames=8",
    "data.decoder_processes=1",
    "mesh.simulated=true",
    "batch.max_row_tokens=1024",
    "batch.smallest_bucket=64",
    "rollout.num_samples=4",
    "rollout.max_tokens=12",
    f"rollout.max_model_len={MAX_MODEL_LEN}",
    "rollout.process=inline",
    "rollout.replicas=1",
    "rollout.tensor_parallel=1",
    "rollout.dtype=float32",
    "rollout.kv_cache_gib=0.25",
    "optimizer.learning_rate=0.01",
    "optimizer.warmup_steps=0",
    f"run.num_steps={NUM_STEPS}",
)
NUM_RECORDS = 11


def published() -> list[Path]:
    """The configs whose model is named by its sizes alone."""
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    return [path for path in paths if config.load(path).model.path.endswith(".json")]


def spaces(items):
    """Pays for spaces; `share` is where a filter of groups can look."""
    shares = [item.text.count(" ") / max(len(item.text), 1) for item in items]
    return [{"total": share, "share": share} for share in shares]


def shrunk(tree, context: float):
    """A config.json of the same architecture; context: of the engine, over the published one."""
    small = {
        key: SMALL[key] if key in SMALL else shrunk(x, context) if isinstance(x, dict) else x
        for key, x in tree.items()
    }
    if "max_position_embeddings" in tree:
        small["max_position_embeddings"] = int(tree["max_position_embeddings"] * context)
    return small


def write_records(folder: Path, records: list[dict]) -> None:
    path = folder / "data" / "train-00000-of-00001.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(records), path)


def write_sums(folder: Path) -> None:
    """Mathematics as hiyouga/math12k has it."""
    sums = [{"problem": f"What is ${i} + 5$?", "answer": f"${i + 5}$"} for i in range(NUM_RECORDS)]
    write_records(folder, sums)


def write_pictures(folder: Path) -> None:
    """Pictures as BUAADreamer/clevr_count_70k has them, which show as many bars as is asked."""
    records = []
    for i in range(NUM_RECORDS):
        picture, file = np.full((320, 480, 3), 90, np.uint8), io.BytesIO()
        picture[100:200, 20 : 20 + 40 * i : 40] = 250
        Image.fromarray(picture).save(file, "PNG")
        shown = [{"bytes": file.getvalue(), "path": f"CLEVR_trainA_{i}.png"}]
        problem = "<image>How many bars are there?"
        records.append({"images": shown, "problem": problem, "answer": f"{i}"})
    write_records(folder, records)


@pytest.fixture(scope="module")
def roots(world, tmp_path_factory):
    """Data of the kind that stands in a config's data.root."""
    folder = tmp_path_factory.mktemp("roots")
    write_sums(folder / "math12k")
    write_pictures(folder / "clevr_count_70k")
    return {
        "data/longvideo_reason": world / "data",
        "data/math12k": folder / "math12k",
        "data/clevr_count_70k": folder / "clevr_count_70k",
    }


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def made_small(path: Path, folder: Path, roots: dict[str, Path], corpus: Path) -> config.Config:
    """The config with SIZES, a random checkpoint in folder/init, and the engine in this process."""
    cfg = config.load(path)
    tree = json.loads((ROOT / cfg.model.path).read_text())
    sizes = folder / "sizes.json"
    sizes.write_text(json.dumps(shrunk(tree, MAX_MODEL_LEN / cfg.rollout.max_model_len)))
    times = ("--time-tokens=64",) if cfg.data.timestamp else ()
    convert.main(["init", str(sizes), str(folder / "init"), f"--corpus={corpus}", *times])
    sometimes = {
        "data.min_pixels=3136": cfg.data.min_pixels,
        "data.max_pixels=4704": cfg.data.max_pixels,
        "rollout.overlong_tokens=4": cfg.rollout.overlong_tokens,
        "algorithm.filter_by=spaces/share": cfg.algorithm.filter_by,
    }
    return config.load(
        path,
        [
            *SIZES,
            *(override for override, given in sometimes.items() if given),
            f"model.path={folder / 'init'}",
            f"data.root={roots[cfg.data.root]}",
            f"batch.groups={max(4, cfg.batch.rows_per_pass)}",
            f"store={{path: {folder / 'store'}, max_gib: 1}}",
            f"rewards={json.dumps(cfg.rewards | {'spaces': 1.0})}",
            f"run.dir={folder / 'run'}",
        ],
    )


@pytest.mark.slow
@pytest.mark.parametrize("path", published(), ids=lambda path: path.stem)
def test_a_published_config_runs(path, world, roots, tmp_path, monkeypatch):
    monkeypatch.setitem(rewards.REWARDS, "spaces", spaces)
    cfg = made_small(path, tmp_path, roots, world / "data" / "corpus.txt")
    train.check_names(cfg)
    STAGES[cfg.stage](cfg)
    run, init = tmp_path / "run", tmp_path / "init"
    steps = lines(run)
    assert [step["step"] for step in steps] == list(range(1, NUM_STEPS + 1))
    assert all(np.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    if cfg.stage == "grpo":
        assert max(step["gap/max"] for step in steps) < MAX_GAP  # of step 2: after an update
    else:
        assert json.loads((run / "evaluation.json").read_text())["questions"] > 0
    assert (max(step.get("pack/examples_per_row", 1) for step in steps) > 1) == cfg.batch.pack
    assert {row["id"] for row in lines(run, "refused.jsonl")} <= {"broken"}
    assert json.loads((run / "finished.json").read_text())["step"] == NUM_STEPS
    trained, start = (models.arrays_of(models.load(f)[1]) for f in (run / "export", init))
    moved = {name.partition(".")[0] for name in trained if (trained[name] != start[name]).any()}
    assert moved == {name.partition(".")[0] for name in trained} - set(cfg.model.frozen)
