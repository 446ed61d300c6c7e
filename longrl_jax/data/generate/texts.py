"""The words of the requests: text files of this package, which a folder may replace."""

import hashlib
import string
from pathlib import Path

FOLDER = Path(__file__).parent / "texts"


def fill(name: str, folder: str, /, **values: object) -> str:
    """Returns the text of a name, its $names filled; folder: GenerateConfig.texts.

    Raises ValueError for a text that uses a name which is not there to be filled.
    """
    try:
        return string.Template(read(name, folder)).substitute(values).strip()
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{_path(name, folder)} asks for {error}, but ${', $'.join(sorted(values))} are known "
            "here; write $$ for a dollar"
        ) from None


def read(name: str, folder: str) -> str:
    """Returns the text of a name, its $names as they are."""
    return _path(name, folder).read_text(encoding="utf-8")


def digest(names: tuple[str, ...], folder: str) -> str:
    """Returns a digest of some texts, for what depends on them."""
    found = hashlib.sha256()
    for name in names:
        found.update(f"{name}\n".encode())
        found.update(_path(name, folder).read_bytes())
    return found.hexdigest()[:16]


def names() -> tuple[str, ...]:
    """Returns the names of all texts, in order."""
    return tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))


def check(folder: str) -> None:
    """Raises ValueError for a folder that holds anything but replacements: a typing error would be
    silently without effect."""
    if not folder:
        return
    if not Path(folder).is_dir():
        raise ValueError(f"texts={folder} is no folder; leave it out, or make it")
    known = {path.name for path in FOLDER.glob("*.txt")}
    strange = sorted(path.name for path in Path(folder).iterdir() if path.name not in known)
    if strange:
        raise ValueError(f"{folder}/{strange[0]} replaces nothing; texts are {sorted(known)}")


def _path(name: str, folder: str) -> Path:
    mine = Path(folder) / f"{name}.txt"
    return mine if folder and mine.is_file() else FOLDER / f"{name}.txt"
