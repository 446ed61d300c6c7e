"""Video files: what a container says of itself, which times to look at, and the frames there.

The one door to the decoders (PyAV and decord; Pillow for images, image.py). All are read through
`read_frames`, which checks time stamps and turns whatever is wrong with a file into a VideoError.
`DecoderPool` runs it in processes of its own. These run this file as a script, so it imports little
and of ours image.py alone: a process is ready in a fraction of a second and touches no device.
"""

import collections
import contextlib
import dataclasses
import importlib
import importlib.metadata
import json
import math
import multiprocessing.connection
import os
import runpy
import signal
import socket
import stat
import subprocess
import sys
import traceback
import types
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

if __name__ == "__main__":  # a decoder process: our packages would bring JAX
    image: Any = types.SimpleNamespace(**runpy.run_path(f"{os.path.dirname(__file__)}/image.py"))
else:
    from longrl_jax.data import image

MAX_FRAMES = 8192
"""Most frames of one video."""
TOLERANCE_S = 1e-3
"""A frame that starts at most this much after the wish still counts as started: containers round to
1 ms, and decord's time stamps are float32 (off by 0.5 ms at 2 hours)."""
END_SLACK_S = 1.0
"""How far a wish may lie behind the end of the last frame: lengths are rounded, sound runs on."""
SEEK_GAP_S = 4.0
"""A keyframe is looked for where the next wish lies further ahead than this."""
READER_VERSION = 1
"""Raise it when the same wishes would give other pixels."""

KINDS: dict[str, str] = {
    "missing": "check data.root and the path in the record",
    "unreadable": "check that it is a whole video file that this user may read",
    "empty": "fetch the file again",
    "no_image": "check that the record names a picture, or convert it to PNG",
    "too_large": "scale the picture down",
    "deep": "convert it to 8 bits a channel",
    "no_video": "leave the record out, or give it the file with the pictures",
    "no_duration": "rewrite the container: ffmpeg -i IN -c copy OUT.mp4",
    "unsupported_codec": "set data.decoder=pyav, or transcode the file to H.264",
    "unsupported_container": "set data.decoder=pyav, or ffmpeg -i IN -c copy OUT.mp4",
    "truncated": "fetch the file again; if it is whole, rewrite it: ffmpeg -i IN OUT.mp4",
    "corrupt": "fetch the file again, or transcode it",
    "wrong_time": "rewrite the time stamps: ffmpeg -i IN OUT.mp4",
    "turned": "transcode the file, which turns its pictures: ffmpeg -i IN OUT.mp4",
    "timeout": "raise data.decode_timeout_s, or transcode the file",
    "crashed": "transcode the file; if others fail too, look at the memory of the machine",
}
"""Every VideoError.kind, and what can be done about it."""

FORMATS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,flv,asf,ogg,3gp,mj2"
"""Containers that are opened. FFmpeg knows others that draw text or follow links to other files."""
DECORD_LACKS = ("av1", "vvc", "evc")
"""Codecs that decord 0.6.0 was built without."""
DECORD_READS = ("mov", "matroska")
"""Containers (first name of FFmpeg's format) whose frames decord counts right. In MPEG-TS it starts
at the second keyframe and calls that frame 0; in AVI it may lose the time stamps."""


