"""From a folder of videos to LongVideo-Reason, stage by stage.

python -m longrl_jax.data.generate estimate CONFIG.yaml     # splits, says what all may cost
python -m longrl_jax.data.generate all CONFIG.yaml          # every stage, in order
python -m longrl_jax.data.generate caption CONFIG.yaml      # one stage, for the films ready for it
python -m longrl_jax.data.generate oracle --port 8100       # answers by rules (synthetic films)
python -m longrl_jax.data.generate serve CHECKPOINT --port 8101   # vLLM, for caption.checkpoint
"""

import argparse
import contextlib
import dataclasses
import fcntl
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from longrl_jax import config, platform, records, strict_yaml
from longrl_jax.data.generate import estimate, oracle, package, run, settings, split, texts, work
from longrl_jax.data.generate.settings import GenerateConfig

STAGES = (*run.STAGES, "package")
EPILOG = """\
stages, each over all films
  split      when is what shown: clips of split.clip_s by the films' own time stamps; asks nobody
  caption    a description of every clip, from its frames
  merge      the captions of a film as one story with times; asks only where it is too long
  question   questions of four kinds, with options and open, each with steps that name times
  parse      checks every question and shuffles its options; asks nobody
  rewrite    the steps as one who watches would think them
  verify     a model answers with the story (must be right) and without (must not always be)
  package    OUT/package: train, validation, test, openended as JSON lines and parquet; README.md

One after another (all), or one by one. A stage that is cut off (a kill, a full disk, a server that
is gone) goes on with the same command: work that is done is left alone, replies that were paid for
are in OUT/journal and are not asked again. After a change of config, texts or films only what
depends on it is done anew. Films of which a request failed wait for the next run, and the exit
status is 1; --give-up takes such requests as rejected.

files in OUT
  config.yaml        the config in full; OUT itself may be named as CONFIG
  work/STAGE/        what a stage made of each film, with its rejects
  journal/           every reply, by the digest of its request
  rejects.jsonl      all that was left out, with the stage and the reason
  package/           the data set; steps.jsonl says which moments each question rests on
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a stage; a mistake of the user's is one line, not a trace."""
    args = _parse(argv)
    try:
        if args.stage == "oracle":
            _oracle(args.port)
        elif args.stage == "serve":
            _serve(args)
        else:
            sys.exit(_generate(args))
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"generate {args.stage}: {error}")
    except KeyboardInterrupt:
        sys.exit(f"generate {args.stage}: stopped; the same command goes on")


def _generate(args: argparse.Namespace) -> int:
    """Returns the exit status: 1 where films wait."""
    path = args.config / "config.yaml" if args.config.is_dir() else args.config
    cfg = settings.load(path, args.overrides)
    texts.check(cfg.texts)
    films = split.find_films(Path(cfg.videos))
    package.root_of(cfg)
    out = Path(cfg.out)
    with _alone(out):
        work.write_text(out / "config.yaml", strict_yaml.dump(_plain(dataclasses.asdict(cfg))))
        names = STAGES if args.stage == "all" else (args.stage,)
        if args.stage in ("all", "estimate"):
            _say("split", run.run_stage(cfg, "split", films))
            sys.stdout.write(estimate.table(estimate.bill(cfg, films)) + "\n")
            names = names[1:]
        waiting = False
        for name in names:
            if name == "package":
                waiting |= _package(cfg, films)
                continue
            if name == "caption" and cfg.caption.checkpoint:
                platform.prepare(config.MeshConfig(data=cfg.caption.devices))
            outcome = run.run_stage(cfg, name, films, give_up=args.give_up)
            waiting |= bool(outcome.waiting)
            _say(name, outcome)
            run.write_rejects(cfg, films)
    return int(waiting)


