"""python -m longrl_jax.data.formats: reads a whole data set, says what is in it, or converts it.

    check SOURCE ROOT FILE            every record read, its media looked for, refused ones listed
    convert SOURCE ROOT FILE OUT      the same, into JSON lines of our plain form (docs/data.md)

SOURCE is a format (data.source in a config), ROOT data.root, FILE data.train.
"""

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from longrl_jax.config import TEMPLATES, pick
from longrl_jax.data import SOURCES, longvideo_reason, prompts
from longrl_jax.data.fields import RecordError, is_there
from longrl_jax.types import Example

LISTED = 20
"""Refused records that are shown; all of them are written to a file."""
SHOWN = 2
"""Records that are shown as the model would be asked them."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 1 if a record was refused, else 0."""
    args = _parser().parse_args(argv)
    root = Path(args.root)
    out = Path(args.out) if args.what == "convert" else None
    try:
        records = pick(SOURCES, args.source, "SOURCE")(root, args.file)
        if out is not None and out.exists():
            raise ValueError(f"{out} is there already; name another file")
        found = _Found(root, records)
        if out is None:
            for _ in tqdm(found, total=len(records), desc="check", unit="record"):
                pass
        else:
            _write(out, tqdm(found, total=len(records), desc="convert", unit="record"))
    except (ValueError, OSError) as error:
        sys.exit(f"longrl_jax.data.formats: {error}")
    sys.stdout.write(found.summary(args.template))
    if found.refused:
        listed = Path(args.refused or f"refused_{args.source}.jsonl")
        listed.write_text("".join(json.dumps(row) + "\n" for row in found.refused))
        sys.stdout.write(f"all refused records: {listed}\n")
    return int(bool(found.refused))


class _Found:
    """Goes through records once, yielding the usable ones, and counts what it meets."""

    def __init__(self, root: Path, records: Any):
        self._root, self._records = root, records
        self._kinds: collections.Counter[str] = collections.Counter()
        self._ids: collections.Counter[str] = collections.Counter()
        self._media: dict[str, str] = {}
        """Path -> why it cannot be read; empty if it is there."""
        self._shown: list[Example] = []
        self.refused: list[dict[str, str]] = []

    def __iter__(self) -> Iterator[Example]:
        for index in range(len(self._records)):
            where = self._records.where(index)
            try:
                example = self._records[index]
                self._check(example, where)
            except RecordError as error:
                self.refused.append({"where": error.where, "message": error.message})
                continue
            self._kinds[example.kind or "(none)"] += 1
            self._ids[example.id] += 1
            if len(self._shown) < SHOWN:
                self._shown.append(example)
            yield example

    def summary(self, template: str) -> str:
        """Returns what was met, for a person."""
        lines = [f"{self._kinds.total()} records can be used, {len(self.refused)} are refused"]
        lines += [f"  {count:8} {kind}" for kind, count in self._kinds.most_common()]
        missing = sum(map(bool, self._media.values()))
        lines.append(f"{len(self._media)} media are named, {missing} of them are not there")
        repeated = [name for name, count in self._ids.items() if count > 1]
        if repeated:
            lines.append(
                f"{len(repeated)} ids stand more than once, e.g. {repeated[0]!r}: as "
                "data.validation they would be refused"
            )
        for example in self._shown:
            lines += ["", *_as_asked(example, template)]
        if self.refused:
            lines += ["", f"the first of {len(self.refused)} refused records:"]
            lines += [f"  {row['where']}: {row['message']}" for row in self.refused[:LISTED]]
        return "\n".join([*lines, ""])

    def _check(self, example: Example, where: str) -> None:
        plain = longvideo_reason.to_record(example)
        if longvideo_reason.to_example(plain, root=self._root, where=where) != example:
            raise RecordError(where, "its words hold a placeholder such as <image>; take it out")
        for path in [*(file.path for file in example.media), example.subtitles]:
            if path and path not in self._media:
                self._media[path] = _missing(self._root / path)
            if path and self._media[path]:
                raise RecordError(where, f"{path} {self._media[path]}; check ROOT and the layout")


def _missing(path: Path) -> str:
    if not is_there(path):
        return "is not a regular file" if os.path.exists(path) else "is not there"
    return "" if path.stat().st_size else "has 0 bytes"


def _as_asked(example: Example, template: str) -> list[str]:
    return [
        f"{example.id} ({example.kind}) {dict(example.tags) or ''}",
        *(f"  [{file.kind} {file.path}]" for file in example.media),
        *(f"  {line}" for line in prompts.user_text(example, template).splitlines()),
        f"  -> {example.answer}" + ("  (with reasoning)" if example.reasoning else ""),
    ]


def _write(out: Path, examples: Iterable[Example]) -> None:
    """Writes plain records; the file is whole or not there at all."""
    unfinished = out.with_name(f"{out.name}.unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        for example in examples:
            file.write(json.dumps(longvideo_reason.to_record(example), ensure_ascii=False) + "\n")
    unfinished.replace(out)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m longrl_jax.data.formats",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(dest="what", required=True)
    for verb in ("check", "convert"):
        one = verbs.add_parser(verb)
        one.add_argument("source", help=", ".join(sorted(SOURCES)))
        one.add_argument("root", help="folder that file and media lie under")
        one.add_argument("file", help="under root; of parquet also a pattern or a folder")
        if verb == "convert":
            one.add_argument("out", help="file of JSON lines that is written")
        one.add_argument("--template", choices=TEMPLATES, default="think")
        one.add_argument("--refused", help="file for the refused (refused_SOURCE.jsonl)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
