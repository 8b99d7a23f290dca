"""The command line on terminals, in pipes and for hasty users."""

import argparse
import io
import json
import os
import pty
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from one_line import fails

from perception_rt import progress
from perception_rt.cli import main
from perception_rt.cli.commands import export_parser, main_parser
from perception_rt.cli.report import environment, environment_lines
from perception_rt.progress import Progress, cut, duration, width

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps the copies of the demos away from the user's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


class Terminal(io.StringIO):
    """A terminal that records its input."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Runs steps under a `Progress` on a screen; returns what the screen got."""
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "TERMINAL_S", 0.002)
    monkeypatch.setattr(progress, "LOG_S", 0.002)
    monkeypatch.setattr(progress, "RATE_S", 0.0)

    def run(steps: Callable[[Progress], None], *, terminal: bool = True) -> str:
        screen = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr(sys, "stderr", screen)
        with Progress() as display:
            steps(display)
            time.sleep(0.05)
        return screen.getvalue()

    return run


def counting(display: Progress) -> None:
    count = display.counter("images")
    for done in range(1, 6):
        count(done, 10)
        time.sleep(0.01)


def test_progress_has_a_rate_and_the_time_that_remains(shown: Callable) -> None:
    line = [text for text in shown(counting).split("\r\x1b[K") if text][-1]
    assert re.fullmatch(r" +\d\.\d s  5 of 10 images, [\d,.]+/s, \d s left", line), repr(line)
    assert re.search(r"5 of 10 images, [\d,.]+/s, \d s left\n", shown(counting, terminal=False))


