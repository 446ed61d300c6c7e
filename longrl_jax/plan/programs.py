"""The programs of a training step, traced from shapes: what `train` jits, with nothing allocated.

Every program is made by the function that the stages call, so a plan cannot drift from training.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from longrl_jax import batching, encode, models, packing, step
from longrl_jax.config import Config
from longrl_jax.models import lora
from longrl_jax.optimizer import make_optimizer
from longrl_jax.sharding import AXES, make_mesh, spec
from longrl_jax.stages import policy as opened
from longrl_jax.stages import update
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Example, Prompt, Rollout, Sample

QUESTION_TOKENS = 512
"""Tokens of a prompt beside the video's: chat template, instruction, question and options."""
FILM = 1080, 1920
"""Height and width of a film's frames, where their size in tokens follows it."""
STAND_IN_TOKEN = 0
"""Plays the media placeholder: without a tokenizer its number is not known, and does not matter."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """The longest row that a config allows: its parts in tokens."""

    num_frames: int
    frame_tokens: int
    """Of one frame (or of unit_frames, which share them): media tokens, separator, and its time."""
    question_tokens: int
    answers: int
    """R."""
    answer_tokens: int
    """Of one answer."""
    unit_frames: int = 1
    rope_axes: int = 1
    """Numbers of one position."""

    @property
    def prompt_tokens(self) -> int:
        return -(-self.num_frames // self.unit_frames) * self.frame_tokens + self.question_tokens

    @property
    def tokens(self) -> int:
        """As packing.row_tokens counts them."""
        return self.prompt_tokens - 1 + self.answers * self.answer_tokens


@dataclasses.dataclass(frozen=True)
class Phase:
    """One program of a step, traced."""

    name: str
    traced: Any
    """jax.stages.Traced."""
    inputs: Any
    """Shapes with shardings of what it reads beside the parameters and the optimizer's state."""


def row_of(cfg: Config, backbone: Any, model_cfg: Any) -> Row:
    """Returns the longest row of a config; refuses one that the config itself would refuse.

    A frame's time is counted as its UTF-8 bytes: a byte-level tokenizer makes no more tokens.
    """
    layout = opened.media_layout(backbone, model_cfg, cfg.data)
    opened.check_pools(layout, models.feature_stage(cfg.model.frozen))
    num_frames, frame_tokens, unit_frames, rope_axes = 0, 0, 1, 1
    if layout is not None:
        num_frames = _longest_film(layout, cfg.data)
        last_s = (num_frames - 1) / (cfg.data.fps or 1)
        stamp = cfg.data.timestamp.format(t=last_s) if cfg.data.timestamp else ""
        view = layout.video(*FILM, num_frames)
        texts = len(layout.opening.encode()) + len(layout.separator.encode()) + len(stamp.encode())
        frame_tokens = sum(times * (count + texts) for times, count in view.unit_tokens)
        unit_frames = view.unit_frames
        rope_axes = 1 if layout.positions is None else layout.positions(1, ())[0].shape[1]
    row = Row(
        num_frames=num_frames,
        frame_tokens=frame_tokens,
        question_tokens=QUESTION_TOKENS,
        answers=cfg.rollout.num_samples if cfg.stage == "grpo" else 1,
        answer_tokens=cfg.rollout.max_tokens,
        unit_frames=unit_frames,
        rope_axes=rope_axes,
    )
    each = "of" if unit_frames == 1 else f", every {unit_frames} of"
    said = f"{row.num_frames} frames {each} {frame_tokens} tokens and {QUESTION_TOKENS} of question"
    if row.tokens > cfg.batch.max_row_tokens:
        raise ValueError(
            f"{said}, with {row.answers} answers of {row.answer_tokens}, take {row.tokens} tokens "
            f"of a row, over batch.max_row_tokens={cfg.batch.max_row_tokens}; raise that, or lower "
            "data.num_frames, rollout.num_samples or rollout.max_tokens"
        )
    length = row.prompt_tokens + row.answer_tokens
    if cfg.stage == "grpo" and length > cfg.rollout.max_model_len:
        raise ValueError(
            f"{said}, with an answer of {row.answer_tokens}, are {length} tokens for the engine, "
            f"over rollout.max_model_len={cfg.rollout.max_model_len}; raise that"
        )
    return row


