"""Packed rows train as rows of their own do: text, images and films, in both families, any mesh."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from longrl_jax import batching, convert, models, step
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases
from longrl_jax.stages import grpo, questions, sft, update
from longrl_jax.stages import policy as opened
from longrl_jax.types import Rollout

ROOT = Path(__file__).parents[2]
GRADIENT_BOUND = 1e-5
"""|difference| / |gradient| of every array, float32: the project's promise for group rows."""
STEPS_BOUND = 1e-4  # of parameters after NUM_STEPS of Adam, whose root makes rounding larger
MAX_GAP = 1e-4  # as in test_loop.py
NUM_STEPS = 4
BATCH = "batch={groups: 6, max_row_tokens: 512, smallest_bucket: 32}"
ALONE = ("mesh={data: 8, simulated: true}", BATCH)
PACKED = {
    "rows and heads": ("mesh={data: 2, fsdp: 2, tensor: 2, simulated: true}", BATCH),
    "ring": ("mesh={data: 2, seq: 4, simulated: true}", BATCH),
    "ulysses": ("mesh={fsdp: 4, seq: 2, simulated: true}", BATCH, "attention={kind: ulysses}"),
    "2d, three passes and an empty one": (
        "mesh={seq: 8, simulated: true}", BATCH.replace("512", "256"),
        "attention={kind: 2d, ulysses: 2}",
    ),
}  # fmt: skip
MESHES_OF = {"vila": tuple(PACKED), "qwen2_5_vl": tuple(PACKED)[1::2]}  # a mesh takes 20 s
EXAMPLES = {
    "vila": (),
    "qwen2_5_vl": ("data.min_pixels=3136", "data.max_pixels=4704", "data.timestamp="),
}


def keep_gradient(*_) -> optax.GradientTransformation:
    """An optimizer that changes nothing and whose state is the gradient."""

    def zeros(params):
        return jax.tree.map(jax.numpy.zeros_like, params)

    return optax.GradientTransformation(zeros, lambda grads, _, params: (zeros(grads), grads))


@dataclasses.dataclass(frozen=True)
class Asked:
    """A config's policy on its mesh, the six questions of `mixed`, and their features."""

    cfg: object
    policy: object
    state: step.TrainState
    groups: list[Rollout]
    features: list

    def passes(self):
        ones = [np.ones(1, np.float32)] * len(self.groups)
        return update.make_passes(self.cfg, self.policy, self.groups, self.features, ones)

    def logps(self):
        passes, index = self.passes()
        found, _ = update.make_pass_logps(self.cfg, self.policy)(
            step.all_params(self.state), passes
        )
        return [x for (x,) in index.per_sample(batching.local_rows(found))]


@pytest.fixture
def asked(configured, world, mixed, tmp_path):
    """asked(family, *overrides) -> Asked, of a random checkpoint."""

    def ask(family: str, *overrides: str) -> Asked:
        init = world / f"{family}_init"
        if not init.exists():
            corpus = world / "data" / "corpus.txt"
            convert.init(ROOT / f"configs/models/tiny_{family}.json", init, corpus=corpus)
        cfg = configured(
            "tiny_cpu_sft.yaml", f"model.path={init}", f"data.train={mixed}", "data.fps=1",
            "data.num_frames=16", "data.validation=", "data.template=direct",
            "optimizer={learning_rate: 0.01}", *EXAMPLES[family], *overrides,
        )  # fmt: skip
        policy, state = opened.open_policy(cfg)
        with (
            RefusedLog(tmp_path / "refused.jsonl") as refused,
            questions.open_embedder(
                cfg, opened.open_encoder(policy, state), refused, Phases()
            ) as embed,
        ):
            (prompts,) = questions.slices(cfg, policy, refused.add, first=0, count=1)
            kept, features = embed(prompts, 1)
        assert len(kept) == 6
        groups = [sft.reference_group(prompt, policy, "direct") for prompt in kept]
        longer = [repeated(group, times) for times, group in enumerate(groups, start=1)]
        return Asked(
            cfg, policy, state, longer, [None if x is None else np.array(x) for x in features]
        )

    return ask


def repeated(group: Rollout, times: int) -> Rollout:
    """The same with an answer that is so many times as long."""
    (sample,) = group.samples
    tokens = np.tile(sample.tokens, times)
    longer = dataclasses.replace(sample, tokens=tokens, logps=np.zeros(len(tokens), np.float32))
    return dataclasses.replace(group, samples=(longer,))


