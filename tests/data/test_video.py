"""The video reader on real files: right frames, typed refusals, processes that cannot hang us."""

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import av
import clips
import numpy as np
import pytest

from longrl_jax.data import video

DECODERS = ("pyav", "decord")
SIZE = (32, 48)
LONG = 300  # frames of the films below, at 10 a second with a keyframe every 2 s
FILMS = {  # name -> how it is made, and which decoders take it
    "h264.mp4": ({}, DECODERS),
    "h264_bframes.mp4": ({"options": {"preset": "medium", "bf": "3"}}, DECODERS),
    "h264_open_gop.mp4": ({"options": {"bf": "3", "x264-params": "open-gop=1"}}, DECODERS),
    "h264_444.mp4": ({"pix_fmt": "yuv444p"}, DECODERS),
    "hevc_open_gop.mp4": ({"codec": "libx265"}, DECODERS),
    "av1.mp4": ({"codec": "libsvtav1"}, ("pyav",)),
    "vp9.webm": ({"codec": "libvpx-vp9"}, DECODERS),
    "h264.mkv": ({}, DECODERS),
    "h264.ts": ({"options": {"preset": "medium", "bf": "3"}}, ("pyav",)),
    "mpeg4.avi": ({"codec": "mpeg4"}, ("pyav",)),
    "h264_sound.mp4": ({"audio_s": 32}, DECODERS),
}
BOTH = [name for name, (_, decoders) in FILMS.items() if decoders == DECODERS]


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {
        name: clips.make(folder / name, num_frames=LONG, **how) for name, (how, _) in FILMS.items()
    }


@pytest.fixture(scope="module")
def film(films):
    return films["h264.mp4"]


def read(path, times_s, *, decoder="pyav", size=SIZE, chunk=64):
    job = video.Job(path=str(path), times_s=tuple(times_s), size=size, decoder=decoder)
    return np.concatenate(list(video.read_frames(job, chunk=chunk)))


def kind_of(path, *, decoder, num_frames=24):
    """Probes and reads as a run does; returns the kind of the refusal, "" for a good file."""
    try:
        duration_s = video.probe(path, decoder=decoder).duration_s
        times = video.frame_times(duration_s, num_frames=num_frames, fps=0)
        read_apart(path, times, decoder=decoder)
    except video.VideoError as error:
        assert str(path) in str(error) and video.KINDS[error.kind] in str(error)
        return error.kind
    return ""


def read_apart(path, times_s, *, decoder):
    """As `read`, in a process of its own: on bad files decord has been seen to abort."""
    job = video.Job(path=str(path), times_s=tuple(times_s), size=SIZE, decoder=decoder)
    with video.DecoderPool(1, timeout_s=60) as pool:
        frames = []
        for item in pool.decode([job], chunk=64):
            if isinstance(item, video.Failed):
                raise item.error
            frames.append(item.frames)
    return np.concatenate(frames)


