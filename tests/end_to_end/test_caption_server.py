"""Captions by our own checkpoint: frames encoded here, its language model behind vLLM's server."""

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import generation
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from longrl_jax.data import synthetic
from longrl_jax.data.generate import captioner, run, settings
from longrl_jax.data.video import DecoderPool

CHECKPOINT = Path(__file__).parents[2] / "configs" / "models" / "tiny_vila_start"
MAX_TOKENS = 24


@contextlib.contextmanager
def vllm_server():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "longrl_jax.data.generate", "serve", str(CHECKPOINT)]
    command += ["--port", str(port), "--dtype", "float32", "--max-model-len", "256"]
    process = subprocess.Popen(command)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            assert process.poll() is None, process.returncode
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait(60)


def in_transformers(x_PD):
    """Greedy words after a whole prompt of embeddings, float32: the witness."""
    folder = CHECKPOINT / "llm"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        tokens = model.generate(
            inputs_embeds=torch.tensor(x_PD)[None],
            attention_mask=torch.ones(1, len(x_PD), dtype=torch.long),
            max_new_tokens=MAX_TOKENS,
            do_sample=False,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
            pad_token_id=0,
        )
    return tokenizer.decode(tokens[0], skip_special_tokens=True)


@pytest.mark.slow
def test_captions_are_the_checkpoint_s_own(tmp_path, monkeypatch):
    """The server is sent the rows of the user's turn alone, and answers the whole prompt."""
    embedded = []

    def turn(x_PD, prompt, tokenizer, cut=captioner.turn):
        embedded.append(x_PD)
        return cut(x_PD, prompt, tokenizer)

    monkeypatch.setattr(captioner, "turn", turn)
    (tmp_path / "films").mkdir()
    _, frames_FHW3, _ = synthetic.make_clip(5, "train", 0)
    synthetic.write_video(tmp_path / "films" / "film.mp4", frames_FHW3)
    asked = {
        "checkpoint": str(CHECKPOINT),
        "question": "who is there when ?",
        "timestamp": "<{t:.0f}s>",
        "frames": 4,
        "max_tokens": MAX_TOKENS,
        "template": "think",
        "devices": 8,
    }
    with vllm_server() as url:
        path = generation.make(
            tmp_path,
            url,
            films=0,
            caption=asked,
            split={"clip_s": 16},
            servers={"all": {"base_url": url, "model": "captioner"}},
        )
        cfg = settings.load(path, [])
        run.run_stage(cfg, "split", ["film.mp4"])
        about = run.work_of(cfg, "split", "film.mp4").items[0]
        with DecoderPool(1, timeout_s=60) as pool, captioner.open_requests(cfg, pool) as make:
            requests = make(about, about["clips"])
            replies = run.chat.ask(requests, cfg.servers["all"], journal=None)
            assert [x.messages for x in make(about, about["clips"])] == [
                x.messages for x in requests
            ]  # else a run that goes on would pay again
    assert len(replies) == 4
    said = [reply.text for reply in replies]
    assert said == [in_transformers(x_PD) for x_PD in embedded[:4]]
    assert len(set(said)) > 1, f"it says the same of every clip: {said}"
