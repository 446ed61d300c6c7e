"""A person's own reward, `module:function` in the config: any function of all answers of a step.

It gets a sequence of types.Scored and returns as many results: None (it could not judge: the answer
leaves the statistics), a number, or a mapping of parts by name with `total` among them.
"""

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longrl_jax.types import Scored

MARK = ":"
"""Stands in the name of no reward of ours."""


def load(name: str) -> Callable[[Sequence[Scored]], Any]:
    """Returns the function that a name of the config says. It is code, and is run.

    Raises ValueError that says what cannot be found.
    """
    module_name, _, function_name = name.partition(MARK)
    if not all(part.isidentifier() for part in (*module_name.split("."), function_name)):
        raise ValueError(f"rewards: {name!r} must be package.module:function")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"rewards: the module of {name!r} cannot be imported ({why}); start in the folder "
            "that it lies in, install it, or name its folder in PYTHONPATH"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        there = sorted(k for k, v in vars(module).items() if callable(v) and k[0] != "_")
        raise ValueError(
            f"rewards: {module.__file__} has no function {function_name!r} ({name}); it has "
            f"{', '.join(there[:20]) or 'none'}"
        )
    return function


def judge(name: str, items: Sequence[Scored]) -> list[dict[str, float] | None]:
    """Returns what a person's function says of the items.

    Raises ValueError that names the function, and what is wrong with what it returned.
    """
    function = load(name)
    try:
        given = list(function(items))
    except Exception as error:
        raise ValueError(f"the reward {name} failed: {type(error).__name__}: {error}") from error
    if len(given) != len(items):
        raise ValueError(f"the reward {name} returned {len(given)} results for {len(items)} items")
    results = [_parts(name, i, result) for i, result in enumerate(given)]
    kinds = {tuple(sorted(parts)) for parts in results if parts is not None}
    if len(kinds) > 1:
        raise ValueError(
            f"the reward {name} returned different parts for different items "
            f"({' and '.join(', '.join(kind) for kind in sorted(kinds)[:2])}); return the same "
            "ones, or None for an item that cannot be judged"
        )
    return results


def _parts(name: str, place: int, result: Any) -> dict[str, float] | None:
    if result is None:
        return None
    parts = result if isinstance(result, Mapping) else {"total": result}
    if "total" not in parts:
        raise ValueError(f"the reward {name} returned {result!r} for item {place}, without 'total'")
    if parts["total"] is None:
        return None
    try:
        numbers = {str(part): float(value) for part, value in parts.items()}
    except (TypeError, ValueError):
        numbers = {"total": math.nan}
    if not all(map(math.isfinite, numbers.values())):
        raise ValueError(
            f"the reward {name} returned {result!r} for item {place}; wanted None, a finite "
            "number, or such numbers by name with 'total' among them"
        )
    return numbers
