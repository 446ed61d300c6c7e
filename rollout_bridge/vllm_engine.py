"""vLLM in this process: prompts go in as arrays, samples come out, new weights are pushed in.

The only file that imports vllm. platform.prepare must have set vLLM's variables before.
Facts it rests on: docs/measured.md section 2.
"""

import dataclasses
import gc
import json
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
from vllm import LLM, SamplingParams
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.layers.attention import is_deferred_attention_layer
from vllm.model_executor.model_loader.reload import layerwise
from vllm.v1.sample.logits_processor import LogitsProcessor

from longrl_jax.config import RolloutConfig
from longrl_jax.types import Sample
from rollout_bridge import weight_sync
from rollout_bridge.engines import EngineError, MediaPrompt, check_request, sync_all
from rollout_bridge.weight_sync import Named, Row

BLOCK_TOKENS = 128
"""Tokens of a prefix-cache block: vLLM's only size on CPU, and ours on GPUs."""


class VllmEngine:
    """One vLLM model. `generate` and `sync` take turns; neither is thread-safe."""

    own_process = False

    def __init__(
        self,
        llm_dir: Path | str,
        *,
        cfg: RolloutConfig,
        seed: int,
        banned_tokens: Sequence[int] = (),
        stop_tokens: Sequence[int] = (),
    ):
        """Loads the checkpoint in llm_dir (config.json and safetensors; no tokenizer is needed).

        banned_tokens are never sampled, and log p is that of the distribution without them;
        stop_tokens end an answer and are its last token.
        """
        self.name = f"vLLM engine on {llm_dir}"
        self.cfg = cfg
        self.version: int | None = 0
        """That `sync` was told; None: a push has begun and not ended."""
        self.shapes = weight_sync.expected_shapes(llm_dir)
        self._push = "none"  # of a weight update: none, open, failed
        self._stop_tokens = list(stop_tokens)
        on_cpu = not torch.cuda.is_available()
        tp = cfg.tensor_parallel
        vision = _vision_config(Path(llm_dir) / "config.json")
        self._merge: int | None = vision["spatial_merge_size"] if vision else None
        kind = _media_options(vision, cfg.max_model_len) if vision else TEXT_OPTIONS
        self._llm: Any = LLM(
            model=str(llm_dir),
            seed=seed,
            dtype=cfg.dtype,  # type: ignore[arg-type]
            max_model_len=cfg.max_model_len,
            tensor_parallel_size=tp,
            distributed_executor_backend="mp" if tp > 1 else None,
            block_size=BLOCK_TOKENS,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            kv_cache_memory_bytes=int(cfg.kv_cache_gib * 2**30) if on_cpu else None,
            enforce_eager=on_cpu,
            enable_chunked_prefill=not on_cpu,  # vLLM 0.32 rewinds a split prompt's seed: CUDA only
            enable_prefix_caching=True,
            **kind,
            generation_config="vllm",  # nothing but our SamplingParams decides how we sample
            logprobs_mode="processed_logprobs",
            logits_processors=[BannedTokens] if banned_tokens else None,
            additional_config={"banned_tokens": sorted(set(banned_tokens))},
            worker_extension_cls=f"{__name__}.{WorkerExtension.__name__}",
            weight_transfer_config={"backend": LayerTransfer.__name__},
            disable_log_stats=False,
            use_tqdm_on_load=False,
        )
        self._counter = PrefixCacheCounter()
        self._llm.llm_engine.logger_manager = self._counter  # type: ignore[assignment]
        self._llm.init_weight_transfer_engine({"init_info": {}})
        self._group_name = self._llm.collective_rpc("group_name")[0]
        _OPEN.add(self)

    def generate(
        self,
        prompts: Sequence[Any],
        *,
        num_samples: int,
        temperature: float,
        max_tokens: int,
        seeds: Sequence[int],
    ) -> list[tuple[Sample, ...]]:
        """Draws num_samples answers to each prompt; temperature 0 is greedy (one answer).

        A prompt is [P, D] embeddings (jax or numpy), [P] integer token ids or, on a checkpoint with
        a vision tower, a MediaPrompt (that engine takes no embeddings: it makes the positions).
        Sample i of a prompt has seed seeds[prompt] + i and depends on nothing else but prompt,
        weights and settings.
        """
        if self.version is None:
            raise EngineError(f"a push to {self.name} broke off: its weights are a mixture; sync")
        check_request(
            prompts,
            seeds,
            hidden_and_vocab=self.hidden_and_vocab,
            max_model_len=self.cfg.max_model_len,
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=max_tokens,
        )
        self._check_kinds(prompts)
        params = [
            SamplingParams(
                n=num_samples,
                temperature=temperature,
                max_tokens=max_tokens,
                seed=seed,
                logprobs=0,
                stop_token_ids=self._stop_tokens,
                ignore_eos=True,  # stop_tokens says it all
                detokenize=False,
            )
            for seed in seeds
        ]
        requests = [_request(p, self._merge) for p in prompts]
        outputs = self._llm.generate(requests, params, use_tqdm=False)
        return [
            tuple(_sample(choice, seed) for choice in sorted(out.outputs, key=lambda c: c.index))
            for out, seed in zip(outputs, seeds, strict=True)
        ]

    def _check_kinds(self, prompts: Sequence[Any]) -> None:
        """Raises ValueError for a kind of prompt that this engine's model would misread."""
        for index, prompt in enumerate(prompts):
            with_media = isinstance(prompt, MediaPrompt)
            if with_media and self._merge is None:
                raise ValueError(
                    f"prompt {index} has media, {self.name} takes tokens or embeddings"
                )
            if self._merge and not with_media and prompt.ndim == 2:
                raise ValueError(
                    f"prompt {index} is embeddings, whose positions {self.name} cannot know; give "
                    "a MediaPrompt"
                )

    def sync(self, weights: Iterable[Named], version: int) -> None:
        """Replaces all weights; extra memory is one layer of `weights`. Names are Hugging Face's.

        Afterwards nothing computed from the old weights is left (the prefix cache is reset).
        """
        sync_all([self], weights, version)

    def start_sync(self) -> None:
        """First third of `sync`; see engines.sync_all."""
        if self._push == "failed":
            raise EngineError(f"vLLM refused a layer for {self.name}; make a new engine")
        if self._push == "open":  # the last push broke off between two layers: close it
            self._llm.finish_weight_update()
        self.version = None
        self._llm.start_weight_update()
        self._push = "open"

    def load(self, layer: Sequence[Named]) -> None:
        """Loads one complete layer; the arrays are free to go when it returns."""
        names, arrays = zip(*layer, strict=True)
        self._update({"names": names, "arrays": arrays})

    def load_shared(self, path: str, names: Sequence[str], rows: Sequence[Row]) -> None:
        """The same from a weight_sync.SharedFile, which every tensor-parallel rank maps."""
        self._update({"names": names, "path": path, "rows": rows})

    def _update(self, info: dict[str, Any]) -> None:
        self._push = "failed"
        self._llm.update_weights({"update_info": info})
        self._push = "open"

    def finish_sync(self, version: int) -> None:
        self._llm.finish_weight_update(weight_version=str(version))
        self._push = "none"
        if not self._llm.reset_prefix_cache():
            raise EngineError(f"{self.name} could not reset its prefix cache after a push")
        self.version = version

    @property
    def hidden_and_vocab(self) -> tuple[int, int]:
        vocab, hidden = self.shapes[weight_sync.EMBEDDING]
        return hidden, vocab

    def prefix_cache_stats(self) -> dict[str, int]:
        """Prompt tokens looked up in the prefix cache, and found there, since the engine began."""
        return {"queries": self._counter.queries, "hits": self._counter.hits}

    def close(self) -> None:
        """Frees the model and the cache; a second call does nothing."""
        if self._llm is None:
            return
        client = self._llm.llm_engine.engine_core
        self._llm = None
        _OPEN.discard(self)
        if _OPEN and client._finalizer.detach() is not None:
            # client.shutdown() would also tear down torch.distributed under the other engines.
            client.engine_core.model_executor.shutdown()
            client.engine_core.scheduler.shutdown()
            gc.unfreeze()  # vLLM froze what it loaded
        else:
            client.shutdown()
        del client
        gc.collect()
        if self._group_name:  # a rank that was killed leaves its file
            for path in Path("/dev/shm").glob(f"{self._group_name}-*"):
                path.unlink(missing_ok=True)


