"""The sides of mr_sp.py: ways to make the same GRPO step of one question with R answers."""

import dataclasses

from longrl_jax.config import BatchConfig, Config, MeshConfig

R = 8
"""Answers to the question: rollout.num_samples of the 7B config."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """One way to make the step."""

    label: str
    encodings: int
    """Times that the video goes through the tower; over 1, each on one device, R at once."""
    prefills: int
    """Prompts that the engine has to read."""
    copies: bool
    """The learner gets R rows of prompt and answer, instead of one with R answers."""
    split: bool
    """All devices share every row; otherwise a row is one device's."""
    store: str = ""
    """write or read: the video's features on the disk."""


SIDES = {
    "plain": Side(label="plain", encodings=3 * R, prefills=R, copies=True, split=False),
    "stage 1": Side(label="MR-SP stage 1", encodings=1, prefills=R, copies=True, split=False),
    "stage 1+2": Side(
        label="MR-SP stages 1 and 2", encodings=1, prefills=R, copies=True, split=True
    ),
    "ours": Side(label="ours", encodings=1, prefills=1, copies=False, split=True, store="write"),
    "ours, later": Side(
        label="ours, later epochs", encodings=0, prefills=1, copies=False, split=True, store="read"
    ),
}
PHASES = ("encode", "prefill", "reference", "update")
Costs = dict[str, dict[str, float]]
"""Side -> phase -> seconds or FLOPs."""


def on(side: Side, cfg: Config, *, devices: int, bucket: int) -> Config:
    """Returns the config of one side's step of one question.

    A whole row at a time on a device; rows that are split go in one pass, since in a pass each
    simulated devices wait for each other for ever too often.
    """
    seq = devices if side.split else 1
    batch = BatchConfig(
        groups=R if side.copies else 1,
        rows_per_pass=0 if side.split else devices,
        max_row_tokens=2**31,
        smallest_bucket=bucket,
    )
    mesh = MeshConfig(fsdp=devices // seq, seq=seq, simulated=True)
    return dataclasses.replace(cfg, batch=batch, mesh=mesh)
