"""Frames are selected as in the reference, and no video file exceeds the limits."""

import builtins
import contextlib
import math
import os
import re
import time

import numpy as np
import pytest
from PIL import Image
from videos import double_packets, indices_of, message_of, write_audio, write_video

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import Limits
from perception_rt.processing.video import (
    load_video,
    select_frames,
)

av = pytest.importorskip("av")


@pytest.mark.parametrize("total", [1, 2, 5, 8, 9, 20, 100, 12_345])
@pytest.mark.parametrize("num_frames", [1, 2, 3, 8, 32])
def test_select_frames(total, num_frames):
    indices = select_frames(total, num_frames)
    assert len(indices) == num_frames
    if num_frames == 1:
        assert indices == [total // 2]
    else:
        assert indices == [int(i * (total - 1) / (num_frames - 1)) for i in range(num_frames)]
        assert indices[0] == 0
        assert indices[-1] == total - 1


def test_select_frames_costs_what_it_returns():
    start = time.perf_counter()
    assert select_frames(2**62, 3) == [0, (2**62 - 1) // 2, 2**62 - 1]
    assert time.perf_counter() - start < 0.1


@pytest.mark.parametrize("value", [0, -1, 1.0, math.nan, True, None, "8"])
def test_select_frames_is_strict(value):
    with pytest.raises(InputError, match="total"):
        select_frames(value, 4)
    with pytest.raises(InputError, match="num_frames"):
        select_frames(4, value)


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("mpeg4", "mp4"),
        ("mpeg4", "avi"),
        ("mpeg4", "mkv"),
        ("mpeg4", "ts"),
        ("libx264", "mp4"),  # with frames out of presentation order
        ("libx264", "mkv"),
        ("libvpx-vp9", "webm"),
    ],
)
def test_files_yield_the_selected_frames(tmp_path, codec, suffix):
    if codec not in av.codecs_available:
        pytest.skip(f"this build of PyAV has no {codec}")
    path = write_video(tmp_path / f"v.{suffix}", codec=codec)
    for num_frames in (1, 2, 8, 20, 32):
        frames = load_video(path, num_frames=num_frames)
        assert frames.shape == (num_frames, 48, 64, 3)
        assert frames.dtype == np.uint8
        assert indices_of(frames) == select_frames(20, num_frames)
    assert np.array_equal(load_video(str(path), num_frames=8), load_video(path, num_frames=8))


def test_colours_are_rgb(tmp_path):
    frames = load_video(write_video(tmp_path / "v.mp4"), num_frames=2)
    red, green, blue = frames[0, 4, 4].tolist()
    assert red > 200
    assert max(green, blue) < 60


@pytest.mark.parametrize(
    ("rotation", "shape", "corner"),
    [
        (0, (48, 64), (4, 4)),
        (90, (64, 48), (-4, 4)),
        (180, (48, 64), (-4, -4)),
        (-90, (64, 48), (4, -4)),
    ],
)
def test_rotation_is_applied(tmp_path, rotation, shape, corner):
    frames = load_video(write_video(tmp_path / "v.mp4", rotation=rotation), num_frames=2)
    assert frames.shape[1:3] == shape
    assert frames[0][corner][0] > 200


