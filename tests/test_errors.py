"""Messages are one printable line, whatever a path contains."""

from pathlib import Path

import pytest

import perception_rt as prt
from perception_rt.cli import main
from perception_rt.errors import (
    BackendError,
    CapacityError,
    CheckpointError,
    ExportError,
    InputError,
    PackageError,
    escaped,
)

HOSTILE = "a\x1b[2Jb\nc\rd\x07\x9be\u202ef\ud800"
SHOWN = r"a\x1b[2Jb\nc\rd\x07\x9be\u202ef\ud800"


@pytest.mark.parametrize(
    "kind", [BackendError, CapacityError, CheckpointError, ExportError, InputError, PackageError]
)
def test_control_characters_are_escaped(kind: type[prt.PerceptionError]) -> None:
    error = kind(f"{HOSTILE}: not found")
    assert str(error) == f"{SHOWN}: not found"
    assert error.args == (f"{HOSTILE}: not found",)
    assert str(kind("Stra\u00dfe \u4e16.png")) == "Stra\u00dfe \u4e16.png"
    assert str(kind()) == ""


def test_text_that_can_be_printed_stays() -> None:
    for text in ("", "a b", "\u00e9\u4e16\U0001f600", "\\n", "'\""):
        assert escaped(text) == text
    assert escaped(HOSTILE) == SHOWN


def test_paths_in_messages(tmp_path: Path, tiny_package: Path) -> None:
    folder = tmp_path / "x\x1b[31m\ny"
    with pytest.raises(PackageError) as caught:
        prt.load(folder)
    assert r"x\x1b[31m\ny" in str(caught.value) and str(caught.value).isprintable()
    folder.mkdir()
    (folder / "manifest.json").write_text("{")
    with pytest.raises(PackageError) as caught:
        prt.load(folder)
    assert str(caught.value).isprintable()
    with prt.load(tiny_package) as engine, pytest.raises(InputError) as error:
        engine.embed_images([folder / "z\x9b.png"])
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "command",
    [
        "verify {}",
        "inspect {}",
        "classify {} --image {} --label a b",
        "embed {package} --text a --out {}/v.npy",
        "embed {package} --image {}",
    ],
)
def test_commands_print_one_line(
    tmp_path: Path, tiny_package: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    hostile = f"{tmp_path}/x\x1b[31m\ny"
    arguments = [
        argument.replace("{package}", str(tiny_package)).replace("{}", hostile)
        for argument in command.split()
    ]
    assert main(arguments) == 2
    lines = capsys.readouterr().err.split("\n")
    assert all(map(str.isprintable, lines))
    assert len([line for line in lines if line and " s  " not in line]) == 1  # besides progress


def test_a_wrong_command_line_is_printable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["verify", "package", f"--{HOSTILE[:-1]}"])
    assert SHOWN[: -len(r"\ud800")] in capsys.readouterr().err
