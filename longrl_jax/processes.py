"""What the processes of one run tell each other; alone, a process tells itself.

Every function but `count`, `index` and `is_first` must be called by all processes, in one order.
Messages are JSON, or bytes, and travel as arrays over the devices' own network.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

SMALLEST_MESSAGE = 1024
"""Bytes; messages are padded to powers of two, so that few programs are compiled for them."""
Sums = Mapping[str, tuple[float, float]]
"""Name -> (sum, count)."""


def count() -> int:
    return jax.process_count()


def index() -> int:
    return jax.process_index()


def is_first() -> bool:
    """Whether this process is the one that writes what belongs to the whole run."""
    return index() == 0


def part(num_things: int) -> range:
    """Returns which of so many things are this process's: neighbours, at most one more than the
    others'. The parts of all processes, in order, are all things in order."""
    return range(num_things * index() // count(), num_things * (index() + 1) // count())


def gather_bytes(content: bytes) -> list[bytes]:
    """Returns what every process has given, in the order of their numbers."""
    if count() == 1:
        return [content]
    sizes = multihost_utils.process_allgather(np.array([len(content)], np.int32)).ravel()
    padded = SMALLEST_MESSAGE
    while padded < sizes.max():
        padded *= 2
    sent = np.zeros(padded, np.uint8)
    sent[: len(content)] = np.frombuffer(content, np.uint8)
    rows = multihost_utils.process_allgather(sent)
    return [row[:size].tobytes() for row, size in zip(rows, sizes, strict=True)]


def gather(value: Any) -> list[Any]:
    """The same of values that JSON can say (tuples become lists); floats travel exactly."""
    if count() == 1:
        return [value]
    return [json.loads(text) for text in gather_bytes(json.dumps(value).encode())]


def joined(mine: Sequence[Any]) -> list[Any]:
    """Returns the lists of all processes as one, in order."""
    return [item for items in gather(list(mine)) for item in items]


def place_of(num_mine: int) -> tuple[int, int]:
    """Returns (how many things stand before this process's, how many all processes have)."""
    numbers = gather(num_mine)
    return sum(numbers[: index()]), sum(numbers)


def added(mine: Sums) -> dict[str, tuple[float, float]]:
    """Returns the sums and counts of all processes, added up by name."""
    total: dict[str, tuple[float, float]] = {}
    for sums in gather({name: list(pair) for name, pair in mine.items()}):
        for name, (value, num) in sums.items():
            before, num_before = total.get(name, (0.0, 0.0))
            total[name] = before + value, num_before + num
    return total


def first(call: Callable[[], Any]) -> Any:
    """Calls in process 0 alone; all get what it returns (as JSON has it), or its error.

    A ValueError or OSError of process 0 is raised there as it is, and a ValueError with the same
    words everywhere else.
    """
    if count() == 1:
        return call()
    failed: Exception | None = None
    result, words = None, ""
    if is_first():
        try:
            result = call()
        except (ValueError, OSError) as error:
            failed, words = error, str(error)
    result, words = gather([result, words])[0]
    if failed is not None:
        raise failed
    if words:
        raise ValueError(f"process 0: {words}")
    return result