def test_packets_that_are_not_frames_are_not_counted(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", frames=10)
    double_packets(monkeypatch)
    assert indices_of(load_video(path, num_frames=4)) == select_frames(10, 4)


def test_arrays_yield_the_selected_frames():
    array = np.arange(20, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    assert load_video(array, num_frames=8)[:, 0, 0, 0].tolist() == select_frames(20, 8)
    assert load_video(array[::-1], num_frames=3)[:, 0, 0, 0].tolist() == [19, 10, 0]
    picked = load_video(array, num_frames=2)
    picked[:] = 7
    assert array[0, 0, 0, 0] == 0


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 3, 8, 8), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((4, 8, 8, 3), np.float32),
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((4, 0, 8, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_named(array):
    message = message_of(array)
    assert str(array.dtype) in message
    assert str(array.shape) in message


def test_limits(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=30)  # 3 seconds
    array = np.zeros((4, 8, 8, 3), np.uint8)
    size = path.stat().st_size
    assert load_video(
        path, num_frames=4, limits=Limits(video_frames=4, video_pixels=64 * 48, video_bytes=size)
    ).shape == (4, 48, 64, 3)
    for source in (path, array):
        assert "from 1 to 3" in message_of(source, video_frames=3)
    assert f"has {size} bytes" in message_of(path, video_bytes=size - 1)
    assert "3072 pixels; the limit is 3071" in message_of(path, video_pixels=64 * 48 - 1)
    assert "64 pixels; the limit is 63" in message_of(array, video_pixels=63)
    assert "longer than 2 seconds" in message_of(path, video_seconds=2)
    fast = write_video(tmp_path / "fast.mp4", frames=30, rate=240)
    assert "has more than 24 frames" in message_of(fast, video_seconds=0.1)


def test_a_result_of_gigabytes_is_refused():
    frame = np.zeros((1, 1, 1, 3), np.uint8)
    huge = np.broadcast_to(frame, (10, 4000, 8000, 3))
    assert "ask for fewer frames" in message_of(huge, num_frames=1000)


@pytest.mark.parametrize("value", [0, -1, 1025, 2.0, True, None, "8", math.nan])
def test_number_of_frames_is_checked(value):
    assert "num_frames" in message_of(np.zeros((4, 8, 8, 3), np.uint8), num_frames=value)


@pytest.mark.parametrize("options", [{}, {"movflags": "faststart"}], ids=["tail", "faststart"])
def test_a_cut_mp4_is_refused(tmp_path, options):
    path = write_video(tmp_path / "v.mp4", frames=40, **options)
    data = path.read_bytes()
    ends = [0, 1, 100, 1000, len(data) // 2, len(data) * 3 // 4]
    if options:  # without, the last bytes are a comment
        ends.append(len(data) - 10)
    for end in ends:
        path.write_bytes(data[:end])
        assert message_of(path).startswith(f"video {str(path)!r} ")


def test_a_cut_matroska_file_is_a_shorter_video(tmp_path):
    path = write_video(tmp_path / "v.mkv", frames=20)
    path.write_bytes(path.read_bytes()[:-400])
    frames = load_video(path, num_frames=2)
    assert 0 < indices_of(frames)[1] < 19


def test_declared_numbers_are_not_believed(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=5)
    data = path.read_bytes()
    for box, offset in ((b"mvhd", 20), (b"mdhd", 20), (b"tkhd", 24)):  # durations
        at = data.index(box) + offset
        data = data[:at] + b"\x7f\xff\xff\xff" + data[at + 4 :]
    path.write_bytes(data)
    assert indices_of(load_video(path, num_frames=5)) == [0, 1, 2, 3, 4]


def test_the_rate_does_not_matter(tmp_path):
    for rate in (1, 240):
        path = write_video(tmp_path / "v.mp4", rate=rate)
        assert indices_of(load_video(path, num_frames=4)) == select_frames(20, 4)
    data = path.read_bytes()
    at = data.index(b"mdhd") + 16
    path.write_bytes(data[:at] + bytes(4) + data[at + 4 :])  # a clock of 0 ticks a second
    start = time.perf_counter()
    with contextlib.suppress(InputError):
        assert indices_of(load_video(path, num_frames=4)) == select_frames(20, 4)
    assert time.perf_counter() - start < 5


def test_damaged_frames_do_no_harm(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=10, codec="mpeg4")
    data = path.read_bytes()
    rng = np.random.default_rng(0)
    outcomes = set()
    for _ in range(60):
        changed = bytearray(data)
        for at in rng.integers(0, len(data), 20):
            changed[at] = int(rng.integers(0, 256))
        path.write_bytes(changed)
        try:
            outcomes.add(load_video(path, num_frames=4).dtype == np.uint8)
        except InputError as error:
            assert not re.search(r"(?<!\d)0x[0-9a-f]{4,}", str(error))
            outcomes.add(False)
    assert outcomes == {True, False}


def test_what_is_not_a_video_is_refused(tmp_path):
    target = write_video(tmp_path / "target.ts")
    (tmp_path / "list.m3u8").write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{target}\n#EXT-X-ENDLIST\n"
    )
    (tmp_path / "list.ffconcat").write_text(f"ffconcat version 1.0\nfile '{target.name}'\n")
    (tmp_path / "text.mp4").write_text("not a video")
    (tmp_path / "empty.mp4").write_bytes(b"")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "still.gif")
    for name in ("list.m3u8", "list.ffconcat", "text.mp4", "empty.mp4", "still.png", "still.gif"):
        path = str(tmp_path / name)
        assert message_of(path) == (
            f"video {path!r} is damaged or is not a video: MP4, MOV, Matroska, WebM, AVI and "
            "MPEG-TS files can be read"
        )
    assert "has no video stream" in message_of(write_audio(tmp_path / "audio.mp4"))


def test_paths_are_named_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of("no.mp4") == f"video 'no.mp4' cannot be read: {os.strerror(2)}"
    assert message_of("http://localhost/v.mp4").startswith("video 'http://localhost/v.mp4' cannot")
    assert message_of(".") == "video '.' is not a regular file"
    assert message_of(None) == "a video must be a path, bytes or an array, not NoneType"
    if hasattr(os, "mkfifo"):
        os.mkfifo("pipe")
        assert message_of("pipe") == "video 'pipe' is not a regular file"


def test_without_pyav_files_need_an_install_and_arrays_do_not(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_av(name, *args):
        if name == "av":
            raise ModuleNotFoundError(name)
        return real(name, *args)

    path = write_video(tmp_path / "v.mp4", frames=2)
    monkeypatch.setattr(builtins, "__import__", without_av)
    with pytest.raises(BackendError, match=r'pip install "perception_rt\[video\]"'):
        load_video(path, num_frames=2)
    assert load_video(np.zeros((4, 8, 8, 3), np.uint8), num_frames=2).shape == (2, 8, 8, 3)


def test_bytes_are_decoded_like_their_file(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=4)
    data = path.read_bytes()
    np.testing.assert_array_equal(load_video(data, num_frames=3), load_video(path, num_frames=3))
    assert message_of(b"no video").startswith("video is damaged or is not a video: MP4, MOV, ")
    with pytest.raises(InputError, match=f"video has {len(data)} bytes; the limit is 10 bytes"):
        load_video(data, num_frames=1, limits=Limits(video_bytes=10))
