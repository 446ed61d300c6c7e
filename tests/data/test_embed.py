"""Before the first frame is decoded: who encodes what, and whether it fits."""

import shutil

import numpy as np
import pytest

from longrl_jax.data import embed
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