def _package(cfg: GenerateConfig, films: Sequence[str]) -> bool:
    """Writes the package of all films that are verified; says whether others are not."""
    kept, num_done = [], 0
    for film in films:
        cut, made = (run.work_of(cfg, name, film) for name in ("split", "verify"))
        if cut is not None and made is not None:
            num_done += 1
            kept += [(about, made.items) for about in cut.items]
    if not num_done:
        sys.stdout.write("package: no film is done; what lies there is left alone\n")
        return True
    rows, steps, rejects = package.rows_of(cfg, kept)
    number, num_before = len(steps), package.num_questions(cfg)
    if num_done < len(films) and number < num_before:
        sys.stdout.write(
            f"package: {number} questions of {num_done} of {len(films)} films; the {num_before} "
            f"that lie in {Path(cfg.out) / 'package'} are left alone until all films are done\n"
        )
        return True
    run.write_rejects(cfg, films)
    path = Path(cfg.out) / "rejects.jsonl"
    rejects = [*_read_lines(path), *rejects]
    work.write_lines(path, rejects)
    about = {
        "films": f"{len(kept)} of {len(films)}; {len(films) - num_done} are not done yet",
        "questions": f"{number}, {len(rejects)} things left out (rejects.jsonl)",
        "words of the requests": f"digest {texts.digest(texts.names(), cfg.texts)}",
    }
    if any(s.model == oracle.MODEL for s in cfg.servers.values()):
        about["made by"] = "AN ORACLE, NOT A MODEL: rules over synthetic stories (oracle.py)"
    costs = {name: run.spent(cfg, (name,)) for name in run.STAGES if run.journals(cfg, name)}
    written = package.write(cfg, rows, steps, package.card(cfg, rows, rejects, costs, about))
    counts = ", ".join(f"{len(records)} {part}" for part, records in rows.items())
    sys.stdout.write(f"package: {counts} in {written[-1].parent}\n")
    return num_done < len(films)


def _say(name: str, outcome: run.Outcome) -> None:
    text = (
        f"{name}: {outcome.done} films done, {outcome.held} held; {outcome.items} kept, "
        f"{outcome.rejects} rejected; {outcome.seconds:.1f} s"
    )
    if outcome.not_ready:
        text += f"; {outcome.not_ready} films wait for an earlier stage"
    if outcome.waiting:
        text += f"; {len(outcome.waiting)} films wait for the next run ({outcome.why})"
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _read_lines(path: Path) -> list[work.Item]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Keeps a second generation out of the folder: what both ask would be paid twice."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / "lock").open("w")
    except OSError as error:
        raise platform.disk_error(error, out, "name another folder as out") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{out} is in use by another generation; wait for it") from None
        yield


def _oracle(port: int) -> None:
    server = oracle.serve(port)
    url = f"http://127.0.0.1:{server.server_port}/v1"
    sys.stdout.write(f"an oracle, not a model: base_url: {url}, model: {oracle.MODEL}\n")
    sys.stdout.flush()
    with server:
        server.serve_forever()


def _serve(args: argparse.Namespace) -> None:
    """Becomes vLLM's server on the language model of a checkpoint."""
    from longrl_jax import models
    from rollout_bridge import prompt_embeds

    folder = models.llm_folder(models.find_folder(str(args.checkpoint)))
    platform.prepare_vllm(config.RolloutConfig())
    command = prompt_embeds.server_command(
        folder,
        name=args.name,
        host="127.0.0.1",
        port=args.port,
        dtype=args.dtype,
        max_model_len=args.max_model_len,
    )
    command += args.vllm
    os.execve(command[0], command, os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"})


def _plain(tree: object) -> dict:
    """Tuples as lists, which YAML has."""
    if isinstance(tree, dict):
        return {name: _plain(value) for name, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, tuple) else tree  # type: ignore


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Takes overrides after options too, which argparse does not where there are subcommands."""
    args, rest = _parser().parse_known_args(argv)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if rest and (wrong or "overrides" not in args):
        _parser().error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:
        args.overrides += rest
    return args


def _parser() -> argparse.ArgumentParser:
    keys = [*records.describe(GenerateConfig), "each of servers (servers.NAME.key):"]
    keys += records.describe(config.ChatConfig)
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.generate",
        description=__doc__,
        epilog=f"{EPILOG}\nconfig keys\n" + "\n".join(keys),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name in (*STAGES, "all", "estimate"):
        command = commands.add_parser(name)
        command.add_argument("config", type=Path, help="a YAML file, or the OUT of a run before")
        command.add_argument("overrides", nargs="*", metavar="section.key=value")
        command.add_argument(
            "--give-up", action="store_true", help="take requests that a server failed as rejected"
        )
    command = commands.add_parser("oracle", help="answers by rules, on synthetic stories alone")
    command.add_argument("--port", type=int, default=8100, help="of 127.0.0.1 (8100)")
    command = commands.add_parser("serve", help="vLLM on a VILA's language model, for captions")
    command.add_argument("checkpoint", type=Path)
    command.add_argument("--port", type=int, default=8101, help="of 127.0.0.1 (8101)")
    command.add_argument("--name", default="captioner", help="the model's name there (captioner)")
    command.add_argument("--dtype", default="bfloat16", help="(bfloat16)")
    command.add_argument("--max-model-len", type=int, default=4096, help="tokens (4096)")
    command.add_argument("vllm", nargs="*", help="after --: more options of vllm serve")
    return parser


if __name__ == "__main__":
    main()
