"""A checkpoint opened for training: on the mesh, with its tokenizer, encoder and engines."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import optax
from flax import nnx

import rollout_bridge
from longrl_jax import encode, models, step
from longrl_jax.batching import bucket
from longrl_jax.config import Config
from longrl_jax.data import prompts
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import AXES, make_mesh, ulysses_size
from longrl_jax.types import Prompt, VideoLayout

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them is in every folder with a tokenizer."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays fixed of a checkpoint; its parameters live in the stage's TrainState."""

    folder: Path
    backbone: Any
    """The module of longrl_jax.models that knows this kind of checkpoint."""
    model_cfg: Any
    graphdef: nnx.GraphDef
    mesh: jax.sharding.Mesh
    tokenizer: Any
    layout: VideoLayout | None
    """None: a text-only model."""
    stage: str
    """Deepest frozen stage of the media path, the one that the store keeps."""
    banned_tokens: tuple[int, ...]
    """Media placeholders: never sampled, and masked in the learner too."""
    stop_tokens: tuple[int, ...]
    compute_dtype: Any


def open_policy(cfg: Config, *, trains: bool = True) -> tuple[Policy, step.TrainState]:
    """Loads model.path onto the mesh; parts that are not frozen get an optimizer, if it trains."""
    mesh = make_mesh(**{axis: getattr(cfg.mesh, axis) for axis in AXES})
    folder = Path(cfg.model.path)
    backbone = models.backbone_of(folder)
    check_heads(backbone.text_config(backbone.read_config(folder)), cfg)
    model_cfg, model = models.load(folder, mesh=mesh)
    text = backbone.text_config(model_cfg)
    tokenizer, stop_tokens = open_tokenizer(models.llm_folder(folder), text.vocab_size)
    optimizer = make_optimizer(cfg.optimizer, cfg.run.num_steps) if trains else optax.identity()
    graphdef, state = step.init_state(model, cfg.model.frozen, optimizer, mesh)
    policy = Policy(
        folder=folder,
        backbone=backbone,
        model_cfg=model_cfg,
        graphdef=graphdef,
        mesh=mesh,
        tokenizer=tokenizer,
        layout=backbone.video_layout(model_cfg),
        stage=models.feature_stage(cfg.model.frozen),
        banned_tokens=prompts.media_token_ids(tokenizer),
        stop_tokens=stop_tokens,
        compute_dtype=DTYPES[cfg.model.compute_dtype],
    )
    return policy, state


def check_heads(text: Any, cfg: Config) -> None:
    """Raises ValueError, before anything is loaded, where devices cannot share the heads."""
    heads = math.gcd(text.num_heads, text.num_kv_heads)
    if heads % cfg.mesh.tensor:
        raise ValueError(
            f"mesh.tensor={cfg.mesh.tensor} does not divide the {text.num_heads} heads "
            f"({text.num_kv_heads} for keys) of model.path={cfg.model.path}; choose one of "
            f"{[n for n in range(1, heads + 1) if heads % n == 0]} and use mesh.seq for the rest"
        )
    ulysses_size(
        text.num_heads,
        kind=cfg.attention.kind,
        ulysses=cfg.attention.ulysses,
        seq=cfg.mesh.seq,
        tensor=cfg.mesh.tensor,
    )
    ranks = cfg.rollout.tensor_parallel
    if text.num_heads % ranks:
        raise ValueError(
            f"rollout.tensor_parallel={ranks} does not divide the {text.num_heads} heads of "
            f"model.path={cfg.model.path}; choose one of "
            f"{[n for n in range(1, text.num_heads + 1) if text.num_heads % n == 0]}"
        )


