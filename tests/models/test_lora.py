"""Adapters against huggingface/peft (tests/golden/lora_peft.py): numbers, start, names, files."""

import functools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file
from tiny_models import write_vila

from longrl_jax import config, models
from longrl_jax.models import decoder, hf_files, lora, qwen2_5_vl, vila, weights
from longrl_jax.models.rope import Rope
from longrl_jax.sharding import make_mesh

GOLDEN = Path(__file__).parents[1] / "golden" / "lora_peft.npz"
RTOL = 1e-5  # float32 sums of up to 96 products, of 2 and then of 16, in another order
LORA = lora.Lora(rank=2, alpha=6.0, targets=config.LORA_TARGETS)
CFG = decoder.Config(
    vocab_size=99, width=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, mlp_width=96,
    norm_eps=1e-4, rope=Rope(theta=3e3), tied=True,
)  # fmt: skip
MESH = {"fsdp": 2, "seq": 2, "tensor": 2}
ROWS = lora.table(decoder, CFG, LORA)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return dict(file)


def part(golden, name):
    start = f"{name}/"
    return {k.removeprefix(start): x for k, x in golden.items() if k.startswith(start)}


def load(golden, *, adapters=True, mesh=None):
    """The golden base model, with the golden adapters or none."""
    model = nnx.eval_shape(lambda: decoder.Model(CFG, rngs=nnx.Rngs(0)))
    graphdef, abstract = nnx.split(model)
    arrays = dict(weights.from_hf(abstract, decoder.table(CFG), part(golden, "base")))
    if mesh is not None:
        places = weights.shardings(abstract, decoder.table(CFG), mesh)
        arrays = {path: jax.device_put(x, places[path]) for path, x in arrays.items()}
    model = nnx.merge(graphdef, weights.with_arrays(abstract, arrays))
    if adapters:
        lora.attach(model, golden_adapters(golden, mesh), LORA)
    return model


def golden_adapters(golden, mesh=None):
    rows = {path: nnx.LoRAParam(jnp.zeros(x.shape)) for path, x in shapes(mesh).items()}
    abstract = nnx.from_flat_state([(tuple(k.split(".")), x) for k, x in rows.items()])
    places = {path: x.sharding for path, x in shapes(mesh).items()}
    found = weights.from_hf(abstract, ROWS, part(golden, "adapter"))
    return {path: jax.device_put(x, places[path]) for path, x in found}


@functools.cache
def shapes(mesh=None):
    model = nnx.eval_shape(lambda: decoder.Model(CFG, rngs=nnx.Rngs(0)))
    return lora.shapes(model, ROWS, LORA, mesh)


@functools.partial(jax.jit, static_argnums=0)
def pulled(graphdef, adapters, rest, tokens, cotangent):
    """Logits, and the gradient of every adapter."""

    def loss(adapters):
        model = nnx.merge(graphdef, adapters, rest)
        pos = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        ids = pos, pos, jnp.zeros_like(pos), jnp.ones_like(pos)
        logits = model.hidden(model.embed(tokens), *ids) @ model.head()
        return (logits * cotangent).sum(), logits

    return jax.grad(loss, has_aux=True)(adapters)[::-1]


def run(model, golden):
    """Logits, and the gradients by peft's names."""
    parts = nnx.split(model, nnx.LoRAParam, ...)
    logits, grads = pulled(*parts, golden["tokens"], golden["cotangent"])
    return np.asarray(logits), grads and dict(weights.to_hf(grads, ROWS))


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=RTOL * max(np.abs(want).max(), 1))


def test_logits_and_gradients_equal_pefts(golden):
    logits, got = run(load(golden), golden)
    assert_close(logits, golden["logits"])
    want = part(golden, "grad")
    assert set(got) == set(want)
    for name, x in want.items():
        assert np.abs(x).max() > 1e-3, name
        assert_close(got[name], x)


