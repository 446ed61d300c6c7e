"""What an evaluation does, what its scores depend on, and where it stands."""

import dataclasses
import hashlib
import importlib.machinery
import json
import sys
from pathlib import Path
from typing import Any

from longrl_jax import config

EXPORT = "export"
"""Name of the folder that a run exports to."""
ALL_EXAMPLES = sys.maxsize
SCORES, DRAWN, ANSWERS = "scores.json", "drawn", "answers"
JUDGE = "judge.jsonl"
"""Verdicts of a model that judges, each paid for once."""
FREE = ("train", "mix", "decoder_processes", "decode_timeout_s", "loader_workers")
"""Keys of the section data that change no score."""

Found = dict[str, Any]
"""What scores.json holds."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What an evaluation does; the rest is the config's (run.eval_examples: how many questions)."""

    out: Path
    num_samples: int = 8
    """Answers to a question in the mode `sampled`; 0: without it."""
    temperature: float = 1.0
    num_shuffles: int = 1
    """Orders of the options that a question is asked in, in the mode `shuffled`; 0: without it."""
    baselines: bool = True
    """With the blind modes and the one-letter baseline."""
    benchmark: str = ""
    """A name in longrl_jax.benchmarks, whose scorers judge beside the rewards; empty: none."""


def begun(cfg: config.Config, plan: Plan) -> Found:
    """Returns what plan.out/scores.json says where nothing is left to do, or an empty start.

    Answers that have been drawn are found later, by mode; other rewards or scorers judge them
    anew. Raises ValueError where the folder holds answers to other questions, with other settings,
    or of weights that have changed.
    """
    settings, judged_by = settings_of(cfg, plan), judges_of(cfg, plan)
    path = plan.out / SCORES
    if path.exists():
        found: Found = json.loads(path.read_text())
        other = sorted(k for k, v in settings.items() if found["settings"].get(k) != v)
        if other:
            raise ValueError(
                f"{path} holds an evaluation with another {', '.join(other)}; choose another --out,"
                " or move that one away"
            )
        unjudged = any(count["unjudged"] for count in found["counts"].values())
        written = all((plan.out / ANSWERS / f"{mode}.jsonl").exists() for mode in found["modes"])
        if found["complete"] and found["judged_by"] == judged_by and not unjudged and written:
            return found
    elif (plan.out / DRAWN).exists():
        raise ValueError(
            f"{plan.out} holds answers, but no {SCORES} that says of what; choose another --out, "
            "or move that one away"
        )
    return {
        "checkpoint": cfg.model.path,
        "step": step_of(cfg.model.path),
        "benchmark": plan.benchmark,
        "questions": 0,
        "refused": 0,
        "complete": False,
        "counts": {},
        "modes": {},
        "baselines": {},
        "shuffled_minus_greedy": {},
        "skipped": {},
        "judged_by": judged_by,
        "settings": settings,
    }


def judges_of(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Returns what judges the answers, and by what results are reported, as JSON has it."""
    from longrl_jax.benchmarks import BENCHMARKS  # here: it brings rewards, which take seconds
    from longrl_jax.rewards import own

    benchmark = BENCHMARKS.get(plan.benchmark)
    return {
        "rewards": dict(cfg.rewards),
        "overlong_tokens": cfg.rollout.overlong_tokens if "overlong" in cfg.rewards else 0,
        "code": {name: _digest_of_code(name) for name in cfg.rewards if own.MARK in name},
        "scorers": list(benchmark.scorers) if benchmark else [],
        "judge": cfg.judge.model if asks_judge(cfg, plan.benchmark) else "",
        "report_by": list(benchmark.report_by) if benchmark else [],
    }


def asks_judge(cfg: config.Config, benchmark: str) -> bool:
    """Whether a reward or a benchmark (a name; empty: none) asks the model of cfg.judge."""
    from longrl_jax.benchmarks import BENCHMARKS

    return "judge" in cfg.rewards or bool(benchmark and BENCHMARKS[benchmark].judge)


def settings_of(cfg: config.Config, plan: Plan) -> dict[str, Any]:
    """Returns all that the answers depend on, as JSON has it."""
    from longrl_jax.data import mixing  # here: it brings grain

    folder = Path(cfg.model.path)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    if not files:
        raise ValueError(
            f"model.path={cfg.model.path} holds no files; name a Hugging Face folder, e.g. a run's "
            "RUN/export"
        )
    digest = hashlib.sha256()
    for path in files:  # not the bytes: a checkpoint may be many gigabytes
        stat = path.stat()
        digest.update(f"{path.relative_to(folder)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    held_out = mixing.files_of(Path(cfg.data.root), cfg.data.validation)
    data, template = dataclasses.asdict(cfg.data), cfg.data.template_file
    settings = {
        "model.path": cfg.model.path,
        "files of model.path": digest.hexdigest()[:16],
        "model.compute_dtype": cfg.model.compute_dtype,
        "rollout": [cfg.rollout.dtype, cfg.rollout.max_tokens, cfg.rollout.max_model_len],
        "batch.max_row_tokens": cfg.batch.max_row_tokens,
        "data": {name: value for name, value in data.items() if name not in FREE},
        "content of data.validation": _digest(*held_out),
        "content of data.template_file": template and _digest(Path(template)),
        "seed": cfg.seed,
        "--samples": plan.num_samples,
        "--temperature": plan.temperature,
        "--shuffles": plan.num_shuffles,
        "--examples": "all" if cfg.run.eval_examples == ALL_EXAMPLES else cfg.run.eval_examples,
        "--baselines": plan.baselines,
    }
    return json.loads(json.dumps(settings))


def default_out(cfg: config.Config) -> Path:
    """Returns run.dir/evaluate/<run that model.path is the export of, or its own name>."""
    folder = Path(cfg.model.path).absolute()
    name = folder.parent.name if folder.name == EXPORT else folder.name
    return Path(cfg.run.dir) / "evaluate" / name


def step_of(checkpoint: str) -> int | None:
    """Returns the last step of the run that exported this folder; None for any other folder."""
    metrics = Path(checkpoint).absolute().parent / "metrics.jsonl"
    if Path(checkpoint).name != EXPORT or not metrics.is_file():
        return None
    lines = metrics.read_text(encoding="utf-8").splitlines()
    return json.loads(lines[-1])["step"] if lines else None


def _digest_of_code(name: str) -> str:
    """Returns the digest of the file of a person's module:function, which is not run for that; ""
    where it is not found, which the evaluation says when it needs it."""
    folders, file = None, None
    parts = name.partition(":")[0].split(".")
    for count in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), folders)
        if spec is None:
            return ""
        folders, file = spec.submodule_search_locations, spec.origin
    return _digest(Path(file)) if file else ""


def _digest(*paths: Path) -> str:
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    return digest.hexdigest()[:16]
