"""Where an answer stands in what a policy wrote."""

from longrl_jax.rewards import math_answer, video_qa
from longrl_jax.types import Scored


def given(item: Scored) -> str:
    r"""Returns the last answer that a text gives in the form that was asked for; "": it gives none.

    That is <answer>...</answer>, or \boxed{...} with data.template=boxed. Nothing else of a text
    counts as an answer, however right it is.
    """
    if item.template == math_answer.TEMPLATE:
        return math_answer.boxed(item.text)
    found = video_qa.ANSWER.findall(item.text)
    return found[-1].strip() if found else ""
