"""What verl and TRL compute of given numbers: advantages, losses with gradients, KL, overlong.

    python -m venv W && W/bin/pip install "trl==1.16.0" "verl==0.9.1" && W/bin/python algorithms.py

writes algorithms.npz beside it, which tests/test_algorithm_witness.py reads. It needs an
environment of its own and imports nothing of ours; `versions` in the file says what it ran with.
Samples are rows here, as there: [samples, tokens], their tokens first, the rest masked.
"""

import importlib.metadata
import types
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from trl.rewards import get_soft_overlong_punishment
from trl.trainer.grpo_trainer import GRPOTrainer
from verl.trainer.ppo import core_algos
from verl.workers.config import ActorConfig

GROUPS, SAMPLES, TOKENS = 6, 4, 128
CLIP_LOW, CLIP_HIGH, CLIP_DUAL = 0.2, 0.28, 3.0
ESTIMATORS = {"kl": "kl", "abs": "abs", "mse": "mse", "low_variance": "low_var_kl"}


def inputs() -> dict[str, np.ndarray]:
    """One group of equal rewards, one sample of one token, one row without any; extreme ratios."""
    rng = np.random.default_rng(7)
    shape = GROUPS * SAMPLES, TOKENS
    lengths = rng.integers(20, TOKENS + 1, shape[0])
    lengths[:2] = 1, TOKENS
    reward = rng.normal(size=(GROUPS, SAMPLES))
    reward[2] = 0.1
    logp = rng.normal(-2, 0.5, shape)
    old = logp + rng.normal(0, 0.3, shape)
    reference = logp + rng.normal(0, 0.5, shape)  # under our bound of 10, which TRL has not
    far, old_far = logp.copy(), old.copy()
    far[5, :4], old_far[5, :4] = [-80, -0.1, -3, -30], [-0.1, -80, -3, -0.2]
    advantage = rng.normal(size=shape[0])
    advantage[3] = 0
    return {
        "reward": reward,
        "lengths": lengths.reshape(GROUPS, SAMPLES),
        "logp": logp,
        "old": old,
        "reference": reference,
        "far": far,
        "old_far": old_far,
        "advantage": advantage,
    }


def mask_of(lengths: np.ndarray) -> torch.Tensor:
    return (torch.arange(TOKENS) < torch.tensor(lengths.reshape(-1, 1))).double()


def advantages(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """verl's, of every token."""
    mask = mask_of(x["lengths"])
    last = torch.tensor(x["lengths"].reshape(-1)) - 1
    rewards = torch.zeros(mask.shape, dtype=torch.float64)
    rewards[torch.arange(len(last)), last] = torch.tensor(x["reward"].reshape(-1))
    index = np.repeat(np.arange(GROUPS), SAMPLES)
    discount = types.SimpleNamespace(gamma=1.0)
    kl = torch.tensor(x["logp"] - x["reference"]) * mask
    made = {
        "grpo": core_algos.compute_grpo_outcome_advantage(rewards.clone(), mask, index),
        "dr_grpo": core_algos.compute_grpo_outcome_advantage(
            rewards.clone(), mask, index, norm_adv_by_std_in_grpo=False
        ),
        "rloo": core_algos.compute_rloo_outcome_advantage(rewards.clone(), mask, index),
        "reinforce_plus_plus": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            rewards.clone(), mask, config=discount
        ),
        "reinforce_plus_plus_baseline": (
            core_algos.compute_reinforce_plus_plus_baseline_outcome_advantage(
                rewards.clone(), mask, index
            )
        ),
        "reinforce_plus_plus_tokens": core_algos.compute_reinforce_plus_plus_outcome_advantage(
            core_algos.compute_rewards(rewards, kl, torch.zeros_like(kl), 0.01),
            mask,
            config=discount,
        ),
    }
    return {f"advantage/{name}": np.asarray(value[0]) for name, value in made.items()}


