"""Checks that the sections of a config share, and the choice of a name from a table."""

import math
import types
from collections.abc import Mapping, Sequence
from typing import TypeVar

X = TypeVar("X")


def pick(table: Mapping[str, X], name: str, key: str) -> X:
    """Returns table[name]; an unknown name lists the known ones."""
    if name not in table:
        raise ValueError(f"{key}={name!r} is unknown; choose one of {', '.join(sorted(table))}")
    return table[name]


def check_positive(key: str, value: float) -> None:
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{key}={value} must be positive")


def check_filled(key: str, value: str) -> None:
    if not value.strip():
        raise ValueError(
            f"{key}={value!r} is empty and would mean the folder you stand in; name it"
        )


def check_one_of(key: str, value: str, names: Sequence[str]) -> None:
    pick(types.MappingProxyType(dict.fromkeys(names)), value, key)
