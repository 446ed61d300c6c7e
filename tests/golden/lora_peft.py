"""What huggingface/peft computes with adapters on a tiny Qwen2, and whether it opens ours.

    pip install peft==0.21.2 torch transformers      (in an environment of its own)
    python tests/golden/lora_peft.py write
    python tests/golden/lora_peft.py check RUN/adapter RUN/export

`write` makes lora_peft.npz beside this file: base weights, adapters, tokens, logits, and the
gradient of sum(logits * cotangent) to every adapter, all float32, by the names in peft's files;
and the adapter_config.json that peft writes. `check` opens an adapter of a finished run on the base
model that it names, and compares its logits with those of the merged export.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import peft
import torch
import transformers
from safetensors.numpy import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "models"))
import tiny_models

TARGETS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
RANK, ALPHA, WIDTH, NUM_TOKENS = 2, 6, 16, 16
MAX_DIFFERENCE = 1e-4  # float32 logits of order 1; the merged sum is rounded once


def write(path: Path) -> None:
    torch.manual_seed(0)
    base = tiny_models.make_text("qwen2", tied=True, width=WIDTH)
    out = {f"base/{name}": x.detach().numpy().copy() for name, x in base.state_dict().items()}
    del out["base/lm_head.weight"]  # tied: the token table
    lora = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM", lora_dropout=0.0
    )
    model = peft.get_peft_model(base, lora)
    generator = torch.Generator().manual_seed(1)
    for name, x in model.named_parameters():
        if "lora_B" in name:  # zeros at first
            x.data.copy_(0.3 * torch.randn(x.shape, generator=generator))
    tokens = torch.randint(0, base.config.vocab_size, (2, NUM_TOKENS), generator=generator)
    logits = model(tokens).logits
    cotangent = torch.randn(logits.shape, generator=generator)
    (logits * cotangent).sum().backward()
    for name, x in model.named_parameters():
        if x.grad is not None:
            out[f"grad/{name.replace('.default', '')}"] = x.grad.numpy()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved = load_file(f"{folder}/adapter_model.safetensors")
        out["config"] = np.array(Path(folder, "adapter_config.json").read_text())
    out |= {f"adapter/{name}": x for name, x in saved.items()}
    out |= {"tokens": tokens.numpy(), "logits": logits.detach().numpy()}
    np.savez_compressed(path, cotangent=cotangent.numpy(), **out)
    sys.stdout.write(f"{path}: {len(out) + 1} arrays, peft {peft.__version__}\n")


def check(adapter: Path, export: Path) -> None:
    base = json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"]
    merged = export / "llm" if (export / "llm").is_dir() else export
    kind = json.loads((merged / "config.json").read_text())["architectures"][0]
    load = getattr(transformers, kind).from_pretrained
    theirs = peft.PeftModel.from_pretrained(load(base, dtype=torch.float32), adapter).eval()
    adapted = {n for n, _ in theirs.named_parameters() if "lora_" in n}
    saved = load_file(adapter / "adapter_model.safetensors")
    assert {n.replace(".default", "") for n in adapted} == set(saved), "peft adapts other modules"
    ours, start = load(merged, dtype=torch.float32).eval(), load(base, dtype=torch.float32).eval()
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        a, b, c = (m(input_ids=tokens).logits for m in (theirs, ours, start))
    difference, moved = (a - b).abs().max().item(), (b - c).abs().max().item()
    sys.stdout.write(
        f"{kind}: {len(saved)} tensors; adapter by peft - merged export: {difference:.1e}; merged "
        f"export - base: {moved:.1e}\n"
    )
    if not difference < MAX_DIFFERENCE < moved:
        sys.exit("they differ, or the adapters changed nothing")


if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write(Path(__file__).with_suffix(".npz"))
    elif len(sys.argv) == 4 and sys.argv[1] == "check":
        check(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        sys.exit(__doc__)
