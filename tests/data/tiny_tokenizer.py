"""A tokenizer as `convert init` writes it, learnt from a page of the questions that tests ask."""

from pathlib import Path
from typing import Any

from longrl_jax import convert
from longrl_jax.data import prompts, synthetic

NUM_CLIPS = 4


def make_tokenizer(folder: Path) -> Any:
    stories = [synthetic.make_clip(0, "train", i)[2] for i in range(NUM_CLIPS)]
    text = "".join(synthetic.corpus([example for asked in stories for example in asked]))
    convert._write_tokenizer(folder, text, 512)
    return prompts.load_tokenizer(folder)