def verl_losses(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Loss and gradient by (loss, mean). A sequence's mean is TRL's: verl adds 1e-8 to a length."""
    found = {}
    config = ActorConfig(
        strategy="fsdp",
        rollout_n=SAMPLES,
        clip_ratio_low=CLIP_LOW,
        clip_ratio_high=CLIP_HIGH,
        clip_ratio_c=CLIP_DUAL,
        ppo_micro_batch_size_per_gpu=1,
    )
    config.global_batch_info.clear()
    mask = mask_of(x["lengths"])
    advantage = torch.tensor(x["advantage"])[:, None].expand(mask.shape)
    for name, theirs in (("clipped", "vanilla"), ("gspo", "gspo"), ("cispo", "cispo")):
        for mean, mode in (("token", "token-mean"), ("fixed", "seq-mean-token-sum-norm")):
            new, old = ("logp", "old") if name == "gspo" else ("far", "old_far")
            logp = torch.tensor(x[new], requires_grad=True)
            loss, _ = core_algos.get_policy_loss_fn(theirs)(
                torch.tensor(x[old]), logp, advantage, mask, mode, config
            )
            loss.backward()
            found[f"verl/{name}/{mean}/loss"] = loss.detach().numpy()
            found[f"verl/{name}/{mean}/gradient"] = logp.grad.numpy()
    return found


def trl_losses(x: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The same of TRL's trainer, of which only the loss runs; beta weighs its KL (k3)."""
    found = {}
    mask = mask_of(x["lengths"])
    for loss_type, level, beta, name in (
        ("grpo", "token", 0.0, "clipped/sequence"),
        ("grpo", "token", 0.04, "clipped/sequence/kl"),
        ("bnpo", "token", 0.04, "clipped/token/kl"),
        ("dr_grpo", "token", 0.04, "clipped/fixed/kl"),
        ("grpo", "sequence", 0.0, "gspo/sequence"),
    ):
        logp = torch.tensor(x["logp"], requires_grad=True)
        trainer = types.SimpleNamespace(
            _get_per_token_logps_and_entropies=lambda *_, logp=logp, **__: (
                logp,
                torch.zeros_like(logp),
                None,
            ),
            aux_loss_enabled=False,
            top_entropy_quantile=1.0,
            off_policy_mask_threshold=None,
            importance_sampling_level=level,
            beta=beta,
            args=types.SimpleNamespace(use_bias_correction_kl=False, delta=None),
            loss_type=loss_type,
            epsilon_low=CLIP_LOW,
            epsilon_high=CLIP_HIGH,
            use_vllm=False,
            vllm_importance_sampling_correction=False,
            model=types.SimpleNamespace(training=True),
            current_gradient_accumulation_steps=1,
            max_completion_length=TOKENS,
            _entropy_bonus_enabled=False,
            accelerator=types.SimpleNamespace(
                gather=lambda value: value, reduce=lambda value, reduction: value, num_processes=1
            ),
            _metrics={"train": defaultdict(list)},
        )
        token = torch.zeros(mask.shape, dtype=torch.long)
        loss = GRPOTrainer._compute_loss(
            trainer,
            trainer.model,
            {
                "prompt_ids": token[:, :1],
                "prompt_mask": token[:, :1],
                "completion_ids": token,
                "completion_mask": mask,
                "advantages": torch.tensor(x["advantage"]),
                "old_per_token_logps": torch.tensor(x["old"]),
                "ref_per_token_logps": torch.tensor(x["reference"]),
            },
        )
        loss.backward()
        found[f"trl/{name}/loss"] = loss.detach().numpy()
        found[f"trl/{name}/gradient"] = logp.grad.numpy()
    return found


def main() -> None:
    x = inputs()
    far, reference = torch.tensor(x["far"]), torch.tensor(x["reference"])
    made = {
        f"kl/{ours}": core_algos.kl_penalty(far, reference, theirs).numpy()
        for ours, theirs in ESTIMATORS.items()
    }
    punish = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)
    made["overlong"] = np.array(punish([[0] * length for length in range(106)]))
    packages = ("verl", "trl", "torch", "transformers")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    made["versions"] = np.array(versions)
    made |= advantages(x) | verl_losses(x) | trl_losses(x)
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"), **{f"input/{k}": v for k, v in x.items()}, **made
    )


if __name__ == "__main__":
    main()