def children() -> set[int]:
    """Process ids of our children, as the kernel sees them."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(pid) for task in tasks for pid in task.read_text().split()}


# Times


@pytest.mark.parametrize(
    ("duration_s", "num_frames", "fps", "want"),
    [
        (8.0, 4, 0, (0, 2, 4, 6)),
        (8.0, 1, 0, (0,)),
        (0.1, 2, 0, (0, 0.05)),
        (2.0, 8, 2, (0, 0.5, 1, 1.5)),  # not 2.0: nothing is shown there any more
        (2.2, 8, 2, (0, 0.5, 1, 1.5, 2)),
        (0.2, 8, 2, (0,)),
        (100.0, 4, 2, (0, 25, 50, 75)),  # 200 are too many: spread, not cut off
        (4.0, 8, 2, (0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5)),
        (30 / 29.97 * 3, 3, 29.97 / 30, (0, 30 / 29.97, 60 / 29.97)),
    ],
)
def test_frame_times(duration_s, num_frames, fps, want):
    got = video.frame_times(duration_s, num_frames=num_frames, fps=fps)
    assert isinstance(got, tuple)
    np.testing.assert_allclose(got, want, atol=1e-12)


def test_frame_times_of_an_absurd_length_are_few():
    assert len(video.frame_times(1e12, num_frames=video.MAX_FRAMES, fps=1000)) == 8192


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"num_frames": 0}, "num_frames"),
        ({"num_frames": 8193}, "8192"),
        ({"fps": -1}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"duration_s": 0}, "duration_s"),
        ({"duration_s": float("inf")}, "duration_s"),
    ],
)
def test_frame_times_names_what_is_wrong(change, named):
    good = {"duration_s": 1.0, "num_frames": 4, "fps": 0.0} | change
    with pytest.raises(ValueError, match=named):
        video.frame_times(good.pop("duration_s"), **good)


# The container


def test_probe_says_what_the_container_says(films):
    got = video.probe(films["h264.mp4"], decoder="decord")
    assert got == video.Probe(duration_s=30.0, num_frames=LONG, height=64, width=96)
    assert video.probe(films["vp9.webm"], decoder="pyav").num_frames == 0  # it has no count
    assert video.probe(films["vp9.webm"], decoder="pyav").duration_s == pytest.approx(30, abs=0.1)
    assert video.probe(films["h264_sound.mp4"], decoder="pyav").duration_s == 30.0  # the pictures'


def test_decoder_version_names_decoder_and_resizer():
    import PIL

    for decoder, name in (("pyav", av.__version__), ("decord", "decord 0.6.0")):
        version = video.decoder_version(decoder)
        assert name in version and PIL.__version__ in version
        assert str(video.READER_VERSION) in version
    with pytest.raises(ValueError, match="decord, pyav"):
        video.decoder_version("opencv")


# The right frames


@pytest.mark.parametrize(
    ("name", "decoder"), [(n, d) for n, (_, decoders) in FILMS.items() for d in decoders]
)
def test_every_frame_is_the_one_asked_for(films, name, decoder):
    path = films[name]
    every = [i / 10 for i in range(LONG)]
    assert clips.numbers(read(path, every, decoder=decoder)) == list(range(LONG))
    between = [i / 10 + 0.06 for i in range(0, LONG, 3)]
    assert clips.numbers(read(path, between, decoder=decoder)) == list(range(0, LONG, 3))
    # > 4 s apart: keyframes are looked for; on and between keyframes and just before them
    sparse = [0, 5.33, 9.99, 14.0, 19.91, 29.9]
    assert clips.numbers(read(path, sparse, decoder=decoder)) == [0, 53, 99, 140, 199, 299]
    assert clips.numbers(read(path, [27.77], decoder=decoder)) == [277]
    mixed = [0.5, 0.6, 8.25, 8.3, 8.4, 21.05]
    assert clips.numbers(read(path, mixed, decoder=decoder)) == [5, 6, 82, 83, 84, 210]


@pytest.mark.parametrize("name", BOTH)
def test_decoders_agree_bit_for_bit(films, name):
    times = video.frame_times(30, num_frames=17, fps=0)
    native = (64, 96)
    np.testing.assert_array_equal(
        *(read(films[name], times, decoder=d, size=native) for d in DECODERS)
    )


def test_ten_bit_frames_are_right_and_nearly_equal(tmp_path):
    path = clips.make(tmp_path / "ten.mp4", pix_fmt="yuv420p10le")
    times = [i / 10 for i in range(60)]
    frames = [read(path, times, decoder=d, size=(64, 96)).astype(int) for d in DECODERS]
    for got in frames:
        assert clips.numbers(got) == list(range(60))
    # colours at the edges of cells are blended by different filters; measured 0.5
    assert np.abs(frames[0] - frames[1]).mean() < 1


@pytest.mark.parametrize("decoder", DECODERS)
def test_variable_rate_goes_by_time(tmp_path, decoder):
    starts = [0, 0.1, 0.2, 0.3, 2, 2.1, 2.2, 5, 5.04, 5.08, 9, 9.1]
    path = clips.make(tmp_path / "vfr.mp4", times_s=starts, options={"bf": "0"})
    times = [0.05, 0.35, 1.99, 2.0, 2.15, 4.99, 5.05, 5.0801, 8.99, 9.0]
    assert clips.numbers(read(path, times, decoder=decoder)) == [0, 3, 3, 4, 5, 6, 8, 9, 9, 10]


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("turns", [1, 2, 3])
def test_rotation_is_applied(tmp_path, decoder, turns):
    path = clips.make(tmp_path / "turned.mp4", num_frames=8, rotation=90 * turns)
    stored = video.probe(path, decoder=decoder)
    assert (stored.height, stored.width) == (64, 96)
    size = (64, 96) if turns == 2 else (96, 64)
    got = read(path, [i / 10 for i in range(8)], decoder=decoder, size=size)
    assert clips.numbers(np.rot90(got, -turns, axes=(1, 2))) == list(range(8))


@pytest.mark.parametrize(("colorspace", "decoder"), [(c, d) for c in (1, 5) for d in DECODERS])
def test_colours_follow_the_colour_space_of_the_file(tmp_path, colorspace, decoder):
    rgb = (200, 40, 90)
    path = clips.make_colour(tmp_path / "colour.mp4", rgb, colorspace=colorspace)
    got = read(path, [0], decoder=decoder)
    # rounding of YUV and of the codec; the wrong matrix is off by over 10
    assert np.abs(got.astype(int) - rgb).max() <= 4


@pytest.mark.parametrize("size", [(32, 48), (100, 100), (64, 96)])
def test_resize_is_that_of_the_siglip_processor(film, size):
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    with av.open(str(film)) as container:
        raw = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)][:3]
    processor = SiglipImageProcessorPil(
        size={"height": size[0], "width": size[1]}, do_rescale=False, do_normalize=False
    )
    want = processor(images=raw, return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(read(film, [0, 0.1, 0.2], size=size), want)


@pytest.mark.parametrize("decoder", DECODERS)
def test_one_frame_and_more_wishes_than_frames(tmp_path, decoder):
    one = clips.make(tmp_path / "one.mp4", num_frames=1)
    duration_s = video.probe(one, decoder=decoder).duration_s
    times = video.frame_times(duration_s, num_frames=5, fps=0)
    assert clips.numbers(read(one, times, decoder=decoder)) == [0] * 5
    short = clips.make(tmp_path / "short.mp4", num_frames=3)
    times = video.frame_times(0.3, num_frames=9, fps=0)
    got = clips.numbers(read(short, times, decoder=decoder))
    assert got == [0, 0, 0, 1, 1, 1, 2, 2, 2]  # each as long as it is shown


@pytest.mark.parametrize(
    ("chunk", "sizes"), [(1, [1] * 10), (4, [4, 4, 2]), (5, [5, 5]), (64, [10])]
)
def test_chunks_are_full_but_for_the_last(film, chunk, sizes):
    times = tuple(i / 10 for i in range(10))
    job = video.Job(path=str(film), times_s=times, size=SIZE, decoder="pyav")
    got = list(video.read_frames(job, chunk=chunk))
    assert [len(frames) for frames in got] == sizes
    assert got[0].dtype == np.uint8 and got[0].shape[1:] == (*SIZE, 3)
    assert clips.numbers(np.concatenate(got)) == list(range(10))


def test_what_lies_between_sparse_wishes_is_not_decoded(film, tmp_path):
    damaged = clips.rot(film, tmp_path / "hole.mp4", start=0.4)
    assert clips.numbers(read(damaged, [0, 29.95])) == [0, 299]
    with pytest.raises(video.VideoError, match="decoded"):
        read(damaged, [0, 15])


# Refusals


@pytest.fixture(scope="module")
def bad(tmp_path_factory, films):
    """name -> a file that no run may train on."""
    folder = tmp_path_factory.mktemp("bad")
    fast = clips.make(folder / "fast.mp4", num_frames=120, faststart=True)
    slow = clips.make(folder / "slow.mp4", num_frames=120)
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("this is no film\n" * 500)
    (folder / "drawn.txt").write_text("FFmpeg would draw this as pictures\n" * 500)
    (folder / "list.m3u8").write_text(f"#EXTM3U\n#EXTINF:30,\n{films['h264.ts']}\n#EXT-X-ENDLIST\n")
    (folder / "loop.mp4").symlink_to(folder / "loop.mp4")
    os.mkfifo(folder / "pipe.mp4")
    return {
        "bit rot": clips.rot(fast, folder / "rot.mp4", start=0.5),
        "bit rot in the header": clips.rot(fast, folder / "rot_header.mp4", start=0.01),
        "cut": clips.cut(fast, folder / "cut.mp4", part=0.6),
        "cut in matroska": clips.cut(films["h264.mkv"], folder / "cut.mkv", part=0.5),
        "cut before the index": clips.cut(slow, folder / "no_moov.mp4", part=0.6),
        "0 bytes": folder / "empty.mp4",
        "text": folder / "text.mp4",
        "text by its name": folder / "drawn.txt",
        "playlist": folder / "list.m3u8",
        "sound only": clips.make_audio(folder / "sound.mp4"),
        "over-reported": clips.overstate(films["h264.mkv"], folder / "over.mkv", factor=10),
        "endless": clips.overstate(films["h264.mkv"], folder / "endless.mkv", factor=1e9),
        "folder": folder,
        "link to itself": folder / "loop.mp4",
        "pipe": folder / "pipe.mp4",
        "nothing": folder / "nowhere.mp4",
        "below a file": fast / "clip.mp4",
    }


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bit rot", "corrupt"),
        ("cut", "truncated"),
        ("cut in matroska", "truncated"),
        ("cut before the index", "unreadable"),
        ("0 bytes", "empty"),
        ("text", "unreadable"),
        ("text by its name", "unreadable"),
        ("playlist", "unreadable"),
        ("sound only", "no_video"),
        ("over-reported", "truncated"),
        ("endless", "truncated"),
        ("folder", "unreadable"),
        ("link to itself", "unreadable"),
        ("pipe", "unreadable"),
        ("nothing", "missing"),
        ("below a file", "missing"),
    ],
)
def test_a_bad_file_is_refused_by_name_and_kind(bad, name, kind, decoder):
    assert kind_of(bad[name], decoder=decoder) == kind


@pytest.mark.parametrize("decoder", DECODERS)
def test_rot_anywhere_is_refused_or_harmless(film, tmp_path, decoder):
    """Whatever is damaged: a typed refusal, or the right frames; never others."""
    times = [i / 10 for i in range(0, LONG, 7)]
    for seed in range(12):
        path = clips.rot(film, tmp_path / f"rot{seed}.mp4", start=seed / 15, seed=seed)
        try:
            got = clips.numbers(read_apart(path, times, decoder=decoder))
        except video.VideoError:
            continue
        assert got == list(range(0, LONG, 7)), seed


@pytest.mark.parametrize(
    "name", [n for n, (_, decoders) in FILMS.items() if "decord" not in decoders]
)
def test_decord_refuses_early_what_it_cannot_read(films, name):
    with pytest.raises(video.VideoError, match="data.decoder=pyav") as caught:
        video.probe(films[name], decoder="decord")
    codec = name == "av1.mp4"
    assert caught.value.kind == ("unsupported_codec" if codec else "unsupported_container")
    assert kind_of(films[name], decoder="pyav") == ""


def test_frames_that_decord_makes_up_are_refused(tmp_path):
    """Frames marked "not coded" show nothing new; decord fills them in from elsewhere."""
    source = clips.make(tmp_path / "source.mp4", codec="mpeg4", num_frames=120)
    path = clips.replace_tail(source, tmp_path / "tail.mp4", 40, b"\x00\x00\x01\xb6\x00\x00\x00")
    assert kind_of(path, decoder="pyav") == ""
    assert kind_of(path, decoder="decord") == "corrupt"


def test_disordered_time_stamps_are_refused(tmp_path):
    """H.264 with B-frames in AVI: the container has no presentation times."""
    path = clips.make(tmp_path / "b.avi", options={"preset": "medium", "bf": "3"})
    assert kind_of(path, decoder="pyav") == "wrong_time"


def test_no_length_and_no_frames_are_told_apart(tmp_path):
    stream = clips.make(tmp_path / "live.webm", codec="libvpx-vp9", live=True)
    assert kind_of(stream, decoder="pyav") == "no_duration"
    nothing = clips.make(tmp_path / "nothing.mp4", num_frames=0, audio_s=1)
    assert kind_of(nothing, decoder="pyav") in ("empty", "no_video")


def test_a_file_of_somebody_else_is_refused(film, tmp_path):
    path = clips.cut(film, tmp_path / "private.mp4", part=1)
    path.chmod(0)
    nobody = 65534
    uid = os.geteuid()
    if uid == 0:
        os.seteuid(nobody)
    try:
        with pytest.raises(video.VideoError, match="Permission") as caught:
            video.probe(path, decoder="pyav")
    finally:
        os.seteuid(uid)
    assert caught.value.kind == "unreadable"


def test_a_video_error_travels_between_processes():
    error = video.VideoError("clip.mp4 is bad", "corrupt")
    back = pickle.loads(pickle.dumps(error))
    assert (str(back), back.kind) == ("clip.mp4 is bad", "corrupt")
    assert isinstance(back, ValueError)


# Memory


MEMORY = """
import resource, sys
from longrl_jax.data import video
path, decoder = sys.argv[1:]
def peak(num_frames):
    times = video.frame_times(8192 / 24, num_frames=num_frames, fps=0)
    job = video.Job(path=path, times_s=times, size=(224, 224), decoder=decoder)
    total = sum(len(frames) for frames in video.read_frames(job, chunk=64))
    assert total == num_frames
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
few = peak(256)
print(peak(8192) - few)
"""
GROWTH_MIB = 48
"""8,192 frames of 224 x 224 are 1,176 MiB and a chunk is 9; the rest is malloc's. Measured: 0."""