TEXT_OPTIONS: dict[str, Any] = {"enable_prompt_embeds": True, "skip_tokenizer_init": True}
"""For a language model, whose prompts may be embeddings."""


def _vision_config(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        raise ValueError(f"there is no {path}; export the model there first")
    return json.loads(path.read_text()).get("vision_config")


def _media_options(vision: dict[str, Any], max_model_len: int) -> dict[str, Any]:
    """For a checkpoint with a vision tower, which vLLM then leaves out: features come to it."""
    token_px = vision["patch_size"] * vision["spatial_merge_size"]
    return {
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {"image": 0, "video": 0},  # of pixels; features are not counted
        "mm_processor_cache_gb": 0,
        # No pixel is processed. vLLM refuses media of more tokens than the largest image has (or
        # than it computes in a step), and by the published bounds an hour of film has more.
        "mm_processor_kwargs": {"max_pixels": max_model_len * token_px**2},
        # An hour of film has more tokens than max_position_embeddings, but not more positions, as
        # M-RoPE counts time (vLLM's table is 4 times that long). vLLM must not compare the two.
        "hf_overrides": {"text_config": {"model_max_length": max_model_len}},
    }


_OPEN: set[VllmEngine] = set()
"""Engines of this process; the last one to close takes vLLM's process-wide state down. A forgotten
engine stays here: collected, it would take that state from under the others."""


def _request(prompt: Any, merge: int | None) -> dict[str, Any]:
    """merge: patches along one side of a media token."""
    if isinstance(prompt, MediaPrompt):
        return _media_request(prompt, merge or 1)
    if prompt.ndim == 2:
        return {"prompt_embeds": to_torch(prompt)}
    return {"prompt_token_ids": np.asarray(prompt).tolist()}


def _media_request(prompt: MediaPrompt, merge: int) -> dict[str, Any]:
    """vLLM takes one placeholder a medium, which it expands, and grids in patches. It knows media
    again by a digest of their features, so other weights are never served from a cache."""
    keep_P = np.ones(len(prompt.tokens), bool)
    data: dict[str, dict[str, torch.Tensor]] = {}
    for kind in ("image", "video"):
        media = [m for m in sorted(prompt.media, key=lambda m: m.offset) if m.kind == kind]
        for medium in media:
            keep_P[medium.offset + 1 : medium.offset + len(medium.features)] = False
        if media:
            grids = [(m.grid[0], m.grid[1] * merge, m.grid[2] * merge) for m in media]
            data[kind] = {
                f"{kind}_embeds": torch.cat([to_torch(m.features) for m in media]),
                f"{kind}_grid_thw": torch.tensor(grids),
            }
        if media and kind == "video":
            data[kind]["second_per_grid_ts"] = torch.tensor([float(m.unit_s) for m in media])
    return {
        "prompt_token_ids": np.asarray(prompt.tokens)[keep_P].tolist(),
        "multi_modal_data": data,
    }


def _sample(choice: Any, seed: int) -> Sample:
    logps = [
        row[token].logprob for token, row in zip(choice.token_ids, choice.logprobs, strict=True)
    ]
    return Sample(
        tokens=np.asarray(choice.token_ids, np.int32),
        logps=np.asarray(logps, np.float32),
        finish_reason=choice.finish_reason,
        seed=seed + choice.index,
    )


def to_torch(array: Any) -> torch.Tensor:
    """Hands an array over without a copy, unless it is split over devices (then it is gathered)."""
    host = weight_sync.to_host(array)
    bfloat16 = host.dtype == ml_dtypes.bfloat16
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*not writable")  # nobody writes to it
        tensor = torch.from_numpy(host.view(np.uint16) if bfloat16 else host)
    return tensor.view(torch.bfloat16) if bfloat16 else tensor


class PrefixCacheCounter:
    """Takes the place of vLLM's metric loggers, which share one global registry per process."""

    def __init__(self):
        self.queries = 0
        self.hits = 0

    def record(self, scheduler_stats: Any = None, **_: Any) -> None:
        if scheduler_stats is not None:
            self.queries += scheduler_stats.prefix_cache_stats.queries
            self.hits += scheduler_stats.prefix_cache_stats.hits

    def log(self) -> None:
        """Called by vLLM every ten seconds."""


class BannedTokens(LogitsProcessor):
    """Sets the logits of tokens that may never be sampled to -inf, before temperature.

    One masked write a step for the whole batch; vLLM's allowed_token_ids would carry the rest of
    the vocabulary in every request, and its logit_bias is at most 100.
    """

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool):
        tokens = vllm_config.additional_config["banned_tokens"]
        self._tokens = torch.tensor(tokens, dtype=torch.long, device=device)

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.index_fill_(-1, self._tokens, float("-inf"))

    def is_argmax_invariant(self) -> bool:
        return False

    def update_state(self, batch_update: Any) -> None:
        """The ban is the same for every request."""


