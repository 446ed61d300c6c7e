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
    sums: dict[str, tuple[float, float]]
    """Metrics that only the engines know, as (sum, count); of a replayed step those of all groups
    that were asked."""


def pack(entry: Entry) -> bytes:
    """Returns an entry as the bytes that `join` and `write` take."""
    samples = [sample for group in entry.groups for sample in group.samples]
    about = {
        "prompts": [prompt_digest(group.prompt) for group in entry.groups],
        "versions": [group.policy_version for group in entry.groups],
        "num_samples": [len(group.samples) for group in entry.groups],
        "finish_reasons": [sample.finish_reason for sample in samples],
        "seeds": [sample.seed for sample in samples],
        "parts": [None if judged is None else dict(judged) for judged in entry.parts],
        "sums": {name: list(pair) for name, pair in entry.sums.items()},
    }
    lengths = np.array([len(sample.tokens) for sample in samples], np.int64)
    tokens = np.concatenate([np.zeros(0, np.int32), *(sample.tokens for sample in samples)])
    logps = np.concatenate([np.zeros(0, np.float32), *(sample.logps for sample in samples)])
    return _to_bytes(about, lengths, tokens, logps)


def join(packed: Sequence[bytes]) -> bytes:
    """Returns entries, each with some of a step's groups, as one."""
    if len(packed) == 1:
        return packed[0]
    abouts, *arrays = zip(*map(_from_bytes, packed), strict=True)
    about: dict[str, Any] = {}
    for name in abouts[0]:
        if name != "sums":
            about[name] = [item for one in abouts for item in one[name]]
    about["sums"] = abouts[0]["sums"]
    for one in abouts[1:]:
        for name, (value, count) in one["sums"].items():
            before, count_before = about["sums"].get(name, (0.0, 0.0))
            about["sums"][name] = [before + value, count_before + count]
    return _to_bytes(about, *map(np.concatenate, arrays))


def write(folder: Path, step: int, content: bytes, *, attempt: int = 1) -> None:
    """Writes a step's packed entry; it is on disk, whole, when this returns.

    attempt: which of a step's tries it holds (dynamic sampling), from 1.
    """
    run_folder.make_folder(folder)
    digest = hashlib.sha256(content).hexdigest().encode()
    run_folder.write_synced(path_of(folder, step, attempt), digest + b"\n" + content)


def read(
    folder: Path,
    step: int,
    prompts: Sequence[Prompt],
    *,
    place: tuple[int, int] | None = None,
    attempt: int = 1,
) -> Entry | None:
    """Returns the entry of a step that asked these prompts; None if there is none.

    place: (groups of the step before these, groups of the step); None: these are all. Raises
    ValueError, with the file's name, for a damaged file and for one of other prompts.
    """
    path = path_of(folder, step, attempt)
    if not path.exists():
        return None
    digest, _, content = path.read_bytes().partition(b"\n")
    if digest != hashlib.sha256(content).hexdigest().encode():
        raise ValueError(f"{path} is damaged: its checksum is wrong")
    try:
        about, lengths, tokens, logps = _from_bytes(content)
        sums = {name: (value, count) for name, (value, count) in about["sums"].items()}
    except (zipfile.BadZipFile, KeyError) as error:  # written by another version: its digest is
        raise ValueError(f"{path} cannot be read: {error!r}") from None
    before, num_groups = place or (0, len(prompts))
    mine = slice(before, before + len(prompts))
    asked = about["prompts"]
    if len(asked) != num_groups or asked[mine] != [prompt_digest(prompt) for prompt in prompts]:
        raise ValueError(f"{path} holds answers to other questions: the data have changed")
    ends = np.cumsum(lengths)[:-1]
    drawn = zip(
        np.split(tokens, ends),
        np.split(logps, ends),
        about["finish_reasons"],
        about["seeds"],
        strict=True,
    )
    samples = [Sample(tokens=t, logps=p, finish_reason=f, seed=s) for t, p, f, s in drawn]
    firsts = np.cumsum([0, *about["num_samples"]])
    groups = [
        Rollout(
            prompt=prompt,
            samples=tuple(samples[firsts[i] : firsts[i + 1]]),
            policy_version=about["versions"][i],
        )
        for i, prompt in enumerate(prompts, start=before)
    ]
    parts = about["parts"][firsts[before] : firsts[before + len(prompts)]]
    return Entry(groups=groups, parts=parts, sums=sums)


def forget(folder: Path, last_step: int) -> None:
    """Removes the entries of all steps up to last_step: a durable checkpoint has their outcome."""
    for path in folder.glob("step_*.journal"):
        if run_folder.step_of_journal(path) <= last_step:
            path.unlink()
    for path in folder.glob(".*.partial"):
        path.unlink()


def path_of(folder: Path, step: int, attempt: int = 1) -> Path:
    more = f"_{attempt:04d}" if attempt > 1 else ""
    return folder / f"step_{step:08d}{more}.journal"


def prompt_digest(prompt: Prompt) -> str:
    """Says whether a prompt is the one that was asked and judged: record, tokens and media."""
    example = prompt.example
    about: list[Any] = [example.id, example.answer, example.kind]
    about += [np.asarray(prompt.tokens).tolist(), [m.key for m in prompt.media]]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _to_bytes(
    about: Mapping[str, Any], lengths: np.ndarray, tokens: np.ndarray, logps: np.ndarray
) -> bytes:
    body = io.BytesIO()
    text = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(body, about=text, lengths=lengths, tokens=tokens, logps=logps)
    return body.getvalue()


def _from_bytes(content: bytes) -> tuple[dict[str, Any], np.ndarray, np.ndarray, np.ndarray]:
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        about = json.loads(arrays["about"].tobytes())
        return about, arrays["lengths"], arrays["tokens"], arrays["logps"]
