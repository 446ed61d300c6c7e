"""Small video files made with PyAV for tests; each frame shows its number as a 4 x 4 barcode."""

import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

SIDE = 4
"""Cells along a side of the barcode, which fills the frame: 16 bits, so it survives resizing."""
DARK, BRIGHT = (30, 60, 100), (230, 200, 120)
TICK = Fraction(1, 15360)
"""Time base of the files: seconds are rounded to it."""


def picture(number: int, *, size: tuple[int, int]) -> np.ndarray:
    """Draws frame `number`, uint8 [H, W, 3]; bit i is cell i in reading order."""
    bits = np.array([number >> i & 1 for i in range(SIDE * SIDE)]).reshape(SIDE, SIDE)
    cells = np.where(bits[..., None] == 1, BRIGHT, DARK).astype(np.uint8)
    rows, columns = (np.arange(n) * SIDE // n for n in size)
    return cells[rows][:, columns]


def number(frame: np.ndarray) -> int:
    """Reads the number of a decoded frame of any size, from the middle of each cell."""
    H, W = frame.shape[:2]
    middles = [
        frame[
            (4 * row + 1) * H // (4 * SIDE) : (4 * row + 3) * H // (4 * SIDE),
            (4 * column + 1) * W // (4 * SIDE) : (4 * column + 3) * W // (4 * SIDE),
        ].mean()
        for row in range(SIDE)
        for column in range(SIDE)
    ]
    return sum(1 << i for i, mean in enumerate(middles) if mean > 127)


def numbers(frames: np.ndarray) -> list[int]:
    return [number(frame) for frame in frames]


def make(
    path: Path,
    *,
    num_frames: int = 60,
    fps: int = 10,
    times_s: Sequence[float] | None = None,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    keyframe_every: int = 20,
    rotation: int = 0,
    audio_s: float = 0,
    faststart: bool = False,
    live: bool = False,
    options: dict[str, str] | None = None,
) -> Path:
    """Writes num_frames numbered frames, at times_s (variable rate) or every 1 / fps seconds.

    rotation: degrees counter-clockwise that a player turns the picture by. audio_s: seconds of a
    tone beside the pictures. live: leave out the length, as a recorder that streams does.
    """
    times_s = [i / fps for i in range(num_frames)] if times_s is None else times_s
    flags = {"movflags": "faststart"} if faststart else {"live": "1"} if live else {}
    with av.open(str(path), "w", options=flags) as out:
        stream = out.add_stream(codec, rate=fps, options=options or _fast(codec))
        stream.height, stream.width = size
        stream.pix_fmt, stream.gop_size = pix_fmt, keyframe_every
        stream.codec_context.time_base = stream.time_base = TICK
        if rotation:
            stream.set_display_rotation(rotation)
        tone = out.add_stream("aac", rate=16000, layout="mono") if audio_s else None
        for i, time_s in enumerate(times_s):
            frame = av.VideoFrame.from_ndarray(picture(i, size=size), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = round(time_s / TICK), TICK
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
        if tone is not None:
            write_tone(out, tone, audio_s)
    return path


def make_audio(path: Path, *, seconds: float = 2) -> Path:
    """Writes a file with sound and no picture."""
    with av.open(str(path), "w") as out:
        write_tone(out, out.add_stream("aac", rate=16000, layout="mono"), seconds)
    return path


def write_tone(out: av.container.OutputContainer, stream: av.AudioStream, seconds: float) -> None:
    wave = np.sin(np.arange(round(16000 * seconds)) / 6).astype(np.float32)
    for start in range(0, len(wave), 1024):
        frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], "fltp", "mono")
        frame.sample_rate, frame.pts = 16000, start
        frame.time_base = Fraction(1, 16000)
        out.mux(stream.encode(frame))
    out.mux(stream.encode(None))


def cut(source: Path, path: Path, *, part: float) -> Path:
    """Writes the first `part` (0 to 1) of a file's bytes."""
    data = source.read_bytes()
    path.write_bytes(data[: round(len(data) * part)])
    return path


def rot(source: Path, path: Path, *, start: float = 0.3, seed: int = 0) -> Path:
    """Writes a copy whose bytes from `start` (0 to 1) on are noise for a fifth of the file."""
    data = bytearray(source.read_bytes())
    first, count = round(len(data) * start), len(data) // 5
    data[first : first + count] = np.random.default_rng(seed).bytes(count)
    path.write_bytes(bytes(data))
    return path


def overstate(source: Path, path: Path, *, factor: float) -> Path:
    """Writes a copy of a Matroska file whose stated length is `factor` times as long."""
    data = bytearray(source.read_bytes())
    at = data.index(b"\x44\x89\x88") + 3  # element Duration, 8 bytes: a double
    data[at : at + 8] = struct.pack(">d", factor * struct.unpack(">d", data[at : at + 8])[0])
    path.write_bytes(bytes(data))
    return path


def replace_tail(source: Path, path: Path, count: int, data: bytes) -> Path:
    """Writes a copy in which the last `count` coded frames consist of `data`."""
    with av.open(str(source)) as old, av.open(str(path), "w") as new:
        stream = new.add_stream_from_template(old.streams.video[0])
        packets = [packet for packet in old.demux(old.streams.video[0]) if packet.size]
        for i, packet in enumerate(packets):
            copy = av.Packet(data if i >= len(packets) - count else bytes(packet))
            copy.pts, copy.dts, copy.time_base = packet.pts, packet.dts, packet.time_base
            copy.duration, copy.is_keyframe = packet.duration, packet.is_keyframe
            copy.stream = stream
            new.mux(copy)
    return path


def make_colour(path: Path, rgb: tuple[int, int, int], *, colorspace: int) -> Path:
    """Writes one frame of one colour, tagged with a colour space (1: BT.709, 5: BT.601)."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=10, options={"crf": "1"})
        stream.height, stream.width, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.colorspace = colorspace
        pixels = np.broadcast_to(np.array(rgb, np.uint8), (64, 64, 3)).copy()
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        frame = frame.reformat(format="yuv420p", dst_colorspace=colorspace)
        out.mux([*stream.encode(frame), *stream.encode(None)])
    return path


def _fast(codec: str) -> dict[str, str]:
    presets = {
        "libx264": {"preset": "veryfast", "crf": "28"},
        "libx265": {"preset": "ultrafast", "x265-params": "log-level=error"},
        "libsvtav1": {"preset": "8"},  # faster ones leave out changes of single cells
        "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"},
    }
    return presets.get(codec, {})


def bomb(path: Path, width: int, height: int) -> Path:
    """Writes a PNG of some hundred bytes that asks for width x height pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        end = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + end

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0" * 100_000, 9)
    parts = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + parts)
    return path
