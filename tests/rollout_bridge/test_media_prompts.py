"""Prompts whose media come beside their tokens: their way to an engine, and Qwen2.5-VL in vLLM.

The witness of the engine is the learner on group rows, which tests/models compares with
transformers.
"""

import dataclasses
import math
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import rollout_bridge
from longrl_jax import convert, models, step
from longrl_jax.batching import make_batch
from longrl_jax.config import RolloutConfig
from longrl_jax.types import Example, Media, Prompt, Rollout, View
from rollout_bridge import EngineMedia, MediaPrompt, engines, weight_sync

ROOT = Path(__file__).parents[2]
CFG = RolloutConfig(
    dtype="float32", max_model_len=2048, kv_cache_gib=0.25, num_samples=3, max_tokens=8
)
MAX_GAP = 1e-4  # float32, sums in another order
HIDDEN, VOCAB = 8, 50
IMAGE, VIDEO = 40, 41


def film(offset, grid, *, width=HIDDEN, kind="video", unit_s=0.5, dtype=np.float32):
    rng = np.random.default_rng(offset)
    features = rng.standard_normal((math.prod(grid), width)).astype(dtype)
    return EngineMedia(kind=kind, offset=offset, grid=grid, unit_s=unit_s, features=features)


def two_media(**changed) -> MediaPrompt:
    tokens = np.array([1, 2, *[VIDEO] * 12, 3, *[IMAGE] * 2, 4, 5], np.int32)
    first, second = film(2, (2, 3, 2)), film(15, (1, 1, 2), kind="image")
    return MediaPrompt(tokens, (dataclasses.replace(first, **changed), second))


def check(prompt):
    engines.check_request(
        [prompt], [0], hidden_and_vocab=(HIDDEN, VOCAB), max_model_len=64, num_samples=2,
        temperature=1.0, max_tokens=4,
    )  # fmt: skip


