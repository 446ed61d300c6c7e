"""Qwen2, Qwen3 and Llama against `transformers`, block by block; what scanning, remat and the mesh
may change."""

import contextlib
import copy
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tiny_models import FAMILIES, LLAMA3, THETA, YARN, write_text

from longrl_jax import models
from longrl_jax.models import decoder
from longrl_jax.models.rope import Rope, parse_rope, rates, rotate
from longrl_jax.sharding import make_mesh

ATOL = 2e-5  # float32 sums of up to 96 products, in another order; states are of order 1 to 10
GRAD_RTOL = 1e-5  # the same sums, recomputed by another program
BF16_SHARE = 1.5  # of the mean error of transformers: the same types, sums in another order
B, T = 2, 24


@pytest.fixture(scope="module")
def pair(request, tmp_path_factory):
    """(torch model, our config, our model, the folder both come from); Qwen2 with an untied head,
    or as `tied_and_untied` or `families` say."""
    family, tied = getattr(request, "param", ("qwen2", False))
    folder = tmp_path_factory.mktemp(family)
    torch_model = write_text(folder, family, tied=tied)
    cfg, model = models.load(folder)
    return torch_model, cfg, model, folder


def pairs(*params):
    ids = [f"{family}-{'tied' if tied else 'untied'}" for family, tied in params]
    return pytest.mark.parametrize("pair", params, ids=ids, indirect=True, scope="module")


tied_and_untied = pairs(("qwen2", True), ("qwen2", False))
families = pairs(*((family, False) for family in FAMILIES))


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


BLOCKS = [
    *((("qwen2", False), block) for block in ("norm1", "attn", "norm2", "mlp", "layer")),
    *(
        ((family, False), block)
        for family in FAMILIES
        if family != "qwen2"
        for block in ("attn", "layer")
    ),
]  # the other blocks do not know their family


@pytest.mark.parametrize(
    ("pair", "block"),
    BLOCKS,
    ids=[f"{family}-{block}" for (family, _), block in BLOCKS],
    indirect=["pair"],
    scope="module",
)
@pytest.mark.parametrize("index", [0, 1])
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


@families
def test_rotation_equals_transformers(pair, rng):
    from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

    torch_model, cfg, _, _ = pair
    q = rng.standard_normal((B, T, cfg.num_heads, cfg.head_dim)).astype(np.float32)
    pos = rng.integers(0, 500, (B, T))
    torch_q = torch.tensor(q).transpose(1, 2)
    cos, sin = torch_model.model.rotary_emb(torch_q, torch.tensor(pos))
    want = apply_rotary_pos_emb(torch_q, torch_q, cos, sin)[0].transpose(1, 2)
    got = rotate(jnp.asarray(q), jnp.asarray(pos), cfg.rope)
    np.testing.assert_allclose(got, want, atol=1e-4)  # an angle of 500 has 3e-5 of rounding