def test_a_start_is_the_base_and_as_wide_as_pefts(golden):
    model, started = load(golden, adapters=False), lora.start(shapes(), seed=3)
    want, _ = run(model, golden)
    lora.attach(model, started, LORA)
    np.testing.assert_array_equal(run(model, golden)[0], want)
    assert np.abs(want - golden["logits"]).max() > 0.1  # which peft's adapters change
    theirs = part(golden, "adapter")
    for wide, widths in ((96, ["mlp.down"]), (16, ["attn.q", "attn.o", "mlp.gate", "mlp.up"])):
        ours = np.concatenate([started[f"text.layers.{n}.lora.a"].ravel() for n in widths])
        peft = np.concatenate([x.ravel() for n, x in theirs.items() if x.shape == (2, wide)])
        assert np.abs(ours).max() <= 1 / math.sqrt(wide)
        assert ours.std() == pytest.approx(peft.std(), rel=0.1)  # of 256 numbers: 4 % by chance
    others = lora.start(shapes(), seed=4)
    path = "text.layers.attn.q.lora.a"
    assert np.abs(others[path] - started[path]).max() > 0.1
    assert np.abs(started[path][0] - started[path][1]).max() > 0.1


def test_a_mesh_changes_neither_start_nor_gradients(golden):
    mesh = make_mesh(**MESH)
    want = lora.start(shapes(), seed=0)
    for path, x in lora.start(shapes(mesh), seed=0).items():
        np.testing.assert_array_equal(x, want[path])
    with jax.set_mesh(mesh):
        _, got = run(load(golden, mesh=mesh), golden)
    for name, x in part(golden, "grad").items():
        assert_close(got[name], x)


def test_adapters_are_split_over_all_devices_that_split_a_model():
    mesh, both = make_mesh(**MESH), ("fsdp", "seq")
    places = weights.shardings(shapes(), ROWS, mesh)
    specs = {path: tuple(place.spec) for path, place in places.items()}
    assert specs["text.layers.attn.q.lora.a"] == (None, both, None)
    assert specs["text.layers.attn.q.lora.b"] == (None, None, "tensor")  # rank 2 on 4 devices
    model = nnx.eval_shape(lambda: decoder.Model(CFG, rngs=nnx.Rngs(0)))
    wide = lora.Lora(rank=8, alpha=1.0, targets=("q", "down"))
    rows = lora.table(decoder, CFG, wide)
    for path, x in lora.shapes(model, rows, wide, mesh).items():
        of_a_device = math.prod(x.sharding.shard_shape(x.shape))
        split = 4 if path in ("text.layers.attn.q.lora.a", "text.layers.mlp.down.lora.b") else 8
        assert of_a_device * split == math.prod(x.shape), path


@pytest.mark.parametrize("mesh", [None, MESH], ids=str)
def test_merged_weights_are_the_sum_and_others_as_they_were(golden, mesh):
    mesh = mesh and make_mesh(**mesh)
    state = nnx.state(load(golden, mesh=mesh), nnx.Param)
    got = dict(models.llm_weights(lora.merged(state, LORA), CFG))
    base, adapters = part(golden, "base"), part(golden, "adapter")
    assert set(got) == {*base, decoder.HEAD}
    changed = 0
    for name, x in base.items():
        module = f"{lora.PEFT}{name.removesuffix('.weight')}.lora_"
        if f"{module}A.weight" not in adapters:
            np.testing.assert_array_equal(got[name], x)
            continue
        a, b = (adapters[f"{module}{side}.weight"].astype(np.float64) for side in "AB")
        np.testing.assert_allclose(got[name], x + 6 / 2 * b @ a, rtol=0, atol=1e-6)
        changed += 1
    assert changed == 7 * CFG.num_layers
    for name, x in models.llm_weights(lora.merged(lora.base(state), None), CFG):
        np.testing.assert_array_equal(x, base.get(name, base["model.embed_tokens.weight"]))


