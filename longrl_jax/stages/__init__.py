"""Training stages: each module is one loop that reads like the paper's algorithm box."""

from longrl_jax.stages import grpo, sft

STAGES = {"sft": sft.run, "grpo": grpo.run}
