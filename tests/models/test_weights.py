"""The parameter table: loading, export, round trips, refusals, shardings and order."""

import json
import weakref

import jax
import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
import transformers
from flax import nnx
from tiny_models import WIDTH, write_text, write_vila

from longrl_jax import models
from longrl_jax.models import copying, decoder, hf_files, vila, weights
from longrl_jax.models.rope import Rope
from longrl_jax.sharding import make_mesh

MIXED = ("mlp.", "layer_norm1", "layers.4", "embed_tokens", "head.probe")
"""Parts of names of tensors that lie in bfloat16, beside others in float32."""
MESH = {"fsdp": 2, "seq": 2, "tensor": 2}


def raw_tensors(folder) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """name -> (type, shape, bytes) of every tensor under a folder, read by the official package."""
    out = {}
    for path in sorted(folder.rglob("*.safetensors")):
        sub = path.parent.relative_to(folder).as_posix()
        for name, x in safetensors.torch.load_file(path).items():
            raw = x.contiguous().flatten().view(torch.uint8).numpy().tobytes()
            out[f"{sub}/{name}"] = (str(x.dtype), tuple(x.shape), raw)
    return out


@pytest.fixture(scope="module")
def vila_folder(tmp_path_factory):
    """A tied checkpoint with published names and two types of numbers."""
    folder = tmp_path_factory.mktemp("vila") / "source"
    write_vila(folder, bfloat16=MIXED)
    return folder


@pytest.fixture(scope="module")
def loaded(vila_folder):
    """(config, model) of it."""
    return models.load(vila_folder)


