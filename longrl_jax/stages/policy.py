"""A checkpoint opened for training: on the mesh, with its tokenizer, encoder and engines."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np
import optax
from flax import nnx

import rollout_bridge
from longrl_jax import encode, models, processes, step
from longrl_jax.config import Config, DataConfig, ModelConfig
from longrl_jax.data import prompts
from longrl_jax.models import lora
from longrl_jax.models.lora import Lora
from longrl_jax.optimizer import make_optimizer
from longrl_jax.packing import bucket
from longrl_jax.sharding import AXES, make_mesh, to_local, ulysses_size
from longrl_jax.types import MediaLayout, Prompt

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""One of them is in every folder with a tokenizer."""
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
Features = np.ndarray | None
"""Stored rows of a prompt's media tokens [M, C]; None: text only."""
Inputs = Callable[[Sequence[Prompt], Sequence[Features]], list[Any]]
"""Prompts and their features -> the engine's input of each (make_prompt_embedder)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """What stays fixed of a checkpoint; its parameters live in the stage's TrainState."""

    folder: Path
    backbone: Any
    """The module of longrl_jax.models that knows this kind of checkpoint."""
    model_cfg: Any
    graphdef: nnx.GraphDef
    base_graphdef: nnx.GraphDef
    """Of the model with adapters off; graphdef itself where there are none."""
    lora: Lora | None
    mesh: jax.sharding.Mesh
    tokenizer: Any
    layout: MediaLayout | None
    """None: a text-only model."""
    stage: str
    """Deepest frozen stage of the media path, the one that the store keeps."""
    banned_tokens: tuple[int, ...]
    """Media placeholders: never sampled, and masked in the learner too."""
    stop_tokens: tuple[int, ...]
    compute_dtype: Any


def open_policy(cfg: Config, *, trains: bool = True) -> tuple[Policy, step.TrainState]:
    """Loads model.path onto the mesh; parts that are not frozen get an optimizer, if it trains.

    So do the adapters of model.lora_rank, which exist only while training.
    """
    mesh = make_mesh(**{axis: getattr(cfg.mesh, axis) for axis in AXES})
    owners = [device.process_index for device in mesh.devices.flat]
    assert owners == sorted(owners), f"the rows of a process are not neighbours: {owners}"
    folder = models.find_folder(cfg.model.path)
    backbone = models.backbone_of(folder)
    check_heads(backbone.text_config(backbone.read_config(folder)), cfg)
    model_cfg, model = models.load(folder, mesh=mesh)
    text = backbone.text_config(model_cfg)
    tokenizer, stop_tokens = open_tokenizer(models.llm_folder(folder), text.vocab_size)
    stage = models.feature_stage(cfg.model.frozen)
    layout = media_layout(backbone, model_cfg, cfg.data)
    check_pools(layout, stage)
    if layout is not None:
        prompts.add_media_tokens(tokenizer, layout)
    media = prompts.media_token_ids(tokenizer)
    optimizer = make_optimizer(cfg.optimizer, cfg.run.num_steps) if trains else optax.identity()
    base_graphdef, adapters = nnx.graphdef(model), lora_of(cfg.model) if trains else None
    if adapters is not None:
        wanted = lora.shapes(model, lora.table(backbone, model_cfg, adapters), adapters, mesh)
        lora.attach(model, lora.start(wanted, seed=cfg.seed), adapters)
    parts = cfg.model.frozen_parts if trains else cfg.model.frozen
    graphdef, state = step.init_state(model, parts, optimizer, mesh)
    policy = Policy(
        folder=folder,
        backbone=backbone,
        model_cfg=model_cfg,
        graphdef=graphdef,
        base_graphdef=base_graphdef,
        lora=adapters,
        mesh=mesh,
        tokenizer=tokenizer,
        layout=layout,
        stage=stage,
        banned_tokens=tuple(token for token in media if token < text.vocab_size),
        stop_tokens=stop_tokens,
        compute_dtype=DTYPES[cfg.model.compute_dtype],
    )
    return policy, state


def lora_of(model: ModelConfig) -> Lora | None:
    """Returns the config's adapters; None without."""
    if not model.lora_rank:
        return None
    return Lora(rank=model.lora_rank, alpha=model.lora_alpha, targets=model.lora_targets)


