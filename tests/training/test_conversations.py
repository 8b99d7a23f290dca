"""Records of the reference's schema become samples; unusable ones are counted and skipped."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perception_rt.errors import InputError, PerceptionError, SampleError
from perception_rt.processing.llm_tokenizer import TokenizerSpec, open_tokenizer
from perception_rt.processing.prompt import Tiles, Turn, encode_prompt, place_media
from perception_rt.processing.tiles import TileSpec, load_tiles
from training.data.loader import LaneStream
from training.data.media import MediaFolders
from training.data.packing import IGNORED
from training.data.records import read_record
from training.distributed import process_group
from training.recipe.schema import DatasetConfig, LanguageDataConfig
from training.tasks.language import open_conversations

TOKENIZER = open_tokenizer(TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=400))
PER_TILE = 4
SPEC = TileSpec(tile_size=8, max_tiles=4)
RED, BLUE = (255, 0, 0), (0, 0, 255)


def below(folder):
    return MediaFolders((folder,))


def exchange(*texts):
    """Returns turns of the schema, the human's first."""
    roles = ("human", "assistant")
    return [{"from": roles[i % 2], "value": text} for i, text in enumerate(texts)]


def flat(color, width=8, height=8):
    return np.broadcast_to(np.array(color, np.uint8), (height, width, 3)).copy()


def write_lines(path, records):
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def texts_of(count, start=0):
    """Returns records without images; each one's answer is its number."""
    return [{"conversations": exchange("?", f"{i}")} for i in range(start, start + count)]


def source(annotations, mix=None, *, seed=0, kept=False, **settings):
    """Opens a source of small samples; `annotations` are paths by name, or (path, root)."""
    found = {
        name: DatasetConfig(annotation=a) if isinstance(a, str) else DatasetConfig(
            annotation=a[0], root=str(a[1])
        )
        for name, a in annotations.items()
    }  # fmt: skip
    defaults = {"tokenizer": "", "conversation": "warmup", "validation": 0, "batch_size": 2}
    config = LanguageDataConfig(
        datasets=found,
        mix=mix or ",".join(f"{name}:1" for name in found),
        **{**defaults, **settings},
    )
    return open_conversations(config, TOKENIZER, SPEC, PER_TILE, seed=seed, validation=kept)


def answers(read):
    """Decodes the learned text of each sample of a row."""
    return [TOKENIZER.decode(s.labels[s.labels != IGNORED]).strip() for s in read.row]


def walk(given, lane, rows):
    """Reads the first rows of a lane and returns their answers."""
    found, position = [], 0
    for _ in range(rows):
        read = given.read(lane, position)
        found += answers(read)
        position = read.position
    return found


# Records


def test_an_image_and_a_question():
    image = flat(RED, 20, 8)
    turns, tiles = read_record(
        {"image": image, "conversations": exchange("What is this?", "Red.")}, below(Path()), SPEC
    )
    expected = load_tiles(image, SPEC)
    assert len(expected) > 1
    assert turns == [
        Turn("user", (Tiles(len(expected)), "What is this?")),
        Turn("assistant", ("Red.",)),
    ]
    np.testing.assert_array_equal(tiles, expected)