@dataclasses.dataclass
class NoInit(WeightTransferInitInfo):
    """Nothing has to be agreed on before the first push."""


@dataclasses.dataclass
class Layer(WeightTransferUpdateInfo):
    """A complete layer: arrays of this process, or rows of a weight_sync.SharedFile."""

    names: Sequence[str]
    arrays: Sequence[Any] = ()
    path: str = ""
    rows: Sequence[Row] = ()


class LayerTransfer(WeightTransferEngine):
    """Receives a layer at a time through vLLM's layerwise reloading, which repacks for the CPU."""

    init_info_cls = NoInit
    update_info_cls = Layer

    def init_transfer_engine(self, init_info: NoInit) -> None:
        pass

    def start_weight_update(self) -> None:
        layerwise.initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if torch.cuda.is_available():  # vLLM's own method synchronizes always, and fails on CPU
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Any) -> None:
        layer: Layer = update_info
        arrays = weight_sync.read(layer.path, layer.rows) if layer.path else layer.arrays
        model: Any = self.model
        model.load_weights(
            (name, to_torch(array).to(self.device))
            for name, array in zip(layer.names, arrays, strict=True)
        )
        for module in model.modules():
            info = layerwise.get_layerwise_info(module)
            if info.can_load() and info.load_numel and not is_deferred_attention_layer(module):
                # A table that vLLM pads (vocabulary not a multiple of 64) never counts as full:
                # it would keep our array until the end of the push.
                layerwise._layerwise_process(module, info)

    def finish_weight_update(self) -> None:
        layerwise.finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


class WorkerExtension:
    """Mixed into vLLM's worker class: naming it makes every worker process import this file."""

    def group_name(self) -> str:
        """How the shared memory of this engine's CPU ranks begins; empty on other devices."""
        return os.environ.get("VLLM_DIST_IDENT", "")


WeightTransferEngineFactory.register_engine(LayerTransfer.__name__, LayerTransfer)
