"""`chat`: reads lines, prints answers, keeps the history, and survives bad lines."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from one_line import fails

from perception_rt.cli import main
from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.load import load
from perception_rt.runtime.request import Exchange, Request

SIZE = 12  # tokens of each answer


@pytest.fixture(scope="module")
def plm(plm_package: Path) -> Iterator[Generator]:
    with load(plm_package) as generator:
        yield generator


class Script:
    """Standard input that makes each line when it is read."""

    def __init__(self, lines: Iterator[str], *, terminal: bool = False) -> None:
        self._lines = lines
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal

    def readline(self) -> str:
        return next((f"{line}\n" for line in self._lines), "")

    def fileno(self) -> int:
        raise io.UnsupportedOperation

    def flush(self) -> None:
        pass


@pytest.fixture
def chat(plm_package: Path, monkeypatch, capsys) -> Callable:
    """Runs `chat` on lines; returns standard output and the errors on standard error."""

    def run(
        lines: Iterator[str] | list[str], *arguments: str, status: int = 0, terminal: bool = False
    ) -> tuple[str, list[str]]:
        capsys.readouterr()
        monkeypatch.setattr("sys.stdin", Script(iter(lines), terminal=terminal))
        if terminal:
            monkeypatch.setattr("sys.stdout.isatty", lambda: True)
        command = ["chat", str(plm_package), "--max-new-tokens", str(SIZE), *arguments]
        assert main(command) == status
        captured = capsys.readouterr()
        lines = captured.err.splitlines()
        others = (" s  ", " prompt tokens")  # progress and timings
        return captured.out, [x for x in lines if not any(other in x for other in others)]

    return run


@pytest.fixture
def spied(monkeypatch) -> tuple[list[Handle], list[int]]:
    """Records the handles of all requests and the numbers of tiles of all vision calls."""
    handles, tiles = [], []
    submit, encode = Generator.submit, PlmEngine.encode_tiles

    def spied_submit(self, request: Request) -> Handle:
        handles.append(submit(self, request))
        return handles[-1]

    def spied_encode(self, pixels, **options):
        tiles.append(len(pixels))
        return encode(self, pixels, **options)

    monkeypatch.setattr(Generator, "submit", spied_submit)
    monkeypatch.setattr(PlmEngine, "encode_tiles", spied_encode)
    return handles, tiles


def test_turns_know_what_was_said(chat, plm: Generator) -> None:
    out, errors = chat(["Hello", "", "  And now?  "])
    first = plm.generate("Hello", max_new_tokens=SIZE).text
    history = [Exchange(prompt="Hello", answer=first)]
    second = plm.generate("And now?", history=history, max_new_tokens=SIZE).text
    assert out == f"{first}\n{second}\n"
    assert second != plm.generate("And now?", max_new_tokens=SIZE).text
    assert errors == []


def test_reset_and_quit(chat, plm: Generator, picture: str) -> None:
    lines = ["Hello", f"/image {picture}", "/reset", "Hello", "/quit", "Hello"]
    out, errors = chat(lines)
    assert out == f"{plm.generate('Hello', max_new_tokens=SIZE).text}\n" * 2
    assert errors == []


def test_clear_is_reset(chat, plm: Generator) -> None:
    out, errors = chat(["Hello", "/clear", "Hello"])
    assert out == f"{plm.generate('Hello', max_new_tokens=SIZE).text}\n" * 2
    assert errors == []


def test_help_lists_the_commands(chat) -> None:
    out, lines = chat(["/help"])
    assert out == ""
    assert [line.split()[0] for line in lines] == ["/image", "/clear", "/help", "/quit", "Any"]


def test_timings_follow_an_answer(plm_package: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.stdin", Script(iter(["Hello", "And now?"])))
    assert main(["chat", str(plm_package), "--max-new-tokens", "4"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if " s  " not in line]
    first, second = lines
    assert first.startswith("0 tiles, ") and "; first token " in first and "tokens/s" in first
    assert "cached)" in second and "cached)" not in first


def test_json_is_a_line_for_each_answer(chat, plm: Generator) -> None:
    out, errors = chat(["Hello", "/dance", "/help", "And now?"], "--json")
    first, second = map(json.loads, out.splitlines())
    assert first["text"] == plm.generate("Hello", max_new_tokens=SIZE).text
    assert first["tokens"] and first["timings"]["ttft_s"] > 0
    assert second["finish_reason"] in ("stop", "length") and second["text"]
    assert "unknown command" in errors[0]


def test_a_second_question_on_an_image_is_cheap(
    chat, spied, picture: str, clip: str, tmp_path: Path
) -> None:
    """Even if the file was deleted in the meantime."""
    copy = shutil.copy(picture, tmp_path / "a b.png")
    handles, tiles = spied

    def lines() -> Iterator[str]:
        yield f"/image {copy}"
        yield "What is it?"
        tiles.append(0)
        Path(copy).unlink()
        yield "And what else?"

    _, errors = chat(lines(), "--video", clip, "--max-tiles", "4")
    assert errors == []
    timings = [handle.result().timings for handle in handles]
    assert [t.image_tiles for t in timings] == [11, 11]
    assert tiles == [1] * 11 + [0]
    assert timings[0].cached_tokens == 0
    assert timings[1].cached_tokens >= timings[0].prompt_tokens


def test_images_go_with_the_question_that_follows(chat, plm: Generator, picture: str) -> None:
    out, _ = chat(["What?", f"/image {picture}", "Two?"], "--image", picture)
    first = plm.generate("What?", images=[picture], max_new_tokens=SIZE).text
    history = [Exchange(prompt="What?", answer=first, images=[picture])]
    second = plm.generate("Two?", images=[picture], history=history, max_new_tokens=SIZE)
    assert out == f"{first}\n{second.text}\n"


def test_errors_are_a_line_and_the_chat_goes_on(chat, plm: Generator, picture: str) -> None:
    lines = [
        "/image nowhere.png",
        "/dance",
        "/image",
        "x" * 9000,
        f"/image {picture}",
        "<image> and <image>",
        "What?",
    ]
    out, errors = chat(lines)
    assert out == f"{plm.generate('What?', images=[picture], max_new_tokens=SIZE).text}\n"
    for line, message in zip(
        errors,
        (
            "image 'nowhere.png' cannot be read",
            "unknown command '/dance'; known are /image FILE, /clear, /help and /quit",
            "unknown command '/image'",
            "the context has 8192",
            "2 <image> or <video> marks for 1",
        ),
        strict=True,
    ):
        assert line.startswith("perception-rt: ") and message in line


def test_a_terminal_is_prompted_and_a_pipe_is_not(chat, plm: Generator) -> None:
    answer = plm.generate("Hello", max_new_tokens=1).text
    arguments = ["--max-new-tokens", "1"]
    assert chat(["Hello"], *arguments)[0] == f"{answer}\n"
    assert chat(["Hello"], *arguments, terminal=True)[0] == f"> {answer}\n> \n"


def test_an_interrupt_ends_an_answer_on_a_terminal_and_all_in_a_pipe(
    chat, plm: Generator, monkeypatch
) -> None:
    from perception_rt.cli import generate

    whole = plm.generate("Hello", max_new_tokens=SIZE).text

    def interrupt(moved) -> str:
        if moved.phase == "decode" and moved.done == 6 and not asked:
            asked.append(moved)
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(generate, "progress_line", interrupt)
    asked: list = []
    out, errors = chat(["Hello", "Hello"], status=130)
    assert errors == ["perception-rt: interrupted"]
    partial = out.removesuffix("\n")
    assert whole.startswith(partial) and 1 < len(partial) < len(whole)
    asked.clear()
    out, errors = chat(["Hello", "Go on"], terminal=True)
    history = [Exchange(prompt="Hello", answer=partial)]
    after = plm.generate("Go on", history=history, max_new_tokens=SIZE).text
    assert out == f"> {partial}\n> {after}\n> \n"
    assert errors == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature must be a finite number of at least 0"),
        (["--max-tiles", "1000000"], "max_tiles must be an integer from 0 to 36"),
        (["--image", "nowhere.png"], "'nowhere.png' cannot be read"),
        (["--video", "nowhere.mp4"], "'nowhere.mp4' cannot be read"),
    ],
)
def test_bad_options_end_it_before_the_first_line(
    plm_package: Path, capsys, monkeypatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("sys.stdin", Script(iter(["Hello"])))
    fails(capsys, ["chat", str(plm_package), *arguments], message, run=main)