def test_images_are_found_below_the_root(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(flat(BLUE)).save(tmp_path / "a" / "b.png")
    record = {"image": "a/b.png", "conversations": exchange("<image>\nWhat?", "Blue.")}
    turns, tiles = read_record(record, below(tmp_path), SPEC)
    assert turns[0].content == place_media("<image>\nWhat?", [len(tiles)])
    assert (tiles[0] == BLUE).all()


def test_several_images_go_where_their_marks_are():
    record = {
        "image": [flat(RED, 40, 40), flat(BLUE)],
        "conversations": exchange("First <image>?", "Red.", "And <image>?", "Blue."),
    }
    turns, tiles = read_record(record, below(Path()), SPEC)
    assert tiles[:, 0, 0].tolist() == [[*RED], [*BLUE]]  # one tile each, as in the reference
    assert turns[0].content == ("First ", Tiles(1), "?")
    assert turns[2].content == ("And ", Tiles(1), "?")


def test_several_images_without_marks_come_first():
    record = {"images": [flat(RED), flat(BLUE)], "conversations": exchange("Same?", "No.")}
    turns, tiles = read_record(record, below(Path()), SPEC)
    assert turns[0].content == (Tiles(1), Tiles(1), "Same?")
    assert len(tiles) == 2


def test_a_caption():
    turns, tiles = read_record({"image": flat(RED), "text": "Red."}, below(Path()), SPEC)
    assert turns == [Turn("user", (Tiles(len(tiles)),)), Turn("assistant", ("Red.",))]


def test_text_only():
    record = {"id": 7, "conversations": exchange("Two plus two?", 4, "Sure?", "Yes.")}
    turns, tiles = read_record(record, below(Path()), SPEC)
    assert [turn.content for turn in turns] == [("Two plus two?",), ("4",), ("Sure?",), ("Yes.",)]
    assert tiles.shape == (0, 8, 8, 3)


def test_turns_without_a_partner_are_dropped():
    record = {"conversations": exchange("x", "Hello.", "A?", "B.", "C?")[1:]}
    turns, _ = read_record(record, below(Path()), SPEC)
    assert [turn.content for turn in turns] == [("A?",), ("B.",)]


def test_boxes_stand_in_texts():
    record = {
        "image": flat(RED, 200, 100),
        "width": 200,
        "height": 100,
        "bbox": [[20, 10, 40, 30], [0, 0, 200, 100]],
        "conversations": exchange("What is in <|bbox1|>?", "<|bbox0|><|bbox0|>"),
    }
    turns, _ = read_record(record, below(Path()), SPEC)
    assert turns[0].content[1] == "What is in [000,000,999,999]?"
    assert turns[1].content == ("[100,100,300,400][100,100,300,400]",)


def boxed(**change):
    record = {"bbox": [[0, 0, 1, 1]], "width": 4, "height": 4, "image": flat(RED)}
    record["conversations"] = exchange("<|bbox0|>?", "a")
    return {**record, **change}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "a line is not an object"),
        ({}, "a line has no conversation, question and answer, or caption"),
        ({"text": "a"}, "a question is empty"),
        ({"conversations": "a"}, "conversations are not a list of turns"),
        ({"conversations": ["a"]}, "conversations are not a list of turns"),
        ({"conversations": []}, "no question has an answer"),
        ({"conversations": exchange("a")}, "no question has an answer"),
        ({"conversations": exchange("a", "b")[1:]}, "no question has an answer"),
        ({"conversations": exchange("a", " \n")}, "an answer is empty"),
        ({"conversations": exchange(" ", "b")}, "a question is empty"),
        ({"conversations": exchange("a", None)}, "a turn is not text"),
        ({"conversations": exchange(4, "a")}, "a turn is not text"),
        ({"conversations": exchange("a", "b")[:1] * 2}, "human and assistant do not alternate"),
        ({"conversations": [{"from": "tool", "value": "a"}] * 2}, "the role of a turn is none of"),
        ({"image": "no.png", "text": "a"}, "an image is missing"),
        ({"image": "\0", "text": "a"}, "an image is missing"),
        ({"image": 5, "text": "a"}, "the path of an image is not text"),
        ({"image": [], "text": "a"}, "the list of images is empty"),
        ({"image": flat(RED)[..., 0], "text": "a"}, "an image is unusable"),
        ({"video": "no.mp4", "text": "a"}, "a video is missing"),
        ({"image": "a", "video": "b", "text": "a"}, "a record has both an image and a video"),
        ({"image": [flat(RED)] * 3, "conversations": exchange("<image><image>?", "b")},
         "numbers of marks and images differ"),
        (boxed(bbox=[[0, 0, 1]]), "a box is not x, y, width, height"),
        (boxed(bbox=[[0, 0, 1, None]]), "a box is not x, y, width, height"),
        (boxed(bbox=[[0, 0, -1, 1]]), "a box is not x, y, width, height"),
        (boxed(bbox=[[0, 0, 10**400, 1]]), "a box is not x, y, width, height"),
        (boxed(width=None), "bbox is not a list, or width or height is not an integer"),
        (boxed(bbox=None), "a text refers to a missing box"),
        (boxed(bbox=[]), "a text refers to a missing box"),
    ],
)  # fmt: skip
def test_bad_records_have_a_reason(record, reason, tmp_path):
    with pytest.raises(SampleError, match=reason):
        read_record(record, below(tmp_path), SPEC)


