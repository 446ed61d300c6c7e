"""`python -m longrl_jax.convert`: what it writes is read here by transformers and by vLLM."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.torch
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrl_jax import convert, models
from longrl_jax.config import RolloutConfig
from longrl_jax.data import prompts

ROOT = Path(__file__).parents[1]
TINY_VILA = ROOT / "configs" / "models" / "tiny_vila.json"
LOGITS_ATOL = 1e-4  # float32 through 4 layers in another order of sums; logits are of order 1
ENGINE_ATOL = 1e-4  # the contract of engine and learner log-probabilities (docs/design.md)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<vila/video>")


def run(*args: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "longrl_jax.convert", *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def call(*args: str | Path) -> None:
    convert.main([str(x) for x in args])


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.relative_to(folder).as_posix()}/{name}": x
        for path in sorted(folder.rglob("*.safetensors"))
        for name, x in safetensors.torch.load_file(path).items()
    }


def assert_same_bytes(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    assert set(got) == set(want)
    for name, x in want.items():
        assert (got[name].dtype, got[name].shape) == (x.dtype, x.shape), name
        assert torch.equal(got[name].flatten().view(torch.uint8), x.flatten().view(torch.uint8))


def torch_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(tokens)).logits.numpy()


def our_logits(folder: Path, tokens: np.ndarray) -> np.ndarray:
    _, model = models.load(folder)
    order = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    ids = order, order, jnp.zeros_like(order), jnp.ones_like(order)
    return np.asarray(model.hidden(model.embed(jnp.asarray(tokens)), *ids) @ model.head())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    lines = [
        f"Question {i}: which colour does the {shape} have in the video?\n\nA. red\nB. blue\n"
        f"<think>The {shape} is red.</think> <answer>A</answer>\n"
        for i in range(40)
        for shape in ("circle", "square", "triangle")
    ]
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, corpus):
    """The demo's birth, by the real command."""
    out = tmp_path_factory.mktemp("init") / "checkpoint"
    done = run("init", TINY_VILA, out, "--corpus", corpus)
    assert done.returncode == 0, done.stderr
    assert "frames of 36 x 36 px become 1 x 1 tokens" in done.stdout
    return out


@pytest.fixture
def tokens() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 261, (2, 12)).astype(np.int32)


def test_init_writes_a_tokenizer_that_transformers_loads(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "llm")
    for text in (*SPECIAL, "\n"):
        assert len(tokenizer.encode(text)) == 1, text
    inside = tokenizer.encode("red<vila/video>\n<vila/video>\nblue<|im_end|>")
    ids = {text: tokenizer.encode(text)[0] for text in (*SPECIAL, "\n")}
    assert [inside.count(ids[text]) for text in ("<vila/video>", "\n", "<|im_end|>")] == [2, 2, 1]
    text = "Häuser, 空, \t<b> and  two spaces"  # bytes stand for whatever was not learned
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode("which colour does the circle have")) < 15  # it has learned words
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("<|im_end|>", "<|endoftext|>")
    generation = json.loads((checkpoint / "llm" / "generation_config.json").read_text())
    assert generation == {
        "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
        "pad_token_id": ids["<|endoftext|>"],
    }


