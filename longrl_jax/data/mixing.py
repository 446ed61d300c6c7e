"""Several sources as one: records of a mix by one number, and the order in which weights take them.

Every source is shuffled anew each epoch and begun again when it is through, whatever the others do;
which source a place of the order belongs to depends on the place and the weights alone. So the
order is a pure function of (seed, place), as that of a single source.
"""

import bisect
import dataclasses
import itertools
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grain

from longrl_jax.config import DataConfig, pick
from longrl_jax.data import SOURCES, parquet
from longrl_jax.data.fields import RecordError
from longrl_jax.types import Example


def open_training(data: DataConfig) -> Any:
    """Returns the training records of a config: those of data.train, or a `Mixture` of data.mix."""
    root = Path(data.root)
    if not data.mix:
        return pick(SOURCES, data.source, "data.source")(root, data.train)
    opened = []
    for part in data.mix:
        if not (root / part.root).resolve().is_relative_to(root.resolve()):
            raise ValueError(
                f"data.mix: root={part.root!r} of {part.name} lies outside data.root={root}; move "
                "it there"
            )
        open_records = pick(SOURCES, part.source, f"data.mix: source of {part.name}")
        opened.append(open_records(root / part.root, part.file))
    return Mixture(
        names=tuple(part.name for part in data.mix),
        weights=tuple(part.weight for part in data.mix),
        roots=tuple(part.root for part in data.mix),
        sources=tuple(opened),
    )


def training_files(data: DataConfig) -> list[Path]:
    """Returns the files that open_training reads."""
    root = Path(data.root)
    named = [(root / part.root, part.file) for part in data.mix] or [(root, data.train)]
    return [path for folder, file in named for path in parquet.files_of(folder, file)]


def template_of(data: DataConfig, example: Example) -> str:
    """Returns how a question is put: as its entry of data.mix says, or data.template."""
    for part in data.mix:
        if part.name == example.source:
            return part.template or data.template
    return data.template


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mixture:
    """Records of several sources, numbered one source after another."""

    names: tuple[str, ...]
    weights: tuple[float, ...]
    roots: tuple[str, ...]
    """Folder under data.root of each source; media are named from data.root."""
    sources: tuple[Any, ...]

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __getitem__(self, index: int) -> Example:
        """Returns an Example with the name of its source; raises RecordError, which has it, too."""
        number, inner = self._place(index)
        try:
            example = self.sources[number][inner]
        except RecordError as error:
            named = RecordError(self.where(index), error.message)
            named.source = self.names[number]
            raise named from None
        root = self.roots[number]
        media, subtitles = example.media, example.subtitles
        if root:
            media = tuple(dataclasses.replace(m, path=f"{root}/{m.path}") for m in media)
            subtitles = subtitles and f"{root}/{subtitles}"
        return dataclasses.replace(
            example, media=media, subtitles=subtitles, source=self.names[number]
        )

    def where(self, index: int) -> str:
        number, inner = self._place(index)
        place = self.sources[number].where(inner)
        return f"{self.roots[number]}/{place}" if self.roots[number] else place

    def numbers(self, source: int) -> range:
        """Returns the numbers of the records of a source."""
        start = sum(map(len, self.sources[:source]))
        return range(start, start + len(self.sources[source]))

    def _place(self, index: int) -> tuple[int, int]:
        ends = list(itertools.accumulate(map(len, self.sources)))
        number = bisect.bisect_right(ends, index)
        return number, index - (ends[number - 1] if number else 0)


def order(source: Any, seed: int) -> Any:
    """Returns the endless order of a source's record numbers, as a grain.MapDataset.

    The order within a source of a mix comes from the seed and its name, so it stays when others
    come and go. Proportions are exact to a hundredth of the smallest weight, and a source is never
    more than one record a source ahead or behind (grain's MapDataset.mix).
    """
    if not isinstance(source, Mixture):
        return _shuffled(range(len(source)), seed)
    parts = [
        _shuffled(source.numbers(number), seed ^ zlib.crc32(name.encode()))
        for number, name in enumerate(source.names)
    ]
    return grain.MapDataset.mix(parts, list(source.weights))


def shares(source: Any) -> str:
    """Returns what a mix is made of, for a person; empty for a single source."""
    if not isinstance(source, Mixture):
        return ""
    total = sum(source.weights)
    parts: Sequence[str] = [
        f"{name} {weight / total:.1%} ({len(records)} records)"
        for name, weight, records in zip(source.names, source.weights, source.sources, strict=True)
    ]
    return "data.mix: " + ", ".join(parts)


def _shuffled(numbers: range, seed: int) -> Any:
    dataset = grain.MapDataset.range(numbers.start, numbers.stop)
    return dataset.seed(seed).shuffle().repeat()