@pytest.mark.slow
@pytest.mark.parametrize("decoder", DECODERS)
def test_8192_frames_take_the_memory_of_a_chunk(tmp_path, decoder):
    path = clips.make(tmp_path / "long.mp4", num_frames=8200, fps=24, size=(32, 32))
    times = video.frame_times(8192 / 24, num_frames=8192, fps=0)
    got = read(path, times, decoder=decoder, size=(16, 16))
    assert clips.numbers(got) == list(range(8192))
    command = [sys.executable, "-c", MEMORY, str(path), decoder]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < GROWTH_MIB


# Processes


@pytest.fixture
def pool():
    before = children()
    with video.DecoderPool(2, timeout_s=60) as pool:
        yield pool
    assert children() == before


def jobs_of(paths, *, num_frames=20, size=SIZE):
    times = tuple(i / 10 for i in range(num_frames))
    return [video.Job(path=str(p), times_s=times, size=size, decoder="pyav") for p in paths]


def collect(items):
    """Returns {job: numbers of its frames} and {job: kind of its error}; checks the order."""
    frames, errors = {}, {}
    for item in items:
        assert item.job_index not in errors
        if isinstance(item, video.Failed):
            errors[item.job_index] = item.error.kind
        else:
            so_far = frames.setdefault(item.job_index, [])
            assert item.first_frame == len(so_far)
            so_far += clips.numbers(item.frames)
    return frames, errors


