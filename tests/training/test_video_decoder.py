"""Another decoder than PyAV gives the same frames, and PyAV decodes what it cannot."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from perception_rt.errors import InputError
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import load_frames, load_video
from training.data.media import MediaFolders
from training.data.records import read_record
from training.data.video_decoder import TorchcodecDecoder, frame_decoder

av = pytest.importorskip("av")

FILES = Path(__file__).parents[1] / "processing" / "files"
SPEC = TileSpec(tile_size=28)


class FakeVideoDecoder:
    """The part of torchcodec's interface that is used, on PyAV; counts what it decodes."""

    decoded: list[int] = []  # noqa: RUF012 - reset by each test
    failure: Exception | None = None
    extra = 0

    def __init__(self, file, *, stream_index, dimension_order, num_ffmpeg_threads, seek_mode):
        assert (dimension_order, num_ffmpeg_threads, seek_mode) == ("NHWC", 1, "exact")
        if self.failure is not None:
            raise self.failure
        with av.open(file) as container:
            stream = container.streams[stream_index]
            self._frames = [f.to_ndarray(format="rgb24") for f in container.decode(stream)]

    def __len__(self):
        return len(self._frames) + self.extra

    def get_frames_at(self, indices):
        self.decoded.extend(indices)
        return SimpleNamespace(data=torch.from_numpy(np.stack([self._frames[i] for i in indices])))


@pytest.fixture
def fake(monkeypatch):
    monkeypatch.setattr(FakeVideoDecoder, "decoded", [])
    return FakeVideoDecoder


def write(path, frames=20, rotation=None, codec="mpeg4", depth="yuv420p"):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, depth
        if rotation is not None:
            stream.set_display_rotation(rotation)
        for i in range(frames):
            pixels = np.full((48, 64, 3), 12 * i, np.uint8)
            pixels[:12, :20] = (200, 30, 9 * i)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_only_the_selected_frames_are_decoded(tmp_path, fake):
    path, decoder = write(tmp_path / "v.mp4"), TorchcodecDecoder(fake)
    assert np.array_equal(
        load_video(path, num_frames=3, decoder=decoder), load_video(path, num_frames=3)
    )
    assert fake.decoded == [0, 9, 19]
    clip = {"start_s": 0.5, "end_s": 1.0, "num_frames": 2}
    assert np.array_equal(
        load_frames(path, SPEC, **clip, decoder=decoder), load_frames(path, SPEC, **clip)
    )
    assert fake.decoded[3:] == [5, 10]
    repeated = load_video(path, num_frames=40, decoder=decoder)  # of 20 frames
    assert np.array_equal(repeated, load_video(path, num_frames=40))


@pytest.mark.parametrize("name", ["lost.ts", "webrtc.webm", "m_hflip.mp4", "turned.mp4"])
def test_pyav_decodes_what_the_other_decoder_may_not_get_right(tmp_path, fake, name):
    path = write(tmp_path / name, rotation=90) if name == "turned.mp4" else FILES / name
    for load in (load_video, lambda path, **options: load_frames(path, SPEC, **options)):
        expected = load(path, num_frames=4)
        assert np.array_equal(load(path, num_frames=4, decoder=TorchcodecDecoder(fake)), expected)


@pytest.mark.parametrize("change", [{"failure": RuntimeError("no")}, {"extra": 1}])
def test_pyav_decodes_when_the_other_decoder_fails(tmp_path, fake, monkeypatch, change):
    path = write(tmp_path / "v.mp4")
    for name, value in change.items():
        monkeypatch.setattr(fake, name, value)
    frames = load_video(path, num_frames=4, decoder=TorchcodecDecoder(fake))
    assert np.array_equal(frames, load_video(path, num_frames=4))
    assert fake.decoded == []


def test_files_are_checked_before_the_other_decoder_sees_them(tmp_path, fake):
    path, decoder = write(tmp_path / "v.mp4"), TorchcodecDecoder(fake)
    path.write_bytes(path.read_bytes()[:-600])
    for bad in (path, FILES / "audio_cover.m4a"):
        with pytest.raises(InputError):
            load_video(bad, num_frames=2, decoder=decoder)
    assert fake.decoded == []


def test_training_works_without_torchcodec(tmp_path, monkeypatch):
    write(tmp_path / "v.mp4", frames=6)
    for module in ("torchcodec", "torchcodec.decoders"):
        monkeypatch.setitem(sys.modules, module, None)
    frame_decoder.cache_clear()
    assert frame_decoder() is None
    record = {"video": "v.mp4", "text": "It gets brighter."}
    _, tiles = read_record(record, MediaFolders((tmp_path,)), SPEC)
    frame_decoder.cache_clear()
    assert np.array_equal(tiles, load_frames(tmp_path / "v.mp4", SPEC))


def test_training_uses_torchcodec(tmp_path, fake, monkeypatch):
    write(tmp_path / "v.mp4", frames=6)
    monkeypatch.setitem(sys.modules, "torchcodec", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", SimpleNamespace(VideoDecoder=fake))
    frame_decoder.cache_clear()
    record = {"video": "v.mp4", "text": "It gets brighter."}
    _, tiles = read_record(record, MediaFolders((tmp_path,)), SPEC)
    frame_decoder.cache_clear()
    assert np.array_equal(tiles, load_frames(tmp_path / "v.mp4", SPEC))
    assert fake.decoded == list(range(6))


MADE = {
    "v.mp4": {},
    "quarter.mp4": {"rotation": 90},
    "half.mp4": {"rotation": 180},
    "three.mp4": {"rotation": -90},
    "reordered.mkv": {"codec": "libx264"},
    "reordered.avi": {"codec": "libx264"},  # without times of presentation
    "deep.mkv": {"codec": "libx264", "depth": "yuv420p10le"},
}
FOUND = ("vfr2.mp4", "m_hflip.mp4", "m_rot90flip.mp4", "webrtc.webm", "lost.ts")


@pytest.mark.parametrize("name", [*MADE, *FOUND])
def test_torchcodec_equals_pyav(tmp_path, name):
    decoders = pytest.importorskip("torchcodec.decoders", exc_type=(ImportError, RuntimeError))
    path = write(tmp_path / name, **MADE[name]) if name in MADE else FILES / name
    frames = load_video(path, num_frames=16, decoder=TorchcodecDecoder(decoders.VideoDecoder))
    expected = load_video(path, num_frames=16)
    assert np.abs(frames.astype(int) - expected.astype(int)).max() <= 2
