"""Prompt embeddings as vLLM's server reads them."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch

from longrl_jax.data import prompts
from longrl_jax.data.generate import captioner
from longrl_jax.types import Example, Prompt
from rollout_bridge import prompt_embeds

TOKENIZER = Path(__file__).parents[2] / "configs" / "models" / "tiny_vila_start" / "llm"


def test_the_server_s_own_reader_gets_the_same_numbers():
    x_PD = np.random.default_rng(0).normal(size=(7, 5)).astype(np.float32)
    text = prompt_embeds.to_base64(x_PD)
    read = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True)
    np.testing.assert_array_equal(read.numpy(), x_PD)
    assert prompt_embeds.to_base64(x_PD.copy()) == text  # the journal knows a request by it
    assert prompt_embeds.to_base64(x_PD + 1) != text


@pytest.mark.parametrize("system", ["", "<|im_start|>system\nBe brief.<|im_end|>\n"])
def test_a_turn_is_what_stands_between_the_marks_of_the_template(system):
    tokenizer = prompts.load_tokenizer(TOKENIZER)
    tokenizer.chat_template = (
        "{{ '" + system.replace("\n", "\\n") + "' }}" + tokenizer.chat_template
    )
    turns = [{"role": "user", "content": "who is there ?"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    tokens = np.array(tokenizer.encode(rendered, add_special_tokens=False), np.int32)
    prompt = Prompt(
        example=Example(id="1", question="", answer=""),
        tokens=tokens,
        is_media=np.zeros(len(tokens), bool),
        rope_pos=np.arange(len(tokens)),
        next_rope_pos=len(tokens),
    )
    rows = captioner.turn(tokens[:, None].astype(np.float32), prompt, tokenizer)
    assert tokenizer.decode(rows[:, 0].astype(int)) == "who is there ?"
