"""Checkpoint folders: make a random one, check one, copy one for others, look into one.

python -m longrl_jax.convert init configs/models/tiny_vila.json runs/init --corpus corpus.txt
python -m longrl_jax.convert inspect runs/init
python -m longrl_jax.convert from-hf downloaded/NVILA checkpoints/nvila
python -m longrl_jax.convert to-hf runs/grpo/export published --dtype bfloat16 --text-only
"""

import argparse
import collections
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from flax import nnx

from longrl_jax import models
from longrl_jax.config import pick
from longrl_jax.models import hf_files
from longrl_jax.models.rope import rates
from longrl_jax.models.vila import PARTS

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
END_OF_TEXT, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MEDIA_TOKENS = ("<image>", "<vila/video>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""ChatML."""
SHOWN_FRAMES, SHOWN_IMAGE = 256, (1080, 1920)
"""Of the film and the image that `inspect` speaks of."""
NUM_BYTES = 256
LOOK_BACK = (1, 2, 3)
"""Tokens that the first heads of layer 0 look back, with --looking-back."""
MAX_FIRMNESS = 100
"""Of --looking-back; scores of attention grow with its square."""
CONTENT_SHARE = 0.1
"""Of the random kernels of those heads: at first where a token stands counts, not what it is."""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; a mistake of the user's is one line, not a trace."""
    args = _parser().parse_args(argv)
    try:
        with jax.default_device(jax.devices("cpu")[0]):  # a checkpoint may be larger than a GPU
            for line in args.run(args):
                sys.stdout.write(line + "\n")
    except (ValueError, OSError) as error:  # OSError: a full disk, a folder without permission
        sys.exit(f"convert {args.command}: {error}")


def init(
    config_json: Path,
    out: Path,
    *,
    seed: int = 0,
    corpus: Path | None = None,
    time_tokens: int = 0,
    looking_back: float = 0.0,
) -> None:
    """Writes a random checkpoint with tokenizer, chat template and generation config.

    config_json is a Hugging Face config.json; for VILA it holds the parts' configs as llm_cfg,
    vision_tower_cfg and mm_projector_cfg. The vocabulary becomes as large as the tokenizer, which
    is a byte-level BPE of at most vocab_size tokens, trained on the corpus (without one: bytes).
    time_tokens: so many words <0s>, <1s>, ... become tokens of their own, for data.timestamp.
    looking_back: how firmly heads 0, 1, 2 of the first layer look 1, 2, 3 tokens back (0: random).
    """
    tree = hf_files.read_json(config_json)
    backbone = models.backbone_of(tree, where=str(config_json))
    llm = tree if backbone.LLM_FOLDER == "" else tree.get(PARTS["llm"])
    if not isinstance(llm, dict):
        raise ValueError(f"{config_json}: {PARTS['llm']} must hold the language model's config")
    text = corpus.read_text() if corpus is not None else ""
    vocab_size = hf_files.positive_int(llm, "vocab_size", str(config_json))

    def write(folder: Path) -> None:
        times = [f"<{t}s>" for t in range(time_tokens)]
        inner = folder / backbone.LLM_FOLDER
        token_ids: Mapping[str, str] = getattr(backbone, "TOKEN_IDS", {})
        media = tuple(token_ids.values()) or MEDIA_TOKENS
        numbers = _write_tokenizer(inner, text, vocab_size, words=times, media=media)
        llm["vocab_size"] = len(numbers)
        tree.update({field: numbers[token] for field, token in token_ids.items()})
        _write_json(folder / "config.json", tree)
        for sub in filter(None, backbone.FOLDERS):
            if not isinstance(tree.get(PARTS[sub]), dict):
                raise ValueError(f"{config_json}: {PARTS[sub]} must hold the config of {sub}/")
            _write_json(folder / sub / "config.json", tree[PARTS[sub]])
        cfg = backbone.read_config(folder)
        if hasattr(backbone, "processor_config"):
            _write_json(folder / backbone.PROCESSORS[-1], backbone.processor_config(cfg))
        arrays = models.arrays_of(backbone.Model(cfg, rngs=nnx.Rngs(seed)))
        if looking_back:
            arrays = {**arrays, **_looking_back(arrays, backbone.text_config(cfg), looking_back)}
        models.write_parts(folder, backbone, backbone.table(cfg), arrays)

    models.write_whole(out, write)


def from_hf(folder: Path, out: Path) -> int:
    """Loads a folder through the table, writes it again and compares every tensor, byte by byte.

    Returns the number of tensors. Raises ValueError, before anything is written, for whatever
    training would refuse: tensors, configs, tokenizer and chat template.
    """
    from longrl_jax.stages.policy import open_tokenizer  # here: no other command needs the stages

    backbone = models.backbone_of(folder)
    text = backbone.text_config(backbone.read_config(folder))
    open_tokenizer(models.llm_folder(folder), text.vocab_size)  # before minutes of reading tensors
    cfg, model = models.load(folder)
    models.save(out, model, cfg, folder)
    before, after = (hf_files.open_tensors(f, backbone.FOLDERS) for f in (folder, out))
    if odd := sorted(set(before) ^ set(after)):
        raise ValueError(f"{odd[0]} is in only one of {folder} and {out}")
    for name in before:
        x, y = before[name], after[name]
        if x.dtype != y.dtype or x.shape != y.shape or x.tobytes() != y.tobytes():
            raise ValueError(f"{name} differs between {folder} and {out}; is its type a float?")
    return len(before)


def to_hf(
    folder: Path,
    out: Path,
    *,
    dtype: str = "",
    text_only: bool = False,
    shard_gib: float = 4.0,
) -> None:
    """Writes a folder for others: another type, other shards, or the language model alone."""
    cfg, model = models.load(folder)
    save = models.save_text if text_only else models.save
    save(
        out,
        model,
        cfg,
        folder,
        dtype=pick(DTYPES, dtype, "--dtype") if dtype else None,
        shard_size_bytes=int(shard_gib * 2**30),
    )


def inspect(folder: Path) -> Iterator[str]:
    """Yields lines that say what a folder holds; reads no array."""
    backbone = models.backbone_of(folder)
    cfg = backbone.read_config(folder)
    tensors = hf_files.open_tensors(folder, backbone.FOLDERS)
    name = backbone.__name__.rpartition(".")[2]
    model_type = hf_files.read_json(folder / "config.json")["model_type"]
    text = backbone.text_config(cfg)
    yield f"{folder}: {name} ({model_type}), {len(tensors)} tensors"
    yield (
        f"text: {text.num_layers} layers of {text.width}, {text.num_heads} heads of "
        f"{text.head_dim} ({text.num_kv_heads} for keys), vocabulary {text.vocab_size}, "
        f"{'tied' if text.tied else 'untied'} head"
    )
    if (layout := backbone.media_layout(cfg)) is not None:
        (h, w), (rows, columns) = layout.image_size, layout.grid
        if layout.pixels is None:
            yield f"video: frames of {h} x {w} px become {rows} x {columns} tokens and a separator"
            if layout.video_pools is not None:
                pools = " and ".join(map(str, layout.video_pools(SHOWN_FRAMES)))
                yield f"film of {SHOWN_FRAMES} frames: frames, rows, columns {pools} share a token"
            if layout.image_view is not None:
                height, width = SHOWN_IMAGE
                tiles = layout.image(height, width).inputs
                yield f"image alone in a prompt: cut into tiles; {height} x {width} px into {tiles}"
        else:
            fewest, most = layout.pixels
            yield (
                f"video: frames keep their aspect, {fewest} to {most} px; {h} x {w} px of "
                f"{layout.unit_frames} frames become a token"
            )
        if layout.image_pixels is not None:
            fewest, most = layout.image_pixels
            yield f"images keep theirs, {fewest} to {most} px; {h} x {w} px become a token"
    count: collections.Counter[str] = collections.Counter()
    size_bytes: collections.Counter[str] = collections.Counter()
    for tensor in tensors:
        part = tensor.partition("/")[0] if "/" in tensor else "llm"
        part = "visual" if "visual." in tensor else part
        key = f"{part} {tensors.dtype(tensor)}"
        size = int(np.prod(tensors.shape(tensor)))
        count[key] += size
        size_bytes[key] += size * tensors.dtype(tensor).itemsize
    for key in sorted(count):
        yield f"{key}: {count[key]:,} numbers, {size_bytes[key] / 2**20:,.1f} MiB"


def _looking_back(arrays: Mapping[str, Any], text: Any, strength: float) -> dict[str, np.ndarray]:
    """Returns weights of a language model that is ready to copy: heads of layer 0 look back, and an
    untied head is the token table.

    After RoPE, query (cos(f b), -sin(f b)) at m and key (1, 0) at n score the sum over the
    frequencies f of cos(f (m - b - n)): largest where n is b tokens before m. Copying what followed
    a word starts from such heads (arXiv:2209.11895, induction heads), and random ones need
    thousands of steps to become them. All are trained like the others.
    """
    if not text.qkv_bias:
        raise ValueError(
            "--looking-back sets the biases of queries and keys, which only qwen2 has; leave it 0"
        )
    half = text.head_dim // 2
    f, _ = rates(text.rope, text.head_dim, np.float64)
    q, k = (np.array(arrays[f"text.layers.attn.{name}.bias"]) for name in "qk")
    kernels = {n: np.array(arrays[f"text.layers.attn.{n}.kernel"]) for n in "qk"}
    k[0].reshape(text.num_kv_heads, 2, half)[:, 0] = strength
    queries = q[0].reshape(text.num_heads, 2, half)
    for head, back in enumerate(LOOK_BACK[: text.num_heads]):
        queries[head] = strength * np.cos(f * back), -strength * np.sin(f * back)
    kernels["q"][0, :, : len(LOOK_BACK) * text.head_dim] *= CONTENT_SHARE
    kernels["k"][0] *= CONTENT_SHARE
    changed = {f"text.layers.attn.{name}.bias": x for name, x in (("q", q), ("k", k))}
    changed |= {f"text.layers.attn.{name}.kernel": x for name, x in kernels.items()}
    if not text.tied:
        changed["text.head_kernel"] = np.array(arrays["text.table"]).T / text.width**0.5
    return changed


def _write_tokenizer(
    folder: Path,
    text: str,
    vocab_size: int,
    *,
    words: Sequence[str] = (),
    media: Sequence[str] = MEDIA_TOKENS,
) -> dict[str, int]:
    """Trains and writes a tokenizer with ChatML's and media tokens; returns its vocabulary.

    words: become tokens whole, wherever they stand.
    """
    from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
    from tokenizers import models as tokenizer_models
    from transformers import PreTrainedTokenizerFast

    special = [END_OF_TEXT, START, END, *media]
    fixed = len(special) + len(words)
    if vocab_size < NUM_BYTES + fixed:
        raise ValueError(
            f"vocab_size={vocab_size} is too small: {NUM_BYTES} bytes and {fixed} special tokens "
            "and words are always in it"
        )
    tokenizer = Tokenizer(tokenizer_models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(words),
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    tokenizer.add_tokens(list(words))
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[START, *media],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    wrapped.save_pretrained(folder)
    ids = {token: tokenizer.token_to_id(token) for token in (END, END_OF_TEXT)}
    generation = {"eos_token_id": list(ids.values()), "pad_token_id": ids[END_OF_TEXT]}
    _write_json(folder / "generation_config.json", generation)
    return wrapped.get_vocab()


def _write_json(path: Path, tree: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.convert",
        description="Makes, checks, exports and describes checkpoint folders (safetensors only).",
    )
    commands = parser.add_subparsers(dest="command", required=True)

    command = commands.add_parser(
        "init", help="a random checkpoint with tokenizer and chat template, from a config.json"
    )
    command.add_argument("config_json", type=Path, help="e.g. configs/models/tiny_vila.json")
    command.add_argument("out", type=Path, help="new folder")
    command.add_argument("--seed", type=int, default=0, help="of the random weights (default 0)")
    command.add_argument(
        "--corpus", type=Path, help="text that the tokenizer learns from (without: single bytes)"
    )
    command.add_argument(
        "--time-tokens",
        type=int,
        default=0,
        help="make so many words <0s>, <1s>, ... tokens of their own, for "
        "data.timestamp='<{t:.0f}s>' (default 0)",
    )
    command.add_argument(
        "--looking-back",
        type=float,
        default=0.0,
        help="how firmly three heads of the first layer look 1, 2, 3 tokens back at birth, so that "
        "copying is learned soon; 5 is firm (default 0: random heads)",
    )
    command.set_defaults(run=_run_init)

    command = commands.add_parser(
        "from-hf", help="check a downloaded folder and write a copy that is equal byte by byte"
    )
    command.add_argument("folder", type=Path, help="downloaded Hugging Face folder")
    command.add_argument("out", type=Path, help="new folder")
    command.set_defaults(run=_run_from_hf)

    command = commands.add_parser(
        "to-hf", help="write a folder for others: another type, or the language model alone"
    )
    command.add_argument("folder", type=Path, help="folder of `init`, `from-hf` or a run's export")
    command.add_argument("out", type=Path, help="new folder")
    command.add_argument(
        "--dtype", default="", help=f"{', '.join(DTYPES)} (default: each tensor keeps its own)"
    )
    command.add_argument(
        "--text-only",
        action="store_true",
        help="the language model alone, as a plain folder of its own kind",
    )
    command.add_argument(
        "--shard-gib", type=float, default=4.0, help="largest tensor file, in GiB (default 4)"
    )
    command.set_defaults(run=_run_to_hf)

    command = commands.add_parser("inspect", help="say what a folder holds, without reading arrays")
    command.add_argument("folder", type=Path)
    command.set_defaults(run=lambda args: inspect(args.folder))
    return parser


def _run_init(args: argparse.Namespace) -> Iterator[str]:
    if args.corpus is not None and not args.corpus.is_file():
        raise ValueError(f"--corpus={args.corpus} is no file; longrl_jax.data.synthetic writes one")
    if args.time_tokens < 0:
        raise ValueError(f"--time-tokens={args.time_tokens} must be 0 or more")
    if not 0 <= args.looking_back <= MAX_FIRMNESS:  # no NaN either
        raise ValueError(f"--looking-back={args.looking_back:g} must be 0 to {MAX_FIRMNESS}")
    init(
        args.config_json,
        args.out,
        seed=args.seed,
        corpus=args.corpus,
        time_tokens=args.time_tokens,
        looking_back=args.looking_back,
    )
    yield from inspect(args.out)


def _run_from_hf(args: argparse.Namespace) -> Iterator[str]:
    count = from_hf(args.folder, args.out)
    yield f"{args.out}: {count} tensors, each equal to its source byte by byte"


def _run_to_hf(args: argparse.Namespace) -> Iterator[str]:
    if not args.shard_gib > 0:
        raise ValueError(f"--shard-gib={args.shard_gib:g} must be positive")
    to_hf(
        args.folder,
        args.out,
        dtype=args.dtype,
        text_only=args.text_only,
        shard_gib=args.shard_gib,
    )
    yield from inspect(args.out)


if __name__ == "__main__":
    main()