@pairs(*((family, tied) for family in FAMILIES for tied in (True, False)))
def test_logits_equal_transformers(pair, rng):
    torch_model, _, model, _ = pair
    tokens = rng.integers(0, 99, (B, T))
    with torch.no_grad():
        want = torch_model(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(logits_of(model, jnp.asarray(tokens)), want, atol=1e-4)


@pairs(("qwen2", False), ("qwen3", False), ("llama3", False))
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
        cfg = decoder.Config(
            vocab_size=16, width=32, num_layers=num_layers, num_heads=2, num_kv_heads=1,
            head_dim=16, mlp_width=32, norm_eps=1e-6, rope=Rope(theta=1e4), tied=True,
        )  # fmt: skip
        model = nnx.eval_shape(lambda: decoder.Model(cfg, rngs=nnx.Rngs(0)))
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


@pairs(("qwen2", True), ("qwen3", False), ("llama3", False))
def test_bfloat16_errs_about_as_much_as_transformers(pair, rng):
    torch_model, _, model, _ = pair
    tokens = rng.integers(0, 99, (B, T))
    with torch.no_grad():
        exact = torch_model(torch.tensor(tokens)).logits.numpy()
        rounded = copy.deepcopy(torch_model).bfloat16()(torch.tensor(tokens)).logits
    theirs = np.abs(rounded.float().numpy() - exact).mean()
    x = model.embed(jnp.asarray(tokens), compute_dtype=jnp.bfloat16)
    h = model.hidden(x, *ids_of(), compute_dtype=jnp.bfloat16)
    ours = np.abs(np.asarray(h @ model.head().astype(jnp.bfloat16), np.float32) - exact).mean()
    assert 0 < ours < BF16_SHARE * theirs


def test_bfloat16_compute_keeps_float32_parameters(pair):
    _, _, model, _ = pair
    x = model.embed(jnp.zeros((1, 4), jnp.int32), compute_dtype=jnp.bfloat16)
    h = model.hidden(x, *ids_of(1, 4), compute_dtype=jnp.bfloat16)
    assert x.dtype == h.dtype == jnp.bfloat16
    assert model.head().dtype == jnp.float32


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("model_type", "mamba", "one of qwen2, qwen3, llama"),
        ("use_sliding_window", True, "use_sliding_window"),
        ("hidden_act", "gelu", "hidden_act"),
        ("quantization_config", {"bits": 4}, "quantization_config"),
        ("layer_types", ["full_attention", "sliding_attention"], "layer_types='sliding_attention'"),
        ("partial_rotary_factor", 0.5, "partial_rotary_factor"),
        ("rope_interleaved", True, "rope_interleaved"),
        ("mlp_bias", True, "mlp_bias"),
        ("rope_parameters", {"rope_type": "linear", "factor": 4.0}, "rope_parameters.rope_type"),
        ("rope_parameters", {"rope_type": ["yarn"]}, "rope_parameters.rope_type"),
        ("rope_parameters", {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddi"),
        ("rope_parameters", YARN | {"mscale": 0.7}, "rope_parameters.mscale=0.7"),
        ("rope_parameters", YARN | {"factor": "4"}, "rope_parameters: factor='4' must be"),
        (
            "rope_parameters",
            LLAMA3 | {"high_freq_factor": 1.0},
            "high_freq_factor=1 must be over low_freq_factor=1",
        ),
        ("rope_parameters", {"mrope_section": [16, 24, 24]}, "rope_parameters.mrope_section"),
        ("num_hidden_layers", None, "num_hidden_layers"),
        ("num_key_value_heads", 3, "num_key_value_heads"),
    ],
)
def test_a_field_we_would_have_to_ignore_is_refused(pair, field, value, named):
    _, _, _, folder = pair
    tree = json.loads((folder / "config.json").read_text()) | {field: value}
    with pytest.raises(ValueError, match=named):
        decoder.parse_config(tree, where="here")


@pairs(("qwen3", False), ("llama", False))
def test_biases_that_a_config_asks_for_are_refused(pair):
    tree = json.loads((pair[3] / "config.json").read_text()) | {"attention_bias": True}
    with pytest.raises(ValueError, match="attention_bias=True is not supported"):
        decoder.parse_config(tree, where="here")


def test_a_text_model_takes_no_features(pair):
    _, cfg, model, _ = pair
    tokens = jnp.zeros((1, 4), jnp.int32)
    with pytest.raises(ValueError, match="no media features"):
        model.embed(tokens, tokens > 0, jnp.zeros((1, 4, 8)))
    assert decoder.media_layout(cfg) is None


@families
def test_older_configs_say_theta_at_the_top(pair):
    """As transformers 4 wrote them: "type" or "rope_type" among the fields of rope_scaling."""
    _, cfg, _, folder = pair
    tree = json.loads((folder / "config.json").read_text())
    fields = tree.pop("rope_parameters")
    del fields["rope_theta"]
    kind = fields.pop("rope_type")
    for name in ("type", "rope_type"):
        scaling = None if kind == "default" else fields | {name: kind}
        older = tree | {"rope_theta": THETA, "rope_scaling": scaling}
        assert decoder.parse_config(older, where="here") == cfg


@pytest.mark.parametrize("family", ["qwen2_yarn", "llama3"])
def test_a_scaling_leaves_fast_pairs_alone_and_slows_the_slow_ones(family):
    """So that the parity above says something about every band."""
    fields = FAMILIES[family][1]["rope_parameters"]
    tree = {"model_type": "llama", "rope_parameters": fields}
    scaled_h = rates(parse_rope(tree, where="here"), 16)[0]
    share_h = rates(Rope(theta=THETA), 16)[0] / scaled_h
    assert share_h[0] == 1 and share_h[-1] == pytest.approx(fields["factor"])
    assert any(1.01 < share < 0.99 * fields["factor"] for share in share_h)


def test_a_tokens_angle_is_exact_where_the_published_lengths_end():
    """float32 angles of position 131,071 against float64: rounding of the product alone."""
    pos = jnp.asarray([[131_071]])
    x = jnp.ones((1, 1, 1, 128))
    got = rotate(x, pos, Rope(theta=1e6))[0, 0, 0]
    angle_h = 131_071 * rates(Rope(theta=1e6), 128)[0].astype(np.float64)
    want = np.concatenate([np.cos(angle_h) - np.sin(angle_h), np.cos(angle_h) + np.sin(angle_h)])
    np.testing.assert_allclose(got, want, atol=131_071 * 2**-23)


@pytest.mark.parametrize("mesh", [None, {"data": 2, "seq": 4}])
def test_an_mlp_in_chunks_of_tokens_is_the_same_mlp(mesh, monkeypatch):
    """Values and gradients; 24 tokens a device in three chunks of 8, and the chunks are there."""
    cfg = decoder.Config(
        vocab_size=9, width=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8,
        mlp_width=24, norm_eps=1e-6, rope=Rope(theta=1e4), tied=False,
    )  # fmt: skip
    graphdef, state = nnx.split(decoder.Mlp(cfg, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 24 * (4 if mesh else 1), 16))

    def run(chunk):
        monkeypatch.setattr(decoder, "MLP_CHUNK", chunk)

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
    monkeypatch.setattr(decoder, "MLP_CHUNK", 10)
    assert [decoder._num_chunks(n) for n in (1, 10, 11, 24, 35, 31)] == [1, 1, 1, 3, 5, 1]
