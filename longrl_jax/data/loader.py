"""The prompts of every step, entered by step number: a pure function of (seed, step).

Grain shuffles record numbers and, with workers, spreads the reading over processes; its own state
is never saved, because that dies with another number of workers (docs/design.md section 6).
"""

import dataclasses
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, Protocol

import grain
from absl import flags

from longrl_jax.data import mixing
from longrl_jax.data.fields import RecordError
from longrl_jax.types import Example, Prompt

WORKER_BUFFER_STEPS = 2
"""Steps that a worker process prepares ahead."""


class Source(Protocol):
    """Records by number; a bad one raises RecordError when it is read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class OnRefused(Protocol):
    """Is told of a refused record: its Example, or where it stands if it could not be read."""

    def __call__(self, record: Example | str, error: ValueError, *, step: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class _Refused:
    record: Example | str
    error: ValueError


def prompts(
    source: Source,
    encode: Callable[[Example], Prompt],
    *,
    seed: int,
    groups: int,
    first_step: int,
    num_steps: int,
    workers: int,
    on_refused: OnRefused,
    part: range | None = None,
) -> Generator[list[Prompt | None], None, None]:
    """Yields num_steps lists of `groups` prompts, those after the first first_step steps.

    Step s (from 1) is the s-th slice of an endless stream in which every epoch is another order of
    the source, or of each source of a mixture. A record that cannot be read or encoded (ValueError)
    leaves None in its place, and on_refused is called for it, here, in the order of the steps.
    workers: processes that read and encode (which must then be picklable); 0: this one. part:
    places of a step that are read and listed (None: all); others' records are not touched. Close
    the generator to leave early.
    """
    order = mixing.order(source, seed)
    wanted = order[first_step * groups : (first_step + num_steps) * groups]
    read = _StepReader(_Reader(source, encode), range(groups) if part is None else part)
    steps = wanted.batch(groups, batch_fn=list).map(read)
    iterator = iter(_with_workers(steps, workers))
    try:
        for step, results in enumerate(iterator, start=first_step + 1):
            yield [_prompt_or_none(result, on_refused, step) for result in results]
    finally:
        iterator.close()  # else worker processes and shared memory outlive the run


def prompts_at(
    source: Source,
    encode: Callable[[Example], Prompt],
    indices: Iterable[int],
    *,
    on_refused: OnRefused,
) -> list[Prompt | None]:
    """Returns the prompts of the records at `indices`; a refused one is None, told as step 0."""
    read = _Reader(source, encode)
    return [_prompt_or_none(read(int(index)), on_refused, 0) for index in indices]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads and encodes the record of a number; a plain record, so that it travels to workers."""

    source: Source
    encode: Callable[[Example], Prompt]

    def __call__(self, index: int) -> Prompt | _Refused:
        try:
            example = self.source[index]
        except RecordError as error:
            return _Refused(error.where, error)
        try:
            return self.encode(example)
        except ValueError as error:
            return _Refused(example, error)


@dataclasses.dataclass(frozen=True)
class _StepReader:
    """Reads the records at the places `part` of a step's numbers."""

    read: _Reader
    part: range

    def __call__(self, numbers: Sequence[int]) -> list[Prompt | _Refused]:
        return [self.read(int(numbers[place])) for place in self.part]


def _with_workers(steps: Any, workers: int) -> Any:
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    dataset = steps.to_iter_dataset(options)
    if workers == 0:
        return dataset
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl flags, which nobody parses here
    return dataset.mp_prefetch(
        grain.MultiprocessingOptions(
            num_workers=workers, per_worker_buffer_size=WORKER_BUFFER_STEPS
        )
    )


def _prompt_or_none(result: Prompt | _Refused, on_refused: OnRefused, step: int) -> Prompt | None:
    if isinstance(result, _Refused):
        on_refused(result.record, result.error, step=step)
        return None
    return result
