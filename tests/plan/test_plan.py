"""Plans: the programs are training's, the page says it all, and what is refused."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from longrl_jax import config, models, platform, step
from longrl_jax.config import load
from longrl_jax.optimizer import make_optimizer
from longrl_jax.plan import __main__ as command
from longrl_jax.plan import compiled, counter, hardware, planned, programs
from longrl_jax.sharding import make_mesh

ROOT = Path(__file__).parents[2]
START = ROOT / "configs/models/tiny_vila_start"
SMALL = """
stage: grpo
model: {path: configs/models/tiny_vila.json, frozen: [vision, projector], compute_dtype: float32}
data: {root: data, num_frames: 9, fps: 1.0, timestamp: "<{t:.0f}s>"}
mesh: {seq: 4}
batch: {groups: 2, rows_per_pass: 1, max_row_tokens: 1024, smallest_bucket: 128}
rollout: {num_samples: 3, max_tokens: 8, max_model_len: 1024, process: worker, tensor_parallel: 2}
algorithm: {kl: 1e-2}
run: {dir: runs/none}
"""


@pytest.fixture
def path(tmp_path, monkeypatch):
    monkeypatch.setattr(platform, "prepare_to_compile", lambda num_devices: None)  # it is prepared
    monkeypatch.chdir(ROOT)
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


def pieces(path):
    cfg = load(path)
    mesh = programs.mesh_of(cfg, jax.devices()[: cfg.mesh.num_devices])
    policy, state = programs.abstract_policy(cfg, mesh)
    row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
    return cfg, policy, state, row, programs.host_passes(cfg, row)


def facts(tree):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), tree)


def test_shapes_and_places_are_those_of_a_loaded_checkpoint():
    mesh = make_mesh(fsdp=2, seq=4)
    optimizer = make_optimizer(config.OptimizerConfig(), 10)
    cfg, model = models.load(START, mesh=mesh)
    graphdef, want = step.init_state(model, ("vision",), optimizer, mesh)
    backbone, same = models.read_shape(START)
    assert same == cfg
    abstract = models.abstract(backbone, cfg, mesh=mesh)
    abstract_def, got = step.abstract_state(abstract, ("vision",), optimizer, mesh)
    assert abstract_def == graphdef
    assert facts(got) == facts(want)
    assert isinstance(jax.tree.leaves(got)[0], jax.ShapeDtypeStruct)


def test_a_config_json_alone_says_what_a_folder_does(tmp_path):
    """The one file that `convert init` takes, and the same in a folder of sub-folders."""
    file = ROOT / "configs/models/tiny_vila.json"
    tree = json.loads(file.read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree))
    for sub, key in models.vila.PARTS.items():
        (tmp_path / sub).mkdir()
        (tmp_path / sub / "config.json").write_text(json.dumps(tree[key]))
    assert models.read_shape(file) == models.read_shape(tmp_path)


def test_a_row_is_the_longest_that_the_config_allows(path):
    cfg, policy, _, row, passes = pieces(path)
    side = policy.layout.grid[0]
    assert row.frame_tokens == side * side + 1 + len("<8s>")
    assert row.prompt_tokens == 9 * row.frame_tokens + programs.QUESTION_TOKENS
    assert passes.tokens.shape == (2, 1, programs.padded_tokens(cfg, row))
    assert (passes.segment > 0).sum() == 2 * row.tokens
    assert passes.loss_mask.sum() == 2 * 3 * 8


def test_the_update_has_the_flops_of_the_formula(path):
    """Per token 2 FLOPs a weight, four times over (forward, again, two backward), but `down` is not
    computed again: nothing needs its result. The head sees answer slots only."""
    cfg, policy, state, row, passes = pieces(path)
    phase = programs.trace_all(cfg, policy, state, passes, row)["update"]
    tiles = compiled.tiles_of(passes, kernel="xla", ulysses=1)
    work = counter.work(phase.traced.jaxpr, num_devices=4, tile_share=tiles.share)
    t, (passes_n, _, T), A = policy.model_cfg.text, passes.tokens.shape, passes.targets.shape[-1]
    heads, kv = t.num_heads * t.head_dim, t.num_kv_heads * t.head_dim
    layer = t.width * (heads + 2 * kv) + heads * t.width + 3 * t.width * t.mlp_width
    dense = t.num_layers * T * (8 * layer - 2 * t.mlp_width * t.width)
    dense += 8 * A * t.width * t.vocab_size
    assert work.dense == pytest.approx(passes_n * dense / 4)
    # two products forward, two again, five backward, each 2 * q * k * heads
    block = -(-T // 4)
    assert work.tiles == pytest.approx(
        passes_n * t.num_layers * 9 * 2 * 4 * block**2 * heads * tiles.share
    )


def test_a_plan_for_the_cpu_reads_like_a_bill(path, capsys):
    settings = ["hardware=cpu", "devices=4", "algorithm.kl=0", "attention.block_size=128"]
    command.main([str(path), *settings])
    page = capsys.readouterr().out
    for words in (
        "PROGRAMS",
        "encode",
        "embed",
        "update",
        "WORK of one device",
        "blockwise XLA, tiles of 128",
    ):
        assert words in page
    assert "logps" not in page  # without a KL term nobody asks for them
    assert "9 frames x 6 tokens + 512 = 566 tokens of prompt, 3 answers x 8" in page


def test_depth_does_not_change_the_number_of_equations(path):
    """Layers are scanned: what is compiled is one of them."""

    def equations(tree):
        file = path.with_name("model.json")
        file.write_text(json.dumps(tree))
        path.write_text(SMALL.replace("configs/models/tiny_vila.json", str(file)))
        cfg, policy, state, row, passes = pieces(path)
        phase = programs.trace_all(cfg, policy, state, passes, row)["update"]
        return sum(1 for _ in counter._all_equations(phase.traced.jaxpr.jaxpr))

    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text())
    few = equations(tree)
    tree["llm_cfg"]["num_hidden_layers"] *= 7
    assert equations(tree) == few


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["devices=8"], "devices=8, but mesh.* of .* makes 4; say how they are used"),
        (["hardware=v100"], "hardware='v100' is unknown; choose one of a100-40gb, a100-80gb, cpu"),
        (["search=maybe"], "search='maybe' is unknown; choose one of no, yes"),
        (["batch.max_row_tokens=580"], "take 589 tokens of a row, over batch.max_row_tokens=580"),
        (
            ["rollout.max_model_len=570"],
            "are 574 tokens for the engine, over rollout.max_model_len",
        ),
        (["model.path=nowhere.json"], "there is no nowhere.json"),
        (["rollout.tensor_parallel=3"], "rollout.tensor_parallel=3 does not divide the 4 heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_by_name(path, settings, message):
    with pytest.raises(SystemExit, match=message):
        command.main([str(path), "hardware=cpu", *settings])


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is not None
    and importlib.util.find_spec("jax_plugins.xla_cuda12") is not None,
    reason="JAX's CUDA packages are here",
)
def test_missing_cuda_packages_are_named_with_the_way_to_get_them():
    with pytest.raises(RuntimeError, match=r"needs JAX's CUDA packages.*make plan CONFIG="):
        hardware.devices(hardware.find("a100-80gb"), 8)


def test_devices_are_whole_hosts():
    with pytest.raises(ValueError, match="12 devices are no whole number of hosts of 8"):
        hardware.devices(hardware.find("h100"), 12)


def test_the_most_frames_fill_whole_buckets(path):
    """A straight line through what was compiled, then down to a length that padding fills."""
    cfg, policy, *_ = pieces(path)
    row = programs.row_of(cfg, policy.backbone, policy.model_cfg)
    plan = planned.Plan(
        cfg=cfg, policy=policy, row=row, row_tokens=0, num_rows=2, num_passes=2, chunk_frames=64,
        tiles=compiled.Tiles(1, 1, 512), resident=None, phases={}, engine=None,
        language_parameters=1,
    )  # fmt: skip
    plan = dataclasses.replace(plan, row_tokens=programs.padded_tokens(cfg, row))
    assert planned._other_length(plan) == 36  # 4 and 18 frames are padded to the same length
    frames = planned._largest({5: (2000, 500), 9: (3000, 100)}, plan)  # the line ends at 3,250
    lengths = []
    for n in (frames, frames + 1):  # 3 digits of a time by then
        bigger = planned.with_frames(cfg, n)
        longest = programs.row_of(bigger, policy.backbone, policy.model_cfg)
        lengths.append(programs.host_passes(bigger, longest).tokens.shape[-1])
    assert lengths[0] <= 3250 < lengths[1]


def python_with_cuda() -> str | None:
    for python in (sys.executable, str(ROOT / ".venv-plan/bin/python")):
        ask = "import importlib.util as u; exit(u.find_spec('jax_plugins.xla_cuda12') is None)"
        if Path(python).exists() and subprocess.run([python, "-c", ask]).returncode == 0:
            return python
    return None


@pytest.mark.slow
@pytest.mark.skipif(python_with_cuda() is None, reason="no JAX with CUDA packages (make plan)")
def test_a_tiny_config_compiles_for_gpus_that_are_not_here(path):
    """Four A100s; the bill holds vLLM, the reserve, the verdict and the search."""
    asked = [
        python_with_cuda(),
        "-m",
        "longrl_jax.plan",
        str(path),
        "hardware=a100-80gb",
        "devices=4",
    ]
    done = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for words in ("4 x NVIDIA A100-SXM4-80GB", "vLLM's share", "reserve", "FITS", "a compiler's"):
        assert words in done.stdout
    assert (
        "the most frames: 8,192 (compiled itself, and the most that data.num_frames takes)"
        in done.stdout
    )


def test_the_longest_film_is_not_the_one_with_most_frames_where_pools_follow_its_length(
    path, tmp_path
):
    """LongVILA-R1: 256 frames are 64 pooled ones, 300 frames 38; a token and a line each."""
    tree = json.loads((ROOT / "configs/models/tiny_vila.json").read_text())
    tree["video_encoder"] = {"_target_": "llava.model.encoders.TSPVideoEncoder"}
    (tmp_path / "pooled.json").write_text(json.dumps(tree))
    overrides = [f"model.path={tmp_path / 'pooled.json'}", "data.num_frames=300"]
    cfg = config.load(path, [*overrides, "data.timestamp="])
    backbone, model_cfg = models.read_shape(cfg.model.path)
    row = programs.row_of(cfg, backbone, model_cfg)
    assert (row.num_frames, row.unit_frames) == (256, 4)
    assert row.prompt_tokens == 64 * 2 + programs.QUESTION_TOKENS
    even = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, fps=0.0))
    assert programs.row_of(even, backbone, model_cfg).num_frames == 300
