"""Runs the commands `generate` and `chat` on an open language model.

Answers go to standard output, everything else to standard error.
"""

import json
import sys
from argparse import Namespace
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from perception_rt.errors import InputError, PerceptionError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.plm_config import PlmConfig
from perception_rt.progress import Progress

if TYPE_CHECKING:
    from perception_rt.processing.image import ImageSource
    from perception_rt.processing.video import VideoSource
    from perception_rt.runtime.generator import Generator
    from perception_rt.runtime.request import (
        Exchange,
        GenerationProgress,
        Request,
        Result,
        Timings,
    )

_COMMANDS = "/image FILE, /clear, /help and /quit"
_HELP = """\
/image FILE  add an image to the next question
/clear       forget the conversation (also /reset)
/help        show this list
/quit        end (also Ctrl-D)
Any other line is a question."""

# Characters that could change the state of a terminal.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """The answer to a question; `result` is None after an interrupt."""

    text: str
    result: "Result | None"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `tokens` and `timings` are None after an interrupt."""
        from perception_rt.processing.boxes import parse_boxes

        result = self.result
        return {
            "text": self.text,
            "tokens": None if result is None else list(result.tokens),
            "finish_reason": "cancelled" if result is None else result.finish_reason,
            "boxes": [asdict(box) for box in parse_boxes(self.text)],
            "timings": None if result is None else _timings(result.timings),
        }


def generate(engine: "Generator", options: Namespace, progress: Progress) -> None:
    """Answers one question and prints the answer or, with `--json`, all facts about it.

    Raises:
        KeyboardInterrupt: the user interrupted; the answer so far is printed.
        PerceptionError: as `Generator.generate`.
    """
    _check_tokenizer(engine)
    progress.step("preparing the prompt")
    request = _request(
        options,
        prompt=options.prompt,
        images=options.image,
        videos=options.video,
        on_progress=lambda moved: _show(progress, moved),
    )
    answer = _ask(engine, request, progress if options.stream else None)
    progress.stop()
    if options.json:
        print(json.dumps(answer.to_dict(), indent=2))
    elif not options.stream:
        print(_printable(answer.text))
    if answer.result is None:
        raise KeyboardInterrupt
    if not options.json:
        print(_summary(answer.result.timings), file=sys.stderr)


def read_prompt(prompt: str) -> str:
    """Returns a prompt; "-" stands for the text on standard input.

    Raises:
        InputError: standard input has no text.
    """
    if prompt != "-":
        return _decoded(prompt, "the question")
    # A longer text is refused like any other.
    text = sys.stdin.read(DEFAULT_LIMITS.text_bytes + 1)
    if len(text) <= DEFAULT_LIMITS.text_bytes:
        text = text.rstrip("\r\n")
    if not text:
        raise InputError("--prompt - reads the question from standard input, which is empty")
    return _decoded(text, "standard input")


def _decoded(text: str, what: str) -> str:
    """A text without a byte order mark; InputError if bytes of it could not be decoded."""
    wrong = next((c for c in text if "\udc80" <= c <= "\udcff"), None)
    if wrong is not None:
        raise InputError(
            f"{what} is not text: it has the byte 0x{ord(wrong) - 0xDC00:02x}, which could not be "
            "decoded; write it in UTF-8"
        )
    return text.removeprefix("\ufeff")


def chat(engine: "Generator", options: Namespace) -> None:
    """Answers the lines of standard input until its end. An error ends only its own line.

    Prints each answer as it grows or, with `--json`, as one line of JSON when it is complete.
    On a terminal, an interrupt ends the current answer; the part so far stays in the conversation.

    Raises:
        InputError: the options are unusable.
    """
    _check_tokenizer(engine)
    conversation = _Conversation(engine, options)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401 - adds line editing to `input`
    while True:
        try:
            line = input("> " if terminal else "").strip()
        except EOFError:
            print(end="\n" if terminal else "")
            break
        if line == "/quit":
            break
        try:
            conversation.take(line, interruptible=terminal)
        except PerceptionError as error:
            print(f"perception-rt: {error}", file=sys.stderr)


class _Conversation:
    """The conversation so far, and the images and videos of the next question.

    Images and videos are decoded when they are named, so no turn depends on a file of an earlier
    one.
    """

    def __init__(self, engine: "Generator", options: Namespace) -> None:
        from perception_rt.processing.image_options import image_options
        from perception_rt.processing.video import load_frames
        from perception_rt.runtime.request import check_request

        self._engine = engine
        self._options = options
        config, spec = PlmConfig.from_dict(engine.manifest.content.architecture), engine.tile_spec
        check_request(
            _request(options, prompt=""),
            vocab_size=config.decoder.vocab_size,
            max_length=engine.max_length,
            max_tiles=spec.max_tiles,
            max_frames=spec.max_frames,
            limits=DEFAULT_LIMITS,
        )
        self._image_options = image_options(options.formats, options.background)
        self._history: list[Exchange] = []
        self._images: list[ImageSource] = [self._opened(file) for file in options.image]
        # Frames already have the size of a tile, so resizing them again changes nothing.
        self._videos: list[VideoSource] = [
            load_frames(file, spec, num_frames=options.num_frames) for file in options.video
        ]

    def take(self, line: str, *, interruptible: bool) -> None:
        """Runs a line: a command, a question, or an empty line."""
        command, _, argument = line.partition(" ")
        if command == "/image" and argument:
            self._images.append(self._opened(argument.strip()))
        elif line in ("/clear", "/reset"):
            self._history, self._images, self._videos = [], [], []
        elif line == "/help":
            print(_HELP, file=sys.stderr)
        elif line.startswith("/"):
            raise InputError(f"unknown command {line!r:.60}; known are {_COMMANDS}")
        elif line:
            self._answer(_decoded(line, "standard input"), interruptible)

    def _opened(self, file: str) -> "ImageSource":
        from perception_rt.processing.image import decode_image

        upright = self._engine.tile_spec.exif_orientation
        return decode_image(file, options=self._image_options, upright=upright)

    def _answer(self, question: str, interruptible: bool) -> None:
        from perception_rt.runtime.request import Exchange

        images, videos = self._images, self._videos
        with Progress() as progress:
            progress.step("preparing the prompt")
            request = _request(
                self._options,
                prompt=question,
                images=images,
                videos=videos,
                history=self._history,
                on_progress=lambda moved: _show(progress, moved),
            )
            answer = _ask(self._engine, request, None if self._options.json else progress)
        if self._options.json:
            print(json.dumps(answer.to_dict()), flush=True)
        elif answer.result is not None:
            print(_summary(answer.result.timings), file=sys.stderr)
        if answer.result is None and not interruptible:
            raise KeyboardInterrupt
        if answer.result is None and not answer.text:
            return  # interrupted before the first token: the question does not count
        exchange = Exchange(
            prompt=question,
            answer=answer.text,
            images=images,
            videos=videos,
            literal=self._options.literal,
        )
        self._history = [*self._history, exchange]
        self._images, self._videos = [], []


def _check_tokenizer(engine: "Generator") -> None:
    content = engine.manifest.content
    if content.text is None:
        raise InputError(
            f"{content.name} has no tokenizer and takes token ids only: export it with --tokenizer"
        )


def _request(options: Namespace, **fields: Any) -> "Request":
    """A request with the options that apply to all questions of a command."""
    from perception_rt.runtime.request import Request

    return Request(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        seed=options.seed,
        stop=options.stop,
        max_tiles=options.max_tiles,
        num_frames=options.num_frames,
        lookup=options.lookup,
        literal=options.literal,
        repetition_penalty=options.repetition_penalty,
        **fields,
    )


def _ask(engine: "Generator", request: "Request", progress: Progress | None) -> Answer:
    """Asks a question. An interrupt ends the answer early.

    Args:
        engine: the language model.
        request: the question.
        progress: display to stop before printing the answer as it grows; None prints nothing.
    """
    pieces: list[str] = []
    result: Result | None = None
    handle = engine.submit(request)
    try:
        for piece in handle:
            pieces.append(piece)
            if progress is not None:
                progress.stop()
                print(_printable(piece), end="", flush=True)
        result = handle.result()
    except KeyboardInterrupt:
        handle.cancel()
    finally:
        if progress is not None and pieces:
            print(flush=True)
    return Answer(text="".join(pieces), result=result)


def _printable(text: str) -> str:
    """Replaces control characters, which a terminal would obey."""
    return text.translate(_CONTROLS) if sys.stdout.isatty() else text


def progress_line(progress: "GenerationProgress") -> str:
    """Describes the progress of a request in one line."""
    if progress.phase == "decode":
        return f"{progress.done} tokens of at most {progress.total}"
    noun = "tiles" if progress.phase == "vision" else "prompt tokens"
    return f"{progress.done} of {progress.total} {noun}"


def _show(progress: Progress, moved: "GenerationProgress") -> None:
    # An answer may be shorter than the most tokens, so its remaining time is unknown.
    total = None if moved.phase == "decode" else moved.total
    progress.count(progress_line(moved), moved.done, total)


def _timings(timings: "Timings") -> dict[str, Any]:
    derived = {"ttft_s": timings.ttft_s, "per_token_s": timings.per_token_s}
    return asdict(timings) | derived


def _summary(timings: "Timings") -> str:
    """One line about the work and the time of an answer."""
    cached = f" ({timings.cached_tokens} cached)" if timings.cached_tokens else ""
    parts = [f"{timings.image_tiles} tiles, {timings.prompt_tokens} prompt tokens{cached}"]
    times = timings.token_times_s
    if times:
        parts.append(
            f"first token {times[0]:.3f} s (preprocess {timings.preprocess_s:.3f}, "
            f"vision {timings.vision_s:.3f}, prefill {timings.prefill_s:.3f})"
        )
    if len(times) > 1 and times[-1] > times[0]:
        # The mean, not the median of `per_token_s`: accepted drafts come several at a time.
        each = (times[-1] - times[0]) / (len(times) - 1)
        parts.append(f"{each * 1e3:.1f} ms/token, {1 / each:.1f} tokens/s")
    return "; ".join(parts)
