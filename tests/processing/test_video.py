"""Frames are chosen as the reference does, and no video file gets more than it may."""

import builtins
import contextlib
import math
import os
import re
import time

import numpy as np
import pytest
from PIL import Image

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing import video
from perception_rt.processing.image import load_image
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import (
    load_frames,
    load_video,
    select_frames,
    select_plm_frames,
)

av = pytest.importorskip("av")

LEVELS = 12  # grey of frame i is 12 * i, so that a decoded frame tells its index
SPEC = TileSpec(tile_size=28)


def write_video(
    path, *, frames=20, size=(64, 48), codec="mpeg4", rotation=None, rate=10, **options
):
    width, height = size
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            pixels = np.full((height, width, 3), i * LEVELS % 256, np.uint8)
            pixels[:12, :12] = (255, 0, 0)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def write_audio(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        samples = np.zeros((1, 16_000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.sample_rate = 16_000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def indices_of(frames):
    """Which frames of `write_video` these are; their centres tell."""
    grey = frames[:, frames.shape[1] // 2, frames.shape[2] // 2, 1].astype(int)
    return [round(value / LEVELS) for value in grey]


def frames_message_of(source, limits=DEFAULT_LIMITS, spec=SPEC, **options):
    with pytest.raises(InputError) as caught:
        load_frames(source, spec, limits=limits, **options)
    assert caught.value.__cause__ is None
    return str(caught.value)


def message_of(source, num_frames=4, **limits):
    with pytest.raises(InputError) as caught:
        load_video(source, num_frames=num_frames, limits=Limits(**limits))
    assert caught.value.__cause__ is None
    return str(caught.value)


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
    count = video._Reader._count_packets
    monkeypatch.setattr(video._Reader, "_count_packets", lambda *a: count(*a) * 2)
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
        assert message_of(path) == f"video {path!r} is damaged or is not a video"
    assert "has no video stream" in message_of(write_audio(tmp_path / "audio.mp4"))


def test_paths_are_named_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of("no.mp4") == f"video 'no.mp4' cannot be read: {os.strerror(2)}"
    assert message_of("http://localhost/v.mp4").startswith("video 'http://localhost/v.mp4' cannot")
    assert message_of(".") == "video '.' is not a regular file"
    assert message_of(None) == "a video must be a path or an array, not NoneType"
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


def plm_frames_by_list(total, fps, max_frames, start_s=None, end_s=None):
    """The reference's rule on lists, for cases in which the reference has an answer."""
    first = 0 if start_s is None else int(start_s * fps)
    last = min(total - 1 if end_s is None else int(end_s * fps), total - 1)
    last = first + 1 if last == first else last
    positions = list(range(first, last + 1, round(fps)))
    if len(positions) < max_frames:
        positions = list(range(first, last + 1))
    number = min(max_frames, len(positions))
    step = (len(positions) - 1) / (number - 1) if number > 1 else 0
    return [positions[round(i * step)] for i in range(number)]


@pytest.mark.parametrize("max_frames", [1, 2, 8, 32])
@pytest.mark.parametrize("fps", [0.6, 1.0, 10, 23.976, 29.97, 240.0])
def test_plm_frames_equal_the_reference(fps, max_frames):
    for total in (2, 3, 7, 31, 32, 33, 300, 961, 1000, 12_345):
        for clip in ((None, None), (0, None), (0.5, 2.5), (None, 3), (1, 1), (0, 10**6)):
            if int((clip[0] or 0) * fps) >= total - 1:
                continue
            expected = plm_frames_by_list(total, fps, max_frames, *clip)
            assert select_plm_frames(total, fps, max_frames, *clip) == expected, (total, clip)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((40, 10, 4), [0, 10, 20, 30]),  # as many seconds as frames
        ((41, 10, 4), [0, 10, 30, 40]),  # 5 seconds, of which 4
        ((39, 10, 5), [0, 10, 19, 28, 38]),  # 4 seconds are too few: spread over all
        ((3, 10, 32), [0, 1, 2]),
        ((1, 10, 32), [0]),
        ((100, 10, 1), [0]),
        ((100, 10, 32, 9.9, 9.9), [99]),
        ((100, 10, 32, 5, 5), [50, 51]),
        ((100, 10, 3, 2, 6), [20, 40, 60]),
        ((10, 0.2, 4), [0, 3, 6, 9]),  # U12: a stride of 0
        ((10, 1e9, 4), [0, 3, 6, 9]),
        ((10, None, 4), [0, 3, 6, 9]),
        ((10, None, 32), list(range(10))),
    ],
)
def test_plm_frames_of_known_videos(arguments, expected):
    assert select_plm_frames(*arguments) == expected


def test_plm_frames_are_in_the_video_and_cost_what_they_return():
    """IMG-08: no list of an attacker's length."""
    start = time.perf_counter()
    for total in (1, 2, 33, 2**31, 2**62, 2**63 - 1):
        for fps in (1e-300, 0.5, 1.0, 29.97, 1e9, 2**31, None):
            for clip in ((None, None),) if fps is None else ((None, None), (0, 0), (0, 2**31)):
                picked = select_plm_frames(total, fps, 32, *clip)
                assert 1 <= len(picked) <= 32
                assert picked == sorted(picked)
                assert 0 <= picked[0] <= picked[-1] < total
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"total": 0}, "total must be"),
        ({"total": 10**400}, "total must be"),
        ({"max_frames": True}, "max_frames must be"),
        ({"fps": 0}, "fps must be"),
        ({"fps": -1.0}, "fps must be"),
        ({"fps": math.nan}, "fps must be"),
        ({"fps": math.inf}, "fps must be"),
        ({"fps": "10"}, "fps must be"),
        ({"start_s": -0.1}, "start_s must be"),
        ({"start_s": math.nan}, "start_s must be"),
        ({"end_s": math.inf}, "end_s must be"),
        ({"end_s": True}, "end_s must be"),
        ({"end_s": "1"}, "end_s must be"),
        ({"start_s": 5, "end_s": 4.5}, "end_s 4.5 is before start_s 5"),
        ({"start_s": 10}, "start_s 10 is after the end of the video, at 10 seconds"),
        ({"fps": None, "start_s": 1}, "need a video whose frames have times"),
    ],
)
def test_plm_frames_are_strict(change, message):
    with pytest.raises(InputError, match=message):
        select_plm_frames(**{"total": 100, "fps": 10, "max_frames": 32, **change})


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "ts"])
def test_frames_are_picked_by_the_clock_of_the_packets(tmp_path, suffix):
    path = write_video(tmp_path / f"v.{suffix}", frames=20, rate=5)  # 4 seconds
    for options in ({}, {"num_frames": 3}, {"start_s": 1, "end_s": 2.5}, {"start_s": 3.8}):
        expected = select_plm_frames(
            20, 5, options.get("num_frames", 32), options.get("start_s"), options.get("end_s")
        )
        frames = load_frames(path, SPEC, **options)
        assert frames.shape == (len(expected), 28, 28, 3)
        assert frames.dtype == np.uint8
        assert indices_of(frames) == expected
    assert indices_of(load_frames(path, TileSpec(tile_size=28, max_frames=4))) == [0, 5, 10, 15]
    assert "start_s 4 is after the end of the video, at 4 seconds" in frames_message_of(
        path, start_s=4
    )


