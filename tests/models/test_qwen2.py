"""Qwen2 against `transformers`, block by block; what scanning, remat and the mesh may change."""

import contextlib
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import write_qwen2

from longrl_jax import models
from longrl_jax.models import layers, qwen2
from longrl_jax.sharding import make_mesh

ATOL = 2e-5  # float32 sums of up to 96 products, in another order; states are of order 1 to 10
GRAD_RTOL = 1e-5  # the same sums, recomputed by another program
B, T = 2, 24


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """(torch model, our config, our model, the folder both come from); the head is untied, or as
    `tied_and_untied` says."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch_model = write_qwen2(folder, tied=getattr(request, "param", False))
    cfg, model = models.load(folder)
    return torch_model, cfg, model, folder


tied_and_untied = pytest.mark.parametrize(
    "pair", [True, False], ids=["tied", "untied"], indirect=True, scope="module"
)


def ids_of(rows=B, length=T):
    """Rope positions, order, branch and segment of plain causal rows."""
    pos = np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length))
    return pos, pos, np.zeros_like(pos), np.ones_like(pos)


def logits_of(model, tokens, *, ids=None, **options):
    x = model.embed(tokens)
    return model.hidden(x, *(ids or ids_of(*tokens.shape)), **options) @ model.head()


def captured(module, run):
    """Returns (inputs, output) of one submodule during run()."""
    seen = {}

    def hook(_, args, kwargs, output):
        first = args[0] if args else kwargs["hidden_states"]
        seen["in"] = first.detach().numpy()
        seen["out"] = (output[0] if isinstance(output, tuple) else output).detach().numpy()

    handle = module.register_forward_hook(hook, with_kwargs=True)
    with torch.no_grad():
        run()
    handle.remove()
    return seen["in"], seen["out"]


def layer_at(stack, i):
    graphdef, state = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda x: x[i], state))


@pytest.mark.parametrize("index", [0, 1])
@pytest.mark.parametrize("block", ["norm1", "attn", "norm2", "mlp", "layer"])
def test_block_equals_transformers(pair, rng, index, block):
    torch_model, _, model, _ = pair
    tokens = rng.integers(0, 99, (B, T))
    theirs = torch_model.model.layers[index]
    submodule = {
        "norm1": theirs.input_layernorm,
        "attn": theirs.self_attn,
        "norm2": theirs.post_attention_layernorm,
        "mlp": theirs.mlp,
        "layer": theirs,
    }[block]
    x, want = captured(submodule, lambda: torch_model(torch.tensor(tokens)))
    ours = layer_at(model.text.layers, index)
    ours = ours if block == "layer" else getattr(ours, block)
    got = ours(jnp.asarray(x), *(ids_of() if block in ("attn", "layer") else ()))
    np.testing.assert_allclose(got, want, atol=ATOL)


def test_rotation_equals_transformers(pair, rng):
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch_model, cfg, _, _ = pair
    q = rng.standard_normal((B, T, cfg.num_heads, cfg.head_dim)).astype(np.float32)
    pos = rng.integers(0, 500, (B, T))
    torch_q = torch.tensor(q).transpose(1, 2)
    cos, sin = torch_model.model.rotary_emb(torch_q, torch.tensor(pos))
    want = apply_rotary_pos_emb(torch_q, torch_q, cos, sin)[0].transpose(1, 2)
    got = layers.rotate(jnp.asarray(q), jnp.asarray(pos), theta=cfg.rope_theta)
    np.testing.assert_allclose(got, want, atol=1e-4)  # an angle of 500 has 3e-5 of rounding


@tied_and_untied
def test_logits_equal_transformers(pair, rng):
    torch_model, _, model, _ = pair
    tokens = rng.integers(0, 99, (B, T))
    with torch.no_grad():
        want = torch_model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, jnp.asarray(tokens)), want, atol=1e-4)


def test_branches_of_a_group_row_equal_separate_rows(pair, rng):
    torch_model, _, model, _ = pair
    prefix, first, second = (rng.integers(0, 99, n) for n in (9, 5, 7))
    row = np.concatenate([prefix, first, second])
    order = np.concatenate([np.arange(9), 9 + np.arange(5), 9 + np.arange(7)]).astype(np.int32)
    branch = np.repeat([0, 1, 2], [9, 5, 7]).astype(np.int32)
    ids = [x[None] for x in (order, order, branch, np.ones_like(order))]
    got = logits_of(model, jnp.asarray(row)[None], ids=ids)[0]
    for answer, at in ((first, slice(9, 14)), (second, slice(14, 21))):
        with torch.no_grad():
            want = torch_model(torch.tensor(np.concatenate([prefix, answer]))[None]).logits[0, 9:]
        np.testing.assert_allclose(got[at], want.numpy(), atol=1e-4)


def test_remat_changes_neither_values_nor_gradients(pair, rng):
    _, _, model, _ = pair
    tokens = jnp.asarray(rng.integers(0, 99, (B, T)))
    graphdef, state = nnx.split(model)

    @functools.partial(jax.jit, static_argnames="remat")
    def run(state, remat):
        def loss(state):
            return jnp.square(logits_of(nnx.merge(graphdef, state), tokens, remat=remat)).mean()

        return jax.value_and_grad(loss)(state)

    want = run(state, "everything")
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    for remat in ("nothing", "attention", "offload"):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, atol=GRAD_RTOL * scale),
            run(state, remat),
            want,
        )


def test_unknown_remat_lists_the_known(pair):
    _, _, model, _ = pair
    with pytest.raises(ValueError, match="nothing, attention, everything"):
        logits_of(model, jnp.zeros((1, 4), jnp.int32), remat="some")


def test_one_layer_is_compiled_whatever_their_number():
    def num_dots(num_layers):
        cfg = qwen2.Config(
            vocab_size=16, width=32, num_layers=num_layers, num_heads=2, num_kv_heads=1,
            head_dim=16, mlp_width=32, norm_eps=1e-6, rope_theta=1e4, tied=True,
        )  # fmt: skip
        model = nnx.eval_shape(lambda: qwen2.Model(cfg, rngs=nnx.Rngs(0)))
        graphdef, state = nnx.split(model)
        tokens = jnp.zeros((1, 8), jnp.int32)
        program = jax.make_jaxpr(lambda s: logits_of(nnx.merge(graphdef, s), tokens))(state)
        return str(program).count("dot_general")

    assert num_dots(2) == num_dots(7) > 0


@pytest.mark.parametrize(
    "shape", [{"fsdp": 2, "seq": 2, "tensor": 2}, {"seq": 8}, {"data": 2, "seq": 4}], ids=str
)
def test_mesh_does_not_change_logits(pair, rng, shape):
    _, _, model, folder = pair
    tokens = jnp.asarray(rng.integers(0, 99, (B, T)))
    mesh = make_mesh(**shape)
    _, sharded = models.load(folder, mesh=mesh)
    graphdef, state = nnx.split(sharded)
    with jax.set_mesh(mesh):
        got = jax.jit(lambda s: logits_of(nnx.merge(graphdef, s), tokens))(state)
    np.testing.assert_allclose(got, logits_of(model, tokens), atol=ATOL * 5)


@tied_and_untied
def test_parameters_are_split_as_the_table_says(pair):
    _, _, _, folder = pair
    mesh = make_mesh(fsdp=2, seq=2, tensor=2)
    _, model = models.load(folder, mesh=mesh)
    spec = model.text.layers.mlp.up.kernel.get_value().sharding.spec
    assert tuple(spec) == (None, ("fsdp", "seq"), "tensor")
    odd = model.text.table.get_value().sharding.spec  # 99 tokens do not split over tensor=2
    assert odd[0] is None and odd[1] == ("fsdp", "seq")


def test_bfloat16_compute_keeps_float32_parameters(pair):
    _, _, model, _ = pair
    x = model.embed(jnp.zeros((1, 4), jnp.int32), compute_dtype=jnp.bfloat16)
    h = model.hidden(x, *ids_of(1, 4), compute_dtype=jnp.bfloat16)
    assert x.dtype == h.dtype == jnp.bfloat16
    assert model.head().dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "llama", "model_type"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("hidden_act", "gelu", "hidden_act"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "rope_type"),
        ("num_hidden_layers", None, "num_hidden_layers"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
    ],
)
def test_a_field_we_would_have_to_ignore_is_refused(pair, field, value, named):
    _, _, _, folder = pair
    tree = json.loads((folder / "config.json").read_text()) | {field: value}
    with pytest.raises(ValueError, match=named):
        qwen2.parse_config(tree, where="here")


def test_a_text_model_takes_no_features(pair):
    _, cfg, model, _ = pair
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="no media features"):
        model.embed(tokens, tokens > 0, jnp.zeros((1, 4, 8)))
    assert qwen2.video_layout(cfg) is None


def test_older_configs_say_theta_at_the_top(pair):
    _, cfg, _, folder = pair
    tree = json.loads((folder / "config.json").read_text())
    del tree["rope_parameters"]
    older = tree | {"rope_theta": 3e3, "rope_scaling": None}
    assert qwen2.parse_config(older, where="here") == cfg


@pytest.mark.parametrize("mesh", [None, {"data": 2, "seq": 4}])
def test_an_mlp_in_chunks_of_tokens_is_the_same_mlp(mesh, monkeypatch):
    """Values and gradients; 24 tokens a device in three chunks of 8, and the chunks are there."""
    cfg = qwen2.Config(
        vocab_size=9, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_width=24, norm_eps=1e-6, rope_theta=1e4, tied=False,
    )  # fmt: skip
    graphdef, state = nnx.split(qwen2.Mlp(cfg, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 24 * (4 if mesh else 1), 16))

    def run(chunk):
        monkeypatch.setattr(qwen2, "MLP_CHUNK", chunk)

        def loss(state, x):
            return jnp.sin(nnx.merge(graphdef, state)(x)).sum()

        with jax.set_mesh(make_mesh(**mesh)) if mesh else contextlib.nullcontext():
            traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(state, x)
            return "scan" in str(traced.jaxpr), traced.lower().compile()(state, x)

    (whole_scans, want), (chunks_scan, got) = run(1024), run(10)
    assert chunks_scan and not whole_scans
    scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(want))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=GRAD_RTOL * scale), got, want
    )


def test_chunks_divide_the_tokens_or_there_is_one(monkeypatch):
    monkeypatch.setattr(qwen2, "MLP_CHUNK", 10)
    assert [qwen2._num_chunks(n) for n in (1, 10, 11, 24, 35, 31)] == [1, 1, 1, 3, 5, 1]