def test_init_writes_a_chat_template(checkpoint):
    tokenizer = AutoTokenizer.from_pretrained(checkpoint / "llm")
    chat = [{"role": "user", "content": "<vila/video>\nWhich?"}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    want = "<|im_start|>user\n<vila/video>\nWhich?<|im_end|>\n<|im_start|>assistant\n"
    assert text == want


def test_the_vocabulary_is_as_large_as_the_tokenizer(checkpoint):
    length = len(AutoTokenizer.from_pretrained(checkpoint / "llm"))
    assert 261 < length <= 640
    assert json.loads((checkpoint / "llm" / "config.json").read_text())["vocab_size"] == length
    top = json.loads((checkpoint / "config.json").read_text())
    assert top["llm_cfg"]["vocab_size"] == length
    table = tensors_of(checkpoint)["llm/model.embed_tokens.weight"]
    assert table.shape == (length, 128)


def test_init_is_decided_by_the_seed(checkpoint, corpus, tmp_path):
    for seed in ("0", "1"):
        call("init", TINY_VILA, tmp_path / seed, "--corpus", corpus, "--seed", seed)
    assert_same_bytes(tensors_of(tmp_path / "0"), tensors_of(checkpoint))
    for path in checkpoint.rglob("*"):
        if path.is_file():
            assert (tmp_path / "0" / path.relative_to(checkpoint)).read_bytes() == path.read_bytes()
    other = tensors_of(tmp_path / "1")
    random = [n for n, x in tensors_of(checkpoint).items() if x.ndim > 1]
    assert random and not any(torch.equal(other[n], tensors_of(checkpoint)[n]) for n in random)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3", "llama"])
def test_init_of_a_text_model_without_corpus(tmp_path, tokens, model_type):
    config = json.loads(TINY_VILA.read_text())["llm_cfg"]
    config |= {"tie_word_embeddings": True, "model_type": model_type}
    config["architectures"] = [f"{model_type.capitalize()}ForCausalLM"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    call("init", tmp_path / "config.json", tmp_path / "out")
    assert len(AutoTokenizer.from_pretrained(tmp_path / "out")) == 261  # 256 bytes and 5 specials
    got, want = our_logits(tmp_path / "out", tokens), torch_logits(tmp_path / "out", tokens)
    np.testing.assert_allclose(got, want, atol=LOGITS_ATOL)


def test_time_tokens_are_one_token_wherever_they_stand(tmp_path, corpus):
    call("init", TINY_VILA, tmp_path, "--corpus", corpus, "--time-tokens", "64")
    tokenizer = prompts.load_tokenizer(tmp_path / "llm")
    (id,) = tokenizer.encode("<14s>")
    for before, after in [("", ""), ("x", "y"), ("a ", " b"), ("<12s>", "<16s>"), ("\n", "?")]:
        tokens = tokenizer.encode(f"{before}<14s>{after}")
        assert tokens == [*tokenizer.encode(before), id, *tokenizer.encode(after)]
        assert tokenizer.decode(tokens) == f"{before}<14s>{after}"
    times = [tokenizer.encode(f"<{t}s>") for t in range(64)]
    assert len({tuple(time) for time in times}) == 64 and {len(time) for time in times} == {1}
    assert len(tokenizer.encode("<64s>")) > 1
    assert tokenizer.encode("1<vila/video>4s")[1] == tokenizer.encode("<vila/video>")[0]
    assert prompts.decode_text(np.array([id]), tokenizer) == "<14s>"
    prompts.answer_tokens("at <14s> is red", tokenizer)  # a word, not a special token
    table = tensors_of(tmp_path)["llm/model.embed_tokens.weight"]
    assert len(tokenizer) == len(table) <= 640


def attention_of_layer_0(folder: Path, x: np.ndarray) -> np.ndarray:
    """Weights [N, T, T] of normed states x [T, D], from the file's tensors, in complex numbers."""
    cfg = json.loads((folder / "config.json").read_text())
    state = {name: t.numpy() for name, t in tensors_of(folder).items()}
    num_tokens, half = len(x), cfg["hidden_size"] // cfg["num_attention_heads"] // 2
    rate = cfg["rope_theta"] ** (-np.arange(half) / half)
    turn = np.exp(1j * np.arange(num_tokens)[:, None, None] * rate)

    def turned(name):
        weight, bias = (state[f"./model.layers.0.self_attn.{name}.{n}"] for n in ("weight", "bias"))
        y = (x @ weight.T + bias).reshape(num_tokens, -1, 2, half)
        return (y[:, :, 0] + 1j * y[:, :, 1]) * turn

    q, k = turned("q_proj"), turned("k_proj")
    k = k.repeat(q.shape[1] // k.shape[1], axis=1)
    score = np.einsum("mnh,snh->nms", q, k.conj()).real / (2 * half) ** 0.5
    score = np.where(np.tri(num_tokens, dtype=bool), score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True)


def test_looking_back_heads_look_one_two_three_tokens_back(tmp_path, corpus):
    num_tokens = 200
    x = np.random.default_rng(0).standard_normal((num_tokens, 128)).astype(np.float32)
    for folder, strength in (("firm", 5), ("random", 0)):
        call("init", TINY_VILA, tmp_path / folder, "--looking-back", strength)
    weight = attention_of_layer_0(tmp_path / "firm" / "llm", x)
    for head, back in enumerate((1, 2, 3)):
        there = weight[head].diagonal(-back)
        assert (weight[head, back:].argmax(-1) == np.arange(num_tokens - back)).all()
        assert there.mean() > 0.5
    others = attention_of_layer_0(tmp_path / "random" / "llm", x)
    assert others[:3].max(-1)[:, 100:].mean() < 0.5
    for offset in (1, 2, 3):  # neither the other heads nor a random start prefer a place
        assert weight[3].diagonal(-offset).mean() < 0.1
        assert others[:, range(offset, num_tokens), range(num_tokens - offset)].mean() < 0.1
    firm, random = (tensors_of(tmp_path / folder) for folder in ("firm", "random"))
    changed = {name for name in firm if not torch.equal(firm[name], random[name])}
    attention = "llm/model.layers.0.self_attn."
    assert changed == {
        "llm/lm_head.weight",
        *(f"{attention}{n}_proj.{kind}" for n in "qk" for kind in ("weight", "bias")),
    }


@pytest.fixture
def published(checkpoint, tmp_path):
    """The checkpoint as a publisher might have it: two types, several files, a pooling head."""
    folder = tmp_path / "published"
    shutil.copytree(checkpoint, folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "llm", dtype=torch.bfloat16)
    (folder / "llm" / "model.safetensors").unlink()
    model.save_pretrained(folder / "llm", max_shard_size="500KB")
    assert len(list((folder / "llm").glob("*.safetensors"))) > 2
    path = folder / "vision_tower" / "model.safetensors"
    state = safetensors.torch.load_file(path)
    state["vision_model.head.probe"] = torch.randn(1, 1, 64, dtype=torch.float16)
    state["vision_model.embeddings.position_ids"] = torch.arange(16)[None]
    safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    return folder


def test_from_hf_copies_byte_by_byte(published, tmp_path, capsys):
    call("from-hf", published, tmp_path / "out")
    want = tensors_of(published)
    assert_same_bytes(tensors_of(tmp_path / "out"), want)
    assert {x.dtype for x in want.values()} == {
        torch.float32, torch.float16, torch.bfloat16, torch.int64,
    }  # fmt: skip
    said = f"{len(want)} tensors, each equal to its source byte by byte"
    assert said in capsys.readouterr().out


def test_to_hf_keeps_types_or_sets_one(published, tmp_path):
    call("to-hf", published, tmp_path / "same")
    assert_same_bytes(tensors_of(tmp_path / "same"), tensors_of(published))
    call("to-hf", published, tmp_path / "half", "--dtype", "bfloat16", "--shard-gib", "0.0003")
    half = tensors_of(tmp_path / "half")
    used = [n for n in half if not n.endswith(("head.probe", "position_ids"))]
    assert {half[n].dtype for n in used} == {torch.bfloat16}
    assert half["vision_tower/vision_model.head.probe"].dtype == torch.float16  # not ours to change
    limit_bytes = int(0.0003 * 2**30) + 4096  # and a header
    files = list((tmp_path / "half" / "llm").glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < limit_bytes for f in files)


def test_to_hf_text_only_in_bfloat16_loads_in_transformers(checkpoint, tmp_path, tokens):
    out = tmp_path / "out"
    call("to-hf", checkpoint, out, "--dtype", "bfloat16", "--text-only")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert all(x.dtype == torch.bfloat16 for x in tensors_of(out).values())
    reference = AutoModelForCausalLM.from_pretrained(checkpoint / "llm", dtype=torch.float32)
    with torch.no_grad():
        for x in reference.parameters():
            x.copy_(x.to(torch.bfloat16))
        want = reference(torch.tensor(tokens)).logits.numpy()  # rounded by torch, not by us
    np.testing.assert_array_equal(torch_logits(out, tokens), want)
    np.testing.assert_allclose(our_logits(out, tokens), want, atol=LOGITS_ATOL)
    assert AutoTokenizer.from_pretrained(out).chat_template == convert.CHAT_TEMPLATE


def test_the_export_gives_the_same_logits_in_transformers_and_in_vllm(checkpoint, tmp_path, tokens):
    from rollout_bridge.vllm_engine import VllmEngine

    cfg, model = models.load(checkpoint)
    model.text.table.set_value(3 * model.text.table.get_value())  # not what `init` wrote
    models.save(tmp_path / "out", model, cfg, checkpoint)
    llm = models.llm_folder(tmp_path / "out")
    want = torch_logits(llm, tokens)
    np.testing.assert_allclose(our_logits(tmp_path / "out", tokens), want, atol=LOGITS_ATOL)

    num_new = 8
    settings = RolloutConfig(
        dtype="float32", max_model_len=128, kv_cache_gib=0.25, max_tokens=num_new
    )
    engine = VllmEngine(llm, cfg=settings, seed=0)
    try:
        groups = engine.generate(
            list(tokens), num_samples=1, temperature=0, max_tokens=num_new, seeds=[0, 1]
        )
    finally:
        engine.close()
    for prompt, (sample,) in zip(tokens, groups, strict=True):
        row = np.concatenate([prompt, sample.tokens])
        logps = torch.log_softmax(torch.tensor(torch_logits(llm, row[None])[0, :-1]), -1).numpy()
        answer = logps[len(prompt) - 1 :]
        np.testing.assert_array_equal(sample.tokens, answer.argmax(-1))
        np.testing.assert_allclose(sample.logps, answer.max(-1), atol=ENGINE_ATOL)
        assert len(sample.tokens) == num_new


def test_inspect_says_what_a_folder_holds(published, capsys):
    call("inspect", published)
    lines = capsys.readouterr().out.splitlines()
    tensors = tensors_of(published)
    vocab = tensors["llm/model.embed_tokens.weight"].shape[0]
    assert lines[:3] == [
        f"{published}: vila (llava_llama), {len(tensors)} tensors",
        f"text: 4 layers of 128, 4 heads of 32 (2 for keys), vocabulary {vocab}, untied head",
        "video: frames of 36 x 36 px become 1 x 1 tokens and a separator",
    ]
    text = [x for name, x in tensors.items() if name.startswith("llm/")]
    count = sum(x.numel() for x in text)
    assert f"llm bfloat16: {count:,} numbers, {2 * count / 2**20:,.1f} MiB" in lines
    assert "vision_tower int64: 16 numbers, 0.0 MiB" in lines


def with_llm(**changes):
    tree = json.loads(TINY_VILA.read_text())
    return tree | {"llm_cfg": tree["llm_cfg"] | changes}


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"model_type": "mamba"}, "config.json: model_type='mamba' is unknown"),
        (with_llm(vocab_size=260), "vocab_size=260 is too small: 256 bytes and 5 special tokens"),
        (with_llm(vocab_size="many"), "vocab_size='many' must be a positive whole number"),
        (with_llm(rope_scaling={"type": "linear", "factor": 2.0}), "rope_type='linear' is not"),
        (with_llm(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
        (with_llm() | {"vision_tower_cfg": None}, "vision_tower_cfg must hold the config of"),
        (with_llm() | {"llm_cfg": None}, "llm_cfg must hold the language model's config"),
        (with_llm() | {"s2": True}, "s2_scales=None must be sizes in pixels"),
    ],
    ids=["type", "small", "word", "scaling", "activation", "no tower", "no text", "s2"],
)
def test_init_refuses_in_one_line_and_leaves_nothing(tmp_path, tree, named):
    (tmp_path / "config.json").write_text(json.dumps(tree))
    with pytest.raises(SystemExit) as error:
        call("init", tmp_path / "config.json", tmp_path / "out")
    assert named in error.value.code and "\n" not in error.value.code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["inspect", "nowhere"], "there is no nowhere/config.json"),
        (["from-hf", "{checkpoint}/llm/..", "{checkpoint}"], "exists and is not empty"),
        (["to-hf", "{checkpoint}", "{out}", "--dtype", "int4"], "--dtype='int4' is unknown"),
        (["to-hf", "{checkpoint}", "{out}", "--shard-gib", "0"], "--shard-gib=0"),
        (["init", "{checkpoint}", "{out}"], "Is a directory"),
        (["init", str(TINY_VILA), "{out}", "--corpus", "none.txt"], "--corpus=none.txt is no file"),
        (["init", str(TINY_VILA), "{out}", "--time-tokens", "-1"], "--time-tokens=-1 must be 0 or"),
        (["init", str(TINY_VILA), "{out}", "--time-tokens", "380"], "385 special tokens and words"),
        (["init", str(TINY_VILA), "{out}", "--looking-back", "nan"], "--looking-back=nan must be"),
    ],
    ids=["no folder", "exists", "type", "shards", "directory", "corpus", "times", "words", "firm"],
)
def test_a_mistake_is_one_line(checkpoint, tmp_path, args, named):
    with pytest.raises(SystemExit) as error:
        call(*(x.format(checkpoint=checkpoint, out=tmp_path / "out") for x in args))
    assert named in error.value.code and "\n" not in error.value.code
    assert error.value.code.startswith(f"convert {args[0]}: ")


def test_looking_back_needs_biases(tmp_path, capsys):
    config = json.loads(TINY_VILA.read_text())["llm_cfg"] | {"model_type": "llama"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SystemExit) as error:
        call("init", tmp_path / "config.json", tmp_path / "out", "--looking-back", 5)
    assert "biases of queries and keys, which only qwen2 has" in error.value.code
    assert not (tmp_path / "out").exists()


def test_a_mistake_ends_the_process_with_a_status(published):
    path = published / "mm_projector" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    done = run("inspect", published)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert f"{path} is not a whole safetensors file" in done.stderr