@pytest.mark.parametrize("num_jobs", [0, 1, 2, 7])
def test_a_pool_hands_out_every_job_in_order(pool, films, num_jobs):
    paths = list(films.values())[:num_jobs]
    frames, errors = collect(pool.decode(jobs_of(paths), chunk=8))
    assert frames == {i: list(range(20)) for i in range(num_jobs)} and not errors
    assert len(pool._workers) == min(num_jobs, 2)


def test_processes_are_kept_between_calls_and_ended_by_close(film):
    before = children()
    pool = video.DecoderPool(2, timeout_s=60)
    assert children() == before  # nothing is started before it is needed
    collect(pool.decode(jobs_of([film] * 3), chunk=8))
    started = children() - before
    assert len(started) == 2
    collect(pool.decode(jobs_of([film] * 3), chunk=8))
    assert children() - before == started
    pool.close()
    assert children() == before
    assert collect(pool.decode(jobs_of([film]), chunk=8))[0] == {0: list(range(20))}
    pool.close()


def test_decord_in_a_pool(pool, film):
    job = video.Job(path=str(film), times_s=(0.0, 0.5, 9.0), size=SIZE, decoder="decord")
    assert collect(pool.decode([job], chunk=2)) == ({0: [0, 5, 90]}, {})


def test_a_refused_file_leaves_the_others_alone(pool, film, bad):
    paths = [bad["cut"], film, bad["nothing"], film]
    frames, errors = collect(pool.decode(jobs_of(paths, num_frames=100), chunk=8))
    assert errors == {0: "truncated", 2: "missing"}
    assert frames[1] == frames[3] == list(range(100))
    assert frames[0] == list(range(len(frames[0])))  # what came before the cut


