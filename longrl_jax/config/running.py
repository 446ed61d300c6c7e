"""The sections `optimizer` and `run`."""

import dataclasses

from longrl_jax.config.checks import check_one_of, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with warm-up and clipping."""

    learning_rate: float = 1e-6
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly from 0."""
    schedule: str = "constant"
    """constant, or cosine (to 0 at run.num_steps)."""
    weight_decay: float = 0.0
    """Decoupled; matrices only, norms and biases are left alone."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self):
        check_positive("optimizer.learning_rate", self.learning_rate)
        check_positive("optimizer.max_grad_norm", self.max_grad_norm)
        check_one_of("optimizer.schedule", self.schedule, ("constant", "cosine"))
        if not (0 <= self.beta1 < 1 and 0 <= self.beta2 < 1 and self.eps > 0):
            raise ValueError(
                f"optimizer.beta1={self.beta1} and optimizer.beta2={self.beta2} must be in [0, 1), "
                f"optimizer.eps={self.eps} positive"
            )
        if self.warmup_steps < 0 or self.weight_decay < 0:
            raise ValueError("optimizer.warmup_steps and optimizer.weight_decay must be 0 or more")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How long a run is and where it writes."""

    dir: str
    """Run folder. The same command on the folder of an unfinished run goes on with it; a folder
    that holds another run is refused."""
    num_steps: int = 100
    """Updates."""
    eval_every: int = 0
    """Steps between evaluations on data.validation; 0: after the last step only."""
    eval_examples: int = 64
    """Questions of one evaluation."""
    export_dtype: str = ""
    """float32 or bfloat16: type of every tensor of RUN/export; empty: as in model.path."""
    export: bool = True
    """Write the trained model as a Hugging Face folder at the end (RUN/export)."""
    checkpoint_every: int = 20
    """Steps between checkpoints (RUN/checkpoints); the last step always makes one. 0: only that.
    Rollouts and rewards of the steps between are journaled, so they are lost in no case."""
    keep: int = 2
    """Newest checkpoints that are kept; older ones are deleted."""
    best_metric: str = ""
    """Score of the evaluation, e.g. video_qa/accuracy: the checkpoint where it is highest is made
    and kept, too. Empty: none."""
    wandb: str = ""
    """Weights & Biases project that gets the metrics (needs the wandb extra); empty: none."""

    def __post_init__(self):
        if self.export_dtype:
            check_one_of("run.export_dtype", self.export_dtype, ("float32", "bfloat16"))
        check_positive("run.num_steps", self.num_steps)
        check_positive("run.eval_examples", self.eval_examples)
        check_positive("run.keep", self.keep)
        for name in ("eval_every", "checkpoint_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"run.{name}={getattr(self, name)} must be 0 or more")
