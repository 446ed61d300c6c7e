"""The section `model`: the policy."""

import dataclasses

from longrl_jax.config.checks import check_filled, check_one_of, check_positive

LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
"""All kernels of a decoder layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The policy. Its sizes come from the checkpoint's config.json, never from here."""

    path: str
    """Hugging Face folder of the starting checkpoint (python -m longrl_jax.convert makes some), or
    a merged global_step_N of Long-RL or EasyR1 (docs/from_long_rl.md)."""
    reference: str = ""
    """Folder of the reference policy for the KL term; empty: the starting checkpoint."""
    frozen: tuple[str, ...] = ("vision",)
    """Parts that are not trained: vision, projector, text. The vision tower must be among them.
    With adapters (lora_rank) the language model's own weights are frozen without being named here:
    [vision] trains adapters and projector, [vision, projector] adapters alone."""
    lora_rank: int = 0
    """Rank of the LoRA adapters that are trained in place of the language model; 0: none. Engine
    and RUN/export get them merged, RUN/adapter holds them alone (peft's format); the KL term's
    reference is the model without them."""
    lora_alpha: float = 16.0
    """The product of an adapter counts lora_alpha / lora_rank times."""
    lora_targets: tuple[str, ...] = LORA_TARGETS
    """Kernels of every layer that have an adapter: q, k, v, o, gate, up, down."""
    compute_dtype: str = "bfloat16"
    """float32 or bfloat16: type of matmuls. Parameters, softmax and losses stay float32."""
    remat: str = "nothing"
    """What a layer keeps for the backward pass: nothing (but its input), attention (its output),
    everything, or offload (its input, in the host's memory)."""

    def __post_init__(self):
        check_filled("model.path", self.path)
        check_one_of("model.compute_dtype", self.compute_dtype, ("float32", "bfloat16"))
        check_one_of("model.remat", self.remat, ("nothing", "attention", "everything", "offload"))
        for part in self.frozen:
            check_one_of("model.frozen", part, ("vision", "projector", "text"))
        if "vision" not in self.frozen:
            raise ValueError(
                f"model.frozen={list(self.frozen)} lacks 'vision': frames are encoded once and "
                "cached, so the tower gets no gradient; add vision to model.frozen"
            )
        if {"projector", "text"} <= set(self.frozen):
            raise ValueError("model.frozen names every part, nothing is left to train; drop one")
        if self.lora_rank:
            _check_lora(self)

    @property
    def frozen_parts(self) -> tuple[str, ...]:
        """Parts whose own weights are not trained, whatever adapters are."""
        return (*self.frozen, "text") if self.lora_rank else self.frozen


def _check_lora(model: "ModelConfig") -> None:
    if model.lora_rank < 0:
        raise ValueError(f"model.lora_rank={model.lora_rank} must be 0 (no adapters) or more")
    check_positive("model.lora_alpha", model.lora_alpha)
    for name in model.lora_targets:
        check_one_of("model.lora_targets", name, LORA_TARGETS)
    if not model.lora_targets or len(set(model.lora_targets)) < len(model.lora_targets):
        raise ValueError(
            f"model.lora_targets={list(model.lora_targets)} must name kernels, each once; without "
            "adapters set model.lora_rank=0"
        )
    if "text" in model.frozen:
        raise ValueError(
            f"model.frozen={list(model.frozen)} names text, whose adapters model.lora_rank="
            f"{model.lora_rank} trains (its own weights are frozen anyway); take it out"
        )
