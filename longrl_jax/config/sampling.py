"""The sections `rollout`, `judge` and `algorithm`: answers, and what is learned from them."""

import dataclasses
import math
import urllib.parse

from longrl_jax.config.checks import check_one_of, check_positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """The vLLM engine and how it samples."""

    num_samples: int = 8
    """Answers drawn for one prompt (R)."""
    temperature: float = 1.0
    """Of sampling; the learner divides its logits by the same number."""
    max_tokens: int = 64
    """Longest answer, in tokens."""
    overlong_tokens: int = 0
    """For the reward `overlong`: it falls from 0 to -1 over the last so many of max_tokens."""
    replicas: int = 1
    """Engines that share a step's prompts; a group never splits."""
    tensor_parallel: int = 1
    """Devices (or CPU processes) of one engine."""
    process: str = "inline"
    """inline: vLLM in the learner's process; worker: in processes of its own, shared memory."""
    python: str = ""
    """Interpreter of the worker processes, where vLLM lives in an environment of its own (as beside
    the cuda12 extra); that environment needs longrl_jax's packages too. Empty: the learner's."""
    dtype: str = "bfloat16"
    """float32 or bfloat16: what the engine computes in."""
    kv_cache_gib: float = 1.0
    """Key/value cache of one CPU engine."""
    gpu_memory_utilization: float = 0.4
    """Share of each GPU that vLLM takes; ignored on CPU."""
    max_model_len: int = 1024
    """Longest prompt plus answer that the engine takes."""

    def __post_init__(self):
        for name in ("num_samples", "temperature", "max_tokens", "replicas", "tensor_parallel"):
            check_positive(f"rollout.{name}", getattr(self, name))
        check_positive("rollout.kv_cache_gib", self.kv_cache_gib)
        if self.temperature < 0.01:
            raise ValueError(
                f"rollout.temperature={self.temperature} must be at least 0.01: vLLM raises lower "
                "ones to that, and the learner would divide by another number"
            )
        check_one_of("rollout.process", self.process, ("inline", "worker"))
        check_one_of("rollout.dtype", self.dtype, ("float32", "bfloat16"))
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError(
                f"rollout.gpu_memory_utilization={self.gpu_memory_utilization} must be in (0, 1]"
            )
        if self.tensor_parallel > 1 and self.process == "inline":
            raise ValueError(
                f"rollout.tensor_parallel={self.tensor_parallel} needs rollout.process=worker"
            )
        if self.python and self.process == "inline":
            raise ValueError(f"rollout.python={self.python!r} needs rollout.process=worker")
        if not 0 <= self.overlong_tokens <= self.max_tokens:
            raise ValueError(
                f"rollout.overlong_tokens={self.overlong_tokens} must be 0 to rollout.max_tokens="
                f"{self.max_tokens}"
            )
        if self.max_tokens >= self.max_model_len:
            raise ValueError(
                f"rollout.max_tokens={self.max_tokens} leaves no room for a prompt in "
                f"rollout.max_model_len={self.max_model_len}"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """Names in ADVANTAGES, LOSSES, MEANS and KL_ESTIMATORS, and their numbers."""

    advantage: str = "grpo"
    """What a reward is compared with. grpo: the mean of its group, over the group's deviation.
    dr_grpo: the mean alone. rloo: the mean of the group's others. reinforce_plus_plus: the mean and
    deviation of all tokens of the step. reinforce_plus_plus_baseline: the same, after the mean of
    the group is taken away."""
    loss: str = "clipped"
    """clipped: PPO's, by token. gspo: the same with the ratio of the whole answer (no dual clip).
    cispo: log p times the clipped ratio, whose gradient is stopped; every token has a gradient."""
    loss_mean: str = "token"
    """Over all passes of a step. token: every token counts the same (DAPO). sequence: every answer
    does, whatever its length (GRPO, GSPO). fixed: tokens over answers * rollout.max_tokens
    (Dr.GRPO)."""
    clip_low: float = 0.2
    """Lower clip of the probability ratio: 1 - clip_low. While a step is one update, the ratio is 1
    and none of the three clips has an effect."""
    clip_high: float = 0.2
    """Upper clip of the probability ratio: 1 + clip_high."""
    clip_dual: float = 3.0
    """Bound on the loss of a token with negative advantage (dual clip of loss=clipped)."""
    kl: float = 0.0
    """Weight of the KL term to the reference; 0 loads no reference and computes none."""
    kl_estimator: str = "low_variance"
    """Of one token: low_variance (k3, bounded), kl (k1), abs, or mse (k2)."""
    kl_in: str = "loss"
    """loss: a term of the loss. reward: taken from the reward of every token, so that a token is
    told of the KL of all that follow; for advantage=reinforce_plus_plus."""
    filter_by: str = ""
    """Dynamic sampling (DAPO): a group is kept if filter_low < mean of this over its answers <
    filter_high, and prompts are asked on until batch.groups are kept. A metric of `reward/`: total,
    or e.g. video_qa/accuracy, of a reward that every source of data.mix has. Empty: every group is
    kept, batch.groups prompts are asked."""
    filter_low: float = 0.01
    filter_high: float = 0.99
    max_tries: int = 20
    """With filter_by: most times that batch.groups prompts are asked for one step, which is then
    made from what was kept."""

    def __post_init__(self):
        check_one_of("algorithm.kl_in", self.kl_in, ("loss", "reward"))
        if not 0 < self.clip_low < 1:
            raise ValueError(f"algorithm.clip_low={self.clip_low} must be in (0, 1)")
        check_positive("algorithm.clip_high", self.clip_high)
        check_positive("algorithm.max_tries", self.max_tries)
        if self.clip_dual <= 1:
            raise ValueError(f"algorithm.clip_dual={self.clip_dual} must be over 1")
        if self.kl < 0:
            raise ValueError(f"algorithm.kl={self.kl} must be 0 or more")
        if self.kl and self.kl_in == "reward" and self.advantage != "reinforce_plus_plus":
            raise ValueError(
                f"algorithm.kl_in=reward gives every token a reward of its own, and "
                f"algorithm.advantage={self.advantage} knows one an answer; use "
                "advantage=reinforce_plus_plus, or kl_in=loss"
            )
        if self.filter_low >= self.filter_high:
            raise ValueError(
                f"algorithm.filter_low={self.filter_low} must be under algorithm.filter_high="
                f"{self.filter_high}: nothing lies between them"
            )

    @property
    def needs_group(self) -> bool:
        """Whether an answer is compared with others to the same prompt."""
        return self.advantage != "reinforce_plus_plus"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """A model behind an OpenAI-compatible server, and how it may be asked."""

    base_url: str = ""
    """Of the server, e.g. https://api.openai.com/v1 or http://localhost:8000/v1 (vllm serve)."""
    model: str = ""
    """Its name there. Replies are kept by it: another model under the same name is not noticed."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable with the key; a server of this machine needs none. Empty: no key."""
    concurrency: int = 8
    """Requests at a time."""
    requests_per_minute: float = 0.0
    """Most requests a minute, evenly spread, tries counted; 0: no limit."""
    timeout_s: float = 120.0
    """Longest time for one try."""
    max_tries: int = 5
    """Most times that one request is sent: after 429, 500, 502, 503, 504, a connection that breaks,
    a time-out, and a reply that will not do (which is paid for)."""
    usd_per_million_prompt_tokens: float = 0.0
    """Price, for the cost that is shown."""
    usd_per_million_completion_tokens: float = 0.0

    def __post_init__(self):
        url = urllib.parse.urlsplit(self.base_url)
        if self.base_url and (url.scheme not in ("http", "https") or not url.hostname):
            raise ValueError(f"base_url={self.base_url!r} must begin with http:// or https://")
        if url.username or url.password or url.query or url.fragment:
            raise ValueError(
                f"base_url of {url.hostname} holds more than an address (a user, a key, a query); "
                "put the key into the environment variable that api_key_env names"
            )
        for name in ("concurrency", "timeout_s", "max_tries"):
            check_positive(name, getattr(self, name))
        for name in (
            "requests_per_minute",
            "usd_per_million_prompt_tokens",
            "usd_per_million_completion_tokens",
        ):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")
