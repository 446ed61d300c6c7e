"""Before the first frame is decoded: who encodes what, and whether it fits."""

import dataclasses
import shutil

import numpy as np
import pytest

from longrl_jax.data import embed, video
from longrl_jax.data.refused import RefusedLog
from rollout_bridge import VideoStore

GIB = 2**30


def entry(size_bytes, problem=""):
    return embed.Entry(
        name="n", path="p", kind="video", num_frames=1, num_tokens=1, size_bytes=size_bytes,
        file="train.jsonl", record=0, place=0, problem=problem,
    )  # fmt: skip


@pytest.mark.parametrize("num_processes", [1, 2, 5])
def test_frames_are_shared_evenly(num_processes):
    frames = np.random.default_rng(0).integers(1, 3600, 100)
    owners = embed.shares(frames.tolist(), num_processes)
    load = [int(frames[np.array(owners) == i].sum()) for i in range(num_processes)]
    assert sum(load) == frames.sum()
    assert max(load) - min(load) <= frames.min() + 60  # longest first: short ones fill the gaps
    assert embed.shares([], num_processes) == []


def test_what_does_not_fit_is_refused_before_anything_is_decoded(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: usage._replace(free=3 * GIB))
    store = VideoStore(tmp_path, 10 * GIB)
    embed.check_room(store, [entry(GIB, "it is missing")] * 2)  # 2 and one more
    embed.check_room(store, [entry(9 * GIB)])  # it is there
    with pytest.raises(ValueError, match=r"need 11 GiB, over store.max_gib=10.*max_gib=11\.0, or"):
        embed.check_room(store, [entry(9 * GIB), entry(2 * GIB, "it is missing")])
    with pytest.raises(ValueError, match=r"needs 4 GiB more .* its disk has 3 GiB left"):
        embed.check_room(store, [entry(GIB, "it is missing")] * 3)


def test_a_store_that_grows_no_more_needs_room_for_one_entry(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: usage._replace(free=2 * GIB))
    store = VideoStore(tmp_path, 10 * GIB)
    monkeypatch.setattr(store, "num_bytes", lambda: 10 * GIB)  # of other configs
    embed.check_room(store, [entry(GIB, "it is missing")] * 8)  # each takes the place of another


def test_a_check_tells_what_was_refused_before_from_what_is_missing(tmp_path):
    film, other = (
        dataclasses.replace(entry(GIB, "it is missing"), name=name, path=f"a b/{name}.mp4")
        for name in ("half", "other")
    )
    with RefusedLog(tmp_path / "refused.jsonl") as refused:
        refused.add("q", video.VideoError("a b/half.mp4 ends in the middle", "truncated"), step=0)
        refused.add("r", ValueError("a b/other.mp4 is asked about in no words"), step=0)
        known = embed.refused_before([film, other], refused.path)
        assert known == {"half": "ends in the middle"}
        work = embed.Work(None, None, VideoStore(tmp_path, 10 * GIB), refused, {})
        check = embed.Plan(out=tmp_path, check=True)
        said = embed.report(work, [film, other], check, known).splitlines()
        assert "a b/half.mp4: refused before: ends in the middle" in said
        assert said[-1].startswith("1 of 2 entries are missing or damaged")
        said = embed.report(work, [film], check, known).splitlines()
        assert said[-1].startswith("every entry is there and whole, but 1 that was refused before")
    assert embed.refused_before([film], tmp_path / "none.jsonl") == {}