def test_slow_items_have_a_time_each(monkeypatch: Any, shown: Callable) -> None:
    clock = iter(range(0, 10_000, 50))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(clock)))

    def slow(display: Progress) -> None:
        display.count("1 of 30 videos", 1, 30)
        display.count("2 of 30 videos", 2, 30)

    assert re.search(r"2 of 30 videos, \d+\.0 s each, \d+:\d\d(:\d\d)? left", shown(slow))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (3599, "59:59"), (3661, "1:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_lines_fit_the_width(monkeypatch: Any, shown: Callable) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    for name in ("/a/long/path" * 20, "\u65e5\u672c\u8a9e" * 40, "e\u0301" * 90):
        for line in shown(lambda display, name=name: display.step(f"opening {name}")).split(
            "\r\x1b[K"
        ):
            assert width(line) <= 39 and "\n" not in line
    line = [text for text in shown(counting).split("\r\x1b[K") if text][-1]
    assert re.fullmatch(r" +\d\.\d s  5 of 10 \S*\.\.\., [\d,.]+/s, \d s left", line), repr(line)
    assert cut("\u65e5\u672c\u8a9e\u65e5", 7) == "\u65e5\u672c..."
    assert cut("short", 5) == "short" and cut("longer", 2) == ".."


def test_a_path_cannot_move_the_cursor(shown: Callable) -> None:
    text = shown(lambda display: display.step("opening a\x1b[2Jb\rc\nd"))
    assert r"opening a\x1b[2Jb\rc\nd" in text and "\x1b[2J" not in text


def test_no_color_means_no_escape_sequence(
    monkeypatch: pytest.MonkeyPatch, shown: Callable
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    text = shown(counting)
    assert "\x1b" not in text and "\r" in text and "\n" not in text
    assert text.endswith(" \r")  # the line is erased
    monkeypatch.setenv("NO_COLOR", "")
    assert "\x1b[K" in shown(counting)


def test_a_dumb_terminal_gets_lines(monkeypatch: Any, shown: Callable) -> None:
    monkeypatch.setenv("TERM", "dumb")
    text = shown(counting)
    assert "\r" not in text and "\x1b" not in text and text.count("\n") >= 2


def test_a_closed_or_missing_stderr_is_no_error(
    monkeypatch: pytest.MonkeyPatch, shown: Callable
) -> None:
    class Closed(Terminal):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    for stream in (Closed(), None):
        monkeypatch.setattr(progress, "QUIET_S", 0.0)
        monkeypatch.setattr(sys, "stderr", stream)
        with Progress() as display:
            counting(display)
    assert progress.THREAD_NAME not in [thread.name for thread in threading.enumerate()]


def environment_of(**changes: str) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM", "COLUMNS")}
    return {**kept, **changes}


def run_shell(line: str, **changes: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell line in which `rt` is `perception-rt`."""
    rt = f"{shlex.quote(sys.executable)} -m perception_rt"
    return subprocess.run(
        ["bash", "-c", f"rt() {{ {rt} \"$@\"; }}; {line}"],
        capture_output=True, text=True, cwd=ROOT, env=environment_of(**changes), timeout=60,
    )  # fmt: skip


def test_a_closed_pipe_is_no_error() -> None:
    for line in (
        "rt inspect demo:pe --json | true; echo ${PIPESTATUS[0]}",
        "rt inspect demo:pe 2>&1 | true; echo ${PIPESTATUS[0]}",
        "rt embed --help | true; echo ${PIPESTATUS[0]}",
        "rt inspect demo:pe >&-; echo $?",
    ):
        result = run_shell(line)
        assert (result.stdout, result.stderr) == ("0\n", ""), line
    result = run_shell("rt inspect absent 2>&1 | true; echo ${PIPESTATUS[0]}")
    assert (result.stdout, result.stderr) == ("2\n", "")
    full = run_shell("rt inspect demo:pe > /dev/full; echo $?")
    assert full.stdout == "2\n"
    assert full.stderr == "perception-rt: No space left on device\n"


def test_on_a_terminal() -> None:
    """A real one: no line is longer than it is wide, also if it has no width."""
    code = (
        "import sys, time; from perception_rt import progress;"
        "progress.QUIET_S = progress.TERMINAL_S = 0.01; d = progress.Progress();"
        "d.__enter__(); d.step('x' * 300); time.sleep(0.1); d.stop()"
    )
    for changes, columns in (({"COLUMNS": "30"}, 30), ({}, 80)):
        leader, follower = pty.openpty()
        subprocess.run(
            [sys.executable, "-c", code], stdout=subprocess.DEVNULL, stderr=follower, cwd=ROOT,
            check=True, env=environment_of(**changes),
        )  # fmt: skip
        os.close(follower)
        text = os.read(leader, 100_000).decode()
        os.close(leader)
        lines = text.split("\r\x1b[K")
        assert max(map(len, lines)) == columns - 1


def subparsers() -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in main_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def examples_of(text: str) -> list[str]:
    return [line.strip() for line in text.partition("examples:\n")[2].splitlines() if line.strip()]


def test_every_help_has_examples_that_parse() -> None:
    count = 0
    for name, parser in [("", main_parser()), *subparsers()]:
        lines = examples_of(parser.format_help())
        assert lines, name
        for line in lines:
            program, *arguments = shlex.split(line.partition(" < ")[0])
            assert program == "perception-rt" and (not name or arguments[0] == name)
            if arguments != ["COMMAND", "--help"]:
                main_parser().parse_args(arguments)
                count += 1
    for line in examples_of(export_parser().format_help()):
        program, *arguments = shlex.split(line)
        assert program == "perception-export"
        export_parser().parse_args(arguments)
        count += 1
    assert count >= 15


@pytest.mark.parametrize(
    "line",
    [
        "classify PKG --image a b --label x y",
        "classify --image a b PKG --label x y",
        "classify --image a b --label x y PKG",
        "classify --label x y PKG --image=a --image b",
        "classify --device cpu --image a b PKG --label x y",
        "classify --ima a b PKG --lab x y",
        "classify --image a b --label x y -- PKG",
        "embed --image a b --num-frames 3 PKG",
        "embed --text one -1 PKG --json",
        "generate --prompt what --image a b PKG",
        "generate --image a b PKG --prompt what --stop x",
        "chat --image a b PKG",
    ],
)
def test_the_package_may_come_last(line: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    options = main_parser().parse_args(line.replace("PKG", str(tmp_path)).split())
    assert options.package == str(tmp_path)
    assert options.image in ([], ["a"], ["a", "b"])
    assert getattr(options, "label", ["x", "y"]) == ["x", "y"]
    assert main_parser().parse_args(line.replace("PKG", "demo:pe").split()).package == "demo:pe"


@pytest.mark.parametrize(
    "line",
    [
        "classify --image a b absent --label x y",  # no package
        "classify --image demo:pe --label x y",  # would leave no image
        "classify --image a demo:pe --label x demo:plm",  # which?
        "embed --image a b",
    ],
)
def test_a_package_that_is_not_clear_is_asked_for(line: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as caught:
        main(line.split())
    assert caught.value.code == 2
    assert "the following arguments are required: DIR" in capsys.readouterr().err


def test_the_prompt_may_be_on_standard_input(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(prompt: str, stdin: str = "") -> dict[str, Any]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        arguments = ["generate", "demo:plm", "--prompt", prompt, "--max-new-tokens", "6"]
        assert main([*arguments, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    expected = ask("Two\nlines?")
    for text in ("Two\nlines?", "Two\nlines?\n", "Two\nlines?\r\n"):
        assert ask("-", text)["tokens"] == expected["tokens"]
    command = ["generate", "demo:plm", "--prompt", "-"]
    for stdin in (io.StringIO("\n"), io.StringIO()):
        monkeypatch.setattr(sys, "stdin", stdin)
        fails(capsys, command, "standard input, which is empty", run=main)
    monkeypatch.setattr(sys, "stdin", io.StringIO("a" * 65536 + "\n" + "more"))
    fails(capsys, command, "the limit is 65536", run=main)


def test_a_question_that_is_not_text_is_refused(
    capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def given(data: bytes) -> io.TextIOWrapper:
        return io.TextIOWrapper(io.BytesIO(data), encoding="utf-8", errors="strict")

    command = ["generate", "demo:plm", "--prompt"]
    for text in ("Grüße", "Hi"):
        data = text.encode("utf-16")
        monkeypatch.setattr(sys, "stdin", given(data))
        fails(capsys, [*command, "-"], "standard input is not text: it has the byte 0x", run=main)
    monkeypatch.setattr(sys, "stdin", given(b""))
    fails(capsys, [*command, "\udcff?"], "the question is not text: it has the byte 0xff", run=main)
    tokens = []
    for data in (b"Hi", b"\xef\xbb\xbfHi\r\n"):  # Windows marks UTF-8
        monkeypatch.setattr(sys, "stdin", given(data))
        assert main([*command, "-", "--max-new-tokens", "4", "--json"]) == 0
        tokens.append(json.loads(capsys.readouterr().out)["tokens"])
    assert tokens[0] == tokens[1]
    monkeypatch.setattr(sys, "stdin", given(b"caf\xe9?\nHi\n"))
    assert main(["chat", "demo:plm", "--max-new-tokens", "4", "--json"]) == 0
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 1
    assert "standard input is not text: it has the byte 0xe9" in captured.err


def test_a_missing_package_is_not_damaged(tmp_path: Path, capsys: Any) -> None:
    absent = str(tmp_path / "absent")
    (tmp_path / "file").write_text("x")
    for path, note in (
        (absent, "missing: there is no file or folder of this name"),
        (str(tmp_path), "not a package: an engine package is a folder with manifest.json"),
        (str(tmp_path / "file"), "not a package: an engine package is a folder with manifest.json"),
    ):
        assert main(["doctor", path]) == 2
        out = capsys.readouterr().out
        assert out.splitlines()[-1] == f"{path}: {note}" and "damaged" not in out
    for command in ("inspect", "verify"):
        fails(capsys, [command, absent], "absent: no engine package: it is missing", run=main)


def test_reports_are_text(capsys: Any) -> None:
    lines = environment_lines(environment())
    assert "backends:" in lines and "  onnxruntime: cpu" in lines
    assert main(["doctor"]) == 0
    assert main(["inspect", "demo:plm"]) == 0
    assert not re.search(r"[{}']|None|True|False", capsys.readouterr().out)


def test_closed_standard_streams_are_no_error() -> None:
    result = run_shell(
        "rt chat demo:plm <&-; echo $?;"
        "echo Hi | rt chat demo:plm --max-new-tokens 1 >&-; echo $?;"
        "rt generate demo:plm --prompt Hi --max-new-tokens 1 >&- 2>&-; echo $?"
    )
    assert result.stdout == "0\n0\n0\n", result.stderr
    assert "Traceback" not in result.stderr
