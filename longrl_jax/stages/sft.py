"""CoT-SFT: maximum likelihood on reference reasoning and answers.

Source: arXiv:2507.07966 section 3 (stage 1, Long-CoT-SFT). A reference answer is a group of one
sample with advantage 1, so SFT and RL share rows, update and sharding.
"""

import contextlib
import functools
from pathlib import Path

import jax
import numpy as np

from longrl_jax import processes
from longrl_jax.config import Config
from longrl_jax.data import prompts as prompt_text
from longrl_jax.data.mixing import template_of
from longrl_jax.data.refused import RefusedLog
from longrl_jax.metrics import Phases, averages
from longrl_jax.stages import policy as opened
from longrl_jax.stages import questions, saving, update
from longrl_jax.stages.evaluation import evaluate, is_due
from longrl_jax.stages.policy import Policy
from longrl_jax.types import Prompt, Rollout, Sample

SHOWN = ("loss", "grad_norm", "time/step_s")


def run(cfg: Config) -> None:
    """Fine-tunes model.path and leaves metrics, scores and an export in run.dir.

    A run.dir with an unfinished run of this config is gone on with.
    """
    folder = Path(cfg.run.dir)
    policy, state = opened.open_policy(cfg)
    encoder = opened.open_encoder(policy, state)
    smallest = cfg.batch.smallest_bucket
    to_inputs = opened.make_prompt_embedder(policy, state, smallest_bucket=smallest)
    train_step = update.make_sft_update(cfg, policy, state)
    saver, state = saving.open_saver(cfg, policy, state)
    phases = Phases()
    with contextlib.ExitStack() as stack:
        refused = stack.enter_context(RefusedLog(folder / "refused.jsonl"))
        embed = stack.enter_context(questions.open_embedder(cfg, encoder, refused, phases))
        held_out = questions.validation(cfg, policy, refused)
        engines = (
            stack.enter_context(opened.open_engines(cfg, policy)) if cfg.data.validation else []
        )
        log = stack.enter_context(saver.open_log("sft"))
        empty_steps = 0
        phases.take()  # what came before belongs to no step
        for number, asked in questions.training(cfg, policy, refused, first_step=saver.first_step):
            kept, features = embed(asked, number)
            groups = [
                reference_group(prompt, policy, template_of(cfg.data, prompt.example))
                for prompt in kept
            ]
            means: dict[str, float] = {}
            num_tokens = 0.0
            _, num_groups = processes.place_of(len(groups))
            empty_steps = questions.count_empty(num_groups, empty_steps, refused)
            if num_groups:
                with phases.phase("update"):
                    weights = [np.ones(1, np.float32)] * len(groups)
                    passes, index = update.make_passes(cfg, policy, groups, features, weights)
                    state, stats = train_step(state, passes)
                    means = averages(jax.device_get(stats))
                filled = processes.added(update.filling(index))
                means |= averages(filled)
                num_tokens, _ = filled["pack/fill"]
                save = functools.partial(saver.export, state)
                update.stop_if_not_finite(means, number=number, save=save)
            counts = {
                "groups": num_groups,
                "refused": refused.settle(),
                **questions.refused_by_source(cfg, refused),
                "compilations": train_step.num_compilations,
            }
            times = phases.take()
            times["time/tokens_per_second"] = num_tokens / times["time/step_s"]
            log.step(number, means | counts | times, shown=SHOWN)
            scores = None
            if cfg.data.validation and is_due(cfg, number):
                opened.push(engines, policy, state, version=number)
                inputs = to_inputs(state)
                scores = evaluate(cfg, policy, engines, held_out, embed, inputs, step=number)
                log.evaluation(number, scores)
                refused.settle()
            saver.after_step(number, state, scores)
            phases.take()  # the seconds of evaluation and checkpoint belong to no step
        saver.finish(state)


def reference_group(prompt: Prompt, policy: Policy, template: str) -> Rollout:
    """Returns the reference answer as the only sample of a group."""
    text = prompt_text.target_text(prompt.example, template)
    tokens = prompt_text.answer_tokens(text, policy.tokenizer)
    no_logps = np.zeros(len(tokens), np.float32)  # no engine drew it
    sample = Sample(tokens=tokens, logps=no_logps, finish_reason="stop", seed=0)
    return Rollout(prompt=prompt, samples=(sample,), policy_version=0)
