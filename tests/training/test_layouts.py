"""Common layouts of jsonl files give the same sample; paths are relative to the file."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from perception_rt.errors import InputError, PerceptionError, SampleError
from perception_rt.processing.conversation_layouts import read_layout
from perception_rt.processing.llm_tokenizer import TokenizerSpec, open_tokenizer
from perception_rt.processing.prompt import Tiles, Turn
from perception_rt.processing.tiles import TileSpec
from training.data.datasets import LineDataset
from training.data.jsonl import JsonLines
from training.data.media import MediaFolders
from training.data.pairs import PairSource
from training.data.records import read_record
from training.recipe.pairs import PairDataConfig
from training.recipe.schema import DatasetConfig, LanguageDataConfig, load_config
from training.tasks.language import open_conversations

PAIRS = Path(__file__).parent / "relative_paths.jsonl"
TINY = Path(__file__).parents[2] / "training" / "configs" / "pe_tiny.yaml"
SPEC = TileSpec(tile_size=8, max_tiles=1)
RED, BLUE = (255, 0, 0), (0, 0, 255)
ASKED = [Turn("user", (Tiles(2), "What?")), Turn("assistant", ("Red.",))]
Json = dict[str, Any]


def red(folder: Path, name: str = "a.png", color: tuple[int, int, int] = RED) -> Path:
    Image.new("RGB", (8, 8), color).save(folder / name)
    return folder / name


def reading(record: Json, folder: Path) -> tuple[list[Turn], Any]:
    return read_record(record, MediaFolders((folder,)), SPEC)


def said(*texts: str, names: tuple[str, str] = ("human", "gpt")) -> list[Json]:
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


def message(role: str, content: Any) -> Json:
    return {"role": role, "content": content}


WITH_PART = [
    message("user", [{"type": "image_url", "image_url": {"url": "a.png"}},
                     {"type": "text", "text": "What?"}]),
    message("assistant", [{"type": "text", "text": "Red."}]),
]  # fmt: skip
LAYOUTS: dict[str, Json] = {
    "reference": {"image": "a.png",
                  "conversations": said("What?", "Red.", names=("human", "assistant"))},
    "LLaVA": {"image": "a.png", "conversations": said("<image>\nWhat?", "Red.")},
    "user": {"image": "a.png", "conversations": said("What?", "Red.", names=("User", "assistant"))},
    "OpenAI": {"image": "a.png",
               "messages": [message("user", "What?"), message("assistant", "Red.")]},
    "OpenAI, images": {"images": ["a.png"],
                       "messages": [message("user", "<image>What?"), message("assistant", "Red.")]},
    "OpenAI, part": {"messages": WITH_PART},
    "transformers, path": {"messages": [
        message("user", [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]),
        message("assistant", "Red."),
    ]},
    "transformers, beside": {"image": "a.png", "messages": [
        message("user", [{"type": "image"}, {"type": "text", "text": "What?"}]),
        message("assistant", "Red."),
    ]},
    "messages of from and value": {"image": "a.png", "messages": said("What?", "Red.")},
    "conversations of role and content": {"image": "a.png", "conversations": [
        message("user", "What?"), message("assistant", "Red."),
    ]},
    "question and answer": {"image": "a.png", "question": "What?", "answer": "Red."},
    "query and response": {"image_path": "a.png", "query": "What?", "response": "Red."},
    "prompt and completion": {"file_name": "a.png", "prompt": "What?", "completion": "Red."},
    "a path in an object": {"image": {"path": "a.png"}, "question": "What?", "answer": "Red."},
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_the_same_sample(name: str, tmp_path: Path) -> None:
    red(tmp_path)
    turns, tiles = reading(LAYOUTS[name], tmp_path)
    assert turns == ASKED
    assert (tiles == RED).all()


def test_every_layout_has_an_example() -> None:
    text = (Path(__file__).parents[2] / "docs" / "training.md").read_text()
    found = []
    for block in text.split("```")[1::2]:
        rest = block.strip()
        while rest.startswith("{"):
            record, end = json.JSONDecoder().raw_decode(rest)
            found.append(record)
            rest = rest[end:].strip()
    assert {"conversations", "messages", "question", "text", "caption"} <= set().union(*found)
    assert all(read_layout(record).texts for record in found)


def test_a_system_turn_replaces_the_system_prompt(tmp_path: Path) -> None:
    red(tmp_path)
    system = {"from": "system", "value": "Be brief."}
    record = {"image": "a.png", "conversations": [system, *said("What?", "Red.")]}
    assert reading(record, tmp_path)[0] == [Turn("system", ("Be brief.",)), *ASKED]
    tokenizer = open_tokenizer(TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=400))
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(record))
    data = LanguageDataConfig(
        datasets={"a": DatasetConfig(annotation=str(path))},
        mix="a:1",
        tokenizer="",
        validation=0,
        batch_size=1,
    )
    (sample,) = open_conversations(data, tokenizer, SPEC, 4, seed=0).read(0, 0).row[:1]
    assert "system\n\nBe brief." in tokenizer.decode(sample.tokens)


def test_images_inside_messages_keep_their_places(tmp_path: Path) -> None:
    url = base64.b64encode(red(tmp_path, "b.png", BLUE).read_bytes()).decode()
    red(tmp_path)
    messages = [
        message("user", [{"type": "text", "text": "First "}, {"type": "image", "path": "a.png"}]),
        message("assistant", "Red."),
        message("user", [{"type": "image_url", "image_url": f"data:image/png;base64,{url}"},
                         {"type": "text", "text": " and now?"}]),
        message("assistant", "Blue."),
    ]  # fmt: skip
    turns, tiles = reading({"messages": messages}, tmp_path)
    assert [turn.content for turn in turns[::2]] == [("First ", Tiles(1)), (Tiles(1), " and now?")]
    assert tiles[:, 0, 0].tolist() == [[*RED], [*BLUE]]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "a.png", "question": "What?"}, "a line has no conversation"),
        ({"image": "a.png", "question": "What?", "answer": {"a": 1}}, "a turn is not text"),
        ({"messages": [message("user", "a"), message("tool", "b")]}, "the role of a turn is none"),
        ({"messages": [message("user", [{"type": "audio"}]), message("assistant", "b")]},
         "a part of a turn is no text, image or video"),
        ({"messages": [message("user", [{"type": "image"}]), message("assistant", "b")]},
         "numbers of marks and images differ"),
        ({"image": "a.png", "messages": WITH_PART}, "numbers of marks and images differ"),
        ({"image": "https://x/a.png", "text": "a"}, "an image is not a local file"),
        ({"image": "data:image/png,abc", "text": "a"}, "an image is not base64"),
        ({"videos": ["a.mp4", "b.mp4"], "text": "a"}, "a record has several videos"),
    ],
)  # fmt: skip
def test_other_records_have_a_reason(record: Json, reason: str, tmp_path: Path) -> None:
    red(tmp_path)
    with pytest.raises(SampleError, match=reason):
        reading(record, tmp_path)


def test_an_empty_list_of_images_is_a_sample_of_text(tmp_path: Path) -> None:
    text = [Turn("user", ("What?",)), Turn("assistant", ("Red.",))]
    for layout in ({"messages": said("What?", "Red.")}, {"question": "What?", "answer": "Red."}):
        turns, tiles = reading({"images": [], **layout}, tmp_path)
        assert turns == text and tiles.shape == (0, 8, 8, 3)
    for record in ({"text": "a"}, {"conversations": said("<image>What?", "Red.")}):
        with pytest.raises(SampleError, match="the list of images is empty"):
            reading({"images": [], **record}, tmp_path)


# Paths


def test_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, elsewhere = tmp_path / "data", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    red(folder)
    red(elsewhere, color=BLUE)
    path = folder / "a.jsonl"
    path.write_text(json.dumps({"image": "a.png", "text": "Red."}))

    def color(annotation: Path, root: str = "") -> list[int]:
        config = DatasetConfig(annotation=str(annotation), root=root)
        dataset = LineDataset("a", config, 0, 0, validation=False)
        _, tiles = read_record(dataset.load(0), dataset.folders, SPEC)
        found: list[int] = tiles[0, 0, 0].tolist()
        return found

    assert color(path) == color(folder) == [*RED]
    assert color(path, ".") == color(path, str(elsewhere)) == [*BLUE]
    (folder / "a.png").unlink()
    assert color(path) == [*BLUE]  # the default of earlier versions
    with pytest.raises(SampleError) as caught:
        color(path, str(folder))
    assert caught.value.detail.startswith(repr(str(folder / "a.png")) + "; the setting root")


def pair_source(path: Path, **settings: Any) -> PairSource:
    config = PairDataConfig(dataset="jsonl", path=str(path), batch_size=2, **settings)
    return PairSource(config, load_config(TINY).model, seed=0, sizes=lambda _: (16,))


def test_pairs_are_found_beside_their_file(tmp_path: Path) -> None:
    shutil.copy(PAIRS, tmp_path)
    for number in range(len(PAIRS.read_text().splitlines())):
        red(tmp_path, f"{number}.jpg", BLUE if number % 2 else RED)
    reader = pair_source(tmp_path / PAIRS.name)
    rows = [reader.read(lane, position).row for position in range(3) for lane in range(2)]
    assert len({row.name for row in rows}) == 6
    for row in rows:
        odd = int(row.name.split()[-1]) % 2 == 0  # lines count from 1
        assert np.abs(row.views[0].astype(int) - np.array(BLUE if odd else RED)).max() < 8


def test_without_their_images_all_pairs_are_named_once(tmp_path: Path) -> None:
    shutil.copy(PAIRS, tmp_path)
    lines = len(PAIRS.read_text().splitlines())
    with pytest.raises(PerceptionError) as caught:
        pair_source(tmp_path / PAIRS.name).read(0, 0)
    message = str(caught.value)
    assert int(message.split()[0]) <= lines
    assert f"an image is missing: '{tmp_path}/" in message
    assert "relative_paths.jsonl line " in message


@pytest.mark.parametrize("text", ['[{"image": "a.png"}]', '\n[\n  {"image": "a.png"}\n]\n'])
def test_a_json_array_is_not_jsonl(text: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.jsonl' is a JSON array; write one object per line"):
        LineDataset("a", DatasetConfig(annotation=str(path)), 0, 0, validation=False)
    with pytest.raises(InputError, match=r"a\.jsonl' is a JSON array"):
        pair_source(path).read(0, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_blank_lines_are_left_out(end: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(end.join(["", "1", "", "", "[2]", "3", "4", "", ""]).encode())
    lines = JsonLines(path, "set")
    assert [lines.load(number) for number in range(len(lines))] == [1, [2], 3, 4]
    assert [lines.where(number)[-1] for number in range(4)] == ["2", "5", "6", "7"]
