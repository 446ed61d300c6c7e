"""Captions by a VILA checkpoint: frames are encoded here, its language model runs in vLLM's server.

What the server gets is the user's turn as prompt embeddings, one part of a chat message
(vLLM's --enable-prompt-embeds); its chat template puts the turn's marks around them, so the model
sees the prompt that it sees in training and evaluation.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax import config, encode
from longrl_jax.chat import Request
from longrl_jax.data import prompts, video
from longrl_jax.data.generate.caption import MakeRequests
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item
from longrl_jax.stages import policy as opened
from longrl_jax.types import Example, MediaFile, Prompt
from rollout_bridge import VideoStore, prompt_embeds

STORE_GIB = 2.0


@contextlib.contextmanager
def open_requests(cfg: GenerateConfig, pool: video.DecoderPool) -> Iterator[MakeRequests]:
    """Yields (film, clips) -> a request for each; the checkpoint is in memory as long."""
    run_cfg = _config(cfg)
    policy, state = opened.open_policy(run_cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    if encoder is None:
        raise ValueError(
            f"caption.checkpoint={cfg.caption.checkpoint} has no vision tower; name a VILA"
        )
    if policy.layout is None or policy.layout.media_apart:
        raise ValueError(
            f"caption.checkpoint={cfg.caption.checkpoint}: a server cannot know this backbone's "
            "positions from embeddings; serve the checkpoint as it is (vllm serve) and leave "
            "caption.checkpoint empty"
        )
    smallest = run_cfg.batch.smallest_bucket
    inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=smallest)(state)
    store = VideoStore(run_cfg.store.path, int(STORE_GIB * 2**30))

    def make(about: Item, clips: list[list[float]]) -> list[Request]:
        asked = [_prompt(about, clip, cfg.caption.question, run_cfg, policy) for clip in clips]
        features, refused = encode.embed(encoder, asked, store, pool, decoder="pyav")
        if refused:
            raise next(iter(refused.values()))
        embedded = inputs(asked, [encode.features_of(prompt, features) for prompt in asked])
        return [
            _request(turn(x_PD, prompt, policy.tokenizer), cfg)
            for prompt, x_PD in zip(asked, embedded, strict=True)
        ]

    with contextlib.closing(store):
        yield make


def turn(x_PD: np.ndarray, prompt: Prompt, tokenizer: Any) -> np.ndarray:
    """Returns the rows of what the user says, without what the chat template puts around it."""
    mark = "MARK"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = rendered.partition(mark)
    head, tail = (tokenizer.encode(text, add_special_tokens=False) for text in (before, after))
    tokens = prompt.tokens.tolist()
    assert tokens[: len(head)] == head and tokens[len(tokens) - len(tail) :] == tail
    return x_PD[len(head) : len(tokens) - len(tail)]


def _prompt(
    about: Item, clip: list[float], question: str, run_cfg: config.Config, policy: Any
) -> Prompt:
    film = MediaFile(kind="video", path=about["film"], span_s=(clip[0], clip[1]))
    data = run_cfg.data
    return prompts.encode_prompt(
        Example(id=about["film"], question=question, answer="", media=(film,)),
        tokenizer=policy.tokenizer,
        layout=policy.layout,
        num_frames=data.num_frames,
        fps=data.fps,
        decoder=data.decoder,
        template=data.template,
        root=Path(data.root),
        timestamp=data.timestamp,
    )


def _request(x_TD: np.ndarray, cfg: GenerateConfig) -> Request:
    part = {"type": "prompt_embeds", "data": prompt_embeds.to_base64(x_TD)}
    return Request(
        messages=({"role": "user", "content": [part]},),
        temperature=cfg.caption.temperature,
        max_tokens=cfg.caption.max_tokens,
        seed=cfg.seed,
        name="caption",
    )


def _config(cfg: GenerateConfig) -> config.Config:
    """Returns the config of an evaluation of the checkpoint on one device."""
    asked = cfg.caption
    return config.Config(
        stage="sft",
        model=config.ModelConfig(
            path=asked.checkpoint, frozen=("vision", "projector"), compute_dtype="float32"
        ),
        data=config.DataConfig(
            root=cfg.videos,
            num_frames=asked.frames,
            template=asked.template,
            timestamp=asked.timestamp,
            decoder="pyav",
        ),
        mesh=config.MeshConfig(data=asked.devices),
        store=config.StoreConfig(path=str(Path(cfg.out) / "embeddings")),
        run=config.RunConfig(dir=cfg.out),
    )
