"""Videos as people have them: mirrored, damaged in transmission, of changing size and rate."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from videos import write_audio, write_video

from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.processing.display_matrix import IDENTITY, read_matrix
from perception_rt.processing.frame_selection import is_uniform, select_plm_frames
from perception_rt.processing.image import load_image
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import decode_frames, load_frames, load_video

av = pytest.importorskip("av")

FILES = Path(__file__).parent / "files"
SPEC = TileSpec(tile_size=28)
ONE = 65536  # of a display matrix

# Orientation of EXIF: elements a, b, c, d of the matrix, and the same done to an array.
ORIENTATIONS = {
    1: ((1, 0, 0, 1), lambda image: image),
    2: ((-1, 0, 0, 1), np.fliplr),
    3: ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
    4: ((1, 0, 0, -1), np.flipud),
    5: ((0, 1, 1, 0), lambda image: image.swapaxes(0, 1)),
    6: ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),
    7: ((0, -1, -1, 0), lambda image: np.rot90(image, 2).swapaxes(0, 1)),
    8: ((0, -1, 1, 0), lambda image: np.rot90(image, 1)),
}


def matrix(a, b, c, d):
    return np.array([a, b, 0, c, d, 0, 0, 0, 2**30], np.int32)


@pytest.mark.parametrize("orientation", ORIENTATIONS)
@pytest.mark.parametrize("suffix", ["mp4", "mov"])
def test_all_orientations_of_a_display_matrix(tmp_path, orientation, suffix):
    elements, turned = ORIENTATIONS[orientation]
    plain = load_video(write_video(tmp_path / f"plain.{suffix}", frames=3), num_frames=2)
    path = tmp_path / f"turned.{suffix}"
    write_video(path, frames=3, matrix=matrix(*(ONE * e for e in elements)).tolist())
    found = load_video(path, num_frames=2)
    assert np.array_equal(found, [turned(frame) for frame in plain])
    tiles = load_frames(path, SPEC, num_frames=2)
    assert np.array_equal(tiles[0], load_image(found[0], SPEC.tile))


def test_matrices_of_other_kinds():
    assert read_matrix(matrix(3 * ONE, 0, 0, -7 * ONE).tobytes()) == (False, True, False)
    assert read_matrix(matrix(5, ONE, -ONE, -5).tobytes()) == (True, False, True)  # rounding
    half = round(ONE * 0.5**0.5)
    assert read_matrix(matrix(half, half, -half, half).tobytes()) == IDENTITY  # 45 degrees
    assert read_matrix(bytes(36)) == IDENTITY
    assert read_matrix(b"short") == IDENTITY
    assert read_matrix(matrix(-(2**31), 0, 0, -(2**31)).tobytes()) == (False, True, True)


def test_a_cover_picture_is_not_a_video(tmp_path):
    with pytest.raises(InputError, match="has no video stream, only a cover picture"):
        load_video(FILES / "audio_cover.m4a", num_frames=2)
    with pytest.raises(InputError, match=r"has no video stream$"):
        load_video(write_audio(tmp_path / "audio.mp4"), num_frames=2)


def test_a_picture_before_the_video_is_not_taken_for_it(tmp_path):
    path = tmp_path / "both.mkv"
    with av.open(str(path), "w") as container:
        picture = container.add_stream("mjpeg", rate=10)
        picture.width, picture.height, picture.pix_fmt = 80, 80, "yuvj420p"
        video = container.add_stream("mpeg4", rate=10)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for stream, count in ((picture, 1), (video, 12)):
            for i in range(count):
                pixels = np.full((stream.height, stream.width, 3), 20 * i, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode())
    frames = load_video(path, num_frames=12)
    assert frames.shape == (12, 48, 64, 3)
    assert np.all(np.diff(frames.mean((1, 2, 3))) > 10)


def test_a_lost_packet_costs_frames_not_the_file():
    frames = decode_frames(FILES / "lost.ts", num_frames=1024)
    distinct = 1 + sum(not np.array_equal(a, b) for a, b in pairwise(frames))
    assert distinct == 50
    assert len(load_frames(FILES / "lost.ts", SPEC)) == 32


@pytest.mark.parametrize("seed", range(6))
def test_any_lost_packets_cost_frames_not_the_file(tmp_path, seed):
    whole = write_video(tmp_path / "v.ts", frames=40).read_bytes()
    packets = [whole[at : at + 188] for at in range(0, len(whole), 188)]
    rng = np.random.default_rng(seed)
    for number in (1, 3):
        lost = set(rng.integers(8, len(packets), number).tolist())
        path = tmp_path / "lost.ts"
        path.write_bytes(b"".join(p for i, p in enumerate(packets) if i not in lost))
        assert load_video(path, num_frames=4).shape == (4, 48, 64, 3)
        assert 2 <= len(load_frames(path, SPEC, start_s=1, end_s=3)) <= 32


def test_a_transport_stream_without_frames_is_refused(tmp_path):
    whole = write_video(tmp_path / "v.ts", frames=10).read_bytes()
    path = tmp_path / "tables.ts"
    path.write_bytes(whole[: 188 * 3])
    with pytest.raises(InputError, match=r"^video .* (no frame|damaged)"):
        load_video(path, num_frames=2)


def test_the_size_of_frames_may_change():
    path = FILES / "webrtc.webm"
    frames = decode_frames(path, num_frames=16)
    shapes = [frame.shape for frame in frames]
    assert set(shapes) == {(240, 320, 3), (480, 640, 3)}
    assert shapes == sorted(shapes)
    assert load_video(path, num_frames=16).shape == (16, 240, 320, 3)
    tiles = load_frames(path, SPEC, num_frames=16)
    assert np.array_equal(tiles[-1], load_image(frames[-1], SPEC.tile))
    with pytest.raises(InputError, match="frames of 640x480 = 307200 pixels; the limit is 200000"):
        load_video(path, num_frames=2, limits=Limits(video_pixels=200_000))


def seconds_of(frames):
    """Times of frames of `vfr2.mp4`."""
    return [round(float(frame.mean()) / 8.5) for frame in frames]


def test_clips_of_a_variable_rate_are_selected_by_time():
    path = FILES / "vfr2.mp4"
    clip = {"start_s": 15, "end_s": 25}
    assert seconds_of(load_frames(path, SPEC, **clip)) == [14, 16, 18, 20, 22, 24]
    assert seconds_of(load_frames(path, SPEC, **clip, num_frames=3)) == [14, 20, 24]
    assert seconds_of(load_frames(path, SPEC, start_s=31)) == [30]
    spread = seconds_of(load_frames(path, SPEC, start_s=5, end_s=25))  # 21 seconds: 32 times
    assert len(spread) < 32
    assert {5, 6, 7, 8, 9, 12, 14, 16, 18, 20, 22, 24} <= set(spread)
    with pytest.raises(InputError, match="start_s 32 is after the end of the video, at 32 seconds"):
        load_frames(path, SPEC, start_s=32)


TIMES = [i / 25 for i in range(250)] + [12.0 + 2 * i for i in range(10)]  # of vfr2.mp4


@pytest.mark.parametrize(
    ("clip", "most", "expected"),
    [
        ((15, 25), 32, [14, 16, 18, 20, 22, 24]),
        ((16, 24), 32, [16, 18, 20, 22, 24]),
        ((15, 25), 3, [14, 20, 24]),
        ((15, 15.5), 8, [14]),
        ((29, None), 8, [28, 30]),
        ((31, 99), 8, [30]),
        ((None, 1), 2, [0, 1]),
        ((8, 14), 4, [8, 9.96, 12, 14]),
        ((0, 30), 4, [0, 9.96, 20, 30]),
        ((0, 30), 1, [0]),
    ],
)
def test_frames_of_a_clip_are_those_shown_at_its_times(clip, most, expected):
    total = len(TIMES)
    picked = select_plm_frames(total, total / 32, most, *clip, TIMES)
    assert [TIMES[i] for i in picked] == expected


def test_other_selections_stay_those_of_the_reference():
    total = len(TIMES)
    assert not is_uniform(TIMES)
    whole = select_plm_frames(total, total / 32, 32)
    assert select_plm_frames(total, total / 32, 32, times=TIMES) == whole
    steady = [i / 30 for i in range(300)]
    jitter = [t + 0.02 * (i % 2) for i, t in enumerate(steady)]
    for times in (steady, [round(t, 3) for t in steady], jitter, [0.0], [], [0.0] * 9):
        assert is_uniform(times)
    for clip in ((1, 2.5), (0, 9), (3, None)):
        expected = select_plm_frames(300, 30, 8, *clip)
        assert select_plm_frames(300, 30, 8, *clip, steady) == expected


def test_clips_of_a_variable_rate_stay_in_their_bounds():
    rng = np.random.default_rng(0)
    for _ in range(300):
        gaps = rng.choice([0.04, 0.04, 1.0, 3.0], rng.integers(3, 60))
        times = [0.0, *np.cumsum(gaps).tolist()]
        total, end = len(times), times[-1] + 1
        start = float(rng.uniform(0, times[-1]))
        stop = float(rng.uniform(start, end))
        most = int(rng.integers(1, 40))
        picked = select_plm_frames(total, total / end, most, start, stop, times)
        assert 1 <= len(picked) <= most
        assert picked == sorted(set(picked))
        if is_uniform(times):
            continue
        shown = [t for t, after in pairwise([*times, end]) if t <= stop and after > start]
        assert {times[i] for i in picked} <= set(shown)
        if len(shown) <= most and stop - start < most - 1:
            assert [times[i] for i in picked] == shown


def test_mirrored_files_show_what_a_player_shows():
    mirrored = load_video(FILES / "m_hflip.mp4", num_frames=4)
    turned = load_video(FILES / "m_rot90flip.mp4", num_frames=4)
    assert mirrored.shape == (4, 180, 320, 3)
    assert np.array_equal(mirrored[:, :, ::-1], turned.swapaxes(1, 2))  # both are one stored video
    with av.open(str(FILES / "m_hflip.mp4")) as container:
        stored = next(container.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(mirrored[0], stored[:, ::-1])


def test_a_damaged_only_key_frame_does_not_cost_the_file():
    frames = load_video(FILES / "lost_key.ts", num_frames=12)
    assert frames.shape == (12, 96, 160, 3)
    assert len({frame.tobytes() for frame in frames}) > 6
