"""Tiny random `transformers` models and VILA folders made of them."""

import json
from pathlib import Path

import torch
import transformers
from transformers import SiglipVisionConfig, SiglipVisionModel

WIDTH, VISION_WIDTH = 64, 32
THETA = 3e3  # no default, so that a config that is not read shows
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
"""Both lengths leave some of the 8 pairs alone, slow some down and mix some."""
FAMILIES = {
    "qwen2": ("Qwen2", {}),
    "qwen3": ("Qwen3", {"head_dim": 24}),  # not width / heads
    "llama": ("Llama", {}),
    "qwen2_yarn": ("Qwen2", {"rope_parameters": YARN | {"rope_theta": THETA}}),
    "qwen3_yarn": (
        "Qwen3",
        {"head_dim": 24, "rope_parameters": YARN | {"rope_theta": THETA, "attention_factor": 1.3}},
    ),
    "llama3": ("Llama", {"rope_parameters": LLAMA3 | {"rope_theta": THETA}}),
}
"""name -> (start of the class names of transformers, what its config says differently)."""


def randomize(module: torch.nn.Module, seed: int, scale: float = 0.15) -> torch.nn.Module:
    """Gives every tensor random numbers (norms around 1), so that no bias or scale is trivial."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, x in module.named_parameters():
            noise = torch.randn(x.shape, generator=generator) * scale
            x.copy_(noise + 1 if "norm" in name and name.endswith("weight") else noise)
    return module.eval()


def make_text(
    family: str = "qwen2", *, tied: bool, num_layers: int = 2, width: int = WIDTH, seed: int = 0
) -> transformers.PreTrainedModel:
    torch.set_num_threads(1)
    name, changes = FAMILIES[family]
    sizes = {
        "vocab_size": 99,
        "hidden_size": width,
        "intermediate_size": 96,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "tie_word_embeddings": tied,
        "rms_norm_eps": 1e-4,
        "rope_parameters": {"rope_type": "default", "rope_theta": THETA},
        "attn_implementation": "eager",
    }
    config = getattr(transformers, f"{name}Config")(**sizes | changes)
    return randomize(getattr(transformers, f"{name}ForCausalLM")(config), seed)


def make_siglip(*, image_size: int = 32, num_layers: int = 3, seed: int = 1) -> SiglipVisionModel:
    torch.set_num_threads(1)
    config = SiglipVisionConfig(
        hidden_size=VISION_WIDTH,
        intermediate_size=48,
        num_hidden_layers=num_layers,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=8,
        layer_norm_eps=1e-4,
        attn_implementation="eager",
    )
    return randomize(SiglipVisionModel(config), seed)


class Pack(torch.nn.Module):
    """Puts size x size neighbours side by side, by loops over cells."""

    def __init__(self, size: int):
        super().__init__()
        self.size = size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        F, n, C = x.shape
        side = round(n**0.5)
        cells = []
        for top in range(0, side, self.size):
            for left in range(0, side, self.size):
                for row in range(top, top + self.size):
                    for column in range(left, left + self.size):
                        inside = row < side and column < side
                        cells.append(x[:, row * side + column] if inside else torch.zeros(F, C))
        return torch.stack(cells, dim=1).reshape(F, -1, self.size**2 * C)


def make_projector(kind: str, C: int = VISION_WIDTH, D: int = WIDTH, seed: int | None = 2):
    """A torch twin that is written down from the published description, `layers.N` and all.

    seed: None leaves the tensors as torch makes them.
    """
    nn = torch.nn
    sequences = {
        "mlp2x_gelu": lambda: [nn.Linear(C, D), nn.GELU(), nn.Linear(D, D)],
        "mlp3x_gelu": lambda: [
            nn.Linear(C, D),
            nn.GELU(),
            nn.Linear(D, D),
            nn.GELU(),
            nn.Linear(D, D),
        ],  # fmt: skip
        "mlp_downsample": lambda: [
            Pack(2),
            nn.LayerNorm(4 * C),
            nn.Linear(4 * C, D),
            nn.GELU(),
            nn.Linear(D, D),
        ],  # fmt: skip
        "mlp_downsample_3x3_fix": lambda: [
            Pack(3),
            nn.LayerNorm(9 * C),
            nn.Linear(9 * C, 3 * C),
            nn.GELU(),
            nn.LayerNorm(3 * C),
            nn.Linear(3 * C, D),
            nn.GELU(),
            nn.Linear(D, D),
        ],  # fmt: skip
        "mlp_downsample_3x3_s2": lambda: [
            Pack(3),
            nn.LayerNorm(9 * C),
            nn.Linear(9 * C, 3 * C),
            nn.GELU(),
            nn.LayerNorm(3 * C),
            nn.Linear(3 * C, C),
            nn.GELU(),
            nn.LayerNorm(C),
            nn.Linear(C, C // 3),
            nn.GELU(),
            nn.LayerNorm(C // 3),
            nn.Linear(C // 3, D),
            nn.GELU(),
            nn.Linear(D, D),
        ],  # fmt: skip
        "mlp_downsample_3x3_s2_new": lambda: [
            Pack(3),
            nn.LayerNorm(9 * C),
            nn.Linear(9 * C, 4 * C),
            nn.GELU(),
            nn.LayerNorm(4 * C),
            nn.Linear(4 * C, 2 * C),
            nn.GELU(),
            nn.LayerNorm(2 * C),
            nn.Linear(2 * C, C),
            nn.GELU(),
            nn.LayerNorm(C),
            nn.Linear(C, C // 3),
            nn.GELU(),
            nn.LayerNorm(C // 3),
            nn.Linear(C // 3, D),
            nn.GELU(),
            nn.Linear(D, D),
        ],  # fmt: skip
    }
    sequences["mlp_downsample_2x2_fix"] = sequences["mlp_downsample"]

    class Projector(nn.Module):
        def __init__(self):
            super().__init__()
            if kind == "identity":
                self.layers = nn.Identity()
            elif kind == "linear":
                self.layers = nn.Linear(C, D)
            else:
                self.layers = nn.Sequential(*sequences[kind]())

        def forward(self, x):
            return self.layers(x)

    return Projector() if seed is None else randomize(Projector(), seed)


def write_vila(
    folder: Path,
    *,
    tied: bool = True,
    kind: str = "mlp_downsample_2x2_fix",
    prefix: str = "vision_model.",
    bfloat16: tuple[str, ...] = (),
    llm_width: int = WIDTH,
    family: str = "qwen2",
    num_scales: int = 1,
    top: dict | None = None,
) -> dict[str, torch.nn.Module]:
    """Writes a VILA folder with safetensors.torch (not with our writer) and returns its parts.

    Tensors whose name contains one of `bfloat16` are stored in that type. num_scales: of S2, whose
    states the projector takes; top: what config.json says besides.
    """
    from safetensors.torch import save_file

    parts = {
        "llm": make_text(family, tied=tied, width=llm_width),
        "vision_tower": make_siglip(),
        "mm_projector": make_projector(kind, C=num_scales * VISION_WIDTH, D=llm_width),
    }
    for sub, module in parts.items():
        start = prefix if sub == "vision_tower" else ""
        state = {start + n: x.detach().contiguous().clone() for n, x in module.state_dict().items()}
        if sub == "llm" and tied:
            del state["lm_head.weight"]
        for name in state:
            if any(part in name for part in bfloat16):
                state[name] = state[name].to(torch.bfloat16)
        (folder / sub).mkdir(parents=True)
        save_file(state, folder / sub / "model.safetensors", metadata={"format": "pt"})
        if sub == "mm_projector":
            tree = {"model_type": "v2l_projector", "mm_projector_type": kind}
            (folder / sub / "config.json").write_text(json.dumps(tree))
        else:
            module.config.save_pretrained(folder / sub)
    tree = {"model_type": "llava_llama", "mm_vision_select_layer": -2, **(top or {})}
    (folder / "config.json").write_text(json.dumps(tree))
    return parts


def write_text(
    folder: Path, family: str = "qwen2", *, tied: bool, num_layers: int = 2
) -> transformers.PreTrainedModel:
    model = make_text(family, tied=tied, num_layers=num_layers)
    model.save_pretrained(folder)
    return model
