"""`generate`: its output, whole, streamed and interrupted."""

import io
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from perception_rt import progress
from perception_rt.cli import main
from perception_rt.cli.generate import Answer
from perception_rt.progress import Progress
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.load import load
from perception_rt.runtime.request import GenerationProgress

SUMMARY = re.compile(
    r"(\d+) tiles, (\d+) prompt tokens( \(\d+ cached\))?; first token \d+\.\d{3} s "
    r"\(preprocess \d+\.\d{3}, vision \d+\.\d{3}, prefill \d+\.\d{3}\)"
    r"(; \d+\.\d ms/token, \d+\.\d tokens/s)?"
)


@pytest.fixture(scope="module")
def plm(plm_package: Path) -> Iterator[Generator]:
    with load(plm_package) as generator:
        yield generator


@pytest.fixture
def ask(plm_package: Path, capsys: pytest.CaptureFixture[str]):
    """Runs `generate`; returns standard output and the lines of standard error."""

    def run(*arguments: str, status: int = 0) -> tuple[str, list[str]]:
        capsys.readouterr()
        assert main(["generate", str(plm_package), "--prompt", "What?", *arguments]) == status
        captured = capsys.readouterr()
        return captured.out, [line for line in captured.err.splitlines() if " s  " not in line]

    return run


def test_the_answer_is_the_library_s(ask, plm: Generator, picture: str) -> None:
    expected = plm.generate("What?", images=[picture], max_new_tokens=24)
    out, (line,) = ask("--image", picture, "--max-new-tokens", "24")
    assert out == expected.text + "\n" and len(expected.tokens) == 24
    match = SUMMARY.fullmatch(line)
    assert match is not None, line
    assert int(match[1]) == expected.timings.image_tiles > 1
    assert int(match[2]) == expected.timings.prompt_tokens
    assert match[3] is None and match[4] is not None


def test_streamed_text_is_the_same(ask, picture: str) -> None:
    arguments = ["--image", picture, "--max-new-tokens", "24"]
    out, (line,) = ask(*arguments, "--stream")
    assert out == ask(*arguments)[0]
    assert SUMMARY.fullmatch(line)


def test_json_is_one_object(ask, plm: Generator, picture: str) -> None:
    out, lines = ask("--image", picture, "--max-new-tokens", "5", "--max-tiles", "2", "--json")
    expected = plm.generate("What?", images=[picture], max_new_tokens=5, max_tiles=2)
    answer = json.loads(out)
    assert lines == []
    assert list(answer) == ["text", "tokens", "finish_reason", "boxes", "timings"]
    assert answer["text"] == expected.text
    assert answer["tokens"] == list(expected.tokens)
    assert answer["finish_reason"] == "length"
    assert answer["boxes"] == []
    timings = answer["timings"]
    assert timings["ttft_s"] == timings["token_times_s"][0] > 0
    assert timings["per_token_s"] > 0
    for name in ("image_tiles", "prompt_tokens", "new_tokens", "steps"):
        assert timings[name] == getattr(expected.timings, name), name


def test_boxes_are_numbers_in_json() -> None:
    answer = Answer(text="at [010,020,300,400].", result=None).to_dict()
    assert answer["boxes"] == [{"x1": 0.01, "y1": 0.02, "x2": 0.3, "y2": 0.4}]


def test_videos_and_their_budgets(ask, picture: str, clip: str) -> None:
    def tiles(*arguments: str) -> int:
        out, _ = ask(*arguments, "--max-new-tokens", "1", "--json")
        return json.loads(out)["timings"]["image_tiles"]

    assert tiles("--video", clip) == 6
    assert tiles("--video", clip, "--num-frames", "3") == 3
    assert tiles("--image", picture, "--max-tiles", "0") == 1
    assert tiles("--image", picture, picture, "--max-tiles", "0", "--video", clip) == 8
    assert tiles() == 0


def test_sampling_options_are_passed_on(ask) -> None:
    def tokens(*arguments: str) -> list[int]:
        return json.loads(ask("--max-new-tokens", "16", "--json", *arguments)[0])["tokens"]

    greedy, hot = tokens(), ["--temperature", "2"]
    assert tokens(*hot, "--seed", "1") == tokens(*hot, "--seed", "1") != tokens(*hot, "--seed", "2")
    assert tokens(*hot, "--top-k", "1") == tokens(*hot, "--top-p", "1e-9") == greedy
    assert tokens("--lookup") == greedy
    penalised = tokens("--repetition-penalty", "1.5")
    assert penalised != greedy and penalised == tokens("--repetition-penalty", "1.5", "--lookup")
    assert tokens("--repetition-penalty", "1") == greedy
    text = json.loads(ask("--max-new-tokens", "16", "--json")[0])["text"]
    stopped = json.loads(ask("--max-new-tokens", "16", "--json", "--stop", "?!", text[3])[0])
    assert stopped["finish_reason"] == "stop"
    assert stopped["text"] == text[: text.index(text[3])]


