"""The journal: rollouts and rewards of a step, on disk before its update.

Sampling and judging are the dear part of a step and need not repeat exactly on every engine. A run
that is killed and goes on takes journaled steps from here. A file is a line with the SHA-256 of
what follows, and an npz archive; nothing in it is pickled.
"""

import dataclasses
import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax import run_folder
from longrl_jax.types import Prompt, Rollout, Sample


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What a step's update is made from, beside the features of its videos."""

    groups: Sequence[Rollout]
    parts: Sequence[Mapping[str, float] | None]
    """Reward parts of every sample, group after group; None: not judged."""
    values: dict[str, float]
    """Metrics that only the engines know."""


def write(folder: Path, step: int, entry: Entry) -> None:
    """Writes a step's entry; it is on disk, whole, when this returns."""
    samples = [sample for group in entry.groups for sample in group.samples]
    about = {
        "prompts": [prompt_digest(group.prompt) for group in entry.groups],
        "versions": [group.policy_version for group in entry.groups],
        "num_samples": [len(group.samples) for group in entry.groups],
        "finish_reasons": [sample.finish_reason for sample in samples],
        "seeds": [sample.seed for sample in samples],
        "parts": [None if judged is None else dict(judged) for judged in entry.parts],
        "values": dict(entry.values),
    }
    body = io.BytesIO()
    np.savez(
        body,
        about=np.frombuffer(json.dumps(about).encode(), np.uint8),
        lengths=np.array([len(sample.tokens) for sample in samples], np.int64),
        tokens=np.concatenate([sample.tokens for sample in samples]),
        logps=np.concatenate([sample.logps for sample in samples]),
    )
    content = body.getvalue()
    run_folder.make_folder(folder)
    digest = hashlib.sha256(content).hexdigest().encode()
    run_folder.write_synced(path_of(folder, step), digest + b"\n" + content)


def read(folder: Path, step: int, prompts: Sequence[Prompt]) -> Entry | None:
    """Returns the entry of a step that asked these prompts; None if there is none.

    Raises ValueError, with the file's name, for a damaged file and for one of other prompts.
    """
    path = path_of(folder, step)
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
            lengths, tokens, logps = (arrays[name] for name in ("lengths", "tokens", "logps"))
            about = json.loads(arrays["about"].tobytes())
    except (zipfile.BadZipFile, KeyError) as error:  # written by another version: its digest is
        raise ValueError(f"{path} cannot be read: {error!r}") from None
    if about["prompts"] != [prompt_digest(prompt) for prompt in prompts]:
        raise ValueError(f"{path} holds answers to other questions: the data have changed")
    ends = np.cumsum(lengths)[:-1]
    drawn = zip(
        np.split(tokens, ends),
        np.split(logps, ends),
        about["finish_reasons"],
        about["seeds"],
        strict=True,
    )
    samples = iter([Sample(tokens=t, logps=p, finish_reason=f, seed=s) for t, p, f, s in drawn])
    groups = [
        Rollout(
            prompt=prompt,
            samples=tuple(next(samples) for _ in range(count)),
            policy_version=version,
        )
        for prompt, count, version in zip(
            prompts, about["num_samples"], about["versions"], strict=True
        )
    ]
    return Entry(groups=groups, parts=about["parts"], values=about["values"])


def forget(folder: Path, last_step: int) -> None:
    """Removes the entries of all steps up to last_step: a durable checkpoint has their outcome."""
    for path in folder.glob("step_*.journal"):
        if int(path.stem.removeprefix("step_")) <= last_step:
            path.unlink()
    for path in folder.glob(".*.partial"):
        path.unlink()


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step_{step:08d}.journal"


def prompt_digest(prompt: Prompt) -> str:
    """Says whether a prompt is the one that was asked and judged: record, tokens and media."""
    example = prompt.example
    about: list[Any] = [example.id, example.answer, example.kind]
    about += [np.asarray(prompt.tokens).tolist(), [m.key for m in prompt.media]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()
