"""vLLM beside a JAX learner: engines, weight pushes and the store of media embeddings."""

from rollout_bridge.engines import (
    Engine,
    EngineError,
    EngineMedia,
    MediaPrompt,
    generate_all,
    make_engines,
    sync_all,
)
from rollout_bridge.video_cache import VideoStore, entry_key, weights_digest

__all__ = [
    "Engine",
    "EngineError",
    "EngineMedia",
    "MediaPrompt",
    "VideoStore",
    "entry_key",
    "generate_all",
    "make_engines",
    "sync_all",
    "weights_digest",
]
