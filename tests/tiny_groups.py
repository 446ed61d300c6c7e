"""Hand-made prompts and groups for the tests of rows, steps and stages, and what rows must say."""

import numpy as np

from longrl_jax.types import Example, Media, Prompt, Rollout, Sample, View

V = 90
"""The media token."""


def make_prompt(tokens, *, key="", rope_pos=None, next_rope_pos=None, name="q") -> Prompt:
    """A prompt whose V tokens are one video of that key; plain positions unless told."""
    tokens = np.asarray(tokens, np.int32)
    is_media = tokens == V
    num_media = int(is_media.sum())
    video = Media(
        kind="video",
        path=f"/{key}.mp4",
        key=key,
        grid=(1, 1, num_media),
        times_s=(0.0,),
        view=View(size=(8, 8), grid=(1, num_media)),
        num_tokens=num_media,
        offset=int(is_media.argmax()),
    )
    return Prompt(
        example=Example(id=name, question="", answer=""),
        tokens=tokens,
        is_media=is_media,
        rope_pos=np.arange(len(tokens), dtype=np.int32) if rope_pos is None else rope_pos,
        next_rope_pos=len(tokens) if next_rope_pos is None else next_rope_pos,
        media=(video,) if num_media else (),
    )


def make_group(prompt, *samples) -> Rollout:
    """A group of these token lists; the engine's log p of token t is -t / 100."""
    made = []
    for tokens in samples:
        tokens = np.asarray(tokens, np.int32)
        logps = -tokens.astype(np.float32) / 100
        made.append(Sample(tokens=tokens, logps=logps, finish_reason="stop", seed=0))
    return Rollout(prompt=prompt, samples=tuple(made), policy_version=0)


def scatter(index, values, shape) -> np.ndarray:
    """The inverse of Index.per_sample: [rollout][sample] -> numbers, to an array [B, A]."""
    array_BA = np.zeros(shape, np.float64)
    for row, slots, of_group in zip(index.rows, index.slots, values, strict=True):
        for at, of_sample in zip(slots, of_group, strict=True):
            array_BA[row, at] = of_sample
    return array_BA


def assert_slots_see_their_own(batch, index, groups, features, advantages) -> int:
    """By the rule of visibility, written as a loop: every slot sees its prompt with its media and
    its sample so far, rotated as they are alone, and nothing else. Returns how many slots."""
    T, A = batch.tokens.shape[1], batch.targets.shape[1]
    t, a = T // batch.num_shards, A // batch.num_shards
    num_slots = 0
    for group, stored, advantage, row, slots in zip(
        groups, features, advantages, index.rows, index.slots, strict=True
    ):
        P = len(group.prompt.tokens)
        for r, (sample, at) in enumerate(zip(group.samples, slots, strict=True)):
            whole = np.concatenate([group.prompt.tokens, sample.tokens])
            for n, slot in enumerate(at):
                here = slot // a * t + (t - a) + slot % a
                seen = [
                    s
                    for s in range(T)
                    if batch.segment[row, s] == batch.segment[row, here] > 0
                    and batch.order[row, s] <= batch.order[row, here]
                    and batch.branch[row, s] in (0, batch.branch[row, here])
                ]
                seen.sort(key=lambda s: batch.order[row, s])
                np.testing.assert_array_equal(batch.tokens[row, seen], whole[: P + n])
                np.testing.assert_array_equal(batch.order[row, seen], np.arange(P + n))
                np.testing.assert_array_equal(batch.rope_pos[row, seen], longer(group.prompt, n))
                if stored is not None:
                    media = [s for s in seen if batch.is_media[row, s]]
                    np.testing.assert_array_equal(batch.features[row, media], stored)
                assert batch.targets[row, slot] == whole[P + n]
                assert batch.advantage[row, slot] == advantage[r]
                same = batch.loss_mask[row] & (batch.sequence[row] == batch.sequence[row, slot])
                np.testing.assert_array_equal(np.sort(at), np.flatnonzero(same))
                assert batch.sequence[row, slot] < batch.num_sequences
                assert batch.engine_logps[row, slot] == sample.logps[n]
                num_slots += 1
    return num_slots


def longer(prompt, num_tokens) -> np.ndarray:
    """Positions of a prompt and of num_tokens behind it."""
    behind = prompt.next_rope_pos + np.arange(num_tokens)
    if prompt.rope_pos.ndim == 2:
        behind = np.repeat(behind[:, None], 3, axis=1)
    return np.concatenate([prompt.rope_pos, behind])
