"""Images that stand in a data file by their bytes, taken out into files named by their content."""

import contextlib
import hashlib
import os
import uuid
from pathlib import Path

from longrl_jax.data import video
from longrl_jax.data.fields import RecordError
from longrl_jax.platform import disk_error

FOLDER = "unpacked"
"""Folder under data.root; it can be deleted at any time and is filled again."""


def image_file(content: bytes, root: Path, where: str) -> str:
    """Writes an image that is not there yet and returns its path under root.

    It is a picture of a format that we read (image.FORMATS), whatever its record calls it, or
    raises RecordError. Written whole or not at all, so any number of processes may do it.
    """
    digest = hashlib.sha256(content).hexdigest()
    path = f"{FOLDER}/{digest[:2]}/{digest}.image"
    target = root / path
    if target.is_file() and target.stat().st_size == len(content):
        return path
    folder = target.parent
    if not folder.resolve().is_relative_to(root.resolve()):
        raise ValueError(f"{root / FOLDER} leads out of data.root={root}; take the link away")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = f"{target}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "xb") as file:  # with the umask's mode, as mkstemp has not
                file.write(content)
            video.probe_image(Path(temporary))
            os.replace(temporary, target)
        except video.VideoError as error:
            said = str(error).replace(temporary, "the picture in it")
            raise RecordError(
                where, said.replace(Path(temporary).name, "the picture in it")
            ) from None
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    except OSError as error:
        raise disk_error(error, folder, "pictures are taken out to data.root") from error
    return path
