"""Tiny random checkpoints (Qwen2 where nothing else is said) and what `transformers` says of them:
the witness of the engine."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

from longrl_jax.config import RolloutConfig

ROOT = Path(__file__).parents[2]
VOCAB, HIDDEN, LAYERS = 160, 128, 3
BANNED = (7, 11, 150)
STOP = (2,)
EOS = 3
"""What config.json ends answers with; the engine must go by STOP alone."""
CFG = RolloutConfig(
    dtype="float32", max_model_len=512, kv_cache_gib=0.25, num_samples=4, max_tokens=16
)
LOGP_ATOL = 1e-4  # float32 sums in another order; measured: 6e-6


def save_checkpoint(folder: Path, *, tied: bool, seed: int, family: str = "Qwen2", **sizes) -> Path:
    """Writes a random model whose logits are far enough apart for greedy decoding to be stable."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(
        **{
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": 192,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "tie_word_embeddings": tied,
            "eos_token_id": EOS,
            "bos_token_id": 1,
        }
        | sizes
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.12).add_(1.0 if parameter.ndim == 1 else 0.0)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def hf_model(folder: Path) -> transformers.PreTrainedModel:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def named_weights(folder: Path) -> list[tuple[str, np.ndarray]]:
    """What a learner would push: Hugging Face names by layer, always with lm_head.weight."""
    state = {n: x.numpy().copy() for n, x in hf_model(folder).state_dict().items()}
    head = state.pop("lm_head.weight", state["model.embed_tokens.weight"])
    return [*state.items(), ("lm_head.weight", head)]


@torch.no_grad()
def hf_logps(
    model: transformers.PreTrainedModel, prompt: np.ndarray, tokens: np.ndarray, temperature: float
) -> np.ndarray:
    """log p of each token after the prompt ([P] tokens or [P, D] embeddings): banned tokens have
    logit -inf, then comes the temperature (0: greedy, which the engine scores at 1)."""
    embed = model.get_input_embeddings()
    prompt_PD = embed(torch.tensor(prompt)) if prompt.ndim == 1 else torch.tensor(prompt)
    x_TD = torch.cat([prompt_PD, embed(torch.tensor(tokens, dtype=torch.long))])
    logits_AV = model(inputs_embeds=x_TD[None]).logits[0, len(prompt) - 1 : -1]
    logits_AV[:, list(BANNED)] = -torch.inf
    logp_AV = torch.log_softmax(logits_AV / (temperature or 1.0), dim=-1)
    return logp_AV[torch.arange(len(tokens)), torch.tensor(tokens, dtype=torch.long)].numpy()


@torch.no_grad()
def hf_greedy(model: transformers.PreTrainedModel, prompt: np.ndarray, num: int) -> list[int]:
    """The most likely tokens, one after another, until a stop token."""
    tokens = torch.tensor(prompt)[None]
    for _ in range(num):
        logits_V = model(tokens).logits[0, -1]
        logits_V[list(BANNED)] = -torch.inf
        tokens = torch.cat([tokens, logits_V.argmax()[None, None]], dim=1)
        if tokens[0, -1] in STOP:
            break
    return tokens[0, len(prompt) :].tolist()


_PROMPTS = itertools.count()


def fresh_prompt(length: int) -> np.ndarray:
    """Random tokens that no earlier call returned, so that no prefix cache knows them."""
    rng = np.random.default_rng([next(_PROMPTS), length])
    return rng.integers(4, VOCAB, length).astype(np.int32)


def as_embeddings(folder: Path, tokens: np.ndarray) -> np.ndarray:
    """[P, D]: rows of the token table, every third one moved to where no token is."""
    table_VD = dict(named_weights(folder))["model.embed_tokens.weight"]
    x_PD = table_VD[tokens]
    x_PD[::3] += np.random.default_rng(len(tokens)).normal(0, 0.1, x_PD[::3].shape)
    return x_PD


def greedy(engine, prompts) -> list[list[int]]:
    answers = engine.generate(
        prompts, num_samples=1, temperature=0.0, max_tokens=8, seeds=[0] * len(prompts)
    )
    return [answer.tokens.tolist() for (answer,) in answers]


def sample(engine, prompts, num_samples=4, temperature=1.0, max_tokens=16, seeds=None):
    return engine.generate(
        prompts,
        num_samples=num_samples,
        temperature=temperature,
        max_tokens=max_tokens,
        seeds=seeds if seeds is not None else [100 * i for i in range(len(prompts))],
    )


def assert_same(got, want) -> None:
    """The same samples, to the bit in tokens and to rounding in logps."""
    assert len(got) == len(want)
    for a, b in zip(itertools.chain(*got), itertools.chain(*want), strict=True):
        assert a.tokens.tolist() == b.tokens.tolist()
        assert (a.seed, a.finish_reason) == (b.seed, b.finish_reason)
        np.testing.assert_allclose(a.logps, b.logps, rtol=0, atol=LOGP_ATOL)


def child(code: str, *args, env=None) -> subprocess.CompletedProcess:
    """Runs a program in a fresh Python that can import the project and this file."""
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, args)],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
