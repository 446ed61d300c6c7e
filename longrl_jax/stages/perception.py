"""Perception: the projector learns to name what a frame shows, before any language is involved.

VILA starts from a tower that knows images and a projector that learns to speak of them (stage 1,
arXiv:2312.07533 section 3). A checkpoint that starts from nothing has neither. Here linear
classifiers read words off the projected media tokens of every frame: word k of the frame's line
(record.reasoning, lines separated by ";"), and word k of record.answer, which holds for all frames.
The classifiers are thrown away; the projector is exported.
"""

import contextlib
import dataclasses
import shutil
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from longrl_jax import run_folder, step
from longrl_jax.config import Config
from longrl_jax.data import mixing
from longrl_jax.data.longvideo_reason import RecordError
from longrl_jax.data.refused import RefusedLog
from longrl_jax.losses import masked_mean
from longrl_jax.metrics import Phases, RunLog
from longrl_jax.optimizer import make_optimizer
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Example, Prompt

SHOWN = ("loss", "accuracy", "time/step_s")
NORM_EPS = 1e-6
Words = list[str]
"""The words that stand at a place; "" where there is none."""


def run(cfg: Config) -> None:
    """Trains the projector of model.path and leaves metrics and an export in run.dir.

    It takes minutes and saves no checkpoints: a run that was killed begins again.
    """
    folder = Path(cfg.run.dir)
    run_folder.cut_logs(folder, run_folder.Point())
    policy, state = opened.open_policy(cfg, trains=False)
    encoder = opened.open_encoder(policy, state)
    if encoder is None or policy.stage != "packed":
        raise ValueError(
            "stage=perception trains the projector: take projector out of model.frozen, and name a "
            "checkpoint with a vision tower in model.path"
        )
    assert policy.layout is not None  # there is an encoder
    if policy.layout.unit_frames > 1 or policy.layout.pixels:
        raise ValueError(
            f"stage=perception reads words off single frames of one size; in model.path="
            f"{cfg.model.path} {policy.layout.unit_frames} frames share their tokens, and their "
            "size follows the film's; name a VILA checkpoint"
        )
    frame_words, film_words = vocabulary(cfg)
    optimizer = make_optimizer(cfg.optimizer, cfg.run.num_steps)
    projector, others = nnx.split_state(state.params, lambda path, _: path[0] == "projector", ...)
    width = policy.backbone.text_config(policy.model_cfg).width
    trained = projector, [jnp.zeros((width, len(known))) for known in frame_words + film_words]
    opt_state = optimizer.init(trained)
    learn = make_update(policy, nnx.merge_state(state.frozen, others), optimizer)
    phases = Phases()
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(RefusedLog(folder / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, phases))
        log = stack.enter_context(
            RunLog(folder, cfg.run.num_steps, name="perception", wandb=cfg.run.wandb)
        )
        empty_steps = 0
        phases.take()
        for number, asked in questions.training(cfg, policy, refused):
            kept, features = embed(labelled(cfg, asked, refused, number), number)
            values: dict[str, Any] = {}
            empty_steps = questions.count_empty(len(kept), empty_steps, refused)
            if kept:
                with phases.phase("update"):
                    batch = make_batch(kept, features, frame_words, film_words, cfg.batch.groups)
                    trained, opt_state, stats = learn(trained, opt_state, *batch)
                    values = {name: float(x) for name, x in jax.device_get(stats).items()}
                if not np.isfinite([values["loss"], values["grad_norm"]]).all():
                    raise FloatingPointError(
                        f"step {number}: loss={values['loss']}, grad_norm={values['grad_norm']}; "
                        "begin again in another run.dir with a lower optimizer.learning_rate"
                    )
            counts = {"groups": len(kept), "refused": refused.count}
            counts |= questions.refused_by_source(cfg, refused)
            log.step(number, values | counts | phases.take(), shown=SHOWN)
    params = nnx.merge_state(others, trained[0])
    shutil.rmtree(folder / "export", ignore_errors=True)
    whole = dataclasses.replace(state, params=params)
    opened.export(policy, whole, folder / "export", dtype=cfg.run.export_dtype)
    run_folder.mark_finished(folder, cfg.run.num_steps)


def vocabulary(cfg: Config) -> tuple[list[Words], list[Words]]:
    """Returns the words of every place: of a frame's line, and of the answer.

    All records are read once; a bad one is refused later, when its step comes.
    """
    source = mixing.open_training(cfg.data)
    frame_words: dict[int, set[str]] = defaultdict(set)
    film_words: dict[int, set[str]] = defaultdict(set)
    for i in range(len(source)):
        try:
            example = source[i]
        except RecordError:
            continue
        for line in lines_of(example):
            for k, word in enumerate(line):
                frame_words[k].add(word)
        for k, word in enumerate(example.answer.split()):
            film_words[k].add(word)
    frames, films = (
        [["", *sorted(words[k])] for k in sorted(words)] for words in (frame_words, film_words)
    )
    return frames, films


