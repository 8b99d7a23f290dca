"""Pairs are read from files once per epoch, from any position; unusable ones are counted."""

import io
import json
import tarfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PerceptionError
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec, load_image
from training.data.pair_batch import Pair, collate_pairs
from training.data.pairs import PairSource, crop_box
from training.data.shards import Index, Tar, expand
from training.distributed import Group
from training.recipe.pairs import PairDataConfig
from training.recipe.schema import load_config
from training.tasks.pair_stream import pair_stream

TINY = Path(__file__).parents[2] / "training" / "configs" / "pe_tiny.yaml"
SIZE = 16
Members = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def model() -> PeConfig:
    found = load_config(TINY).model
    assert isinstance(found, PeConfig)
    return found


def picture(number: int, size: tuple[int, int] = (20, 12), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def sample(number: int) -> Members:
    """Returns the members of a sample; samples vary in image and caption format."""
    ending = ("png", "jpg", "webp")[number % 3]
    image = picture(number, kind={"jpg": "JPEG"}.get(ending, ending.upper()))
    caption = f"number {number}"
    text = (
        ("txt", caption.encode())
        if number % 2
        else ("json", json.dumps({"caption": caption}).encode())
    )
    return [(f"x/{number:03d}.{ending}", image), (f"x/{number:03d}.{text[0]}", text[1])]


def write_tar(path: Path, members: Members) -> None:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def shards(folder: Path, counts: list[int]) -> str:
    number = 0
    for index, count in enumerate(counts):
        members = [m for i in range(number, number + count) for m in sample(i)]
        write_tar(folder / f"s-{index:02d}.tar", members)
        number += count
    return str(folder / f"s-{{00..{len(counts) - 1:02d}}}.tar")


def jsonl(folder: Path, count: int) -> str:
    for number in range(count):
        (folder / f"{number}.png").write_bytes(picture(number))
    key = ("caption", "text")
    lines = [{"image": f"{i}.png", key[i % 2]: f"number {i}"} for i in range(count)]
    path = folder / "pairs.jsonl"
    path.write_text("\n\n".join(json.dumps(line) for line in lines))
    return str(path)


def source(model: PeConfig, path: str, lanes: int, **settings: object) -> PairSource:
    dataset = "jsonl" if path.endswith("jsonl") else "webdataset"
    config = PairDataConfig(dataset=dataset, path=path, batch_size=lanes, **settings)  # type: ignore[arg-type]
    return PairSource(config, model, seed=3, sizes=lambda _: (SIZE,))


def number_of(pair: Pair) -> int:
    return int("".join(text_of(pair).split()[1:]))  # every digit is a token


def text_of(pair: Pair) -> str:
    return ClipTokenizer(context_length=24).decode(pair.tokens.tolist()).strip()


@pytest.mark.parametrize(
    ("counts", "lanes", "epoch"),
    [
        ([8, 8], 2, 8),  # a shard each
        ([4, 4, 4, 4], 2, 8),  # two shards each
        ([12], 4, 3),  # one for all
        ([6, 6], 4, 3),  # two lanes to a shard
    ],
)
def test_every_sample_comes_once_per_epoch(
    model: PeConfig, tmp_path: Path, counts: list[int], lanes: int, epoch: int
) -> None:
    reader = source(model, shards(tmp_path, counts), lanes)
    epochs = []
    for start in (0, epoch, 2 * epoch):
        positions = range(start, start + epoch)
        epochs.append([number_of(reader.read(l, p).row) for p in positions for l in range(lanes)])
    for numbers in epochs:
        assert sorted(numbers) == list(range(sum(counts)))
    assert epochs[0] != epochs[1] != epochs[2]


def test_lanes_of_unequal_shards_end_their_epochs_by_themselves(
    model: PeConfig, tmp_path: Path
) -> None:
    reader = source(model, shards(tmp_path, [2, 3, 4]), 3)
    seen = Counter(number_of(reader.read(lane, p).row) for lane in range(3) for p in range(120))
    assert sorted(seen) == list(range(9))
    # Shards change lanes between epochs, so in the long run no sample comes much more often.
    assert max(seen.values()) < 2 * min(seen.values())


def test_a_row_is_a_function_of_lane_and_position(model: PeConfig, tmp_path: Path) -> None:
    """TRN-01: a resumed run reads the same rows, in any order, as an uninterrupted one."""
    path = shards(tmp_path, [3, 5, 4, 2])
    settings = {"crop_min": 0.3, "flip": True}
    in_order = source(model, path, 2, **settings)
    rows = {(lane, p): in_order.read(lane, p).row for p in range(30) for lane in range(2)}
    anywhere = source(model, path, 2, **settings)
    for lane, position in [(1, 29), (1, 3), (0, 17), (1, 28), (0, 0), (0, 29)]:
        read = anywhere.read(lane, position)
        expected = rows[lane, position]
        assert read.position == position + 1
        assert read.row.name == expected.name
        assert np.array_equal(read.row.views[0], expected.views[0])
        assert torch.equal(read.row.tokens, expected.tokens)


@pytest.mark.parametrize(("counts", "lanes", "scans"), [([20], 4, 1), ([5, 5, 5, 5], 2, 8)])
def test_reading_on_opens_every_shard_once_per_epoch_at_most(
    model: PeConfig, tmp_path: Path, counts: list[int], lanes: int, scans: int
) -> None:
    reader = source(model, shards(tmp_path, counts), lanes)
    index, opened = reader.format.index, []

    class Counting(Tar):
        def index(self, shard: Path) -> Index:
            opened.append(shard)
            return index(shard)

    reader.format = Counting()
    for position in range(2 * 20 // lanes):
        for lane in range(lanes):
            reader.read(lane, position)
    assert len(opened) <= scans


def test_a_run_stops_where_the_share_of_unusable_samples_is_too_large(
    model: PeConfig, tmp_path: Path
) -> None:
    """TRN-06."""
    path = Path(jsonl(tmp_path, 45))
    path.write_text(path.read_text() + '\n{"image": "none.png", "caption": "x"}' * 5)
    settings = ["data.dataset=jsonl", f"data.path={path}", f"data.root={tmp_path}"]
    for bad_fraction, ends in ((0.05, True), (0.2, False)):
        config = load_config(TINY, [*settings, f"data.bad_fraction={bad_fraction}"])
        stream = pair_stream(
            config.data, model, config.run, sizes=lambda _: (SIZE,), parts=1, group=Group()
        )
        text = r"^unusable samples: [1-5] different, in \d+ of 1\d\d .*an image is missing"
        error = pytest.raises(PerceptionError, match=text)
        with error if ends else nullcontext():
            for _ in range(5):
                stream.next()
        assert 0 < stream.bad_samples <= 5
        stream.close()


def test_a_stream_resumes_where_it_was_also_on_two_ranks(model: PeConfig, tmp_path: Path) -> None:
    config = load_config(
        TINY,
        [
            "data.dataset=webdataset",
            f"data.path={shards(tmp_path, [5, 4, 3])}",
            "data.batch_size=4",
        ],
    )

    def stream(rank: int = 0, ranks: int = 1):  # type: ignore[no-untyped-def]
        return pair_stream(
            config.data,
            config.model,
            config.run,
            sizes=lambda _: (SIZE,),
            parts=1,
            group=Group(rank=rank, ranks=ranks),
        )

    whole = stream()
    for _ in range(7):
        whole.next()
    state = whole.state()
    assert state["positions"].tolist() == [7] * 4
    expected = whole.next()[0]
    found = []
    for rank in range(2):
        half = stream(rank, 2)
        half.load_state(state)
        found.append(half.next()[0])
    assert found[0].names + found[1].names == expected.names
    assert torch.equal(torch.cat([f.pixels for f in found]), expected.pixels)


def test_jsonl_gives_what_the_runtime_sees_of_the_same_file(
    model: PeConfig, tmp_path: Path
) -> None:
    reader = source(model, jsonl(tmp_path, 6), 2, root=str(tmp_path))
    rows = [reader.read(lane, position).row for position in range(3) for lane in range(2)]
    assert sorted(number_of(row) for row in rows) == list(range(6))
    for row in rows:
        spec = ImageSpec(height=SIZE, width=SIZE)
        expected = load_image(tmp_path / f"{number_of(row)}.png", spec)
        assert np.array_equal(row.views[0][0], expected)
        assert row.name == f"pairs.jsonl line {2 * number_of(row) + 1}"


def test_unusable_lines_are_counted_and_replaced(model: PeConfig, tmp_path: Path) -> None:
    """TRN-06."""
    path = Path(jsonl(tmp_path, 40))
    (tmp_path / "cut.png").write_bytes(picture(0)[:60])
    lines = [
        "{broken",
        "[1]",
        '{"caption": "number 1"}',
        '{"image": 7, "caption": "number 1"}',
        '{"image": "1.png"}',
        '{"image": "1.png", "caption": " "}',
        '{"image": "none.png", "caption": "number 1"}',
        '{"image": "cut.png", "caption": "number 1"}',
        json.dumps({"image": "1.png", "caption": "x " * 40_000}),
        '{"video": "none.mp4", "caption": "number 1"}',
    ]
    path.write_text(path.read_text() + "\n" + "\n".join(lines))
    reader = source(model, str(path), 2, root=str(tmp_path))
    reads = [reader.read(lane, position) for position in range(25) for lane in range(2)]
    assert Counter(sample.reason for read in reads for sample in read.bad) == {
        "not JSON": 1,
        "not a JSON object": 1,
        "no image or video": 1,
        "the path of an image is not text": 1,
        "no caption": 2,
        "an image is missing": 1,
        "unreadable image": 1,
        "caption too long": 1,
        "a video is missing": 1,
    }
    assert {number_of(read.row) for read in reads} == set(range(40))
    assert all(read.position == 1 + i // 2 for i, read in enumerate(reads))
    assert sum(read.seen for read in reads) == 50


def test_unusable_members_are_counted_and_others_ignored(model: PeConfig, tmp_path: Path) -> None:
    """TRN-06."""
    members = [m for i in range(8) for m in sample(i)]
    members += [("x/000.cls", b"7"), ("x/readme.md", b"#"), ("x/000.seg.png", b"no")]
    members += [("x/a.png", picture(0)), ("x/b.txt", b"number 1")]
    members += [("x/c.png", b"junk"), ("x/c.txt", b"number 1")]
    members += [("x/d.png", picture(0)), ("x/d.json", b"[]")]
    write_tar(tmp_path / "s.tar", members)
    reader = source(model, str(tmp_path / "s.tar"), 2)
    reads = [reader.read(lane, position) for position in range(6) for lane in range(2)]
    assert Counter(sample.reason for read in reads for sample in read.bad) == {
        "no caption": 1,
        "no image": 1,
        "unreadable image": 1,
        "not a JSON object": 1,
    }
    assert {number_of(read.row) for read in reads} == set(range(8))


def test_a_run_stops_where_too_much_is_unusable(model: PeConfig, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text("{}\n" * 300)
    with pytest.raises(PerceptionError, match=r"100 samples in a row are unusable.*no image"):
        source(model, str(path), 2).read(0, 0)


def test_unusable_files_are_one_clear_error(model: PeConfig, tmp_path: Path) -> None:
    whole = tmp_path / "whole.tar"
    write_tar(whole, [m for i in range(4) for m in sample(i)])
    (tmp_path / "cut.tar").write_bytes(whole.read_bytes()[:1300])
    (tmp_path / "junk.tar").write_bytes(b"junk" * 500)
    (tmp_path / "none.jsonl").write_text("")
    for name, message in (
        ("cut.tar", r"cut\.tar is damaged, or not an uncompressed tar file"),
        ("junk.tar", r"junk\.tar is damaged"),
        ("none.jsonl", "has 0 samples"),
        ("missing.tar", "missing.tar' is not a file"),
        ("no-*.tar", "matches no file"),
    ):
        with pytest.raises(InputError, match=message):
            source(model, str(tmp_path / name), 2).read(0, 0)
    with pytest.raises(InputError, match="4 samples, too few for 5 of the 5 rows"):
        source(model, str(whole), 5).read(0, 0)
    with pytest.raises(InputError, match=r"data\.path must name the files"):
        PairDataConfig(dataset="jsonl")


def test_patterns(tmp_path: Path) -> None:
    for name in ("a-08.tar", "a-09.tar", "a-10.tar", "b-1.tar"):
        (tmp_path / name).touch()

    def names(pattern: str) -> list[str]:
        return [path.name for path in expand(str(tmp_path / pattern))]

    assert names("a-{08..10}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar"]
    assert names("{a-09,b-1}.tar") == ["a-09.tar", "b-1.tar"]
    assert names("{b,a}-*.tar") == ["b-1.tar", "a-08.tar", "a-09.tar", "a-10.tar"]


def test_crops_lie_within_the_image_and_keep_enough_of_it() -> None:
    boxes = [crop_box(np.random.default_rng(i), 200, 100, 0.5) for i in range(500)]
    shares = [(r - l) * (b - t) / 20_000 for l, t, r, b in boxes]
    assert all(0 <= l < r <= 200 and 0 <= t < b <= 100 for l, t, r, b in boxes)
    # A drawn side may exceed the image's by the root of the ratio; it is then clipped.
    assert 0.5 * (3 / 4) ** 0.5 <= min(shares) < 0.55
    assert max(shares) > 0.9
    assert crop_box(np.random.default_rng(0), 1, 1, 0.01) == (0, 0, 1, 1)


def test_flips_and_crops_are_off_by_default(model: PeConfig, tmp_path: Path) -> None:
    path = jsonl(tmp_path, 8)
    plain = source(model, path, 2, root=str(tmp_path))
    flipping = source(model, path, 2, root=str(tmp_path), flip=True)
    cropping = source(model, path, 2, root=str(tmp_path), crop_min=0.5)
    mirrored = 0
    for position in range(4):
        image, other, part = (s.read(0, position).row.views[0] for s in (plain, flipping, cropping))
        turned = np.array_equal(other, image[:, :, ::-1])
        assert turned or np.array_equal(other, image)
        assert not np.array_equal(part, image)
        mirrored += turned
    assert 0 < mirrored < 4


def test_sizes_follow_the_position(model: PeConfig, tmp_path: Path) -> None:
    config = PairDataConfig(dataset="webdataset", path=shards(tmp_path, [6]), batch_size=2)
    reader = PairSource(config, model, seed=0, sizes=lambda step: (8,) if step < 3 else (24, 16))
    shapes = [[v.shape for v in reader.read(0, position).row.views] for position in (2, 3)]
    assert shapes == [[(1, 8, 8, 3)], [(1, 24, 24, 3), (1, 16, 16, 3)]]


def write_video(path: Path, frames: int) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for i in range(frames):
            pixels = np.full((32, 32, 3), 10 + 20 * i, dtype=np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)


def test_a_video_gives_frames_over_all_of_it(model: PeConfig, tmp_path: Path) -> None:
    write_video(tmp_path / "v.mp4", 12)
    (tmp_path / "i.png").write_bytes(picture(0))
    lines = [{"video": "v.mp4", "text": "number 0"}, {"image": "i.png", "text": "number 1"}]
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    reader = source(model, str(path), 2, root=str(tmp_path), frames=4, crop_min=0.5)
    rows = sorted((reader.read(lane, 0).row for lane in range(2)), key=number_of)
    assert [len(row.views[0]) for row in rows] == [4, 1]
    brightness = rows[0].views[0].mean(axis=(1, 2, 3))
    assert np.allclose(brightness, [10, 70, 150, 230], atol=8)  # frames 0, 3, 7 and 11
    batch = collate_pairs(rows)
    assert batch.frames == (4, 1)
    assert batch.pixels.shape == (5, 3, SIZE, SIZE)
    assert (batch.weight, batch.counts) == (2, {"images": 5})


def test_an_image_of_another_mode_is_what_the_exported_encoder_sees(
    model: PeConfig, tmp_path: Path
) -> None:
    path = Path(jsonl(tmp_path, 2))
    for number in range(2):
        name = tmp_path / f"{number}.png"
        Image.open(name).convert("P" if number else "RGBA").save(name)
    reader = source(model, str(path), 2)
    spec = ImageSpec(height=SIZE, width=SIZE, rgb_conversion="after_resize")
    for lane in range(2):
        row = reader.read(lane, 0).row
        expected = load_image(tmp_path / f"{number_of(row)}.png", spec)
        assert np.array_equal(row.views[0][0], expected)
