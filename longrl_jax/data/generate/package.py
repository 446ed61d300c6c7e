"""The kept questions as LongVideo-Reason has them: JSON lines and parquet by split, and a card.

Source: the card of LongVideo-Reason/longvideo-reason (fields, splits). Films, not questions, are
split; open questions of training films are the split `openended`, those of held-out films a file of
their own, so that no film is both learnt from and asked about.
"""

import collections
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from longrl_jax.data.generate import parse, work
from longrl_jax.data.generate.question import LETTERS
from longrl_jax.data.generate.settings import GenerateConfig
from longrl_jax.data.generate.work import Item

FIELDS = ("problem_id", "problem", "data_type", "problem_type", "reasoning", "videos", "answer")
SPLITS = ("train", "validation", "test", "openended", "openended_held_out")
STEPS = "steps.jsonl"
Rows = dict[str, list[dict[str, Any]]]
"""By split."""


def root_of(cfg: GenerateConfig) -> Path:
    """Returns data.root of the package: the nearest folder that holds films and package."""
    both = [str(Path(path).resolve()) for path in (cfg.videos, cfg.out)]  # no .., no link
    root = Path(os.path.commonpath(both))
    if root == Path(root.anchor):
        raise ValueError(
            f"videos={cfg.videos} and out={cfg.out} have no folder in common, which would be "
            "data.root; put one beside the other"
        )
    return root


def rows_of(
    cfg: GenerateConfig, films: Sequence[tuple[Item, Sequence[Item]]]
) -> tuple[Rows, list[Item], list[Item]]:
    """Returns (records by split, where each comes from, rejects). films: (about, its questions)."""
    rows: Rows = {split: [] for split in SPLITS}
    steps: list[Item] = []
    rejects: list[Item] = []
    first: dict[str, str] = {}
    number = 0
    where = Path(cfg.videos).resolve().relative_to(root_of(cfg))
    for about, questions in films:
        film = about["film"]
        if first.setdefault(about["sha256"], film) != film:
            twin = f"the same film as {first[about['sha256']]}"
            rejects += [{"stage": "package", "film": film} | work.reject("film: twin", twin)]
            continue
        split = split_of(about["sha256"], cfg)
        for item in questions:
            part = split
            if not item["options"]:
                part = "openended" if split == "train" else "openended_held_out"
            record = {
                "problem_id": number,
                "problem": parse.problem(item),
                "data_type": "video",
                "problem_type": item["kind"],
                "reasoning": item["reasoning"],
                "videos": (where / film).as_posix(),
                "answer": f"<answer>{item['answer']}</answer>",
            }
            rows[part].append(record)
            more = {x: item.get(x, []) for x in ("id", "form", "steps", "seen", "blind")}
            steps.append({"problem_id": number, "split": part} | more)
            number += 1
    return rows, steps, rejects


def split_of(content: str, cfg: GenerateConfig) -> str:
    """Returns where a film goes, by its digest: films that come later move no other."""
    share = int(work.digest([content, cfg.seed])[:13], 16) / 16**13
    if share < cfg.package.test:
        return "test"
    return "validation" if share < cfg.package.test + cfg.package.validation else "train"


def write(cfg: GenerateConfig, rows: Rows, steps: Sequence[Item], card: str) -> list[Path]:
    """Writes OUT/package; each file is whole or not there, the card comes last. A split without
    records has no files."""
    folder = Path(cfg.out) / "package"
    written = []
    for split, records in rows.items():
        for path, data in _files(folder, split, records):
            if records:
                work.write_bytes(path, data)
                written.append(path)
            else:
                path.unlink(missing_ok=True)
    work.write_lines(folder / STEPS, list(steps))
    work.write_text(folder / "README.md", card)
    return [*written, folder / STEPS, folder / "README.md"]


def num_questions(cfg: GenerateConfig) -> int:
    """Returns how many questions the package that lies there holds."""
    path = Path(cfg.out) / "package" / STEPS
    return path.read_bytes().count(b"\n") if path.exists() else 0


def _files(folder: Path, split: str, records: list[dict[str, Any]]) -> Iterator[tuple[Path, bytes]]:
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    yield folder / f"{split}.jsonl", lines.encode()
    yield folder / "data" / f"{split}.parquet", parquet(records)


def parquet(records: list[dict[str, Any]]) -> bytes:
    """Returns a parquet file with the published fields: problem_id int64, all others texts."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    types = [(name, pa.int64() if name == "problem_id" else pa.string()) for name in FIELDS]
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(types)), file)
    return file.getvalue()


def card(
    cfg: GenerateConfig,
    rows: Rows,
    rejects: Sequence[Item],
    costs: Mapping[str, Any],
    about: Mapping[str, str],
) -> str:
    """Returns README.md. costs: stage -> chat.Totals; about: lines under the title."""
    root = root_of(cfg)
    inside = (Path(cfg.out).resolve() / "package").relative_to(root).as_posix()
    lines = ["---", "configs:", "- config_name: default", "  data_files:"]
    for split in [split for split in SPLITS if rows[split]]:
        lines += [f"  - split: {split}", f"    path: data/{split}.parquet"]
    lines += ["---", "", "# Questions about films", ""]
    lines += [f"- {name}: {text}" for name, text in about.items()]
    lines += ["", f"Paths of `videos` count from the folder that holds {inside}. To train:", ""]
    train = "train" if rows["train"] else next((s for s in SPLITS if rows[s]), "train")
    lines += [f"    data.root={root} data.train={inside}/{train}.jsonl", "", "## Counts", ""]
    kinds = sorted({row["problem_type"] for records in rows.values() for row in records})
    letters = [*LETTERS, "open"]
    lines += _table(["split", "all", *kinds, *letters], _counts(rows, kinds, letters))
    lines += ["", "## Left out", ""]
    left_out = collections.Counter((row["stage"], row["reason"]) for row in rejects)
    order = sorted(left_out.items(), key=lambda x: (-x[1], x[0]))
    lines += _table(["stage", "reason", "number"], [[*key, n] for key, n in order])
    lines += ["", "## What it took", ""]
    lines += _table(
        ["stage", "model", "replies", "of no use", "prompt tokens", "reply tokens", "USD", "s"],
        [
            [
                *(name, model_of(cfg, name), t.replies, t.refused, t.prompt_tokens),
                *(t.completion_tokens, f"{t.usd:.4f}", f"{t.seconds:.0f}"),
            ]
            for name, t in costs.items()
        ],
    )
    lines += ["", "s: of all requests, those at the same time counted each."]
    return "\n".join(lines) + "\n"


def model_of(cfg: GenerateConfig, stage: str) -> str:
    name = getattr(cfg, stage).server
    return cfg.servers[name].model if name else "none"


def _counts(rows: Rows, kinds: Sequence[str], letters: Sequence[str]) -> list[list[Any]]:
    table: list[list[Any]] = []
    for split, records in rows.items():
        by_kind = collections.Counter(record["problem_type"] for record in records)
        answers = [record["answer"].removeprefix("<answer>")[:-9] for record in records]
        by_letter = collections.Counter(
            "open" if split.startswith("open") else answer for answer in answers
        )
        counts = [*(by_kind[kind] for kind in kinds), *(by_letter[x] for x in letters)]
        table.append([split, len(records), *counts])
    return table


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [
        "| " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |" for line in lines
    ]