def abstract_of(cfg):
    backbone = vila if isinstance(cfg, vila.Config) else decoder
    return nnx.state(nnx.eval_shape(lambda: backbone.Model(cfg, rngs=nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("prefix", ["", "vision_model."], ids=["plain", "published"])
def test_round_trip_keeps_every_tensor(tmp_path, tied, prefix):
    source, out = tmp_path / "source", tmp_path / "out"
    write_vila(source, tied=tied, prefix=prefix, bfloat16=MIXED)
    cfg, model = models.load(source)
    models.save(out, model, cfg, source)
    want = raw_tensors(source)
    assert raw_tensors(out) == want
    assert len({kind for kind, _, _ in want.values()}) == 2  # of both types
    assert f"vision_tower/{prefix}head.probe" in want  # which our tower does not have
    assert ("llm/lm_head.weight" in want) == (not tied)
    files = {p.relative_to(source) for p in source.rglob("*") if p.suffix != ".safetensors"}
    assert {p.relative_to(out) for p in out.rglob("*") if p.suffix != ".safetensors"} == files
    for path in files:
        assert (
            not (source / path).is_file() or (out / path).read_text() == (source / path).read_text()
        )


@pytest.mark.parametrize(
    ("family", "tied", "extra"),
    [
        ("qwen2", True, ""),
        ("qwen3", True, "head"),
        ("qwen3", False, ""),
        ("qwen3_yarn", True, ""),
        ("llama", False, "rates"),
        ("llama3", True, ""),
    ],
)
def test_round_trip_of_a_text_folder_keeps_every_tensor(tmp_path, family, tied, extra):
    """Also what published files hold besides: the head of a tied model (Qwen3-0.6B), the rates of
    the rotation (Llama-2)."""
    source, out = tmp_path / "source", tmp_path / "out"
    write_text(source, family, tied=tied)
    (source / "tokenizer.json").write_text('{"version": "1.0"}\n')
    state = safetensors.torch.load_file(source / "model.safetensors")
    state = {n: x.to(torch.bfloat16) if "mlp." in n else x for n, x in state.items()}
    if extra == "head":
        state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    if extra == "rates":
        for i in range(2):
            state[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.rand(8)
    safetensors.torch.save_file(state, source / "model.safetensors", metadata={"format": "pt"})
    cfg, model = models.load(source)
    models.save(out, model, cfg, source)
    want = raw_tensors(source)
    assert raw_tensors(out) == want
    assert len({kind for kind, _, _ in want.values()}) == 2
    assert ("./lm_head.weight" in want) == (not tied or extra == "head")
    files = {p.name for p in source.iterdir() if p.suffix != ".safetensors"}
    assert {p.name for p in out.iterdir() if p.suffix != ".safetensors"} == files
    for name in files:
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_a_written_copy_of_a_tied_head_follows_the_table(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    write_text(source, "qwen3", tied=True)
    state = safetensors.torch.load_file(source / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(state, source / "model.safetensors")
    cfg, model = models.load(source)
    model.text.table.set_value(model.text.table.get_value() + 1)
    models.save(out, model, cfg, source)
    after = safetensors.torch.load_file(out / "model.safetensors")
    torch.testing.assert_close(after["lm_head.weight"], state["lm_head.weight"] + 1)
    torch.testing.assert_close(after["model.embed_tokens.weight"], after["lm_head.weight"])


def test_a_vila_folder_may_hold_a_llama(tmp_path):
    """VILA-1.5: its decoder is Llama-2, its projector packs 2x2."""
    source, out = tmp_path / "source", tmp_path / "out"
    parts = write_vila(source, family="llama", tied=False, kind="mlp_downsample", bfloat16=MIXED)
    rates = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.rand(8) for i in range(2)}
    state = safetensors.torch.load_file(source / "llm" / "model.safetensors")
    safetensors.torch.save_file(state | rates, source / "llm" / "model.safetensors")
    cfg, model = models.load(source)
    models.save(out, model, cfg, source)
    assert raw_tensors(out) == raw_tensors(source)
    pushed = {name: x.shape for name, x in models.llm_weights(model, cfg)}
    assert pushed == {n: tuple(x.shape) for n, x in parts["llm"].state_dict().items()}


def test_round_trip_on_a_mesh_keeps_every_tensor(vila_folder, tmp_path):
    cfg, model = models.load(vila_folder, mesh=make_mesh(**MESH))
    models.save(tmp_path / "out", model, cfg, vila_folder)
    assert raw_tensors(tmp_path / "out") == raw_tensors(vila_folder)


def test_several_input_shards_and_several_output_shards(tmp_path, rng):
    torch_model = write_text(tmp_path / "whole", tied=False)
    torch_model.save_pretrained(tmp_path / "cut", max_shard_size="60KB")
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) > 2
    cfg, model = models.load(tmp_path / "cut")
    limit_bytes = 100_000
    models.save(tmp_path / "out", model, cfg, tmp_path / "cut", shard_size_bytes=limit_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert all(f.stat().st_size <= limit_bytes + 4096 for f in files)  # and a header
    assert raw_tensors(tmp_path / "out") == raw_tensors(tmp_path / "whole")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokens = torch.tensor(rng.integers(0, 99, (1, 8)))
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, torch_model(tokens).logits)


def test_an_export_of_another_type_says_so_in_its_configs(vila_folder, loaded, tmp_path):
    cfg, model = loaded
    dtype = jax.numpy.bfloat16.dtype
    models.save(tmp_path / "out", model, cfg, vila_folder, dtype=dtype)
    tree = json.loads((tmp_path / "out" / "llm" / "config.json").read_text())
    assert tree.get("dtype", tree.get("torch_dtype")) == "bfloat16"
    ours = {n: x for n, x in raw_tensors(tmp_path / "out").items() if ".head." not in n}
    assert {kind for kind, _, _ in ours.values()} == {"torch.bfloat16"}
    source = safetensors.torch.load_file(vila_folder / "llm" / "model.safetensors")
    for name, x in source.items():
        want = x.to(torch.bfloat16).flatten().view(torch.uint8).numpy().tobytes()
        assert ours[f"llm/{name}"][2] == want


def test_code_and_pickles_are_not_copied(vila_folder, loaded, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in vila_folder.iterdir():
        (source / path.name).symlink_to(path)
    torch.save({}, source / "pytorch_model.bin")
    torch.save({}, source / "optimizer.pt")
    (source / "modeling_vila.py").write_text("raise SystemExit\n")
    (source / "LICENSE").write_text("terms\n")
    models.save(tmp_path / "out", loaded[1], loaded[0], source)
    assert {p.name for p in (tmp_path / "out").iterdir() if p.is_file()} == {
        "config.json",
        "LICENSE",
    }


def test_an_export_appears_whole_or_not_at_all(vila_folder, loaded, tmp_path):
    cfg, model = loaded
    short = nnx.state(model, nnx.Param)
    del short["text"]["norm"]["scale"]
    with pytest.raises(ValueError, match="disagree on .*text.norm.scale"):
        models.save(tmp_path / "out", short, cfg, vila_folder)
    more = nnx.state(model, nnx.Param)
    more["text"]["adapter"] = nnx.Param(jax.numpy.ones(2))  # would be left out without a word
    with pytest.raises(ValueError, match="disagree on .*text.adapter"):
        models.save(tmp_path / "out", more, cfg, vila_folder)
    assert not (tmp_path / "out").exists()
    models.save(tmp_path / "out", model, cfg, vila_folder)  # what was left there is in nobody's way
    with pytest.raises(ValueError, match="out exists and is not empty"):
        models.save(tmp_path / "out", model, cfg, vila_folder)


@pytest.fixture
def parts_of(loaded):
    """(abstract state, table, a checkpoint that fits them), free to be damaged."""
    cfg, model = loaded
    table = vila.table(cfg)
    hf = {name: np.array(x) for name, x in weights.to_hf(models.arrays_of(model), table)}
    return abstract_of(cfg), table, hf


LAYER_1 = "llm/model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda hf: hf.pop(LAYER_1), f"checkpoint lacks {LAYER_1}"),
        (
            lambda hf: hf.update({"llm/lora_A": np.ones(1)}),
            "1 checkpoint tensors have no row in the table, e.g. llm/lora_A",
        ),
        (
            lambda hf: hf.update({"llm/model.layers.2.mlp.up_proj.weight": hf[LAYER_1]}),
            "have no row in the table, e.g. llm/model.layers.2",
        ),
        (
            lambda hf: hf.update({LAYER_1: hf[LAYER_1][:-1]}),
            rf"{LAYER_1} -> text.layers.mlp.up.kernel: the file has \(64, 95\)",
        ),
        (lambda hf: hf.update({LAYER_1: hf[LAYER_1][0]}), rf"{LAYER_1} .* the file has \(64,\)"),
        (lambda hf: hf[LAYER_1].__setitem__((0, 0), np.nan), f"{LAYER_1} holds NaN"),
        (lambda hf: hf[LAYER_1].__setitem__((0, 0), np.inf), f"{LAYER_1} holds NaN or infinite"),
        (
            lambda hf: hf.update({LAYER_1: hf[LAYER_1].astype(np.int8)}),
            f"{LAYER_1} holds int8 numbers",
        ),
    ],
    ids=["missing", "left over", "layer too many", "misshapen", "flat", "nan", "inf", "int8"],
)
def test_what_the_table_does_not_account_for_is_refused_by_name(parts_of, damage, named):
    abstract, table, hf = parts_of
    damage(hf)
    with pytest.raises(ValueError, match=named):
        list(weights.from_hf(abstract, table, hf, ignored=vila.IGNORED))


def test_names_are_checked_before_the_first_array_is_read(parts_of):
    abstract, table, hf = parts_of
    hf.pop(LAYER_1)

    class Unread(dict):
        def __getitem__(self, name):
            raise AssertionError(f"{name} was read")

    with pytest.raises(ValueError, match="lacks"):
        next(weights.from_hf(abstract, table, Unread(hf)))


def test_a_tied_checkpoint_with_a_head_of_its_own_is_refused(tmp_path):
    write_text(tmp_path, tied=False)
    tree = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(ValueError, match="lm_head.weight differs from .*tie_word_embeddings"):
        models.load(tmp_path)


def test_a_nan_in_a_tied_table_and_its_copy_is_called_one(tmp_path):
    """A NaN differs from itself, so the two would be said to differ."""
    write_text(tmp_path, "qwen3", tied=True)
    file = tmp_path / "model.safetensors"
    state = safetensors.torch.load_file(file)
    state["model.embed_tokens.weight"][0, 0] = torch.nan
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    safetensors.torch.save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="model.embed_tokens.weight holds NaN"):
        models.load(tmp_path)


def test_the_table_covers_every_parameter_and_every_tensor(parts_of, vila_folder):
    abstract, table, _ = parts_of
    assert set(table) == set(weights.by_path(abstract))
    named = {
        row.hf.format(i=i)
        for path, row in table.items()
        for i in range(weights.by_path(abstract)[path].shape[0] if weights.stacked(row) else 1)
    }
    unused = {
        n for n in raw_tensors(vila_folder) if n.startswith("vision_tower/vision_model.head.")
    }
    assert named == set(raw_tensors(vila_folder)) - unused and unused


@pytest.mark.parametrize(
    "path", ["text.norm.scale", "vision.layers.q.bias", "projector.layers.4.bias"]
)
def test_a_row_that_is_missing_is_noticed_in_both_directions(parts_of, path):
    abstract, table, hf = parts_of
    short = {p: row for p, row in table.items() if p != path}
    with pytest.raises(ValueError, match=f"disagree on .*{path}"):
        next(weights.from_hf(abstract, short, hf))
    with pytest.raises(ValueError, match=f"disagree on .*{path}"):
        next(weights.to_hf(abstract, short))


def test_two_rows_of_one_name_are_refused(parts_of):
    abstract, table, hf = parts_of
    double = table | {"text.norm.scale": table["text.table"]}
    with pytest.raises(ValueError, match="embed_tokens.weight stands in two rows"):
        next(weights.from_hf(abstract, double, hf))


def test_every_parameter_lies_on_the_mesh_as_drawn(vila_folder, loaded):
    """fsdp=2, seq=2, tensor=2: the part of an array that one device has, drawn by hand.

    text: width 64, 4 + 2 heads of 16, MLP 96, 99 tokens; tower: width 32, MLP 48, patches of 8;
    projector: 4 * 32 -> 64. Rows of 64 or 32 are cut in 4 (fsdp, seq), heads and MLP in 2 (tensor).
    """
    want = {
        "text.table": (99, 16),  # 99 is odd: the vocabulary stays whole
        "text.norm.scale": (64,),
        "text.layers.norm1.scale": (2, 64),
        "text.layers.norm2.scale": (2, 64),
        "text.layers.attn.q.kernel": (2, 16, 32),
        "text.layers.attn.q.bias": (2, 32),
        "text.layers.attn.k.kernel": (2, 16, 16),
        "text.layers.attn.k.bias": (2, 16),
        "text.layers.attn.v.kernel": (2, 16, 16),
        "text.layers.attn.v.bias": (2, 16),
        "text.layers.attn.o.kernel": (2, 32, 16),
        "text.layers.mlp.gate.kernel": (2, 16, 48),
        "text.layers.mlp.up.kernel": (2, 16, 48),
        "text.layers.mlp.down.kernel": (2, 48, 16),
        "projector.layers.1.scale": (128,),
        "projector.layers.1.bias": (128,),
        "projector.layers.2.kernel": (32, 64),
        "projector.layers.2.bias": (64,),
        "projector.layers.4.kernel": (16, 64),
        "projector.layers.4.bias": (64,),
        "vision.patch_kernel": (8, 8, 3, 8),
        "vision.patch_bias": (32,),
        "vision.positions": (16, 8),
        "vision.norm.scale": (32,),
        "vision.norm.bias": (32,),
        **{f"vision.layers.norm{i}.{end}": (3, 32) for i in (1, 2) for end in ("scale", "bias")},
        **{f"vision.layers.{name}.kernel": (3, 8, 16) for name in "qkv"},
        **{f"vision.layers.{name}.bias": (3, 16) for name in "qkv"},
        "vision.layers.o.kernel": (3, 16, 8),
        "vision.layers.o.bias": (3, 32),
        "vision.layers.up.kernel": (3, 8, 24),
        "vision.layers.up.bias": (3, 24),
        "vision.layers.down.kernel": (3, 24, 8),
        "vision.layers.down.bias": (3, 32),
    }
    sharded = models.arrays_of(models.load(vila_folder, mesh=make_mesh(**MESH))[1])
    assert {path: x.addressable_shards[0].data.shape for path, x in sharded.items()} == want
    for path, x in models.arrays_of(loaded[1]).items():
        np.testing.assert_array_equal(sharded[path], x, err_msg=path)


class OfOneProcess:
    """A sharding as one of several processes sees it: some of the devices are its own."""

    def __init__(self, sharding, devices):
        self.sharding, self.devices = sharding, devices

    def addressable_devices_indices_map(self, shape):
        everywhere = self.sharding.devices_indices_map(shape)
        return {device: everywhere[device] for device in self.devices}


class Noted:
    """A stored tensor that notes the bytes of every read."""

    def __init__(self, stored, reads):
        self.stored, self.reads = stored, reads
        self.shape, self.dtype = stored.shape, stored.dtype

    def __getitem__(self, index):
        x = self.stored[index]
        self.reads.append(x.nbytes)
        return x


def test_a_process_reads_once_what_its_devices_hold_and_no_more(vila_folder, loaded, monkeypatch):
    """Two processes of four devices; their parts are counted number by number."""
    cfg, model = loaded
    abstract, table, whole = abstract_of(cfg), vila.table(cfg), models.arrays_of(model)
    mesh = make_mesh(**MESH)
    places = weights.shardings(abstract, table, mesh)
    monkeypatch.setattr(jax, "make_array_from_single_device_arrays", lambda _, place, parts: parts)
    kinds = {}
    for process in range(2):
        devices = list(mesh.devices.flat)[4 * process :][:4]
        reads = {name: [] for name in hf_files.open_tensors(vila_folder, vila.FOLDERS)}
        tensors = {
            name: Noted(x, reads[name])
            for name, x in hf_files.open_tensors(vila_folder, vila.FOLDERS).items()
        }
        mine = {path: OfOneProcess(place, devices) for path, place in places.items()}
        names = weights.check(abstract, table, tensors, ignored=vila.IGNORED)
        for path, parts in weights.placed(abstract, table, tensors, mine, ignored=vila.IGNORED):
            needed = np.zeros(whole[path].shape, bool)
            for device, part in zip(devices, parts, strict=True):
                index = places[path].devices_indices_map(needed.shape)[device]
                needed[index] = True
                assert part.devices() == {device}
                np.testing.assert_array_equal(part, whole[path][index], err_msg=path)
            numbers = sum(sum(reads[name]) // tensors[name].dtype.itemsize for name in names[path])
            assert numbers == needed.sum(), path
            kinds[path, process] = numbers / needed.size
            layers = needed.shape[0] if weights.stacked(table[path]) else 1
            most = max(max(reads[name]) // tensors[name].dtype.itemsize for name in names[path])
            assert most == parts[0].size // layers, path
    assert kinds["text.layers.mlp.up.kernel", 0] == kinds["text.layers.mlp.up.kernel", 1] == 0.5
    assert kinds["text.norm.scale", 0] == kinds["text.norm.scale", 1] == 1


def test_an_untied_head_of_even_size_is_split_over_tensor(loaded):
    cfg = decoder.Config(
        vocab_size=100, width=WIDTH, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
        mlp_width=96, norm_eps=1e-6, rope=Rope(theta=1e4), tied=False,
    )  # fmt: skip
    places = weights.shardings(abstract_of(cfg), decoder.table(cfg), make_mesh(**MESH))
    assert places["text.head_kernel"].shard_shape((64, 100)) == (16, 50)
    assert places["text.table"].shard_shape((100, 64)) == (50, 16)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("mesh", [None, MESH], ids=["one device", "mesh"])
def test_a_push_goes_layer_after_layer_and_holds_one_layer(tmp_path, tied, mesh):
    """Counted where the memory is: arrays that JAX keeps, and those handed out and not dropped."""
    num_layers = 5
    torch_model = write_text(tmp_path, tied=tied, num_layers=num_layers)
    layer_names: dict[str, set[str]] = {}  # a tensor outside the layers is a layer of its own
    for name in torch_model.state_dict():
        number = name.partition(".layers.")[2].partition(".")[0]
        layer_names.setdefault(number or name, set()).add(name)
    cfg, model = models.load(tmp_path, mesh=mesh and make_mesh(**mesh))
    state = nnx.state(model, nnx.Param)
    before_bytes = live_bytes()
    handed: list[tuple[weakref.ref, int]] = []
    most_bytes = most_jax_bytes = 0
    layer: dict[str, np.ndarray] = {}
    order, sizes_bytes = [], []
    for name, x in models.llm_weights(state, cfg):
        if not any(ref() is x for ref, _ in handed):  # the tied head is the table again
            handed.append((weakref.ref(x), x.nbytes))
        layer[name] = x
        del x
        most_bytes = max(most_bytes, sum(n for ref, n in handed if ref() is not None))
        most_jax_bytes = max(most_jax_bytes, live_bytes() - before_bytes)
        number = next(n for n, names in layer_names.items() if name in names)
        assert set(layer) <= layer_names[number], "a layer comes in one piece"
        if set(layer) == layer_names[number]:
            order.append(number)
            sizes_bytes.append(sum(x.nbytes for x in layer.values()))
            layer.clear()
    assert order[-num_layers:] == [str(i) for i in range(num_layers)]
    assert set(order) == set(layer_names) and len(order) == len(layer_names)
    assert 0 < most_bytes <= max(sizes_bytes)
    assert most_jax_bytes <= max(sizes_bytes)
    assert max(sizes_bytes) < sum(sizes_bytes) / 3  # so that holding everything would fail


def live_bytes() -> int:
    return sum(x.nbytes for x in jax.live_arrays())


def test_every_push_names_the_head(tmp_path):
    """vLLM keeps a packed copy of a tied head, which would go stale."""
    torch_model = write_text(tmp_path, tied=True)
    cfg, model = models.load(tmp_path)
    pushed = {name: np.array(x) for name, x in models.llm_weights(model, cfg)}
    assert set(pushed) == set(torch_model.state_dict())
    for name, x in torch_model.state_dict().items():
        np.testing.assert_array_equal(pushed[name], x.numpy(), err_msg=name)


def test_the_language_model_alone_loads_in_transformers(vila_folder, tmp_path, rng):
    copying.copy(vila_folder, tmp_path / "text", text_only=True)
    assert raw_tensors(tmp_path / "text") == raw_tensors(vila_folder / "llm")
    tokens = torch.tensor(rng.integers(0, 99, (1, 8)))
    ours, theirs = (
        transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        for folder in (tmp_path / "text", vila_folder / "llm")
    )
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, theirs(tokens).logits, rtol=0, atol=0)


@pytest.mark.parametrize("tree", [{}, {"model_type": "mamba"}])
def test_an_unknown_model_type_lists_the_known(tmp_path, tree):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(
        ValueError,
        match="choose a checkpoint of llama, llava_llama, qwen2, qwen2_5_vl, qwen3, vila",
    ):
        models.backbone_of(tmp_path)
