"""Tiny checkpoints as torch opens them, called alike: models of transformers, and for VILA's
projector a twin. The witness of log-probabilities, gradients and updates: every answer runs alone,
whole, behind its own copy of the prompt, with a loss written as a loop over tokens."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file
from test_s2 import dynamic_twin, fixed_twin
from test_vila_family import pooled_by_loop
from tiny_models import make_projector
from tiny_qwen2_5_vl import published_name, their_patches
from transformers.vision_utils import get_vision_window_index

from longrl_jax.models import qwen2_5_vl

TEMPERATURE = 0.7
CLIP = {"clip_low": 0.1, "clip_high": 0.2, "clip_dual": 1.5}
KL = 0.3


@dataclasses.dataclass(frozen=True)
class Numbers:
    """What both sides are given: [group][sample] -> one number a token, or one a sample."""

    groups: list[Any]
    features: list[np.ndarray | None]
    advantage: list[np.ndarray]
    old: list[list[np.ndarray]]
    reference: list[list[np.ndarray]]
    banned: tuple[int, ...]
    stage: str = "packed"
    """Of the features: what lies behind it is trained."""


class Side:
    """A text-only folder, or one of VILA."""

    def __init__(self, folder: Path, dtype: str = "float32"):
        torch.set_num_threads(1)
        self.dtype = getattr(torch, dtype)
        options = {"dtype": self.dtype, "attn_implementation": "eager"}
        self.is_vila, self.projector = (folder / "llm").is_dir(), None
        llm_folder = folder / "llm" if self.is_vila else folder
        self.llm = transformers.AutoModelForCausalLM.from_pretrained(llm_folder, **options).eval()
        self.stage = "packed"
        if self.is_vila:
            self.top = json.loads((folder / "config.json").read_text())
            self.tower = transformers.SiglipVisionModel.from_pretrained(
                folder / "vision_tower", **options
            ).eval()
            self.scales = [int(x) for x in self.top.get("s2_scales", "0").split(",")]
            self.projector = self._open_twin(folder).to(self.dtype)
            self.pools = self.top.get("video_encoder", {}).get("pool_sizes")
            self.stage = "projected" if self.pools else "packed"  # pools are behind the projector

    def _open_twin(self, folder: Path) -> torch.nn.Module:
        tree = json.loads((folder / "mm_projector" / "config.json").read_text())
        width = len(self.scales) * self.tower.config.hidden_size
        twin = make_projector(tree["mm_projector_type"], width, self.llm.config.hidden_size)
        twin.load_state_dict(load_file(folder / "mm_projector" / "model.safetensors"))
        return twin

    @torch.no_grad()
    def packed(self, frames: np.ndarray) -> torch.Tensor:
        """Published preprocessing and the chosen hidden state, neighbours side by side: [M, C] of
        uint8 [F, Y, X, 3]."""
        return self._pack(self._states(frames)).flatten(0, 1)

    def _pack(self, states: torch.Tensor) -> torch.Tensor:
        return self.projector.layers[0](states).to(self.dtype)  # its padding is float32

    def _states(self, frames: np.ndarray) -> torch.Tensor:
        if self.top.get("s2"):
            size = self.tower.config.image_size
            return fixed_twin(self._cast_tower, frames, self.scales, size, 0)
        processor = transformers.SiglipImageProcessorPil(do_resize=False)
        pixels = processor(list(frames), return_tensors="pt")["pixel_values"].to(self.dtype)
        select = self.top["mm_vision_select_layer"]
        states = self.tower(pixels, output_hidden_states=True).hidden_states[select]
        return states.repeat(1, 1, len(self.scales))  # of a frame in dynamic S2: one for all

    def _cast_tower(self, pixels: torch.Tensor, **options: Any) -> Any:
        return self.tower(pixels.to(self.dtype), **options)

    def _cast_projector(self, states: torch.Tensor) -> torch.Tensor:
        return self.projected(self._pack(states))

    @torch.no_grad()
    def stored(self, frames: np.ndarray, medium: Any) -> torch.Tensor:
        """The rows of a medium's tokens, of `stage`."""
        if self.stage == "packed":
            return self.packed(frames)
        return self.shown(frames, medium)

    @torch.no_grad()
    def shown(self, frames: np.ndarray, medium: Any) -> torch.Tensor:
        """What the language model sees of a medium: [M, D]."""
        if medium.view.scales:
            size = self.tower.config.image_size
            blocks = [(y // size, x // size) for y, x in medium.view.scales]
            parts = {"vision_tower": self._cast_tower, "mm_projector": self._cast_projector}
            return dynamic_twin(parts, frames, blocks, -1)
        tokens = self.projected(self.packed(frames))
        if medium.kind == "video" and self.stage == "projected":
            tokens = pooled_by_loop(tokens.reshape(len(frames), -1, tokens.shape[-1]), self.pools)
        return tokens

    def projected(self, packed: torch.Tensor) -> torch.Tensor:
        """The twin without its first layer, which packs patches."""
        return self.projector.layers[1:](packed)

    def logits(
        self,
        tokens: np.ndarray,
        media_at: np.ndarray,
        stored: torch.Tensor | None,
        rope_pos: np.ndarray,
    ) -> torch.Tensor:
        """[T, V] of one sequence whose media stand at the indices media_at."""
        x_TD = self.llm.get_input_embeddings()(torch.tensor(tokens).long())
        if stored is not None:
            media = stored.to(self.dtype)
            media = self.projected(media) if self.stage == "packed" else media
            x_TD = x_TD.index_put((torch.tensor(media_at),), media)
        return self._logits(x_TD, torch.tensor(rope_pos).long())

    def _logits(self, x_TD: torch.Tensor, rope_pos: torch.Tensor) -> torch.Tensor:
        return self.llm(inputs_embeds=x_TD[None]).logits[0]  # with its own positions: 0, 1, 2, ...

    def trained(self) -> dict[str, torch.nn.Parameter]:
        """Parameters of the language model and the projector, by their names in the folder."""
        if not self.is_vila:
            return dict(self.llm.named_parameters())
        parts = {"llm": self.llm}
        if self.stage == "packed":
            parts["mm_projector"] = self.projector
        return {f"{p}/{n}": x for p, part in parts.items() for n, x in part.named_parameters()}


class Qwen25VlSide(Side):
    """A folder of Qwen2.5-VL."""

    stage = "packed"

    def __init__(self, folder: Path, dtype: str = "float32"):
        torch.set_num_threads(1)
        self.dtype = getattr(torch, dtype)
        self.llm = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, attn_implementation="eager"
        ).eval()
        self.tower = self.llm.model.visual
        self.projector = self.tower.merger

    @torch.no_grad()
    def packed(self, frames: np.ndarray) -> torch.Tensor:
        """What goes into the merger, in our order: theirs is by window."""
        pixels = (frames / np.float32(255) - qwen2_5_vl.IMAGE_MEAN) / qwen2_5_vl.IMAGE_STD
        config = self.tower.config
        rows, grid = their_patches(pixels.astype(np.float32), config.patch_size)
        seen: list[torch.Tensor] = []
        handle = self.projector.register_forward_hook(lambda _, args, __: seen.append(args[0]))
        self.tower(rows.to(self.dtype), grid)
        handle.remove()
        merge = config.spatial_merge_size
        window_index, _ = get_vision_window_index(
            grid, merge, config.window_size, config.patch_size
        )
        by_window = seen[0].reshape(-1, merge**2 * config.hidden_size)
        return by_window[torch.argsort(torch.as_tensor(window_index))]

    def projected(self, packed: torch.Tensor) -> torch.Tensor:
        return self.projector(packed.reshape(-1, self.tower.config.hidden_size))

    def _logits(self, x_TD: torch.Tensor, rope_pos: torch.Tensor) -> torch.Tensor:
        return self.llm(inputs_embeds=x_TD[None], position_ids=rope_pos.T[:, None]).logits[0]

    def trained(self) -> dict[str, torch.nn.Parameter]:
        frozen = ("visual.blocks.", "visual.patch_embed.")
        named = {published_name(n): x for n, x in self.llm.named_parameters()}
        return {n: x for n, x in named.items() if not n.startswith(frozen)}


def open_side(folder: Path, dtype: str = "float32") -> Side:
    """Opens a folder by its config.json, in one type of numbers."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    return (Qwen25VlSide if model_type == "qwen2_5_vl" else Side)(folder, dtype)


def sample_logps(
    side: Side, prompt: Any, answer: np.ndarray, packed: Any, banned: Any, temperature: float
) -> torch.Tensor:
    """log p of an answer's tokens behind the prompt; banned tokens cannot be, then the temperature
    divides."""
    tokens, P = np.concatenate([prompt.tokens, answer]), len(prompt.tokens)
    logits = side.logits(
        tokens,
        np.flatnonzero(prompt.is_media),
        None if packed is None else torch.as_tensor(packed),
        longer(prompt, len(answer)),
    )
    if logits.dtype == torch.bfloat16:
        logits = logits.float()  # as everyone does before a softmax
    out = torch.zeros(logits.shape[-1], dtype=torch.bool)
    out[list(banned)] = True
    logps = torch.log_softmax(
        (logits[P - 1 : -1] / temperature).masked_fill(out, -math.inf), dim=-1
    )
    return logps[torch.arange(len(answer)), torch.tensor(tokens[P:]).long()]


def longer(prompt: Any, num_tokens: int) -> np.ndarray:
    """The prompt's positions and those of num_tokens behind it."""
    behind = prompt.next_rope_pos + np.arange(num_tokens)
    if prompt.rope_pos.ndim == 2:
        behind = np.repeat(behind[:, None], 3, axis=1)
    return np.concatenate([prompt.rope_pos, behind])


def all_logps(side: Side, numbers: Numbers) -> list[list[torch.Tensor]]:
    """[group][sample] -> log p of its tokens."""
    return [
        [
            sample_logps(side, group.prompt, s.tokens, packed, numbers.banned, TEMPERATURE)
            for s in group.samples
        ]
        for group, packed in zip(numbers.groups, numbers.features, strict=True)
    ]


def token_mean(logps: list[list[torch.Tensor]], numbers: Numbers, *, loss: str) -> torch.Tensor:
    """The loss over all tokens of all answers: "clipped", with a KL term, or "nll"."""
    terms = []
    for g, of_group in enumerate(logps):
        for r, of_sample in enumerate(of_group):
            A = float(numbers.advantage[g][r])
            for i, logp in enumerate(of_sample):
                old, reference = numbers.old[g][r][i], numbers.reference[g][r][i]
                terms.append(-A * logp if loss == "nll" else token_loss(logp, old, A, reference))
    return torch.stack(terms).mean()


def token_loss(logp, old, advantage, reference):
    """PPO's objective with dual clip, and k3, of one token (arXiv:1707.06347, 1912.09729)."""
    ratio = torch.exp(logp - old)
    r = ratio.item()
    inside = min(max(r, 1 - CLIP["clip_low"]), 1 + CLIP["clip_high"])
    gain = ratio * advantage
    if inside * advantage < r * advantage:
        gain = torch.full_like(logp, inside * advantage)  # a clip leaves no gradient
    if advantage < 0 and gain.item() < CLIP["clip_dual"] * advantage:
        gain = torch.full_like(logp, CLIP["clip_dual"] * advantage)
    difference = reference - logp
    return -gain + KL * (torch.exp(difference) - difference - 1)


def torch_update(side: Side, numbers: Numbers, cfg: Any) -> dict[str, tuple[np.ndarray, ...]]:
    """One step of torch's AdamW behind a clip of the norm; matrices alone decay.

    cfg: an OptimizerConfig. Returns (before, clipped gradient, after) of every trained tensor.
    """
    named = side.trained()
    before = {name: x.detach().numpy().copy() for name, x in named.items()}
    token_mean(all_logps(side, numbers), numbers, loss="clipped").backward()
    torch.nn.utils.clip_grad_norm_(named.values(), cfg.max_grad_norm)
    groups = [
        {"params": [x for x in named.values() if x.ndim > 1], "weight_decay": cfg.weight_decay},
        {"params": [x for x in named.values() if x.ndim == 1], "weight_decay": 0.0},
    ]
    betas = cfg.beta1, cfg.beta2
    torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=betas, eps=cfg.eps).step()
    return {name: (before[name], x.grad.numpy(), x.detach().numpy()) for name, x in named.items()}


@torch.no_grad()
def greedy(side: Side, prompt: Any, packed: Any, banned: Any, num_tokens: int) -> list[int]:
    """The most likely tokens, one after another."""
    tokens = prompt.tokens
    for i in range(num_tokens):
        logits_V = side.logits(
            tokens,
            np.flatnonzero(prompt.is_media),
            None if packed is None else torch.as_tensor(packed),
            longer(prompt, i),
        )[-1]
        logits_V[list(banned)] = -math.inf
        tokens = np.append(tokens, int(logits_V.argmax())).astype(np.int32)
    return tokens[len(prompt.tokens) :].tolist()
