"""`export` from Python makes the same packages as the command, and refuses bad values early."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from perception_rt.cli import export_main
from perception_rt.cli.export import export_parser
from perception_rt.errors import CheckpointError, ExportError, InputError
from perception_rt.export import ExportOptions, architecture, export
from perception_rt.export.components.plm import PlmExport
from perception_rt.export.options import parse_image_size, parse_taps, parse_target
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import read_manifest


def test_an_encoder_has_the_same_id_from_python_and_the_command(tmp_path: Path) -> None:
    command = [
        "--model", "PE-Demo", "--weights", "random", "--seed", "3", "--precision", "int8",
        "--image-size", "48x32", "--center-crop", "--taps", "0,-1", "--ignore-exif",
        "--out", str(tmp_path / "cli"),
    ]  # fmt: skip
    assert export_main(command) == 0
    lines: list[str] = []
    chosen = ExportOptions(
        model="PE-Demo", weights="random", seed=3, precision="int8", image_size=(48, 32),
        center_crop=True, ignore_exif=True, taps=[0, -1], out=tmp_path / "new" / "python",
    )  # fmt: skip
    manifest = export(chosen, lines.append)
    assert isinstance(manifest, Manifest)
    assert manifest == read_manifest(tmp_path / "new" / "python")
    assert manifest.id == read_manifest(tmp_path / "cli").id
    image = manifest.content.image
    assert (image["rgb_conversion"], image["exif_orientation"]) == ("after_resize", False)
    assert lines[-1] == f"published python, {manifest.id}"


def test_a_language_model_has_the_same_id_and_is_planned_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [
        "--model", "PLM-Demo", "--precision", "int4", "--blocks", "int4", "--max-length", "256",
        "--out", str(tmp_path / "cli"),
    ]  # fmt: skip
    assert export_main(command) == 0
    plans = []
    make_plan = PlmExport.make_plan

    def counted(*arguments: Any) -> Any:
        plans.append(make_plan(*arguments))
        return plans[-1]

    monkeypatch.setattr(PlmExport, "make_plan", counted)
    manifest = export(
        ExportOptions(
            model="PLM-Demo", precision="int4", blocks="int4", max_length=256,
            out=str(tmp_path / "python"),
        )
    )  # fmt: skip
    assert manifest.id == read_manifest(tmp_path / "cli").id
    assert manifest.content.text is not None
    (made,) = plans
    assert (made.tiles.mode, made.max_length) == ("vanilla", 256)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "either a model or a checkpoint"),
        ({"model": "PE-Demo", "checkpoint": "x.pt"}, "either a model or a checkpoint"),
        ({"checkpoint": "x.pt", "weights": "random"}, "--weights is for --model"),
        ({"model": "PE-Demo", "config": "x.json"}, "--config is for --checkpoint"),
        ({"model": 3}, "model must be text, not 3"),
        ({"model": "PE-Demo", "precision": 8}, "precision must be text, not 8"),
        ({"model": "PE-Demo", "route": None}, "route must be text, not a NoneType"),
        ({"model": "PE-Demo", "weights": 0.5}, r"weights must be a path, not 0\.5"),
        ({"model": "PE-Demo", "seed": "1"}, "seed must be an integer, not a str"),
        ({"model": "PLM-Demo", "max_length": 1.0}, r"max_length must be an integer, not 1\.0"),
        ({"model": "PE-Demo", "force": 1}, "force must be True or False, not 1"),
        ({"model": "PE-Demo", "image_size": "448"}, "image_size must be a side or .height, width"),
        ({"model": "PE-Demo", "image_size": (448, 1, 2)}, "image_size must be a side"),
        ({"model": "PE-Demo", "taps": "all"}, "taps must be a sequence of int, not a str"),
        ({"model": "PE-Demo", "taps": [1.0]}, "taps must be a sequence of int, not a list"),
        ({"model": "PE-Demo", "target": [89]}, "target must be a sequence of str, not a list"),
    ],
)
def test_wrong_types_and_contradictions_are_refused(
    values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        ExportOptions(**{"out": tmp_path / "p", **values})
    with pytest.raises(InputError, match="out must be a path, not a NoneType"):
        ExportOptions(model="PE-Demo", out=None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": "PE-Core-X"}, "unknown model 'PE-Core-X'"),
        ({"model": "PE-Core-B16-224", "precision": "int4"}, "int4 is for language models"),
        ({"model": "PE-Core-B16-224", "image_size": (225, 224)}, "multiple of the patch size 16"),
        ({"model": "PE-Core-B16-224", "image_size": 0}, "from 1 to"),
        ({"model": "PE-Core-B16-224", "taps": [12]}, "layer 12 is out of range"),
        ({"model": "PE-Core-B16-224", "blocks": "int4"}, "--blocks is for a language model"),
        ({"model": "PLM-1B", "taps": ()}, "--taps is for an encoder"),
        ({"model": "PLM-1B", "image_size": 448}, "--image-size is for an encoder"),
        ({"model": "PLM-1B", "max_length": 0}, "--max-length 0 is not in 1 to the model's 11520"),
        ({"model": "PLM-1B", "blocks": "int3"}, "blocks must be int8 or int4, not 'int3'"),
        ({"model": "PLM-1B", "precision": "fp9"}, "unknown precision 'fp9'"),
        ({"model": "PLM-1B", "backend": "x"}, "unknown backend 'x'"),
        ({"model": "PLM-1B", "target": "sm89"}, "onnxruntime has no engines to build for 'sm89'"),
        ({"model": "PLM-1B", "route": "x"}, "unknown route 'x'"),
        ({"model": "PLM-1B", "calibrator": "x"}, "unknown calibrator 'x'"),
        ({"model": "PLM-1B", "calibration": "x"}, "--calibration is for fp8"),
        (
            {"model": "PLM-1B", "precision": "fp8", "target": (), "calibration": "absent"},
            "--calibration absent: No such file",
        ),
    ],
)
def test_bad_values_are_refused_before_weights_are_looked_for(
    values: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "download", lambda name: pytest.fail("the hub was asked"))
    with pytest.raises(InputError, match=message):
        export(ExportOptions(out=tmp_path / "a" / "p", **values))
    assert list(tmp_path.iterdir()) == []


def test_a_taken_destination_is_refused_before_weights_are_looked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(architecture, "download", lambda name: pytest.fail("the hub was asked"))
    (tmp_path / "p").write_text("mine")
    with pytest.raises(ExportError, match="is not a directory; it is not replaced"):
        export(ExportOptions(model="PLM-1B", out=tmp_path / "p", force=True))
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("p", "mine")]


def test_a_string_is_one_target_and_sequences_become_tuples() -> None:
    one = ExportOptions(model="PE-Demo", target="sm89", taps=[1, 0], out="p")
    assert (one.target, one.taps) == (("sm89",), (1, 0))
    assert ExportOptions(model="PE-Demo", out="p").target is None


def test_texts_of_the_command_line_are_parsed() -> None:
    assert parse_taps("all") is None and parse_taps("none") == () and parse_taps("5,-1") == (5, -1)
    with pytest.raises(InputError, match="--taps must be all, none or integers, not 'first'"):
        parse_taps("first")
    assert parse_target("none") == () and parse_target("SM89,here") == ("sm89", "here")
    assert parse_image_size("448x336") == (448, 336)


def test_every_option_of_the_command_has_a_field() -> None:
    arguments = vars(export_parser().parse_args(["--model", "PE-Demo", "--out", "p"]))
    # fp8 is a precision; the command evaluates what `export` made.
    only_the_command = {"command", "fp8", "json", "eval_data", "eval_task", "eval_option"}
    assert arguments.keys() - only_the_command == {field.name for field in fields(ExportOptions)}


def test_options_load_no_library() -> None:
    code = """
import sys
from perception_rt.export import ExportOptions
ExportOptions(model="PE-Demo", out="p")
print(*{"numpy", "torch", "onnx"} & set(sys.modules))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_a_checkpoint_that_is_not_there(tmp_path: Path) -> None:
    """Nothing at the path is said before a missing configuration is."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "two").mkdir()
    for name in ("a.pt", "b.pt"):
        (tmp_path / "two" / name).write_bytes(b"x")
    for name, message in (
        ("absent.pt", "no weights file at .*absent"),
        ("empty", "directory .*empty has no weights"),
        ("two", "has 2 weight files .* pass one of a.pt, b.pt"),
    ):
        with pytest.raises(CheckpointError, match=message):
            export(ExportOptions(checkpoint=tmp_path / name, out=tmp_path / "p"))
    with pytest.raises(InputError, match=r"needs --config, .* open_clip_config\.json or model"):
        export(ExportOptions(checkpoint=tmp_path / "two" / "a.pt", out=tmp_path / "p"))