def open_tokenizer(folder: Path, vocab_size: int) -> tuple[Any, tuple[int, ...]]:
    """Returns the tokenizer and the tokens that end an answer; refuses one that does not fit."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(  # transformers would make an empty one
            f"{folder} holds no tokenizer (none of {', '.join(TOKENIZER_FILES)}); copy it there"
        )
    tokenizer = prompts.load_tokenizer(folder)
    media = prompts.media_token_ids(tokenizer)  # never looked up in the table
    token, index = max(
        (x for x in tokenizer.get_vocab().items() if x[1] not in media), key=lambda x: x[1]
    )
    if index >= vocab_size:
        raise ValueError(
            f"token {token!r} of the tokenizer in {folder} has number {index}, but the model's "
            f"table ends at vocab_size={vocab_size}; take the tokenizer of this checkpoint"
        )
    try:
        return tokenizer, prompts.stop_token_ids(tokenizer)
    except jinja2.TemplateError as error:
        raise ValueError(f"the chat template in {folder} is broken ({error}); mend it") from None


def open_reference(cfg: Config, policy: Policy, state: step.TrainState) -> nnx.State | None:
    """Returns the parameters of the KL term's reference; None where algorithm.kl is 0.

    They are the start of the run, or model.reference, which must have the frozen media stages of
    model.path: the stored features of a video serve both.
    """
    if not cfg.algorithm.kl:
        return None
    if not cfg.model.reference:
        start = jax.tree.map(jnp.copy, state.params)  # the update consumes the policy's own
        return nnx.merge_state(state.frozen, start)
    model_cfg, model = models.load(cfg.model.reference, mesh=policy.mesh)
    if model_cfg != policy.model_cfg:
        raise ValueError(
            f"model.reference={cfg.model.reference} has other sizes than model.path="
            f"{cfg.model.path}; name a checkpoint of the same architecture"
        )
    params = nnx.state(model, nnx.Param)
    if policy.layout is not None:
        ours, theirs = (
            rollout_bridge.weights_digest(models.stage_weights(p, policy.stage))
            for p in (step.all_params(state), params)
        )
        if ours != theirs:
            raise ValueError(
                f"model.reference={cfg.model.reference} makes other {policy.stage!r} features of a "
                f"video than model.path={cfg.model.path}: a part of model.frozen differs; name a "
                "reference with the same frozen parts, or take projector out of model.frozen"
            )
    return params


def open_encoder(policy: Policy, state: step.TrainState) -> encode.Encoder | None:
    """Returns the frozen media stages on the mesh; None for a text-only model."""
    if policy.layout is None:
        return None
    frozen = models.stage_weights(state.frozen, policy.stage)
    return encode.make_encoder(
        policy.graphdef,
        state.frozen,
        state.params,
        stage=policy.stage,
        width=policy.backbone.feature_width(policy.model_cfg, policy.stage),
        dtype=policy.compute_dtype,
        mesh=policy.mesh,
        digest=rollout_bridge.weights_digest(
            frozen, about=policy.backbone.stage_identity(policy.model_cfg, policy.stage)
        ),
    )


def make_prompt_embedder(
    policy: Policy, *, smallest_bucket: int
) -> Callable[[step.TrainState, Sequence[Prompt], Sequence[np.ndarray | None]], list[np.ndarray]]:
    """Returns a function that makes the engine's input [P, D] from the current weights.

    Text rows come from the token table and, where the projector is trained, media rows from the
    projector of this very step; only the stored features below them are reused.
    """

    program = make_embed_program(policy)

    def embed(
        state: step.TrainState, asked: Sequence[Prompt], features: Sequence[np.ndarray | None]
    ) -> list[np.ndarray]:
        params, out = step.all_params(state), []
        for prompt, stored_MC in zip(asked, features, strict=True):
            P = len(prompt.tokens)
            size = embed_tokens(policy, P, smallest_bucket)
            tokens_1P, is_media_1P = np.zeros((1, size), np.int32), np.zeros((1, size), bool)
            tokens_1P[0, :P], is_media_1P[0, :P] = prompt.tokens, prompt.is_media
            features_1PC = None
            if stored_MC is not None:
                features_1PC = np.zeros((1, size, stored_MC.shape[-1]), stored_MC.dtype)
                features_1PC[0, :P][prompt.is_media] = stored_MC
            x_PD = program(params, tokens_1P, is_media_1P, features_1PC)
            out.append(np.asarray(x_PD)[:P])
        return out

    return embed


def embed_tokens(policy: Policy, num_tokens: int, smallest_bucket: int) -> int:
    """Returns the padded length of a prompt in make_embed_program."""
    split = policy.mesh.shape["seq"]
    return -(-bucket(num_tokens, smallest_bucket) // split) * split


def make_embed_program(policy: Policy) -> step.CountedJit:
    """Returns (params, tokens [1, P], is_media [1, P], features [1, P, C]) -> [P, D], jitted."""

    def embed_row(params: nnx.State, tokens_1P: Any, is_media_1P: Any, features: Any) -> jax.Array:
        model = nnx.merge(policy.graphdef, params)
        x_1PD = model.embed(
            tokens_1P,
            is_media_1P,
            features,
            stage=policy.stage,
            compute_dtype=policy.compute_dtype,
        )
        return x_1PD[0]

    return step.CountedJit(embed_row, mesh=policy.mesh)


@contextlib.contextmanager
def open_engines(cfg: Config, policy: Policy) -> Iterator[list[rollout_bridge.Engine]]:
    """Starts the vLLM replicas on the checkpoint's language model and closes them at the end."""
    engines = rollout_bridge.make_engines(
        models.llm_folder(policy.folder),
        cfg.rollout,
        seed=cfg.seed,
        banned_tokens=policy.banned_tokens,
        stop_tokens=policy.stop_tokens,
    )
    try:
        yield engines
    finally:
        for engine in engines:
            engine.close()


def push(
    engines: Sequence[rollout_bridge.Engine],
    policy: Policy,
    state: step.TrainState,
    *,
    version: int,
) -> None:
    """Gives the language model's current weights to every engine."""
    weights = models.llm_weights(step.all_params(state), policy.model_cfg)
    rollout_bridge.sync_all(engines, weights, version)


def export(policy: Policy, state: step.TrainState, folder: Path, *, dtype: str = "") -> None:
    """Writes the model as a Hugging Face folder that transformers and vLLM load.

    dtype: run.export_dtype.
    """
    chosen = np.dtype(DTYPES[dtype]) if dtype else None
    models.save(folder, step.all_params(state), policy.model_cfg, policy.folder, dtype=chosen)
