"""A small generation for tests: films of numbered frames, a config, a server with all roles.

The server describes a clip by the clock time that its request names (CAPTIONS), and answers all
else by the rules of data/generate/oracle.py.
"""

import json
import re
from pathlib import Path

import clips
import yaml
from chat_server import Asked

from longrl_jax.data.generate import oracle

CAPTIONS = {
    "0:00": "Red left. Red middle.",
    "0:10": "blue top. blue bottom.",
    "0:20": "green right. green left.",
    "0:30": "purple bottom. purple middle.",
    "0:40": "white walker to top-left yellow pad.",
}
CLIP_S, NUM_CLIPS = 10, len(CAPTIONS)
STAGES = ("caption", "question", "rewrite", "verify")
"""Stages that ask a server here; `merge` does where stories are too long."""


def make(folder: Path, base_url: str, *, films: int = 2, **changes) -> Path:
    """Writes films and a config; changes: section -> its keys. Returns the config's path."""
    (folder / "films").mkdir(parents=True, exist_ok=True)
    for i in range(films):
        path = folder / "films" / f"film {i}.mp4"
        if not path.exists():  # other sizes, so that no two films are one
            size = (32, 48 + 16 * i)
            film(path, size)
    tree = {
        "videos": str(folder / "films"),
        "out": str(folder / "out"),
        "servers": {"all": {"base_url": base_url, "model": "any", "concurrency": 4}},
        "caption": {"server": "all", "frames": 2, "max_tokens": 50},
        "merge": {"server": "all"},
        "question": {"server": "all"},
        "rewrite": {"server": "all"},
        "verify": {"server": "all", "blind_tries": 2},
        "package": {"validation": 0, "test": 0},
    }
    for name, keys in changes.items():
        tree[name] = tree.get(name, {}) | keys if isinstance(keys, dict) else keys
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def film(path: Path, size: tuple[int, int]) -> None:
    """mpeg4 in one thread: libx264's bytes are others now and then, of the same pictures, and ids,
    the order of options and the oracle's guesses come from the bytes."""
    clips.make(
        path,
        num_frames=NUM_CLIPS * CLIP_S * 2,
        fps=2,
        size=size,
        codec="mpeg4",
        options={"threads": "1", "flags": "+bitexact"},
    )


def answer(asked: Asked) -> str:
    if stage_of(asked) == "caption":
        start = re.search(r"The clip goes from (\S+) to", asked.text)
        assert start, asked.text
        return CAPTIONS[start[1]].lower()
    return oracle.reply(asked.body["messages"], asked.body.get("seed") or 0)


def stage_of(asked: Asked) -> str:
    """Returns which stage sent a request, by its words."""
    marks = {
        "pictures of one clip": "caption",
        "<notes>": "merge",
        "question(s) of the kind": "question",
        "<steps>": "rewrite",
    }
    return next((stage for mark, stage in marks.items() if mark in asked.text), "verify")


def package(folder: Path) -> dict[str, bytes]:
    """Returns the files of a package but its card, which tells times, and what was guessed: a reply
    of no use is asked again with another seed."""
    found = {
        path.relative_to(folder / "out" / "package").as_posix(): path.read_bytes()
        for path in sorted((folder / "out" / "package").rglob("*"))
        if path.is_file() and path.name != "README.md"
    }
    found["steps.jsonl"] = re.sub(rb', "blind": [^\n]*', b"", found["steps.jsonl"])
    return found


def records(folder: Path, split: str = "train") -> list[dict]:
    path = folder / "out" / "package" / f"{split}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]
