"""Rows of parquet files by number, read by row group; the only file that imports pyarrow.

A data set of the hub is a folder of shards, data/train-00000-of-00008.parquet and so on, the rows
of which count as one. Only plain columns are built (no pandas, nothing is unpickled).
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from longrl_jax.data.fields import RecordError

SHARD = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})")
MAX_GROUP_BYTES = 2**31
"""Largest row group that is read, uncompressed: one row asks for all of its group."""


class Parquet:
    """Holds where row groups stand, and the one that was read last; travels without it."""

    def __init__(self, root: Path, file: str, columns: Sequence[str]):
        """columns: those that are read, where the files have them."""
        self._root, self._paths = root, shards(root, file)
        self._open: tuple[int, Any] | None = None
        self._held: tuple[tuple[int, int], Any] | None = None
        self._columns: list[str] = []
        groups = []
        for place, path in enumerate(self._paths):
            opened = self._file(place)
            names = opened.schema_arrow.names
            mine = [name for name in names if name in columns]
            if place == 0:
                self._columns = mine
            if mine != self._columns or not mine:
                raise ValueError(
                    f"{root / path} has the columns {', '.join(names)}; wanted are those of "
                    f"{', '.join(self._columns or columns)}, as in the first file"
                )
            for group in range(opened.num_row_groups):
                about = opened.metadata.row_group(group)
                self._check_size(path, about)
                groups.append((place, group, about.num_rows))
        self._groups = np.array(groups, np.int64).reshape(-1, 3)
        self._ends = np.cumsum(self._groups[:, 2])
        if not len(self):
            raise ValueError(f"{root / file} holds no records; is it the right file?")

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Returns the columns that say something; raises RecordError where the file is damaged."""
        import pyarrow

        at, row = self._place(index)
        place, group, _ = self._groups[at]
        key = int(place), int(group)
        try:
            if self._held is None or self._held[0] != key:
                self._held = key, self._file(key[0]).read_row_group(key[1], self._columns)
            (found,) = self._held[1].slice(row, 1).to_pylist()
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise RecordError(
                self.where(index), f"cannot be read ({error}); fetch the file again"
            ) from None
        return {name: value for name, value in found.items() if value is not None}

    def where(self, index: int) -> str:
        """file[row], from 0."""
        at, row = self._place(index)
        place = self._groups[at, 0]
        of_file = self._groups[:at][self._groups[:at, 0] == place, 2].sum()
        return f"{self._paths[place]}[{of_file + row}]"

    def _place(self, index: int) -> tuple[int, int]:
        """Returns the number of the row group, among all, and the row in it."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = int(np.searchsorted(self._ends, index, side="right"))
        return at, int(index - (self._ends[at - 1] if at else 0))

    def _file(self, place: int) -> Any:
        """Opens a file, the only one that is held open."""
        import pyarrow
        from pyarrow import parquet

        if self._open is None or self._open[0] != place:
            path = self._root / self._paths[place]
            try:
                self._open = place, parquet.ParquetFile(path)
            except (pyarrow.ArrowException, OSError) as error:
                why = " ".join(str(error).split())
                raise ValueError(
                    f"{path} is no whole parquet file ({why[:200]}); fetch it again"
                ) from None
        return self._open[1]

    def _check_size(self, path: str, about: Any) -> None:
        chunks = map(about.column, range(about.num_columns))
        size = sum(
            chunk.total_uncompressed_size
            for chunk in chunks
            if chunk.path_in_schema.split(".")[0] in self._columns
        )
        if size > MAX_GROUP_BYTES:
            raise ValueError(
                f"{self._root / path} has a row group of {size / 2**20:.0f} MiB, over "
                f"{MAX_GROUP_BYTES // 2**20}, and any of its rows would read all of it; write the "
                "file anew with row groups of 100 rows (pyarrow.parquet.write_table, "
                "row_group_size=100)"
            )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": None, "_held": None}


def is_parquet(root: Path, file: str) -> bool:
    """Whether a data file is a parquet file, a pattern of such or a folder."""
    return file.endswith(".parquet") or (root / file).is_dir()


def files_of(root: Path, file: str) -> list[Path]:
    """Returns the files that a data file of any format stands for: its shards, or itself."""
    return [root / name for name in (shards(root, file) if is_parquet(root, file) else [file])]


def shards(root: Path, file: str) -> list[str]:
    """Returns the paths, under root, of the parquet files that a name stands for: one file, a
    pattern (data/train-*.parquet), or a folder with the files in it, or in its folder data.

    Raises ValueError if there are none, if they are of several splits, and if a shard is missing.
    """
    folder = root / file
    if folder.is_dir():
        found = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    elif "*" in file and not Path(file).is_absolute():
        found = sorted(root.glob(file))
    else:
        found = [folder] if folder.is_file() else []
    for path in found:
        if not path.resolve().is_relative_to(root.resolve()):
            raise ValueError(f"the data file {path} lies outside data.root={root}; move it there")
    if not found:
        raise ValueError(f"there is no data file {folder}; set data.root and the file under it")
    names = [path.relative_to(root).as_posix() for path in found]
    if len(names) > 1 or "*" in file:
        _check_whole(folder, [path.stem for path in found])
    return names


def _check_whole(folder: Path, stems: Sequence[str]) -> None:
    splits: dict[str, list[re.Match[str] | None]] = {}
    for stem in stems:
        match = SHARD.fullmatch(stem)
        split = match["split"] if match else re.sub(r"[-_.]?\d+$", "", stem)
        splits.setdefault(split, []).append(match)
    if len(splits) > 1:
        raise ValueError(
            f"{folder} holds several splits, {', '.join(sorted(splits))}; name one, e.g. "
            f"data/{min(splits)}-*.parquet"
        )
    (matches,) = splits.values()
    if all(match is None for match in matches):
        return
    numbers = sorted(int(match["number"]) for match in matches if match)
    counts = {int(match["count"]) for match in matches if match}
    if len(counts) != 1 or None in matches or numbers != list(range(*counts)):
        raise ValueError(
            f"{folder} has the shards {', '.join(sorted(stems))[:200]}, which are not all of one "
            "set; fetch what is missing, or name a file"
        )
