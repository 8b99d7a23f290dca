"""Data of tasks: each form gives the same items, and hostile data one clear error."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import (
    COLOURS,
    classified_tars,
    picture,
    write_captions,
    write_folders,
    write_table,
    write_tars,
)

from perception_rt.errors import InputError
from perception_rt.evaluation.data.captioned import read_captioned
from perception_rt.evaluation.data.class_names import read_classes, read_templates
from perception_rt.evaluation.data.files import read_names
from perception_rt.evaluation.data.labelled import read_labelled
from perception_rt.evaluation.data.training_data import read_training
from perception_rt.evaluation.tasks import TASKS, TaskOptions, get_task


def test_folders(tmp_path: Path) -> None:
    found = read_labelled(str(write_folders(tmp_path / "data", 2)))
    assert found.classes == list(COLOURS)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert list(found.ids[:2]) == ["blue/0.png", "blue/1.png"]


def test_folders_are_matched_by_name_where_all_are_names(tmp_path: Path) -> None:
    data = str(write_folders(tmp_path / "data", 1))
    by_name = read_labelled(data, ["red", "yellow", "blue", "green"])
    assert by_name.labels.tolist() == [2, 3, 0]
    by_order = read_labelled(data, ["Blau", "Gruen", "Rot"])
    assert by_order.labels.tolist() == [0, 1, 2]
    assert by_order.classes == ["Blau", "Gruen", "Rot"]


def test_folders_of_numbers_are_in_order_of_the_numbers(tmp_path: Path) -> None:
    for name in ("10", "9", "2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(picture("red"))
    assert read_labelled(str(tmp_path)).classes == ["2", "9", "10"]


def test_table_of_names_or_numbers(tmp_path: Path) -> None:
    rows = ["path,label", "a.png,red", "sub/b.png,blue"]
    found = read_labelled(str(write_table(tmp_path, rows)))
    assert found.classes == ["blue", "red"]
    assert found.labels.tolist() == [1, 0]
    assert found.items[1].source == str(tmp_path / "sub/b.png")
    numbered = ["label,path,note", "1,a.png,x", "0,b.mp4.png,y"]
    found = read_labelled(str(write_table(tmp_path, numbered)), ["blue", "red"])
    assert found.labels.tolist() == [1, 0]


def test_tars(tmp_path: Path) -> None:
    data = str(classified_tars(tmp_path))
    found = read_labelled(data)
    assert found.classes == list(COLOURS)
    assert found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert found.ids[0] == "test/0.tar#s00.png"
    assert read_templates(str(tmp_path / "zeroshot_classification_templates.txt")) == [
        "a photo of {}.",
        "{}",
    ]


def test_captions_of_lines_tables_and_tars_are_the_same(tmp_path: Path) -> None:
    lines = read_captioned(str(write_captions(tmp_path)))
    assert len(lines.items) == 3
    assert lines.owners.tolist() == [0, 0, 1, 1, 2, 2]
    rows = [f"{lines.ids[o]},{c}" for c, o in zip(lines.captions, lines.owners, strict=True)]
    table = read_captioned(str(write_table(tmp_path, ["path,caption", *rows])))
    members = {}
    for number, name in enumerate(COLOURS):
        texts = [c for c, o in zip(lines.captions, lines.owners, strict=True) if o == number]
        members |= {f"{name}.png": picture(name), f"{name}.txt": "\n".join(texts).encode()}
    tars = read_captioned(str(write_tars(tmp_path / "tars", members)))
    for other in (table, tars):
        assert other.captions == lines.captions
        assert np.array_equal(other.owners, lines.owners)


def test_imagenet_has_1000_classes_and_80_templates() -> None:
    classes, templates = read_classes("imagenet"), read_templates("imagenet")
    assert (len(classes), len(templates), classes[0], classes[-1]) == (
        1000, 80, "tench", "toilet paper",
    )  # fmt: skip
    assert all(template.count("{}") == 1 for template in templates)


def test_names_that_occur_twice_get_their_number(tmp_path: Path) -> None:
    data = str(write_folders(tmp_path / "data", 1))
    found = read_labelled(data, ["crane", "bird", "crane"])
    assert found.labelled_classes == ["crane (0)", "bird", "crane (2)"]
    rows = ["path,label", "a.png,crane"]
    with pytest.raises(InputError, match="two classes are named 'crane'; use their numbers"):
        read_labelled(str(write_table(tmp_path, rows)), found.classes)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["path,class", "a.png,red"], "has no column 'label'; it needs path,label"),
        (["path,label", "a.png,"], "line 2 of .* has no label"),
        (["path,label", "a.png"], "line 2 of .* has no label"),
        (["path,label"], "the data have no items"),
        (["path,label", "a.png,red", "a.png,blue"], "item 'a.png' occurs twice"),
        (["path,label", "a.png,red", "b.mp4,blue"], "images and videos: evaluate them one by one"),
        (["path,label", "a\0.png,red"], "cannot be read|is not a path|no CSV|line contains NUL"),
    ],
)
def test_bad_tables(tmp_path: Path, rows: list[str], message: str) -> None:
    file = write_table(tmp_path, rows)
    with pytest.raises(InputError, match=message):
        found = read_labelled(str(file))
        open_all(found)


def open_all(found: object) -> None:
    """Opens the files of items, as an evaluation does."""
    from perception_rt.processing.image import decode_image

    for item in found.items:
        decode_image(item.file)


@pytest.mark.parametrize("label", ["yellow", "3", "-1", "1.5", "\u00b2", "9" * 30])
def test_labels_that_are_no_class(tmp_path: Path, label: str) -> None:
    file = write_table(tmp_path, ["path,label", f"a.png,{label}"])
    with pytest.raises(
        InputError, match=r"line 2 .*neither the name of a class nor a number below 3"
    ):
        read_labelled(str(file), list(COLOURS))


def test_bad_folders(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="must be a folder with a folder per class"):
        read_labelled(str(tmp_path / "absent"))
    (tmp_path / "flat").mkdir()
    with pytest.raises(InputError, match="has no folder per class"):
        read_labelled(str(tmp_path / "flat"))
    data = write_folders(tmp_path / "data", 1)
    with pytest.raises(InputError, match=r"4 class names, but .* has 3 folders, and 'blue'"):
        read_labelled(str(data), ["a", "b", "c", "d"])
    (data / "empty").mkdir()
    with pytest.raises(InputError, match="empty' has no image or video"):
        read_labelled(str(data))


PNG = picture("red")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": PNG}, "sample 'a' of .* has no .cls member"),
        ({"a.cls": b"0"}, "sample 'a' of .* has 0 images or videos, not one"),
        ({"a.png": PNG, "a.jpg": PNG, "a.cls": b"0"}, "has 2 images or videos, not one"),
        ({"a.png": PNG, "a.cls": b"3"}, "nor a number below 3"),
        ({"a.png": PNG, "a.cls": b"\xff"}, "the text is not UTF-8"),
        ({"a.png": PNG, "a.cls": b"0", "b.png": PNG, "b.cls": b"0", "a.txt": b""}, "occurs twice"),
        ({}, "the data have no items"),
    ],
)
def test_bad_tars(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    data = write_tars(tmp_path, members)
    (data / "classnames.txt").write_text("\n".join(COLOURS))
    with pytest.raises(InputError, match=message):
        read_labelled(str(data))


@pytest.mark.parametrize("count", ["", "0", "-1", "two", "9" * 99])
def test_bad_numbers_of_shards(tmp_path: Path, count: str) -> None:
    data = classified_tars(tmp_path)
    (data / "test" / "nshards.txt").write_text(count)
    with pytest.raises(InputError, match="must have the number of shards"):
        read_labelled(str(data))


def test_missing_and_damaged_tars(tmp_path: Path) -> None:
    data = classified_tars(tmp_path)
    (data / "test" / "nshards.txt").write_text("2")
    with pytest.raises(InputError, match=r"1\.tar' cannot be read"):
        read_labelled(str(data))
    (data / "test" / "1.tar").write_bytes(b"no tar" * 1000)
    with pytest.raises(InputError, match="damaged"):
        read_labelled(str(data))
    with pytest.raises(InputError, match=r"number of shards .*train.* cannot be read"):
        read_labelled(str(data), split="train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"image": "a.png"}, "line 1 .* must have a text in 'caption', or a list in 'captions'"),
        ({"caption": "x"}, "must have a path in 'image' or 'video'"),
        ({"image": "a.png", "video": "b.mp4", "caption": "x"}, "must have a path"),
        ({"image": "a.png", "captions": []}, "must have a text"),
        ({"image": "a.png", "captions": ["a", " "]}, "a caption that is no text"),
        ({"image": "a.png", "captions": [3]}, "a caption that is no text"),
        ([1], "is not a JSON object"),
    ],
)
def test_bad_captions(tmp_path: Path, line: object, message: str) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(json.dumps(line) + "\n")
    with pytest.raises(InputError, match=message):
        read_captioned(str(file))
    file.write_text("{\n")
    with pytest.raises(InputError, match=r"line 1 of .* is not JSON"):
        read_captioned(str(file))


def test_bad_lists_of_names(tmp_path: Path) -> None:
    file = tmp_path / "templates.txt"
    file.write_text("a photo of a {}\na photo\n")
    with pytest.raises(InputError, match=r"template 'a photo' of .* has no \{\}"):
        read_templates(str(file))
    for name, text in (("a.txt", "\n \n"), ("a.json", "[1]"), ("b.json", "{}"), ("c.json", "[]")):
        (tmp_path / name).write_text(text)
        with pytest.raises(InputError, match="must have strings"):
            read_names(str(tmp_path / name), "class file")
    with pytest.raises(InputError, match=r"class file .* cannot be read"):
        read_classes(str(tmp_path / "absent.txt"))


def test_training_data_share_classes_and_no_file(tmp_path: Path) -> None:
    train = write_folders(tmp_path / "train", 2, first=10)
    test = write_folders(tmp_path / "test", 2)
    read_training(str(test), TaskOptions(train_data=str(train)))
    with pytest.raises(InputError, match="is also in the training data"):
        read_training(str(train), TaskOptions(train_data=str(train)))
    with pytest.raises(InputError, match="give --train-data"):
        read_training(str(test), TaskOptions())
    rows = ["path,label", "a.png,blue", "b.png,red"]
    table = str(write_table(tmp_path, rows))
    classes = tmp_path / "classes.txt"
    classes.write_text("\n".join(COLOURS))
    options = TaskOptions(train_data=table, classes=str(classes))
    with pytest.raises(InputError, match="class 'green' has no item in the training data"):
        read_training(str(test), options)


def test_tasks_are_functions_of_this_package_and_refuse_foreign_options() -> None:
    for task in TASKS.values():
        assert task.run.startswith("perception_rt.evaluation.")
        assert callable(task.function())
        assert set(task.options) <= {*TaskOptions.__dataclass_fields__}
    with pytest.raises(InputError, match="zero-shot does not take --k; it takes --classes"):
        get_task("zero-shot").check(TaskOptions(k=3))
    with pytest.raises(InputError, match=re.escape("unknown task 'x'; known are zero-shot")):
        get_task("x")