def test_a_file_that_hangs_costs_its_process_and_no_other_file(film, bad):
    """Reading a pipe that nobody writes to never returns."""
    with video.DecoderPool(1, timeout_s=2) as pool:
        frames, errors = collect(pool.decode(jobs_of([bad["pipe"], film, film]), chunk=8))
        assert errors == {0: "timeout"}
        assert frames == {1: list(range(20)), 2: list(range(20))}


def test_a_decoder_that_spins_holding_the_gil_is_ended_too(tmp_path):
    """As decord can: C code that never gives the interpreter a turn."""
    code = f"""
import ctypes, importlib.util, itertools
spec = importlib.util.spec_from_file_location("video", {video.__file__!r})
video = importlib.util.module_from_spec(spec)
spec.loader.exec_module(video)
def spin():
    yield 1
    sum(itertools.repeat(0))  # one C call without an end
list(video._timed(spin(), 0.5))
"""
    done = subprocess.run([sys.executable, "-c", code], timeout=60)
    assert done.returncode == -signal.SIGALRM


def test_a_process_that_dies_costs_its_own_job_only(film, bad):
    before = children()
    with video.DecoderPool(1, timeout_s=60) as pool:

        def shoot():
            (pid,) = children() - before
            os.kill(pid, signal.SIGSEGV)

        timer = threading.Timer(1.5, shoot)
        timer.start()
        frames, errors = collect(pool.decode(jobs_of([bad["pipe"], film]), chunk=8))
        timer.join()
    assert errors == {0: "crashed"} and frames == {1: list(range(20))}


