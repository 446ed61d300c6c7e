"""Training stages: each module is one loop that reads like the paper's algorithm box."""

from longrl_jax.stages import grpo, perception, sft

STAGES = {"perception": perception.run, "sft": sft.run, "grpo": grpo.run}