def _longest_film(layout: Any, data: Any) -> int:
    """Returns the frames of the film with the most tokens: where the pool follows the length, a
    shorter one may have more."""
    if layout.video_pools is None or not data.fps:
        return data.num_frames

    def units(num_frames: int) -> int:
        return -(-num_frames // layout.video(*FILM, num_frames).unit_frames)

    return max(range(1, data.num_frames + 1), key=lambda n: (units(n), n))


def abstract_policy(cfg: Config, mesh: Mesh) -> tuple[Policy, step.TrainState]:
    """Returns what stages.policy.open_policy does, of shapes alone; model.path needs no tensors."""
    backbone, model_cfg = models.read_shape(cfg.model.path)
    opened.check_heads(backbone.text_config(model_cfg), cfg)
    model = models.abstract(backbone, model_cfg, mesh=mesh)
    optimizer = make_optimizer(cfg.optimizer, cfg.run.num_steps)
    base_graphdef, adapters = nnx.graphdef(model), opened.lora_of(cfg.model)
    if adapters is not None:
        rows = lora.table(backbone, model_cfg, adapters)
        lora.attach(model, lora.shapes(model, rows, adapters, mesh), adapters)
    graphdef, state = step.abstract_state(model, cfg.model.frozen_parts, optimizer, mesh)
    policy = Policy(
        folder=models.find_folder(cfg.model.path),
        backbone=backbone,
        model_cfg=model_cfg,
        graphdef=graphdef,
        base_graphdef=base_graphdef,
        lora=adapters,
        mesh=mesh,
        tokenizer=None,
        layout=opened.media_layout(backbone, model_cfg, cfg.data),
        stage=models.feature_stage(cfg.model.frozen),
        banned_tokens=(STAND_IN_TOKEN,),
        stop_tokens=(),
        compute_dtype=opened.DTYPES[cfg.model.compute_dtype],
    )
    return policy, state


def mesh_of(cfg: Config, devices: Sequence[Any]) -> Mesh:
    """Returns the config's mesh over these devices."""
    return make_mesh(**{axis: getattr(cfg.mesh, axis) for axis in AXES}, devices=devices)


def host_passes(cfg: Config, row: Row) -> Any:
    """Returns a step's Batch of longest rows as numpy arrays, without features: batching's own."""
    rope_pos = np.arange(row.prompt_tokens, dtype=np.int32)
    if row.rope_axes > 1:
        rope_pos = np.repeat(rope_pos[:, None], row.rope_axes, axis=1)
    prompt = Prompt(
        example=Example(id="longest", question="", answer=""),
        tokens=np.zeros(row.prompt_tokens, np.int32),
        is_media=np.zeros(row.prompt_tokens, bool),
        rope_pos=rope_pos,
        next_rope_pos=row.prompt_tokens,
    )
    answer = Sample(
        tokens=np.zeros(row.answer_tokens, np.int32),
        logps=np.zeros(row.answer_tokens, np.float32),
        finish_reason="length",
        seed=0,
    )
    group = Rollout(prompt=prompt, samples=(answer,) * row.answers, policy_version=0)
    groups = [group] * cfg.batch.groups
    advantages = [np.zeros(row.answers, np.float32)] * len(groups)
    return update.make_host_passes(cfg, groups, [None] * len(groups), advantages)[0]


def padded_tokens(cfg: Config, row: Row) -> int:
    """Returns T of host_passes; where rows are not packed without making them."""
    if cfg.batch.pack:
        return host_passes(cfg, row).tokens.shape[-1]
    shape = packing.RowShape(
        prefix_tokens=row.prompt_tokens - 1, branch_tokens=row.answers * row.answer_tokens
    )
    parts = packing.sizes(
        shape,
        num_shards=cfg.mesh.seq,
        smallest_bucket=cfg.batch.smallest_bucket,
        max_row_tokens=cfg.batch.max_row_tokens,
    )
    return cfg.mesh.seq * sum(parts)


def trace_all(
    cfg: Config, policy: Policy, state: step.TrainState, passes: Any, row: Row
) -> dict[str, Phase]:
    """Returns the phases of a step by name: encode, embed, logps (if there is a KL term), update.

    passes: of host_passes.
    """
    phases = {}
    batch = on_mesh(policy, passes)
    if policy.layout is not None:
        phases["encode"] = _encode(policy, state, row)
    if cfg.stage == "grpo":
        phases["embed"] = _embed(cfg, policy, state, row)
    logps_nBA = None
    if cfg.stage == "grpo" and cfg.algorithm.kl:
        program = update.make_pass_logps(cfg, policy, adapters=False)
        reference = lora.base(step.all_params(state))
        phases["logps"] = Phase("logps", program.trace(reference, batch), batch)
        if cfg.algorithm.kl_in == "loss":
            logps_nBA = batch.engine_logps  # of the same shape and place
    make = update.make_grpo_update if cfg.stage == "grpo" else update.make_sft_update
    traced = make(cfg, policy, state).trace(state, batch, logps_nBA)
    phases["update"] = Phase("update", traced, (batch, logps_nBA))
    return phases


def shard_bytes(tree: Any) -> int:
    """Returns the bytes that one device holds of a pytree of shapes with shardings."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def on_mesh(policy: Policy, passes: Any) -> Any:
    """Returns the shapes of a placed batch, with the stored features of its tokens."""
    features = None
    if policy.layout is not None:
        width = policy.backbone.feature_width(policy.model_cfg, policy.stage)
        shape = (*passes.tokens.shape, width)
        features = jax.ShapeDtypeStruct(shape, policy.compute_dtype)
    batch = dataclasses.replace(passes, features=features)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        batch,
        batching.shardings(batch, policy.mesh),
    )


def _encode(policy: Policy, state: step.TrainState, row: Row) -> Phase:
    """The tower on one chunk of frames."""
    assert policy.layout is not None
    run = encode.make_program(
        policy.graphdef, state.params, stage=policy.stage, dtype=policy.compute_dtype
    )
    view = policy.layout.video(*FILM, row.num_frames)
    shape = (encode.chunk_sizes(policy.mesh, view)[-1], *view.size, 3)
    place = NamedSharding(policy.mesh, spec("frames", None, None, None))
    frames = jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=place)
    with jax.set_mesh(policy.mesh):
        return Phase("encode", run.trace(state.frozen, frames, view), frames)


def _embed(cfg: Config, policy: Policy, state: step.TrainState, row: Row) -> Phase:
    """The engine's input: one prompt, padded as stages.policy.make_prompt_embedder does."""
    size = opened.embed_tokens(policy, row.prompt_tokens, cfg.batch.smallest_bucket)
    whole = NamedSharding(policy.mesh, spec())

    def shape(*dims: int, dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=whole)

    features = None
    if policy.layout is not None:
        width = policy.backbone.feature_width(policy.model_cfg, policy.stage)
        features = shape(1, size, width, dtype=policy.compute_dtype)
    inputs = shape(1, size, dtype=jnp.int32), shape(1, size, dtype=bool), features
    mine, others = opened.split_inputs(policy, state)
    program = opened.make_embed_program(policy, others)
    return Phase("embed", program.trace(mine, *inputs), inputs)