def test_prompts_survive_the_way_to_a_worker():
    prompts = [np.arange(3), two_media(), np.ones((2, HIDDEN)), MediaPrompt(np.arange(4), ())]
    arrays, notes = engines.to_arrays(prompts)
    assert len(arrays) == 1 + 3 + 1 + 1 and all(isinstance(x, np.ndarray) for x in arrays)
    back = engines.from_arrays(arrays, notes)
    assert [type(p) for p in back] == [type(p) for p in prompts]
    for a, b in zip(prompts[1].media, back[1].media, strict=True):
        assert (a.kind, a.offset, a.grid, a.unit_s) == (b.kind, b.offset, b.grid, b.unit_s)
        np.testing.assert_array_equal(a.features, b.features)
    np.testing.assert_array_equal(back[1].tokens, prompts[1].tokens)


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"kind": "audio"}, "holds a 'audio'"),
        ({"kind": "image"}, "holds a 'image' of 2 steps in time"),
        ({"offset": 3}, "12 equal media tokens must stand at 3"),
        ({"offset": 12}, "12 equal media tokens must stand at 12"),
        ({"grid": (2, 3, 1)}, r"a grid of \(2, 3, 1\) wants \[6, 8\]"),
        ({"features": np.ones((12, 9), np.float32)}, r"features are float32\[12, 9\]"),
        ({"features": np.ones((12, 8), np.int32)}, r"features are int32\[12, 8\]"),
    ],
)
def test_media_that_do_not_stand_as_they_say_are_refused(changed, named):
    check(two_media())
    with pytest.raises(ValueError, match=f"prompt 0.*{named}"):
        check(two_media(**changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny random Qwen2.5-VL with tokenizer and processor."""
    out = tmp_path_factory.mktemp("vl") / "init"
    convert.init(ROOT / "configs/models/tiny_qwen2_5_vl.json", out)
    return out


def test_a_push_to_it_carries_the_language_model_alone(folder):
    cfg, model = models.load(folder)
    shapes = weight_sync.expected_shapes(folder)
    pushed = {name: x.shape for name, x in models.llm_weights(model, cfg)}
    assert shapes == pushed and "lm_head.weight" in shapes
    assert not any("visual" in name for name in shapes)


class World:
    """Prompts of every kind with random features, for a checkpoint."""

    def __init__(self, folder):
        from longrl_jax.data import prompts

        self.cfg, self.model = models.load(folder)
        self.layout = models.backbone_of(folder).media_layout(self.cfg)
        tokenizer = prompts.load_tokenizer(folder)
        self.banned = prompts.media_token_ids(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.token = {
            "image": vocabulary["<|image_pad|>"], "video": vocabulary["<|video_pad|>"],
            "start": vocabulary["<|vision_start|>"], "end": vocabulary["<|vision_end|>"],
        }  # fmt: skip
        self.rng = np.random.default_rng(0)

    def ask(self, *media) -> tuple[Prompt, np.ndarray | None]:
        """media: (kind, grid, seconds a unit). Returns the prompt and its features."""
        tokens, placed = self.rng.integers(8, 200, 9).tolist(), []
        for kind, grid, unit_s in media:
            tokens.append(self.token["start"])
            placed.append(
                Media(
                    kind=kind,
                    path="",
                    key=str(self.rng.integers(2**40)),
                    grid=grid,
                    times_s=(),
                    view=View(size=(0, 0), grid=grid[1:]),
                    num_tokens=math.prod(grid),
                    offset=len(tokens),
                    unit_s=unit_s,
                )  # fmt: skip
            )
            tokens += [self.token[kind]] * math.prod(grid)
            tokens += [self.token["end"], *self.rng.integers(8, 200, 5).tolist()]
        tokens = np.array(tokens, np.int32)
        is_media = np.isin(tokens, (self.token["image"], self.token["video"]))
        rope_pos, following = self.layout.positions(len(tokens), placed)
        prompt = Prompt(
            example=Example(id="q", question="", answer=""), tokens=tokens, is_media=is_media,
            rope_pos=rope_pos, next_rope_pos=following, media=tuple(placed),
        )  # fmt: skip
        shape = int(is_media.sum()), self.cfg.text.width
        features = self.rng.standard_normal(shape).astype(np.float32)
        return prompt, features if placed else None

    def gap(self, model, asked, groups) -> float:
        """The largest difference of log p between engine and learner, on group rows."""
        rollouts = [
            Rollout(prompt=prompt, samples=group, policy_version=0)
            for (prompt, _), group in zip(asked, groups, strict=True)
        ]
        batch, _ = make_batch(
            rollouts, features=[features for _, features in asked],
            advantages=[np.zeros(len(group), np.float32) for group in groups],
            num_rows=len(asked), num_shards=1, smallest_bucket=128, max_row_tokens=4096,
        )  # fmt: skip
        graphdef, params = nnx.split(model)
        token_logps = step.make_token_logps(
            graphdef, temperature=0.7, banned_tokens=self.banned, stage="projected"
        )
        logps = np.asarray(jax.jit(token_logps)(params, batch)[0])
        return float(np.abs(logps - batch.engine_logps)[batch.loss_mask].max())


def engine_input(prompt, features):
    if features is None:
        return prompt.tokens
    ends = np.cumsum([m.num_tokens for m in prompt.media])[:-1]
    media = [
        EngineMedia(kind=m.kind, offset=m.offset, grid=m.grid, unit_s=m.unit_s, features=rows)
        for m, rows in zip(prompt.media, np.split(features, ends), strict=True)
    ]
    return MediaPrompt(prompt.tokens, tuple(media))


def most_media_tokens(engine) -> int:
    """Tokens of a medium that vLLM takes even where it computes fewer in a step."""
    from vllm.multimodal import MULTIMODAL_REGISTRY

    info = MULTIMODAL_REGISTRY.create_processor(engine._llm.llm_engine.model_config).info
    most = info.get_mm_max_tokens_per_item(CFG.max_model_len, {"image": 1, "video": 1})
    return max(most.values())


@pytest.mark.slow
def test_qwen2_5_vl_says_what_the_learner_says(folder, tmp_path):
    world = World(folder)
    asked = [
        world.ask(),
        world.ask(("image", (1, 3, 4), 1.0)),
        world.ask(("image", (1, 2, 2), 1.0), ("image", (1, 5, 3), 1.0)),
        world.ask(("video", (30, 3, 5), 1.5)),  # over three cache blocks, time over rows
        world.ask(("video", (6, 4, 4), 0.3)),  # units share a position in time
        world.ask(("video", (4, 2, 3), 4.0), ("video", (9, 2, 2), 1.0)),
        world.ask(("image", (1, 2, 3), 1.0), ("video", (5, 2, 2), 2.0), ("image", (1, 1, 2), 1.0)),
    ]
    inputs = [engine_input(*a) for a in asked]
    (engine,) = rollout_bridge.make_engines(
        folder, CFG, seed=0, banned_tokens=world.banned, stop_tokens=()
    )

    def sample(prompts):
        return engine.generate(
            prompts, num_samples=3, temperature=0.7, max_tokens=8, seeds=range(len(prompts))
        )

    try:
        assert most_media_tokens(engine) > CFG.max_model_len - 64  # so any prompt that fits passes
        groups = sample(inputs)
        assert world.gap(world.model, asked, groups) < MAX_GAP
        said = {int(t) for group in groups for answer in group for t in answer.tokens}
        assert not said & set(world.banned)
        # other weights, the same features: nothing of the old weights is served
        convert.init(ROOT / "configs/models/tiny_qwen2_5_vl.json", tmp_path / "other", seed=1)
        cfg, other = models.load(tmp_path / "other")
        engine.sync(models.llm_weights(other, cfg), version=1)
        groups = sample(inputs)
        assert world.gap(other, asked, groups) < MAX_GAP
        assert world.gap(world.model, asked, groups) > 100 * MAX_GAP
        # other features at the same place are not taken for the old ones
        changed = [(prompt, x if x is None else x + 0.5) for prompt, x in asked]
        groups = sample([engine_input(*a) for a in changed])
        assert world.gap(other, changed, groups) < MAX_GAP
        with pytest.raises(ValueError, match="prompt 0 is embeddings, whose positions"):
            sample([np.ones((5, cfg.text.width), np.float32)])
    finally:
        engine.close()