def test_a_damaged_image_is_named_with_its_path(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nx")
    with pytest.raises(SampleError, match="an image is unusable") as caught:
        read_record({"image": "a.png", "text": "a"}, below(tmp_path), SPEC)
    assert repr(str(tmp_path / "a.png")) in caught.value.detail


# Videos


@pytest.fixture
def video(tmp_path):
    """A video of 4 seconds at 10 frames per second; frame i is grey of level 6 * i."""
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for i in range(40):
            frame = av.VideoFrame.from_ndarray(flat((6 * i,) * 3, 64, 48), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return {"video": "v.mp4", "conversations": exchange("<video>\nWhat?", "Grey.")}


def frames_of(tiles):
    """Returns frame numbers, derived from the grey outside the upper left, where a box may be."""
    return np.rint(tiles[:, 4:, 4:].mean(axis=(1, 2, 3)) / 6).astype(int).tolist()


def test_a_video(video, tmp_path):
    turns, tiles = read_record(video, below(tmp_path), SPEC)
    # At one frame per second there are fewer than max_frames, so 32 of all frames are taken.
    assert turns[0].content == (Tiles(32), "What?")
    assert frames_of(tiles)[::31] == [0, 39]


def test_a_clip_of_a_video(video, tmp_path):
    _, tiles = read_record({**video, "start_time": 1.0, "end_time": 1.5}, below(tmp_path), SPEC)
    assert frames_of(tiles) == [10, 11, 12, 13, 14, 15]


def test_boxes_are_drawn_into_frames(video, tmp_path):
    clip = {**video, "start_time": 1, "end_time": 1.5}
    boxes = {"11": [0, 0, 30, 20], "12": None, "15": [0, 0, 30, 20], "3": [0, 0, 63, 47]}
    _, plain = read_record(clip, below(tmp_path), SPEC)
    _, marked = read_record({**clip, "bbox_map": boxes}, below(tmp_path), SPEC)
    changed = [not np.array_equal(a, b) for a, b in zip(plain, marked, strict=True)]
    assert changed == [False, True, False, False, False, True]
    assert frames_of(marked) == frames_of(plain)  # the box is in the upper left
    red, green, _ = marked[1, 0, 0].tolist()
    assert red > green + 50


@pytest.mark.parametrize(
    "change",
    [
        {"start_time": 3, "end_time": 2},
        {"start_time": 100},
        {"start_time": "1"},
        {"bbox_map": {"0": [0, 0]}},
        {"bbox_map": {"0": [5, 5, 1, 1]}},
    ],
)
def test_bad_clips_are_unusable(video, tmp_path, change):
    with pytest.raises(SampleError, match="a video is unusable"):
        read_record({**video, **change}, below(tmp_path), SPEC)


# Samples


def test_a_sample_is_its_prompt_and_its_answer():
    given = source({"a": "scenes:read"}, conversation="plm_sft", packing=False)
    (sample,) = given.read(0, 0).row
    learned = np.flatnonzero(sample.labels != IGNORED)
    question = TOKENIZER.decode(sample.tokens).split("user\n\n")[1].split("assistant\n\n")[0]
    turn = Turn("user", place_media(question, [len(sample.tiles)]))
    prompt = encode_prompt(TOKENIZER, [turn], PER_TILE).ids
    assert sample.tokens[: learned[0]].tolist() == prompt.tolist()
    assert sample.labels[learned].tolist() == sample.tokens[learned[0] :].tolist()
    ends = [TOKENIZER.control(name) for name in ("<|eot_id|>", "<|end_of_text|>")]
    assert sample.labels[-2:].tolist() == ends
    assert sample.name == "a 0"


def test_what_is_too_long_is_cut_after_an_answer(tmp_path):
    record = {
        "image": ["a.png", "a.png"],
        "conversations": exchange("<image>", "1" * 20, "<image>", "2" * 20, "?", "3"),
    }
    Image.fromarray(flat(RED)).save(tmp_path / "a.png")
    path = write_lines(tmp_path / "a.jsonl", [record])
    whole = source({"a": (path, tmp_path)}, packing=False, seq_len=53).read(0, 0)
    assert answers(whole) == ["1" * 20 + "\n" + "2" * 20 + "\n3"]
    short = source({"a": (path, tmp_path)}, packing=False, seq_len=51).read(0, 0)
    assert answers(short) == ["1" * 20 + "\n" + "2" * 20]
    assert len(short.row[0].tiles) == 2
    shorter = source({"a": (path, tmp_path)}, packing=False, seq_len=49).read(0, 0)
    assert answers(shorter) == ["1" * 20]
    assert len(shorter.row[0].tiles) == 1
    assert len(shorter.row[0].tokens) == PER_TILE + 21
    with pytest.raises(PerceptionError, match="over-long"):
        source({"a": (path, tmp_path)}, packing=False, seq_len=24).read(0, 0)


def test_bad_samples_are_counted_by_reason(tmp_path):
    """TRN-06: no sample is lost without being counted."""
    Image.fromarray(flat(RED)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"\xff\xd8\xff")
    records = [
        "{broken",
        {"image": "missing.png", "text": "a"},
        {"image": "bad.png", "text": "a"},
        {"image": "good.png", "text": ""},
        {"conversations": exchange("?", "1" * 99)},
        {"image": "good.png", "text": "good"},
    ]
    path = write_lines(tmp_path / "a.jsonl", records)
    given = source({"set": (path, tmp_path)}, seq_len=64, packing=False, batch_size=1)
    bad, seen, position, good = [], 0, 0, []
    while position < len(records):
        read = given.read(0, position)
        assert read.seen == read.position - position
        good += answers(read)
        seen += read.seen
        position = read.position
        bad += read.bad
    assert seen == position
    assert set(good) == {"good"}
    # One epoch, and the samples before the good line of the next.
    assert {sample.reason: sample.name for sample in bad} == {
        "a line cannot be read": "set line 1",
        "an image is missing": "set line 2",
        "an image is unusable": "set line 3",
        "an answer is empty": "set line 4",
        "over-long": "set line 5",
    }
    missing = next(sample for sample in bad if "missing" in sample.reason)
    assert missing.detail.startswith(repr(str(tmp_path / "missing.png")))


def test_bad_samples_are_bounded(tmp_path):
    """TRN-06: above `bad_fraction` the run stops."""
    path = write_lines(tmp_path / "a.jsonl", ["{", *texts_of(19)])
    given = source({"a": path}, seq_len=16, batch_size=2)

    def stream(bad_fraction):
        return LaneStream(
            given, len, lanes=2, parts=1, group=group, workers=2, bad_fraction=bad_fraction
        )

    with process_group("cpu") as group:
        bounded = stream(0.01)
        with pytest.raises(PerceptionError, match=r"is 0.01: a line cannot be read \(1, the") as e:
            for _ in range(60):
                bounded.next()
        assert re.match(r"unusable samples: 1 different, in \d+ of 1\d\d samples", str(e.value))
        bounded.close()
        allowed = stream(0.1)
        for _ in range(60):
            allowed.next()
        assert allowed.bad_samples == 1  # line 1, although it was met in every epoch
        allowed.close()


def test_a_dataset_of_bad_samples_ends(tmp_path):
    """TRN-06."""
    path = write_lines(tmp_path / "a.jsonl", ["{", "[]"])
    with pytest.raises(PerceptionError, match=r"^2 samples in a row .* a line [12]: a line"):
        source({"a": path}).read(0, 0)


# Order


def test_a_row_is_a_pure_function_of_lane_and_position(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(50))
    annotations = {"a": path, "b": "scenes:count"}
    shared = source(annotations, seq_len=64)
    places = [(lane, position) for lane in range(2) for position in range(20)] * 2

    def read(place):
        found = shared.read(*place)
        return found.position, [(s.name, s.tokens.tolist(), s.tiles.sum()) for s in found.row]

    with ThreadPoolExecutor(4) as pool:
        threaded = list(pool.map(read, places))
    fresh = source(annotations, seq_len=64)
    for place, found in zip(reversed(places), reversed(threaded), strict=True):
        other = fresh.read(*place)
        assert found[0] == other.position
        assert found[1] == [(s.name, s.tokens.tolist(), s.tiles.sum()) for s in other.row]


def test_lanes_share_an_epoch(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(30))
    given = source({"a": path}, packing=False, batch_size=3)
    lanes = [walk(given, lane, 20) for lane in range(3)]
    first = [answer for lane in lanes for answer in lane[:10]]
    second = [answer for lane in lanes for answer in lane[10:]]
    assert sorted(first) == sorted(second) == sorted(str(i) for i in range(30))
    assert first != second  # shuffled anew
    assert first != [str(i) for i in range(30)]
    other = source({"a": path}, packing=False, batch_size=3, seed=1)
    assert walk(other, 0, 20) != lanes[0]


def test_rows_hold_what_fits_and_go_on_with_the_rest(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(40))
    packed = source({"a": path}, seq_len=10, batch_size=1)
    single = source({"a": path}, packing=False, batch_size=1)
    position, found = 0, []
    while position < 40:
        read = packed.read(0, position)
        used = sum(len(sample.tokens) for sample in read.row)
        (following,) = single.read(0, read.position).row
        assert used <= 10 < used + len(following.tokens)
        assert len(read.row) == read.position - position
        position = read.position
        found += answers(read)
    assert found == walk(single, 0, position)


def test_validation_is_never_trained_on(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", texts_of(20))
    trained = walk(source({"a": path}, validation=5, packing=False, batch_size=1), 0, 30)
    evaluated = source({"a": path}, validation=5, packing=False, batch_size=4, kept=True)
    assert {int(answer) for answer in trained} == set(range(15))
    assert sorted(int(answer) for answer in walk(evaluated, 0, 5)) == list(range(15, 20))


def test_scenes_of_validation_are_others():
    train = source({"a": "scenes:read"}, packing=False).read(0, 0)
    again = source({"a": "scenes:read"}, packing=False).read(0, 0)
    kept = source({"a": "scenes:read"}, packing=False, kept=True)
    np.testing.assert_array_equal(train.row[0].tiles, again.row[0].tiles)
    assert not np.array_equal(train.row[0].tiles, kept.read(0, 0).row[0].tiles)


# Construction


def test_files_of_a_directory_are_one_dataset(tmp_path):
    for chunk in range(3):
        write_lines(tmp_path / f"a.chunk.{chunk:02}.jsonl", texts_of(4, start=4 * chunk))
    (tmp_path / "notes.txt").write_text("no data")
    given = source({"a": str(tmp_path)}, packing=False, batch_size=1)
    rows = [given.read(0, position).row[0] for position in range(12)]
    names = {TOKENIZER.decode(row.tokens).strip(): row.name for row in rows}
    assert sorted(map(int, names)) == list(range(12))
    assert names["5"] == "a a.chunk.01.jsonl line 2"


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        ("no.jsonl", "dataset 'a': .*no.jsonl' cannot be read: No such file"),
        ("empty.jsonl", "dataset 'a' is empty"),
        ("blank.jsonl", "dataset 'a' is empty"),
        ("folder", "dataset 'a' is empty"),
        ("five.jsonl", "dataset 'a' has 5 lines; data.validation keeps 5 of them"),
        ("scenes:no", "unknown scenes 'no'"),
    ],
)
def test_datasets_that_cannot_be_opened(annotation, message, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.jsonl").write_text("\n \n")
    write_lines(tmp_path / "five.jsonl", texts_of(5))
    if ":" not in annotation:
        annotation = str(tmp_path / annotation)
    with pytest.raises(InputError, match=message):
        source({"a": annotation}, validation=5)


@pytest.mark.parametrize(
    ("mix", "message"),
    [
        ("b:1", "data.mix has 'b:1'; an entry is name:weight, and names are a"),
        ("a", "data.mix has 'a'"),
        ("a:1,", "data.mix has ''"),
        ("a:1,a:2", "data.mix has 'a' twice"),
        ("a:0", "the weight of 'a' must be positive, not '0'"),
        ("a:-1", "must be positive"),
        ("a:nan", "must be positive"),
        ("a:inf", "must be positive"),
        ("a:x", "must be positive, not 'x'"),
    ],
)
def test_a_mix_that_is_none(mix, message):
    with pytest.raises(InputError, match=message):
        source({"a": "scenes:read"}, mix)