def lines_of(example: Example) -> list[list[str]]:
    """Returns the words of every frame's line."""
    return [line.split() for line in example.reasoning.split(";")]


def labelled(
    cfg: Config, asked: Sequence[Prompt], refused: RefusedLog, number: int
) -> list[Prompt]:
    """Returns the prompts with one video, of data.num_frames frames, and a line for each; the
    others are refused by name."""
    kept, wanted = [], cfg.data.num_frames
    for prompt in asked:
        one_film = [medium.kind for medium in prompt.media] == ["video"]
        num_frames = len(prompt.media[0].times_s) if one_film else 0
        num_lines = len(lines_of(prompt.example))
        if num_frames == num_lines == wanted:
            kept.append(prompt)
            continue
        error = ValueError(
            f"record {prompt.example.id!r} names {num_lines} frames, {num_frames} of its video are "
            f"read, and data.num_frames={wanted}; write one line a frame, separated by ';'"
        )
        refused.add(prompt.example, error, step=number)
    return kept


def make_batch(
    asked: Sequence[Prompt],
    features: Sequence[np.ndarray | None],
    frame_words: Sequence[Words],
    film_words: Sequence[Words],
    num_films: int,
) -> tuple[Float[np.ndarray, "N F n C"], Int[np.ndarray, "N F K"]]:
    """Returns stored features and the number of the word at each place; -1 in films of padding."""
    num_frames = len(asked[0].media[0].times_s)
    stored_FnC = [x.reshape(num_frames, -1, x.shape[-1]) for x in features if x is not None]
    rows_NFnC = np.zeros((num_films, *stored_FnC[0].shape), np.float32)
    num_places = len(frame_words) + len(film_words)
    labels_NFK = np.full((num_films, num_frames, num_places), -1, np.int32)
    for i, (prompt, stored) in enumerate(zip(asked, stored_FnC, strict=True)):
        rows_NFnC[i] = stored
        film = _numbers(prompt.example.answer.split(), film_words)
        for t, line in enumerate(lines_of(prompt.example)):
            labels_NFK[i, t] = _numbers(line, frame_words) + film
    return rows_NFnC, labels_NFK


def _numbers(said: Sequence[str], words: Sequence[Words]) -> list[int]:
    """Returns the number of the word at each place; 0 after the last word."""
    padded = [*said, *[""] * (len(words) - len(said))]
    return [known.index(word) for word, known in zip(padded, words, strict=True)]


def make_update(
    policy: Policy, others: nnx.State, optimizer: optax.GradientTransformation
) -> step.CountedJit:
    """Returns jitted ((projector, classifiers), opt_state, features, labels) -> the same, stats.

    The loss is the sum over places of the mean cross-entropy; accuracy counts words that are there.
    """

    def loss_of(trained: Any, rows_NFnC: Array, labels_NFK: Array) -> tuple[Array, Array]:
        projector, classifiers = trained
        model = nnx.merge(policy.graphdef, nnx.merge_state(others, projector))
        z_NFD = model.projector(rows_NFnC).mean(axis=2)
        z_NFD *= jax.lax.rsqrt(jnp.square(z_NFD).mean(-1, keepdims=True) + NORM_EPS)
        losses, right = [], []
        for k, classifier_DW in enumerate(classifiers):
            label_NF, logits_NFW = labels_NFK[..., k], z_NFD @ classifier_DW
            logp_NFW = jax.nn.log_softmax(logits_NFW)
            picked_NF = jnp.take_along_axis(logp_NFW, label_NF[..., None].clip(0), -1)[..., 0]
            losses.append(-masked_mean(picked_NF, label_NF >= 0))
            right.append((logits_NFW.argmax(-1) == label_NF) & (label_NF > 0))
        return jnp.stack(losses).sum(), jnp.stack(right).sum() / (labels_NFK > 0).sum()

    def learn(trained: Any, opt_state: Any, rows_NFnC: Array, labels_NFK: Array) -> Any:
        (loss, accuracy), grads = jax.value_and_grad(loss_of, has_aux=True)(
            trained, rows_NFnC, labels_NFK
        )
        changes, opt_state = optimizer.update(grads, opt_state, trained)
        stats = {"loss": loss, "grad_norm": optax.global_norm(grads), "accuracy": accuracy}
        return optax.apply_updates(trained, changes), opt_state, stats

    return step.CountedJit(learn, mesh=policy.mesh)
