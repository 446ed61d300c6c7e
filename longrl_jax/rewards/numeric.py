"""Reward of questions whose answer is a number: is it the same, units and tolerance counted?

The forms are those of quantities.py. A reference may say its tolerance: "12 +- 0.5", "12 cm +- 5%";
else numbers must be equal (to 1e-6 of the reference).
"""

from collections.abc import Sequence

from longrl_jax.rewards import answers
from longrl_jax.rewards.quantities import Quantity, plain, quantities, same
from longrl_jax.types import Scored

TOLERANCE = 1e-6
"""Of the reference: room for 1/3 against 0.3333333, none for another answer."""


def reward(items: Sequence[Scored]) -> list[dict[str, float] | None]:
    """Returns `accuracy` (0 or 1), also as `total`. None where the reference is not one number."""
    results: list[dict[str, float] | None] = []
    for item in items:
        right = is_right(answers.given(item), item.example.answer)
        results.append(None if right is None else {"total": float(right), "accuracy": float(right)})
    return results


def is_right(given: str, reference: str) -> bool | None:
    """Whether an answer is the reference's number; None: the reference is no number.

    An answer with several numbers is wrong: which of them is meant is for it to say.
    """
    wanted, _, spread = plain(reference).partition("+-")
    centre, allowed = _only(wanted), _only(spread)
    if centre is None or (spread and allowed is None):
        return None
    number = _only(plain(given))
    if number is None:
        return False
    tolerance = TOLERANCE * abs(centre.number)
    if allowed is not None:
        relative = allowed.kind == "%" and centre.kind != "%"
        tolerance += abs(allowed.value * centre.number if relative else _in_unit(allowed, centre))
    return same(number, centre, tolerance)


def _in_unit(allowed: Quantity, centre: Quantity) -> float:
    """Returns a tolerance as a number of the centre's unit."""
    if allowed.kind and allowed.kind == centre.kind:
        return allowed.value / centre.factor
    return allowed.number


def _only(text: str) -> Quantity | None:
    found = quantities(text)
    return found[0] if len(found) == 1 else None
