"""Evaluations with packages: tasks, reports, comparisons and `perception-export --eval-data`."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from evaluation_data import (
    COLOURS,
    classified_tars,
    write_captions,
    write_folders,
    write_table,
)
from PIL import Image

import perception_rt
from perception_rt.cli import export_main, main
from perception_rt.cli.report import evaluation_lines
from perception_rt.errors import InputError
from perception_rt.evaluation import TaskOptions, evaluate, write_report
from perception_rt.evaluation.metrics.bootstrap import RESAMPLES
from perception_rt.package.reader import read_manifest


@pytest.fixture(scope="module")
def engine(tiny_package: Path) -> Iterator[perception_rt.Embedder]:
    with perception_rt.load(tiny_package) as loaded:
        yield loaded


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folders(tmp_path_factory.mktemp("colours") / "test", 4)


def pictures(data: Path) -> list[str]:
    return [str(path) for path in sorted(data.rglob("*.png"))]


def test_zero_shot_equals_classify(engine: perception_rt.Embedder, data: Path) -> None:
    report = evaluate(engine, "zero-shot", data)
    expected = np.repeat(range(3), 4)
    answers = engine.classify(pictures(data), COLOURS).argmax(axis=1)
    assert report.value("top-1") == (answers == expected).mean()
    (part,) = report.parts
    assert [COLOURS.index(name) for name in part.outcomes.answers] == answers.tolist()
    assert sum(group.items for group in part.groups) == 12
    by_class = [group.values["top-1"] for group in part.groups]
    assert report.value("mean per class") == pytest.approx(np.mean(by_class))


def test_templates_of_a_file_and_of_the_data(
    engine: perception_rt.Embedder, data: Path, tmp_path: Path
) -> None:
    templates = ["a photo of {}.", "{}"]
    answers = engine.classify(pictures(data), COLOURS, templates).argmax(axis=1)
    file = tmp_path / "templates.json"
    file.write_text(json.dumps(templates))
    report = evaluate(engine, "zero-shot", data, TaskOptions(templates=str(file)))
    assert report.parts[0].outcomes.answers == [COLOURS[answer] for answer in answers]
    tars = evaluate(engine, "zero-shot", classified_tars(tmp_path / "tars"))
    assert tars.run.result.settings["templates"] == templates
    # The same pictures as the first two of each folder.
    assert tars.parts[0].outcomes.answers == [
        COLOURS[answer] for answer in answers.reshape(3, 4)[:, :2].reshape(-1)
    ]


def test_retrieval_equals_a_sort_of_the_cosines(
    engine: perception_rt.Embedder, tmp_path: Path
) -> None:
    file = write_captions(tmp_path)
    report = evaluate(engine, "retrieval", file)
    captions = [text for name in COLOURS for text in (f"a {name} square", f"all {name}")]
    cosines = (
        engine.embed_images([str(tmp_path / f"{name}.png") for name in COLOURS])
        @ engine.embed_texts(captions).T
    )
    to_text = (cosines.argmax(axis=1) // 2 == range(3)).mean()
    to_image = (cosines.argmax(axis=0) == np.arange(6) // 2).mean()
    assert report.value("R@1", "image to text") == to_text
    assert report.value("R@1", "text to image") == to_image
    assert report.value("R@10", "text to image") == 1
    dual = evaluate(engine, "retrieval", file, TaskOptions(dual_softmax=True))
    assert dual.run.result.settings["dual_softmax"] is True


def test_neighbours_and_probe_learn_what_the_embeddings_separate(
    engine: perception_rt.Embedder, data: Path, tmp_path: Path
) -> None:
    train = str(write_folders(tmp_path / "train", 6, first=20))
    nearest = evaluate(engine, "knn", data, TaskOptions(train_data=train, k=3))
    probe = evaluate(engine, "linear-probe", data, TaskOptions(train_data=train))
    assert nearest.value("top-1") == probe.value("top-1") == 1
    with pytest.raises(InputError, match="--k must be an integer from 1 to 18, not 19"):
        evaluate(engine, "knn", data, TaskOptions(train_data=train, k=19))
    with pytest.raises(InputError, match="--temperature must be above 0"):
        evaluate(engine, "knn", data, TaskOptions(train_data=train, k=1, temperature=0.0))


def write_video(path: Path, colour: tuple[int, int, int]) -> None:
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for _ in range(4):
            pixels = np.full((32, 32, 3), colour, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, "rgb24")))
        container.mux(stream.encode())


def test_videos(engine: perception_rt.Embedder, tmp_path: Path) -> None:
    colours = {"blue": (0, 0, 255), "red": (255, 0, 0)}
    for name, rgb in colours.items():
        write_video(tmp_path / f"{name}.mp4", rgb)
    table = write_table(tmp_path, ["path,label", "blue.mp4,blue", "red.mp4,red"])
    report = evaluate(engine, "zero-shot", table, TaskOptions(num_frames=2))
    weights = engine.embed_labels(list(colours))
    videos = [str(tmp_path / f"{name}.mp4") for name in colours]
    answers = (engine.embed_videos(videos, num_frames=2) @ weights.T).argmax(axis=1)
    assert report.parts[0].outcomes.answers == [list(colours)[answer] for answer in answers]
    out = tmp_path / "report.json"
    assert len(write_report(report, out)) == 3
    captions = write_table(
        tmp_path, ["path,caption", "blue.mp4,a blue video", "red.mp4,red"], "captions.csv"
    )
    assert [part.name for part in evaluate(engine, "retrieval", captions).parts] == [
        "video to text",
        "text to video",
    ]


def test_a_package_against_another(
    tiny_packages: dict[str, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    package, other = str(tiny_packages["int8"]), str(tiny_packages["fp32"])
    command = ["eval", package, "--task", "zero-shot", "--data", str(data), "--out", str(out)]
    assert main([*command, "--against", other]) == 0
    shown = capsys.readouterr().out
    assert "points lost against tiny fp32" in shown
    assert "of 12 answers changed" in shown
    report = json.loads(out.read_text())
    assert (report["schema"], report["package"]["precision"]) == (1, "int8")
    assert report["package"]["id"] == read_manifest(package).id
    assert report["against"]["id"] == read_manifest(other).id
    (part,) = report["parts"]
    with perception_rt.load(package) as own, perception_rt.load(other) as theirs:
        rows = [engine.embed_images(pictures(data)) for engine in (own, theirs)]
    cosines = (rows[0] * rows[1]).sum(axis=1)
    assert part["against"]["cosine"]["lowest"] == pytest.approx(cosines.min(), abs=1e-6)
    changed = [item for item in part["answers"] if item["answer"] != item["other_answer"]]
    assert part["against"]["changed_answers"] == len(changed)
    right = [
        sum(item[key] == item["expected"] for item in part["answers"]) / 12
        for key in ("answer", "other_answer")
    ]
    lost = {figure["name"]: figure["value"] for figure in part["against"]["points_lost"]}
    assert lost["top-1"] == pytest.approx(100 * (right[1] - right[0]))
    assert "report-confusion.png" in report["pictures"]
    assert "report-cosines.png" in report["pictures"]
    for name in report["pictures"]:
        with Image.open(tmp_path / name) as picture:
            picture.load()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["report.json", *report["pictures"]]
    )


def test_the_digest_is_of_the_bytes_and_not_of_the_place(
    engine: perception_rt.Embedder, data: Path, tmp_path: Path
) -> None:
    copy = write_folders(tmp_path / "copy", 4)
    first, second = (evaluate(engine, "zero-shot", folder) for folder in (data, copy))
    assert first.run.digest == second.run.digest
    shifted = (copy / "red" / "0.png").read_bytes()
    (copy / "red" / "1.png").write_bytes(shifted)
    assert evaluate(engine, "zero-shot", copy).run.digest != first.run.digest
    assert first.to_dict()["bootstrap"]["resamples"] == RESAMPLES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "zero-shot", "--data", "absent"], "must be a folder with a folder per class"),
        (["--task", "zero-shot", "--data", "{data}", "--k", "3"], "zero-shot does not take --k"),
        (["--task", "zero-shot", "--data", "{data}", "--out", "a.txt"], "must end in .json"),
        (["--task", "zero-shot", "--data", "{data}", "--num-frames", "2"], "is for videos"),
        (["--task", "knn", "--data", "{data}"], "give --train-data"),
    ],
)
def test_bad_options_are_one_line(
    tiny_package: Path, data: Path, arguments: list[str], message: str, capsys
) -> None:
    filled = [argument.format(data=data) for argument in arguments]
    assert main(["eval", str(tiny_package), *filled]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if " s  " not in line]
    assert len(errors) == 1
    assert message in errors[0]


def test_a_damaged_picture_is_named_and_no_report_is_written(
    tiny_package: Path, tmp_path: Path, capsys
) -> None:
    data = write_folders(tmp_path / "data", 2)
    (data / "green" / "1.png").write_bytes(b"no picture")
    out = tmp_path / "report.json"
    command = ["eval", str(tiny_package), "--task", "zero-shot", "--data", str(data)]
    assert main([*command, "--out", str(out)]) == 2
    assert "green/1.png" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data]


def test_an_export_records_the_points_lost(
    tuned: Path, tiny_config, data: Path, tmp_path: Path, capsys
) -> None:
    config = tmp_path / "config.json"
    config.write_text(json.dumps(tiny_config.to_dict()))
    out = tmp_path / "package"
    command = ["--checkpoint", str(tuned), "--config", str(config), "--out", str(out)]
    command += ["--precision", "int8", "--taps", "none", "--eval-data", str(data)]
    assert export_main([*command, "--eval-task", "knn", "--json"]) == 2
    assert "give --train-data" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == [config]  # nothing is published
    assert export_main([*command, "--json"]) == 0
    assert sorted(tmp_path.iterdir()) == [config, out]
    record = read_manifest(out).record["evaluation"]
    printed = capsys.readouterr()
    assert json.loads(printed.out)["record"]["evaluation"] == record
    scores = [line for line in printed.err.splitlines() if "points lost against fp32" in line]
    assert scores[0].startswith("zero-shot top-1: ")
    assert main(["inspect", str(out)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [f"evaluation  {line}" for line in scores] == [s for s in shown if "points lost" in s]
    report = evaluate(out, "zero-shot", data)
    assert record["parts"][0]["metrics"] == report.to_dict()["parts"][0]["metrics"]
    assert record["against"]["precision"] == "fp32"
    assert record["data"] == report.run.digest


@pytest.mark.parametrize(
    "record",
    [None, 3, [], {}, {"task": "knn", "against": None, "parts": [{"name": "", "metrics": [1]}]}],
)
def test_inspect_survives_the_evaluation_of_another_version(record: object) -> None:
    assert evaluation_lines(record) == ["not in a form that this version knows"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--eval-option", "k=3"], "--eval-option needs --eval-data"),
        (["--eval-data", ".", "--eval-option", "k"], "'k' is not NAME=VALUE"),
        (["--eval-data", ".", "--eval-option", "k=x"], "k must be of type int, not 'x'"),
        (["--eval-data", ".", "--eval-option", "k=1"], "zero-shot does not take --k"),
        (["--eval-data", ".", "--eval-task", "x"], "unknown task 'x'"),
        (["--eval-data", "absent"], "--eval-data 'absent' does not exist"),
    ],
)
def test_bad_evaluations_of_an_export_end_before_it(
    more: list[str], message: str, tmp_path: Path, capsys
) -> None:
    command = ["--model", "PE-Demo", "--out", str(tmp_path / "package")]
    assert export_main([*command, *more]) == 2
    assert message in capsys.readouterr().err