def test_a_process_that_died_idle_is_replaced(pool, film):
    before = children()
    collect(pool.decode(jobs_of([film]), chunk=8))
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    pool._workers[0].process.wait(timeout=30)
    frames, errors = collect(pool.decode(jobs_of([film]), chunk=8))
    assert frames == {0: list(range(20))} and not errors


def test_a_slow_consumer_is_no_time_out(film):
    timeout_s = 2
    with video.DecoderPool(1, timeout_s=timeout_s) as pool:
        got = 0
        # 1.2 MB a chunk: more than the kernel keeps in between, so the process has to wait
        for item in pool.decode(jobs_of([film], num_frames=40, size=(224, 224)), chunk=8):
            assert isinstance(item, video.Chunk), item
            if not got:
                time.sleep(timeout_s + 1)
            got += len(item.frames)
    assert got == 40


def test_leaving_the_loop_early_leaves_the_pool_usable(pool, film):
    for _ in pool.decode(jobs_of([film] * 4, num_frames=200, size=(224, 224)), chunk=4):
        break
    frames, errors = collect(pool.decode(jobs_of([film] * 2), chunk=8))
    assert frames == {0: list(range(20)), 1: list(range(20))} and not errors


def test_two_loops_at_once_are_refused(pool, film):
    first = pool.decode(jobs_of([film] * 2), chunk=4)
    next(first)
    with pytest.raises(RuntimeError, match="decoding already"):
        next(pool.decode(jobs_of([film]), chunk=4))
    first.close()


def test_a_bug_is_not_taken_for_a_bad_file(pool, film):
    job = video.Job(path=str(film), times_s=(0.0,), size=(-1, 5), decoder="pyav")
    with pytest.raises(RuntimeError, match="height and width"):
        list(pool.decode([job], chunk=4))


SCRIPT = """
import sys
from longrl_jax.data import video
print("started", flush=True)  # no __main__ guard: a decoder process must not run this again
pool = video.DecoderPool(2, timeout_s=60)
job = video.Job(path=sys.argv[1], times_s=(0.0,) * 500, size=(224, 224), decoder="pyav")
loop = pool.decode([job, job], chunk=4)
next(loop)
print(*[w.process.pid for w in pool._workers], flush=True)
if sys.argv[2] == "killed":
    import os, signal
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("end", ["left", "killed"])
def test_no_process_outlives_the_program(film, tmp_path, end):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(film), end], capture_output=True, text=True, timeout=120
    )
    first, pids = done.stdout.splitlines()
    assert first == "started" and len(pids.split()) == 2
    for pid in pids.split():
        for _ in range(100):  # they end by themselves when they find the pool gone
            if not Path(f"/proc/{pid}/exe").exists():
                break
            time.sleep(0.1)
        else:
            raise AssertionError(f"process {pid} is still there")


@pytest.mark.parametrize(
    ("kwargs", "named"),
    [
        ({"num_processes": 0, "timeout_s": 1}, "num_processes"),
        ({"num_processes": 1, "timeout_s": 0}, "timeout_s"),
    ],
)
def test_a_pool_names_what_is_wrong(kwargs, named):
    with pytest.raises(ValueError, match=named):
        video.DecoderPool(**kwargs)