def relative(got, want):
    """Path -> |difference| / |wanted|, of the arrays that are not 0."""
    got, want = models.arrays_of(got), models.arrays_of(want)
    assert got.keys() == want.keys()
    size = {path: np.linalg.norm(x) for path, x in want.items()}
    return {
        path: np.linalg.norm(np.asarray(got[path]) - np.asarray(x)) / size[path]
        for path, x in want.items()
        if size[path] > 0
    }


@pytest.mark.slow
@pytest.mark.parametrize("family", EXAMPLES)
def test_loss_and_gradients_are_those_of_a_row_an_example(asked, monkeypatch, family):
    """Text, an image, images in the words, a film, two films, both."""
    assert jax.device_count() == 8
    for module in (update, opened):
        monkeypatch.setattr(module, "make_optimizer", keep_gradient)

    def learn(one: Asked):
        passes, index = one.passes()
        state, stats = update.make_sft_update(one.cfg, one.policy, one.state)(one.state, passes)
        return passes, index, jax.device_get(state.opt_state), jax.device_get(stats)

    _, index, want, want_stats = learn(asked(family, *ALONE))
    assert len(set(index.rows)) == 6 and len(models.arrays_of(want)) > 10
    for name in MESHES_OF[family]:
        settings = PACKED[name]
        passes, index, got, stats = learn(asked(family, *settings, "batch.pack=true"))
        assert len(set(index.rows)) < 6
        num_empty = sum(not np.asarray(mask).any() for mask in passes.loss_mask)
        assert num_empty == name.endswith("empty one")
        assert stats["tokens"] == want_stats["tokens"] and stats["tokens"][0] > 50
        np.testing.assert_allclose(stats["loss"][0], want_stats["loss"][0], rtol=1e-6, err_msg=name)
        error = relative(got, want)
        worst = max(error, key=error.get)
        assert error[worst] <= GRADIENT_BOUND, (name, worst, error[worst])


@pytest.mark.slow
def test_steps_of_adam_end_where_those_of_a_row_an_example_do(asked):
    """With adapters; the projector learns beside them."""
    ends = []
    for settings in (ALONE, (*PACKED["ring"], "batch.pack=true")):
        one = asked("vila", *settings, "model.lora_rank=4")
        learn, state = update.make_sft_update(one.cfg, one.policy, one.state), one.state
        losses = []
        for _ in range(NUM_STEPS):
            state, stats = learn(state, one.passes()[0])
            losses.append(float(stats["loss"][0]))
        assert losses[-1] < losses[0]
        ends.append((losses, jax.device_get(state.params)))
    np.testing.assert_allclose(ends[1][0], ends[0][0], rtol=STEPS_BOUND)
    error = relative(ends[1][1], ends[0][1])
    worst = max(error, key=error.get)
    assert error[worst] <= STEPS_BOUND, (worst, error[worst])


@pytest.mark.slow
@pytest.mark.parametrize("family", EXAMPLES)
def test_what_one_example_says_does_not_reach_another(asked, family):
    """To the last bit: other tokens, and other features, of two in a row of six."""
    one = asked(family, *PACKED["ring"], "batch.pack=true")
    want = one.logps()
    changed = (0, 4)
    groups, features = list(one.groups), list(one.features)
    for i in changed:
        prompt, (sample,) = groups[i].prompt, groups[i].samples
        tokens = np.where(prompt.is_media, prompt.tokens, prompt.tokens[::-1])
        sample = dataclasses.replace(sample, tokens=sample.tokens[::-1])
        prompt = dataclasses.replace(prompt, tokens=tokens)
        groups[i] = dataclasses.replace(groups[i], prompt=prompt, samples=(sample,))
        features[i] = None if features[i] is None else features[i][::-1] + 1
    got = dataclasses.replace(one, groups=groups, features=features).logps()
    for i in range(6):
        assert np.array_equal(got[i], want[i]) == (i not in changed), i


@pytest.mark.slow
def test_grpo_packs_groups_and_agrees_with_its_engine(configured, spaces, tmp_path):
    """Whatever shares a row, log p is what a real vLLM says of the same answers."""
    cfg = configured(
        "tiny_cpu_grpo.yaml",
        "batch={groups: 4, max_row_tokens: 1024, smallest_bucket: 64, pack: true}",
        "rewards={spaces: 1.0}",
        "algorithm.kl=0.1",
        "optimizer={learning_rate: 0.01}",
        "run.num_steps=2",
        "data.validation=",
    )
    grpo.run(cfg)
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").open()]
    assert [step["step"] for step in steps] == [1, 2]
    assert max(step["gap/max"] for step in steps) < MAX_GAP
    assert min(step["pack/examples_per_row"] for step in steps) > 1
    assert abs(steps[0]["kl"]) < 1e-6 < steps[1]["kl"]
