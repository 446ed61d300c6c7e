"""The evaluations of one command: every benchmark, with and without thinking, by number of frames.

Each is an evaluation of its own in a folder of its own; the model and its engines are opened once.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from longrl_jax import config
from longrl_jax.evaluate.plan import Plan, asks_judge, default_out

THINKING = {"on": "think", "off": "direct"}
"""Value of --thinking -> data.template."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One evaluation and how it differs from the others."""

    cfg: config.Config
    plan: Plan
    thinking: str = ""
    """on, off, or empty: as the config or the benchmark says."""
    num_frames: int = 0
    """0: as the config or the benchmark says."""

    @property
    def words(self) -> tuple[str, ...]:
        """What was chosen by an option, as a person reads it."""
        thinking = {"on": ("thinking",), "off": ("direct",), "": ()}[self.thinking]
        frames = (f"{self.num_frames} frames",) if self.num_frames else ()
        benchmark = (self.plan.benchmark,) if self.plan.benchmark else ()
        return (*benchmark, *thinking, *frames)


def variants(args: argparse.Namespace) -> list[Variant]:
    """Returns the evaluations that a command line asks for. Raises ValueError for a wrong one."""
    return [
        _variant(args, overrides, benchmark, thinking, num_frames)
        for benchmark, overrides in _benchmarks(args).items()
        for thinking in args.thinking or [""]
        for num_frames in args.frames or [0]
    ]


def folder(args: argparse.Namespace, cfg: config.Config) -> Path:
    """Returns where all evaluations of a command write."""
    return args.out or default_out(cfg)


def _benchmarks(args: argparse.Namespace) -> dict[str, list[str]]:
    """Returns {name: what is overridden for it, after the command line}; one benchmark has its
    records in data.root, several, or all, in data.root/NAME each; {"": []} without."""
    if not args.benchmark:
        return {"": []}
    from longrl_jax.benchmarks import BENCHMARKS  # here: it brings rewards, which take seconds

    root = Path(config.load(args.config, args.overrides).data.root)
    files = dict(item.partition("=")[::2] for item in args.benchmark)
    apart = len(files) > 1
    if args.benchmark == ["all"]:
        files, apart = {name: "" for name in BENCHMARKS if (root / name).is_dir()}, True
        if not files:
            raise ValueError(
                f"--benchmark all: data.root={root} holds no folder named after a benchmark; known "
                f"ones are {', '.join(sorted(BENCHMARKS))}"
            )
    found: dict[str, list[str]] = {}
    for name, file in files.items():
        config.pick(BENCHMARKS, name, "--benchmark")
        found[name] = [f"data.validation={json.dumps(file)}"] if file else []
        found[name] += [f"data.root={json.dumps(str(root / name))}"] if apart else []
    return found


def _variant(
    args: argparse.Namespace,
    overrides: list[str],
    benchmark: str,
    thinking: str,
    num_frames: int,
) -> Variant:
    chosen = [f"data.template={THINKING[thinking]}"] if thinking else []
    if num_frames:
        chosen += [f"data.num_frames={num_frames}", "data.fps=0"]
    of_benchmark = _overrides(benchmark, thinking) if benchmark else []
    cfg = config.load(args.config, [*of_benchmark, *args.overrides, *overrides, *chosen])
    cfg = dataclasses.replace(cfg, run=dataclasses.replace(cfg.run, eval_examples=args.examples))
    if cfg.mesh.processes > 1:
        raise ValueError(
            f"mesh.processes={cfg.mesh.processes}: an evaluation is one process; set "
            "mesh.processes=1 and mesh.* to the devices of this host"
        )
    if asks_judge(cfg, benchmark) and not (cfg.judge.base_url and cfg.judge.model):
        raise ValueError(
            f"--benchmark {benchmark} needs a model that judges: judge.base_url="
            f"{cfg.judge.base_url!r} and judge.model={cfg.judge.model!r} must name one behind an "
            "OpenAI-compatible server"
        )
    if not cfg.data.validation:
        raise ValueError("data.validation is empty; name a file of held-out questions")
    plan = Plan(
        out=folder(args, cfg),
        num_samples=args.samples,
        temperature=args.temperature,
        num_shuffles=args.shuffles,
        baselines=args.baselines,
        benchmark=benchmark,
    )
    variant = Variant(cfg=cfg, plan=plan, thinking=thinking, num_frames=num_frames)
    out = plan.out.joinpath(*(word.replace(" ", "_") for word in variant.words))
    return dataclasses.replace(variant, plan=dataclasses.replace(plan, out=out))


def _overrides(name: str, thinking: str) -> list[str]:
    """Returns what a benchmark says of the config; the command line's own overrides come later."""
    from longrl_jax.benchmarks import BENCHMARKS

    benchmark = BENCHMARKS[name]
    said = [
        f"data.source={benchmark.source}",
        f"data.template={benchmark.template}",
        f"data.wording={benchmark.wording}",
        f"data.subtitles={benchmark.subtitles!r}",
        f"data.num_frames={benchmark.num_frames}",
        "data.fps=0",
    ]
    reasons = thinking == "on" and benchmark.template != THINKING["on"]
    return said if reasons else [*said, f"rollout.max_tokens={benchmark.max_tokens}"]