def media_layout(backbone: Any, model_cfg: Any, data: DataConfig) -> MediaLayout | None:
    """Returns the backbone's layout with the config's bounds; refuses settings it cannot follow."""
    layout = backbone.media_layout(model_cfg)
    if data.frame_pool:
        if layout is None or layout.unit_frames > 1 or layout.pixels:
            raise ValueError(
                f"data.frame_pool={data.frame_pool} is for VILA checkpoints; leave it 0"
            )
        pools = functools.partial(_fixed_pools, ((data.frame_pool, 1, 1),))
        layout = dataclasses.replace(layout, video_pools=pools if data.frame_pool > 1 else None)
    for prefix in ("", "image_"):
        field = f"{prefix}pixels"
        fewest, most = getattr(data, f"{prefix}min_pixels"), getattr(data, f"{prefix}max_pixels")
        if not fewest and not most:
            continue
        said = f"data.{prefix}min_pixels={fewest} and data.{prefix}max_pixels={most}"
        own = layout and getattr(layout, field)
        if not own:
            raise ValueError(
                f"{said} are for backbones whose pictures have any size (Qwen2.5-VL); leave them 0"
            )
        bounds = fewest or own[0], most or own[1]
        if bounds[0] > bounds[1] or bounds[1] < math.prod(layout.image_size):
            raise ValueError(
                f"{said}: pictures of {bounds[0]} to {bounds[1]} pixels cannot be (one token has "
                f"{math.prod(layout.image_size)}); set both"
            )
        layout = dataclasses.replace(layout, **{field: bounds})
    if data.timestamp and layout is not None and layout.positions is not None:
        raise ValueError(
            f"data.timestamp={data.timestamp!r}: positions of this backbone hold frame times; "
            "leave it empty"
        )
    if data.subtitles == "between" and layout is not None and layout.positions is not None:
        raise ValueError(
            "data.subtitles='between': positions of this backbone want no words between the frames "
            "of a film; set data.subtitles=above"
        )
    return layout


def check_pools(layout: MediaLayout | None, stage: str) -> None:
    """Refuses films that are pooled behind a projector which is trained."""
    if layout is not None and layout.video_pools is not None and stage != "projected":
        raise ValueError(
            "the tokens of a film's frames are averaged behind the projector (TSP), so it cannot "
            "be trained: put projector into model.frozen, or set data.frame_pool=1 (no averaging)"
        )