def test_an_export_merges_in_the_types_of_its_source(tmp_path):
    """MLP kernels lie in bfloat16, beside others in float32; only q and up have adapters."""
    source, some = tmp_path / "source", lora.Lora(rank=3, alpha=3.0, targets=("q", "up"))
    write_vila(source, bfloat16=("mlp.",))
    cfg, model = models.load(source)
    rows = lora.table(vila, cfg, some)
    rng = np.random.default_rng(0)
    arrays = {
        path: jnp.asarray(rng.normal(size=x.shape), jnp.float32)
        for path, x in lora.shapes(model, rows, some, None).items()
    }
    lora.attach(model, arrays, some)
    merged = lora.merged(nnx.state(model, nnx.Param), some)
    models.save(tmp_path / "out", merged, cfg, source)
    got, want = (hf_files.open_tensors(f, vila.FOLDERS) for f in (tmp_path / "out", source))
    assert set(got) == set(want)
    changed = set()
    for name in want:
        x, base = got[name][...], want[name][...]
        assert x.dtype == base.dtype, name
        if x.tobytes() == base.tobytes():
            continue
        changed.add(name)
        layer, stem = int(name.split(".")[2]), "attn.q" if "q_proj" in name else "mlp.up"
        a, b = (np.asarray(arrays[f"text.layers.{stem}.lora.{n}"][layer]) for n in "ab")
        exact = base.astype(np.float32) + (a @ b).T
        last_bit = 2**-8 if x.dtype != np.float32 else 1e-6  # a bfloat16 has 8 bits
        np.testing.assert_allclose(x.astype(np.float32), exact, rtol=last_bit, atol=1e-6)
    assert len(changed) == 2 * cfg.text.num_layers
    assert {got[name].dtype.name for name in changed} == {"float32", "bfloat16"}
    assert models.load(tmp_path / "out")[0] == cfg


def test_an_adapter_folder_is_what_peft_writes(golden, tmp_path):
    state = nnx.state(load(golden), nnx.Param)
    lora.save(tmp_path / "adapter", state, decoder, CFG, LORA, base_folder=Path("some/base"))
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {lora.CONFIG, lora.TENSORS}
    got, want = load_file(tmp_path / "adapter" / lora.TENSORS), part(golden, "adapter")
    assert set(got) == set(want)
    for name, x in want.items():
        assert got[name].dtype == x.dtype == np.float32
        np.testing.assert_array_equal(got[name], x)
    ours = json.loads((tmp_path / "adapter" / lora.CONFIG).read_text())
    theirs = json.loads(str(golden["config"]))
    assert ours.pop("base_model_name_or_path") == "some/base"
    assert set(ours.pop("target_modules")) == set(theirs.pop("target_modules"))
    assert ours == {name: theirs[name] for name in ours}


@pytest.mark.parametrize("backbone", [vila, qwen2_5_vl], ids=["vila", "qwen2_5_vl"])
def test_names_are_of_the_model_that_the_adapter_is_opened_on(backbone):
    name = {vila: "tiny_vila", qwen2_5_vl: "tiny_qwen2_5_vl"}[backbone]
    _, cfg = models.read_shape(Path(__file__).parents[2] / f"configs/models/{name}.json")
    names = {row.hf for row in lora.table(backbone, cfg, LORA).values()}
    inside = {vila: "", qwen2_5_vl: "language_model."}[backbone]
    start = f"base_model.model.model.{inside}layers.{{i}}."
    assert f"{start}self_attn.q_proj.lora_A.weight" in names and len(names) == 14
    targets = lora.peft_config(backbone, LORA, base_folder="")["target_modules"]
    assert isinstance(targets, str) == (backbone is qwen2_5_vl)  # its tower has such names, too


def test_a_rank_over_a_kernels_own_is_refused():
    model = nnx.eval_shape(lambda: decoder.Model(CFG, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match=r"lora_rank=9 is over the rank of text.layers.attn.k"):
        lora.shapes(model, ROWS, lora.Lora(rank=9, alpha=1.0, targets=("k",)), None)