def test_a_cache_folder_serves_the_next_command(ask, picture: str, tmp_path: Path) -> None:
    arguments = ["--image", picture, "--max-new-tokens", "4", "--cache-dir", str(tmp_path / "c")]
    first, (line,) = ask(*arguments)
    assert "cached" not in line
    second, (line,) = ask(*arguments)
    assert second == first
    assert int(re.search(r"\((\d+) cached\)", line)[1]) > 100
    with pytest.raises(SystemExit):
        ask(*arguments, "--no-cache")
    assert ask(*arguments[:-2], "--no-cache")[0] == first


def test_one_question_keeps_no_copy_of_its_prompt(ask, monkeypatch) -> None:
    """No later question could use the copy, which takes hundreds of MiB in a large model."""
    bounds = []
    original = Generator.__init__

    def spied(self, package, options) -> None:
        bounds.append((options.prefix_cache_bytes, options.cache))
        original(self, package, options)

    monkeypatch.setattr(Generator, "__init__", spied)
    ask("--max-new-tokens", "1")
    ask("--max-new-tokens", "1", "--no-cache")
    assert bounds == [(0, True), (0, False)]


class Terminal(io.StringIO):
    """A terminal that records its input."""

    def isatty(self) -> bool:
        return True


def test_progress_makes_way_for_the_text(plm: Generator, plm_package: Path, monkeypatch) -> None:
    """Both streams are one terminal here; control characters never reach it."""
    screen = Terminal()
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "TERMINAL_S", 0.0005)
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setattr(sys, "stderr", screen)
    arguments = ["generate", str(plm_package), "--prompt", "What?", "--max-new-tokens", "200"]
    assert main([*arguments, "--stream", "--temperature", "1", "--seed", "0"]) == 0
    expected = plm.generate("What?", max_new_tokens=200, temperature=1.0, seed=0).text
    shown, _, text = screen.getvalue().rpartition("\x1b[K")
    assert "prompt tokens" in shown or "opening" in shown
    answer, _, line = text.removesuffix("\n").rpartition("\n")
    assert SUMMARY.fullmatch(line)
    assert re.search(r"[\x00-\x08\x0b-\x1f\x7f]", expected)
    assert answer == re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "\ufffd", expected)


def test_stopped_progress_is_silent(monkeypatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "TERMINAL_S", 0.001)
    monkeypatch.setattr(sys, "stderr", screen)
    with Progress() as shown:
        shown.step("one")
        while "one" not in screen.getvalue():
            pass
        shown.stop()
        length = len(screen.getvalue())
        assert screen.getvalue().endswith("\x1b[K")
        shown.step("two")
        assert progress.THREAD_NAME not in [thread.name for thread in threading.enumerate()]
    assert len(screen.getvalue()) == length


def interrupt_at(monkeypatch, tokens: int) -> None:
    """Interrupts when the answer has this many tokens."""
    from perception_rt.cli import generate

    def line(moved: GenerationProgress) -> str:
        if moved.phase == "decode" and moved.done == tokens:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(generate, "progress_line", line)


@pytest.mark.parametrize("arguments", [[], ["--stream"], ["--lookup"]])
def test_an_interrupt_keeps_the_text_so_far(ask, arguments: list[str], monkeypatch) -> None:
    whole, _ = ask("--max-new-tokens", "40")
    interrupt_at(monkeypatch, 20)
    out, lines = ask("--max-new-tokens", "40", *arguments, status=130)
    assert lines == ["perception-rt: interrupted"]
    text = out.removesuffix("\n")
    assert 10 <= len(text) <= 20 and whole.startswith(text)


def test_an_interrupt_keeps_the_object_whole(ask, monkeypatch) -> None:
    interrupt_at(monkeypatch, 5)
    out, lines = ask("--json", status=130)
    answer = json.loads(out)
    assert lines == ["perception-rt: interrupted"]
    assert answer["finish_reason"] == "cancelled" and answer["text"]
    assert answer["tokens"] is None and answer["timings"] is None


def test_ctrl_c_and_a_reader_that_leaves(plm_package: Path) -> None:
    command = [sys.executable, "-m", "perception_rt", "generate", str(plm_package)]
    command += ["--prompt", "What?", "--max-new-tokens", "7000", "--stream"]

    def start() -> subprocess.Popen[bytes]:
        # A shell starts what it runs in the background with interrupts ignored.
        heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed
        )
        assert child.stdout.read(10)
        return child

    interrupted = start()
    interrupted.send_signal(signal.SIGINT)
    left = start()
    left.stdout.close()
    out, err = interrupted.communicate(timeout=30)
    assert (interrupted.returncode, out[-1:]) == (130, b"\n")
    assert err.splitlines()[-1] == b"perception-rt: interrupted"
    assert left.wait(timeout=30) == 0  # a closed pipe is no error
    assert [line for line in left.stderr.read().splitlines() if b" s  " not in line] == []


def test_an_error_after_some_text_begins_a_line(ask, monkeypatch) -> None:
    from perception_rt.errors import BackendError
    from perception_rt.runtime.generation.plm_engine import PlmEngine

    calls, original = [], PlmEngine.embed

    def embed(self, tokens):
        calls.append(len(tokens))
        if len(calls) == 12:
            raise BackendError("the engine failed")
        return original(self, tokens)

    monkeypatch.setattr(PlmEngine, "embed", embed)
    out, lines = ask("--stream", status=2)
    assert len(out) > 1 and out.endswith("\n")
    assert lines == ["perception-rt: the engine failed"]
