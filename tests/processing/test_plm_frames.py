"""Frames for language models are selected as in the reference."""

import contextlib
import math
import time

import numpy as np
import pytest
from videos import LEVELS, double_packets, indices_of, message_of, write_audio, write_video

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing import video
from perception_rt.processing.image import load_image
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import (
    frame_rate,
    load_frames,
    load_video,
    select_plm_frames,
)

av = pytest.importorskip("av")

SPEC = TileSpec(tile_size=28)


def frames_message_of(source, limits=DEFAULT_LIMITS, spec=SPEC, **options):
    with pytest.raises(InputError) as caught:
        load_frames(source, spec, limits=limits, **options)
    assert caught.value.__cause__ is None
    return str(caught.value)


def plm_frames_by_list(total, fps, max_frames, start_s=None, end_s=None):
    """The reference's rule on lists, for cases that the reference supports."""
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
        ((41, 10, 4), [0, 10, 30, 40]),  # 4 of 5 seconds
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
    """IMG-08: no list whose length an attacker controls."""
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
    assert indices_of(load_frames(path, SPEC, start_s=2, end_s=3)) == [2, 3]  # by time


def test_rounding_does_not_move_a_clip():
    assert frame_rate(20, 0.0) is None
    fps = frame_rate(20, 4.000000000000001)  # the quotient is 4.999999999999999
    assert select_plm_frames(20, fps, 1, 1, 2) == [5]


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
    double_packets(monkeypatch)
    assert indices_of(load_frames(path, SPEC, num_frames=2)) == [0, 10]


def test_frames_are_held_one_at_a_time(tmp_path, monkeypatch):
    path = write_video(tmp_path / "v.mp4", frames=4)
    monkeypatch.setattr(video, "MAX_RESULT_PIXELS", 64 * 48)
    assert "ask for fewer frames" in message_of(path)
    assert len(load_frames(path, SPEC)) == 4


@pytest.mark.parametrize("value", [0, -1, 33, 10**9, 2.0, True, "8", math.nan])
def test_number_of_tiles_of_a_video_is_checked(value):
    array = np.zeros((4, 8, 8, 3), np.uint8)
    message = frames_message_of(array, num_frames=value)
    assert message.startswith("num_frames must be an integer from 1 to 32, not ")
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
    for _ in range(40):  # in the tables of sizes and times, at the end
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