def _fixed_pools(pools: tuple[Any, ...], num_frames: int) -> tuple[Any, ...]:
    return pools


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
    """Returns the parameters of the KL term's reference, of policy.base_graphdef; None where
    algorithm.kl is 0.

    They are the start of the run, or model.reference, which must have the frozen media stages of
    model.path: the stored features of a video serve both. The start shares the frozen arrays of the
    state: with adapters, the whole language model.
    """
    if not cfg.algorithm.kl:
        return None
    if not cfg.model.reference:
        # the update consumes the policy's own
        start = jax.tree.map(jnp.copy, lora.base(state.params))
        return nnx.merge_state(state.frozen, start)
    model_cfg, model = models.load(models.find_folder(cfg.model.reference), mesh=policy.mesh)
    if model_cfg != policy.model_cfg:
        raise ValueError(
            f"model.reference={cfg.model.reference} has other sizes than model.path="
            f"{cfg.model.path}; name a checkpoint of the same architecture"
        )
    params = nnx.state(model, nnx.Param)
    if policy.layout is not None:
        ours, theirs = (
            rollout_bridge.weights_digest(
                models.stage_weights(p, policy.stage), to_host=models.to_host
            )
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
    """Returns the frozen media stages on this process's devices; None for a text-only model."""
    if policy.layout is None:
        return None
    frozen = models.stage_weights(state.frozen, policy.stage)
    applied, others = split_off(step.all_params(state), frozen)
    return encode.make_encoder(
        policy.graphdef,
        jax.tree.map(to_local, applied),
        others,
        stage=policy.stage,
        width=policy.backbone.feature_width(policy.model_cfg, policy.stage),
        dtype=policy.compute_dtype,
        mesh=policy.mesh.local_mesh,
        digest=rollout_bridge.weights_digest(
            frozen,
            about=policy.backbone.stage_identity(policy.model_cfg, policy.stage),
            to_host=models.to_host,
        ),
    )


def make_prompt_embedder(
    policy: Policy, state: step.TrainState, *, smallest_bucket: int
) -> Callable[[step.TrainState], Inputs]:
    """Returns a function that makes, from the weights of a state, one that makes engine's inputs.

    An input is [P, D] embeddings; where the engine takes media apart (MediaLayout.media_apart),
    tokens, with the media's embeddings beside them. Text rows come from the token table and, where
    the projector is trained, media rows from the projector of that very state; only the stored
    features below them are reused. All processes must call the function with a state; what it
    returns each one calls by itself.
    """
    _, others = split_inputs(policy, state)
    program = make_embed_program(policy, others)

    apart = policy.layout is not None and policy.layout.media_apart

    def inputs_of(state: step.TrainState) -> Inputs:
        mine = jax.tree.map(to_local, split_inputs(policy, state)[0])

        def embed(asked: Sequence[Prompt], features: Sequence[Features]) -> list[Any]:
            out: list[Any] = []
            for prompt, stored_MC in zip(asked, features, strict=True):
                if apart and stored_MC is None:
                    out.append(prompt.tokens)
                    continue
                P = len(prompt.tokens)
                size = embed_tokens(policy, P, smallest_bucket)
                tokens_1P, is_media_1P = np.zeros((1, size), np.int32), np.zeros((1, size), bool)
                tokens_1P[0, :P], is_media_1P[0, :P] = prompt.tokens, prompt.is_media
                features_1PC = None
                if stored_MC is not None:
                    features_1PC = np.zeros((1, size, stored_MC.shape[-1]), stored_MC.dtype)
                    features_1PC[0, :P][prompt.is_media] = stored_MC
                x_PD = np.asarray(program(mine, tokens_1P, is_media_1P, features_1PC))[:P]
                out.append(_with_media(prompt, x_PD) if apart else x_PD)
            return out

        return embed

    return inputs_of


def split_inputs(policy: Policy, state: step.TrainState) -> tuple[nnx.State, nnx.State]:
    """Returns (the parameters between a token and the language model's input, all others)."""
    params = step.all_params(state)
    return split_off(params, models.input_weights(params, policy.stage))


def split_off(params: nnx.State, wanted: Collection[str]) -> tuple[nnx.State, nnx.State]:
    """Returns (the parameters of these paths, all others)."""
    mine, others = nnx.split_state(params, lambda path, _: ".".join(map(str, path)) in wanted, ...)
    return mine, others


def _with_media(prompt: Prompt, x_PD: np.ndarray) -> rollout_bridge.MediaPrompt:
    """Cuts the rows of every medium out of an embedded prompt."""
    media = [
        rollout_bridge.EngineMedia(
            kind=m.kind,
            offset=m.offset,
            grid=m.grid,
            unit_s=m.unit_s,
            features=np.ascontiguousarray(x_PD[m.offset : m.offset + m.num_tokens]),
        )
        for m in prompt.media
    ]
    return rollout_bridge.MediaPrompt(tokens=prompt.tokens, media=tuple(media))


def embed_tokens(policy: Policy, num_tokens: int, smallest_bucket: int) -> int:
    """Returns the padded length of a prompt in make_embed_program."""
    split = policy.mesh.shape["seq"]
    return -(-bucket(num_tokens, smallest_bucket) // split) * split


def make_embed_program(policy: Policy, others: nnx.State) -> step.CountedJit:
    """Returns (params, tokens [1, P], is_media [1, P], features [1, P, C]) -> [P, D], jitted.

    params and others are those of split_inputs; of the others only shapes are used. It runs on this
    process's devices.
    """
    shapes = jax.eval_shape(lambda: others)

    def embed_row(params: nnx.State, tokens_1P: Any, is_media_1P: Any, features: Any) -> jax.Array:
        unused = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        model = nnx.merge(policy.graphdef, params, unused)
        x_1PD = model.embed(
            tokens_1P,
            is_media_1P,
            features,
            stage=policy.stage,
            compute_dtype=policy.compute_dtype,
        )
        return x_1PD[0]

    return step.CountedJit(embed_row, mesh=policy.mesh.local_mesh)


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
    """Gives the language model's current weights to every engine of this process; all processes
    must call it, and gather every layer together."""
    merged = lora.merged(step.all_params(state), policy.lora)
    weights = models.llm_weights(merged, policy.model_cfg)
    rollout_bridge.sync_all(engines, weights, version)


def export(policy: Policy, state: step.TrainState, folder: Path, *, dtype: str = "") -> None:
    """Writes the model, adapters merged, as a Hugging Face folder that transformers and vLLM load;
    all processes must call it, the first one writes.

    dtype: run.export_dtype.
    """
    params = lora.merged(step.all_params(state), policy.lora)
    if not processes.is_first():
        models.follow_save(params, policy.model_cfg)
        return
    chosen = np.dtype(DTYPES[dtype]) if dtype else None
    models.save(folder, params, policy.model_cfg, policy.folder, dtype=chosen)


def export_adapter(policy: Policy, state: step.TrainState, folder: Path) -> None:
    """Writes the adapters alone, as peft opens them; all processes must call it."""
    assert policy.lora is not None, "there are no adapters"
    where = policy.backbone, policy.model_cfg, policy.lora
    if not processes.is_first():
        for _ in lora.tensors_of(state.params, *where):
            pass
        return
    lora.save(folder, state.params, *where, base_folder=models.llm_folder(policy.folder))