class VideoError(ValueError):
    """A file that cannot be used; the message names it, what is wrong and a way out."""

    def __init__(self, message: str, kind: str):
        super().__init__(message, kind)  # both, so that it can be pickled
        assert kind in KINDS, kind
        self.kind = kind
        """A key of KINDS."""

    def __str__(self) -> str:
        return self.args[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Probe:
    """What a container says."""

    duration_s: float
    num_frames: int
    """0 where the container does not say it."""
    height: int
    """In pixels, as stored: before a rotation that the container may ask for."""
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timeline:
    """When the frames of a file are shown, counted from the first one."""

    starts_s: np.ndarray
    """float64 [F], ascending from 0; gaps of any size."""
    end_s: float
    """When the last frame ends."""
    height: int
    """In pixels, as shown: after the rotation that the container asks for."""
    width: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """Frames wanted of one file."""

    path: str
    times_s: tuple[float, ...]
    """In ascending order, from the first frame on; the same frame may be asked for repeatedly."""
    size: tuple[int, int]
    """Height and width, in pixels, of the frames handed out."""
    decoder: str
    """pyav or decord; image: the file is a picture, which every time shows."""
    scales: tuple[tuple[int, int], ...] = ()
    """types.View.scales of an image, whose tiles, one for every time, are handed out then."""
    stored: tuple[int, int] | None = None
    """Height and width, in pixels, that pictures must have before they are resized; None: any."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chunk:
    """Some frames of a job, one after the other."""

    job_index: int
    first_frame: int
    """Index in Job.times_s."""
    frames: np.ndarray
    """uint8 [k, H, W, 3]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Failed:
    """The last that is heard of a job; chunks may have come before."""

    job_index: int
    error: VideoError


def probe(path: str | os.PathLike[str], *, decoder: str) -> Probe:
    """Reads the container, no pixels; raises VideoError for what cannot be read by `decoder`."""
    path = os.fspath(path)
    _check_file(path)
    with _open(path, decoder) as (container, stream):
        duration_s = _duration_s(container, stream)
        if duration_s <= 0:
            if not next(container.demux(stream)).size:
                raise _error("empty", path, "holds no frame")
            raise _error("no_duration", path, "does not say how long it is")
        codec = stream.codec_context
        return Probe(
            duration_s=duration_s, num_frames=stream.frames, height=codec.height, width=codec.width
        )


def timeline(path: str | os.PathLike[str]) -> Timeline:
    """Reads every coded frame's time stamp, and the first picture; raises VideoError.

    Unlike Probe.duration_s it holds for a film that starts late, and for one of variable rate.
    """
    path = os.fspath(path)
    _check_file(path)
    with _open(path, "pyav") as (container, stream):
        first = next(_decode(container, stream, path), None)
        if first is None:
            raise _error("empty", path, "holds no frame")
        height, width = first.height, first.width
        if round(first.rotation / 90) % 2:
            height, width = width, height
        zero_s = first.time
    spans_s = []
    with _open(path, "pyav") as (container, stream):
        for packet in container.demux(stream):
            _check_whole(packet, path)
            if packet.pts is not None:
                start_s = float(packet.pts * packet.time_base) - zero_s
                spans_s.append((start_s, float((packet.duration or 0) * packet.time_base)))
    spans_s = sorted(span for span in spans_s if span[0] > -TOLERANCE_S)  # an edit list hides some
    starts_s = np.maximum([start_s for start_s, _ in spans_s], 0.0)
    end_s = float(starts_s[-1]) + spans_s[-1][1]
    if end_s <= 0:
        raise _error("no_duration", path, "does not say how long its only frame is shown")
    return Timeline(starts_s=starts_s, end_s=end_s, height=height, width=width)


def probe_image(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Returns height and width of a picture, in pixels; raises VideoError."""
    path = os.fspath(path)
    _check_file(path)
    try:
        return image.probe(path)
    except image.Unusable as error:
        raise _error(error.args[0], path, error.args[1]) from error


def frame_times(duration_s: float, *, num_frames: int, fps: float) -> tuple[float, ...]:
    """Returns the wished times in seconds; at most num_frames.

    fps == 0: num_frames, at the starts of equal slices of the video. The last one then lies a whole
    slice before the end, so a length that is a little overstated does no harm, and the first frame
    is always among them. fps > 0: every 1 / fps s; if these are too many, as with fps == 0, spread
    over the whole video and not cut off (as VILA does).
    """
    if not 1 <= num_frames <= MAX_FRAMES:
        raise ValueError(f"num_frames={num_frames} must be 1 to {MAX_FRAMES}")
    if not (fps >= 0 and math.isfinite(fps)):
        raise ValueError(f"fps={fps} must be 0 (spread evenly) or more")
    if not (duration_s > 0 and math.isfinite(duration_s)):
        raise ValueError(f"duration_s={duration_s} must be a positive number of seconds")
    wished = math.ceil(duration_s * fps - 1e-6)  # 2 s at 2 a second are 4, rounded lengths too
    if fps > 0 and wished <= num_frames:
        return tuple(i / fps for i in range(max(wished, 1)))
    return tuple(i * duration_s / num_frames for i in range(num_frames))


def decoder_version(decoder: str) -> str:
    """Names all that pixels depend on besides the file and the job; for keys of stored features."""
    packages = ["pillow"]
    if decoder != "image":
        _check_decoder(decoder)
        packages.insert(0, "av" if decoder == "pyav" else decoder)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    return ", ".join([*versions, f"reader {READER_VERSION}"])


def read_frames(job: Job, *, chunk: int) -> Iterator[np.ndarray]:
    """Yields the wished frames in order, uint8 [k, H, W, 3], k = chunk but for the last.

    The frame for a time is the last one that starts by then (the first, if none does), counted from
    the first frame; more wishes than frames repeat frames. Frames are turned as the container asks
    and resized as transformers' SigLIP processor does it (Pillow, bicubic). There is no time limit
    here; DecoderPool has one. Memory: one chunk and a few decoded frames; decord adds a read-ahead
    of its own that has no limit (400 to 1,500 decoded frames were seen).

    Raises VideoError. decord's and PyAV's frames are equal bit for bit, but for formats over 8 bit,
    where they blend colours at edges differently. What decord reports to have made up is refused.
    Of a picture every time is the same; its tiles (Job.scales) take the times in turn.
    """
    assert job.times_s and list(job.times_s) == sorted(job.times_s) and chunk >= 1
    if job.decoder == "image":
        frames = _read_image(job)
        yield from (frames[i : i + chunk] for i in range(0, len(frames), chunk))
        return
    _check_decoder(job.decoder)
    read = _read_pyav if job.decoder == "pyav" else _read_decord
    batch: list[np.ndarray] = []
    last: np.ndarray | None = None
    for picture in read(job.path, job.times_s):
        if job.stored is not None and picture.shape[:2] != job.stored:
            what = "shows pictures of {} x {}, not {} x {} px as stored"
            raise _error("turned", job.path, what.format(*picture.shape[:2], *job.stored))
        if picture is not last:
            last, resized = picture, _resize(picture, job.size)
        batch.append(resized)
        if len(batch) == chunk:
            yield np.stack(batch)
            batch.clear()
    if batch:
        yield np.stack(batch)


class DecoderPool:
    """Decoder processes: started when first needed, kept between calls, ended by `close`.

    with DecoderPool(2, timeout_s=60) as pool:
        for item in pool.decode(jobs, chunk=64):
            ...
    """

    def __init__(self, num_processes: int, *, timeout_s: float):
        """timeout_s: longest time one job may decode; waiting for the consumer does not count."""
        if num_processes < 1:
            raise ValueError(f"num_processes={num_processes} must be at least 1")
        if not timeout_s > 0:
            raise ValueError(f"timeout_s={timeout_s} must be over 0")
        self.num_processes, self.timeout_s = num_processes, timeout_s
        self._workers: list[_Worker] = []
        self._decoding = False
        self._finalizer = weakref.finalize(self, _stop, self._workers)  # at exit, too

    def decode(
        self, jobs: Sequence[Job], *, chunk: int | Sequence[int]
    ) -> Iterator[Chunk | Failed]:
        """Yields the chunks of every job in order, those of several jobs interleaved.

        chunk: most frames of one, for all jobs or for each.
        A process decodes one chunk ahead and then waits, so memory does not grow with the number
        of jobs. A file that hangs or crashes its process costs that process and nothing else.
        Leaving the loop early is fine; a second call may start when the first one has ended.
        """
        if self._decoding:
            raise RuntimeError("this DecoderPool is decoding already; end or close that loop first")
        self._decoding = True
        waiting = collections.deque(enumerate(jobs))
        chunks = [chunk] * len(jobs) if isinstance(chunk, int) else chunk
        try:
            while busy := self._hand_out(waiting, chunks):
                for connection in multiprocessing.connection.wait(list(busy)):
                    item = self._receive(busy[connection], jobs)
                    if item is not None:
                        yield item
        finally:
            _stop(self._workers, only_busy=True)
            self._decoding = False

    def close(self) -> None:
        """Ends the processes; a later `decode` starts new ones."""
        _stop(self._workers)

    def __enter__(self) -> "DecoderPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _hand_out(
        self, waiting: "collections.deque[tuple[int, Job]]", chunks: Sequence[int]
    ) -> "dict[Any, _Worker]":
        """Gives jobs to idle processes, starts missing ones; returns the busy by connection."""
        while waiting:
            worker = next((w for w in self._workers if w.job_index is None), None)
            if worker is None:
                if len(self._workers) == self.num_processes:
                    break
                self._workers.append(worker := _start())
            job_index, job = waiting[0]
            request = {
                "job": dataclasses.asdict(job),
                "chunk": chunks[job_index],
                "timeout_s": self.timeout_s,
            }
            try:
                worker.connection.send_bytes(json.dumps(request).encode())
            except OSError:  # it died while it had nothing to do: not this job's fault
                _stop([worker])
                self._workers.remove(worker)
                continue
            worker.job_index = job_index
            waiting.popleft()
        return {w.connection: w for w in self._workers if w.job_index is not None}

    def _receive(self, worker: "_Worker", jobs: Sequence[Job]) -> Chunk | Failed | None:
        """Takes one message; None: the job is done."""
        job_index = worker.job_index
        assert job_index is not None
        try:
            message = json.loads(worker.connection.recv_bytes())
            if "shape" in message:
                frames = np.empty(message["shape"], np.uint8)
                worker.connection.recv_bytes_into(frames.reshape(-1).data)
                return Chunk(job_index=job_index, first_frame=message["first"], frames=frames)
        except (EOFError, OSError):
            self._workers.remove(worker)
            return Failed(job_index=job_index, error=self._obituary(worker, jobs[job_index].path))
        worker.job_index = None
        if "bug" in message:
            raise RuntimeError(f"decoding {jobs[job_index].path} failed:\n{message['bug']}")
        if "error" in message:
            return Failed(job_index=job_index, error=VideoError(message["error"], message["kind"]))
        return None

    def _obituary(self, worker: "_Worker", path: str) -> VideoError:
        worker.connection.close()
        status = worker.process.wait()
        if status == -signal.SIGALRM:
            return _error("timeout", path, f"was not decoded within {self.timeout_s:g} s")
        return _error("crashed", path, f"ended its decoder process (exit status {status})")


@dataclasses.dataclass
class _Worker:
    process: subprocess.Popen
    connection: multiprocessing.connection.Connection
    job_index: int | None = None
    """None: it waits for a job."""


def _start() -> _Worker:
    """Starts this file as a script: multiprocessing would import the caller's main module again."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno())],
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
        )
    return _Worker(process, multiprocessing.connection.Connection(ours.detach()))


def _stop(workers: list[_Worker], *, only_busy: bool = False) -> None:
    """Ends processes and takes them off the list."""
    for worker in list(workers):
        if worker.job_index is not None or not only_busy:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()
            workers.remove(worker)


def _serve(connection: multiprocessing.connection.Connection) -> None:
    """The life of a decoder process: job after job, until the pool hangs up."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the pool decides
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    for package in ("av", "PIL.Image"):  # now, so that no job's time pays for it
        importlib.import_module(package)
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        fields = request["job"]
        fields["scales"] = tuple(tuple(scale) for scale in fields["scales"])
        lists = {name: tuple(fields[name]) for name in ("times_s", "size")}
        job = Job(**fields | lists | {"stored": fields["stored"] and tuple(fields["stored"])})
        first = 0
        try:
            for frames in _timed(read_frames(job, chunk=request["chunk"]), request["timeout_s"]):
                _send(connection, first=first, shape=frames.shape)
                connection.send_bytes(frames.reshape(-1).data)
                first += len(frames)
            _send(connection, done=True)
        except VideoError as error:
            _send(connection, error=str(error), kind=error.kind)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception:
            _send(connection, bug=traceback.format_exc())


def _timed(frames: Iterator[np.ndarray], timeout_s: float) -> Iterator[np.ndarray]:
    """Passes items on; the kernel ends this process when it took too long to make them.

    An alarm needs no Python to run: it also ends a decoder that spins while it holds the GIL, and
    an orphan whose pool died.
    """
    left_s = timeout_s
    while True:
        signal.setitimer(signal.ITIMER_REAL, left_s)
        try:
            item = next(frames, None)
        finally:
            left_s = max(signal.setitimer(signal.ITIMER_REAL, 0)[0], 1e-6)
        if item is None:
            return
        yield item


def _send(connection: multiprocessing.connection.Connection, **message: Any) -> None:
    connection.send_bytes(json.dumps(message).encode())


def _error(kind: str, path: str, what: str) -> VideoError:
    return VideoError(f"{path} {what}; {KINDS[kind]}", kind)


def _check_decoder(decoder: str) -> None:
    if decoder not in ("pyav", "decord"):
        raise ValueError(f"decoder={decoder!r} is unknown; choose one of decord, pyav")


def _check_file(path: str) -> None:
    """A pipe may never end, and where a file is probed nobody watches the time."""
    info = _stat(path)
    if not stat.S_ISREG(info.st_mode):
        raise _error("unreadable", path, "is not a regular file")
    if info.st_size == 0:
        raise _error("empty", path, "has 0 bytes")


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _error("missing", path, "does not exist") from None
    except OSError as error:
        raise _error("unreadable", path, f"cannot be opened ({error.strerror})") from None


@contextlib.contextmanager
def _open(path: str, decoder: str) -> Iterator[tuple[Any, Any]]:
    """Opens a container with PyAV, yields it and its first video stream; PyAV's errors are ours."""
    import av

    _check_decoder(decoder)
    info = _stat(path)
    if stat.S_ISREG(info.st_mode) and info.st_size == 0:
        raise _error("empty", path, "has 0 bytes")
    options = {"protocol_whitelist": "file", "format_whitelist": FORMATS}
    try:
        container = av.open(os.path.abspath(path), options=options, metadata_errors="replace")
    except av.FFmpegError as error:
        raise _error("unreadable", path, f"cannot be opened ({error.strerror})") from error
    with container:
        if not container.streams.video:
            raise _error("no_video", path, "has no video stream")
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise _error("unsupported_codec", path, "has a codec that PyAV does not know")
        name = codec.codec.canonical_name
        if decoder == "decord" and name in DECORD_LACKS:
            raise _error("unsupported_codec", path, f"is {name}, which decord cannot decode")
        if decoder == "decord" and container.format.name.split(",")[0] not in DECORD_READS:
            what = f"is {container.format.name}, where decord miscounts frames"
            raise _error("unsupported_container", path, what)
        try:
            yield container, stream
        except av.FFmpegError as error:
            raise _error("corrupt", path, f"cannot be decoded ({error.strerror})") from error


def _duration_s(container: Any, stream: Any) -> float:
    """Returns the length of the stream, else of the container; 0 if neither says it."""
    if stream.duration:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6  # FFmpeg's AV_TIME_BASE


def _read_pyav(path: str, times_s: Sequence[float]) -> Iterator[np.ndarray]:
    """Yields a picture for every time; the same object again while the frame is the same."""
    with _open(path, "pyav") as (container, stream):
        frames = _decode(container, stream, path)
        following = next(frames, None)
        if following is None:
            raise _error("empty", path, "holds no frame")
        zero_s, shown, picture = following.time, None, None
        for time_s in times_s:
            wish_s = zero_s + time_s + TOLERANCE_S
            if following is not None and _keyframe_between(stream, following.time, wish_s):
                frames = _seek(container, stream, path, wish_s)
                following, picture = next(frames), None
            while shown is None or (following is not None and following.time <= wish_s):
                shown, following, picture = following, next(frames, None), None
            if following is None:
                length_s = shown.time - zero_s + (shown.duration or 0) * float(shown.time_base)
                _check_end(path, time_s, length_s)
            if picture is None:
                picture = np.rot90(shown.to_ndarray(format="rgb24"), round(shown.rotation / 90))
            yield picture


def _read_image(job: Job) -> np.ndarray:
    _check_file(job.path)
    try:
        tiles = image.read(job.path, size=job.size, scales=job.scales, stored=job.stored)
    except image.Unusable as error:
        raise _error(error.args[0], job.path, error.args[1]) from error
    if not job.scales:
        return np.repeat(tiles, len(job.times_s), axis=0)
    assert len(tiles) == len(job.times_s), f"{job} has {len(tiles)} tiles"
    return tiles


def _keyframe_between(stream: Any, now_s: float, wish_s: float) -> bool:
    """Says whether decoding can be skipped; without an index in the container it never is."""
    if wish_s - now_s < SEEK_GAP_S:
        return False
    index = stream.index_entries
    found = index.search_timestamp(int(wish_s / stream.time_base), backward=True, any_frame=False)
    return found >= 0 and float(index[found].timestamp * stream.time_base) > now_s


def _seek(container: Any, stream: Any, path: str, wish_s: float) -> Iterator[Any]:
    """Returns the frames from a keyframe on that starts by wish_s."""
    back_s = 0.0
    while True:
        target = int((wish_s - back_s) / stream.time_base)
        container.seek(target, stream=stream)
        frames = _decode(container, stream, path)
        first = next(frames, None)
        if first is not None and first.time <= wish_s:
            return _chain(first, frames)
        if wish_s - back_s < 0:
            raise _error("wrong_time", path, f"has no frame that starts by {wish_s:.3f} s")
        back_s = 2 * back_s + 1  # the index counts decoding times: a keyframe may be shown later


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest


def _decode(container: Any, stream: Any, path: str) -> Iterator[Any]:
    """Yields the frames from where the container stands, in order of presentation."""
    last_s = -math.inf
    for packet in container.demux(stream):
        _check_whole(packet, path)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise _error("corrupt", path, f"has a damaged frame after {last_s:.3f} s")
            if frame.pts is None or frame.time < last_s:
                raise _error("wrong_time", path, f"has disordered frames at {last_s:.3f} s")
            last_s = frame.time
            yield frame


def _read_decord(path: str, times_s: Sequence[float]) -> Iterator[np.ndarray]:
    """As _read_pyav, by decord's index of time stamps. Every frame up to the last one is decoded.

    decord does not say which frame it hands out. Its seeks lose the frames that stand before an
    open keyframe (HEVC: 9 of 24 frames were others, without a word), so there are none here.
    """
    with _open(path, "decord") as (container, stream):
        _check_packets(container, stream, path, times_s)
    import decord
    from decord._ffi.base import DECORDLimitReachedError

    decord.logging.set_level(decord.logging.QUIET)
    errors = (RuntimeError, decord.DECORDError, DECORDLimitReachedError)
    try:
        # fault_tol: the first frame that decord would fill in from its neighbour is an error
        reader = decord.VideoReader(os.path.abspath(path), num_threads=1, fault_tol=1e-9)
        spans_s = np.asarray(reader.get_frame_timestamp(range(len(reader))), np.float64)
    except errors as error:
        raise _decord_error(path, error) from error
    starts_s, ends_s = (spans_s - spans_s[0, 0]).T
    if not (np.diff(starts_s) >= 0).all() or abs(spans_s[0, 0]) > 1e9:  # 1e9: decord's "unknown"
        raise _error("wrong_time", path, "has disordered frames")
    indices = np.searchsorted(starts_s, np.asarray(times_s) + TOLERANCE_S, side="right") - 1
    position, picture = -1, None
    for time_s, index in zip(times_s, indices.tolist(), strict=True):
        if index == len(reader) - 1:
            _check_end(path, time_s, ends_s[-1])
        try:
            while position < index:
                frame, picture, position = reader.next(), None, position + 1
        except StopIteration:
            raise _error(
                "truncated", path, f"has {position + 1} frames, not {len(reader)}"
            ) from None
        except errors as error:
            raise _decord_error(path, error) from error
        if picture is None:
            picture = frame.asnumpy()
        yield picture


def _check_packets(container: Any, stream: Any, path: str, times_s: Sequence[float]) -> None:
    """Reads all coded frames: on a cut file, or one of absurd length, decord aborts its process."""
    starts_s, ends_s = [], []
    for packet in container.demux(stream):
        _check_whole(packet, path)
        if packet.pts is not None:
            starts_s.append(float(packet.pts * packet.time_base))
            ends_s.append(float((packet.pts + (packet.duration or 0)) * packet.time_base))
    if not starts_s:
        raise _error("empty", path, "holds no frame")
    _check_end(path, times_s[-1], max(ends_s) - min(starts_s))


def _decord_error(path: str, error: Exception) -> VideoError:
    """Sorts decord's errors by their text: it has one type for nearly all."""
    kinds: Mapping[str, str] = {
        "cannot find video stream": "unsupported_codec",
        "av_read_frame": "truncated",
    }
    text = str(error)
    kind = next((kind for part, kind in kinds.items() if part in text), "corrupt")
    last_line = text.strip().splitlines()[-1] if text.strip() else type(error).__name__
    return _error(kind, path, f"cannot be decoded by decord ({last_line[:200]})")


def _check_whole(packet: Any, path: str) -> None:
    if packet.is_corrupt:
        at = "" if packet.dts is None else f" at {float(packet.dts * packet.time_base):.3f} s"
        raise _error("truncated", path, f"breaks off inside a frame{at}")


def _check_end(path: str, time_s: float, length_s: float) -> None:
    """Refuses a wish far behind the last frame: the length that the container states is wrong."""
    if time_s > length_s + END_SLACK_S:
        raise _error(
            "truncated",
            path,
            f"ends after {length_s:.3f} s, though by its container there is a frame at "
            f"{time_s:.3f} s",
        )


def _resize(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    from PIL import Image

    H, W = size
    image = Image.fromarray(np.ascontiguousarray(picture))
    return np.asarray(image.resize((W, H), Image.Resampling.BICUBIC))


if __name__ == "__main__":
    _serve(multiprocessing.connection.Connection(int(sys.argv[1])))
