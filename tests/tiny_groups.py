"""Hand-made prompts and groups for the tests of rows, steps and stages."""

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