def test_the_declared_rate_is_not_believed(tmp_path):
    path = tmp_path / "v.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(20):  # 1 a second, then 10
            pixels = np.full((48, 64, 3), i * LEVELS, np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = 1000 * i if i < 10 else min(9000 + 100 * (i - 9), 9999)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    # 20 frames in 10 seconds: every second one, and of these 5
    assert indices_of(load_frames(path, SPEC, num_frames=5)) == [0, 4, 8, 14, 18]
    assert indices_of(load_frames(path, SPEC, start_s=2, end_s=3)) == [4, 5, 6]


def test_rounding_does_not_move_a_clip():
    reader = video._Reader(av, None, "v", DEFAULT_LIMITS)
    assert reader._fps(20) is None
    reader._seconds = 4.000000000000001  # 20 / 4 would be 4.999999999999999
    assert select_plm_frames(20, reader._fps(20), 1, 1, 2) == [5]


def test_frames_are_squashed_as_images_are(tmp_path):
    path = write_video(tmp_path / "v.mp4", rotation=90, frames=4)
    whole = load_video(path, num_frames=4)
    assert whole.shape == (4, 64, 48, 3)
    expected = np.stack([load_image(frame, SPEC.tile) for frame in whole])
    assert np.array_equal(load_frames(path, SPEC), expected)
    assert np.array_equal(load_frames(whole, SPEC), expected)
    assert np.array_equal(load_frames(whole[::-1], SPEC, num_frames=2), expected[[3, 0]])


def test_frames_of_packets_that_are_not_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", frames=20, rate=10)
    count = video._Reader._count_packets
    monkeypatch.setattr(video._Reader, "_count_packets", lambda *a: count(*a) * 2)
    assert indices_of(load_frames(path, SPEC, num_frames=2)) == [0, 10]


def test_frames_are_held_one_at_a_time(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", frames=4)
    monkeypatch.setattr(video, "_MAX_RESULT_PIXELS", 64 * 48)
    assert "ask for fewer frames" in message_of(path)
    assert len(load_frames(path, SPEC)) == 4


@pytest.mark.parametrize("value", [0, -1, 33, 10**9, 2.0, True, "8", math.nan])
def test_number_of_tiles_of_a_video_is_checked(value):
    array = np.zeros((4, 8, 8, 3), np.uint8)
    assert frames_message_of(array, num_frames=value) == (
        "num_frames must be an integer from 1 to 32"
    )
    assert "from 1 to 3" in frames_message_of(array, Limits(video_frames=3), num_frames=4)
    assert len(load_frames(array, SPEC, limits=Limits(video_frames=3))) == 3


def test_bad_videos_have_no_frames(tmp_path):
    path = write_video(tmp_path / "v.mp4", frames=30)
    name = f"video {str(path)!r} "
    assert "longer than 2 seconds" in frames_message_of(path, Limits(video_seconds=2))
    assert "the limit is 3071" in frames_message_of(path, Limits(video_pixels=3071))
    data = path.read_bytes()
    for end in (0, 1, 100, len(data) // 2):
        path.write_bytes(data[:end])
        assert frames_message_of(path).startswith(name)
    rng = np.random.default_rng(1)
    for _ in range(40):  # in the tables of sizes and times, which are at the end
        changed = bytearray(data)
        for at in rng.integers(len(data) - 700, len(data), 3):
            changed[at] = int(rng.integers(0, 256))
        path.write_bytes(changed)
        with contextlib.suppress(InputError):
            assert 1 <= len(load_frames(path, SPEC, end_s=2)) <= 32
    assert frames_message_of(path, start_s=-1).startswith("start_s")  # before it is read
    assert "has no video stream" in frames_message_of(write_audio(tmp_path / "audio.mp4"))
    assert "cannot be read" in frames_message_of("no.mp4")
    assert "not NoneType" in frames_message_of(None)
    for array in (np.zeros((4, 8, 8), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        assert "a video array must be" in frames_message_of(array)
    array = np.zeros((4, 8, 8, 3), np.uint8)
    assert "whose frames have times" in frames_message_of(array, end_s=1)
