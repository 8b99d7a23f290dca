"""The commands `perception-rt` and `perception-export`: parse arguments, print lines or JSON.

Each sub-command makes the calls that a program would make, and imports what it needs itself:
`perception-rt embed` never imports torch.
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from perception_rt._version import __version__
from perception_rt.cli.arguments import (
    CommandParser,
    list_argument,
    package_arguments,
    question_arguments,
)
from perception_rt.cli.conform import add_conform_arguments, run_conform
from perception_rt.cli.embed import EmbedCommand, add_embed_arguments
from perception_rt.cli.evaluate import EvaluateCommand, add_evaluate_arguments
from perception_rt.cli.export import REFIT_HELP, add_refit_arguments, export_parser, run_refit
from perception_rt.cli.features import FeaturesCommand, add_features_arguments
from perception_rt.cli.match import MatchCommand, add_match_arguments
from perception_rt.cli.search import (
    SearchCommand,
    add_index_arguments,
    add_search_arguments,
    run_index,
)
from perception_rt.cli.serve import add_serve
from perception_rt.cli.streams import drop_unwritable, reopen_closed
from perception_rt.cli.track import TrackCommand, add_track_arguments
from perception_rt.errors import InputError, PerceptionError, escaped
from perception_rt.families import PE, PLM, Family, get_family
from perception_rt.progress import Progress, is_terminal

Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `perception-rt`; returns the exit status."""
    return _run(main_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `perception-export`; returns the exit status."""
    return _run(export_parser(), arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Runs a command. A PerceptionError becomes one line on standard error and status 2.

    A reader that leaves, such as `head`, ends the command without an error.
    """
    reopen_closed()
    try:
        options = parser.parse_args(arguments)
        # Print "?" for characters that cannot be encoded; find bytes that are no text.
        for stream, errors in ((sys.stdout, "replace"), (sys.stdin, "surrogateescape")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except PerceptionError as error:
        return _fail(f"{parser.prog}: {error}", 2)
    except BrokenPipeError:
        return 0
    except OSError as error:
        where = "" if error.filename is None else escaped(f": {error.filename}")
        return _fail(f"{parser.prog}: {error.strerror or type(error).__name__}{where}", 2)
    except KeyboardInterrupt:
        return _fail(f"{parser.prog}: interrupted", 130)
    finally:
        drop_unwritable()


def _fail(line: str, status: int) -> int:
    """Prints an error, if anything reads standard error, and returns the status."""
    with suppress(OSError):
        print(line, file=sys.stderr)
    return status


def main_parser() -> argparse.ArgumentParser:
    """Parser of `perception-rt`; each sub-command sets its function as `command`."""
    parser = CommandParser(
        prog="perception-rt",
        description="Run engine packages.",
        examples=(
            "perception-rt demo",
            "perception-rt classify demo:pe --image digit.png --label two three eight",
            'perception-rt generate demo:plm --image row.png --prompt "Read the digits."',
            "perception-rt COMMAND --help",
        ),
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=CommandParser)
    _add_demo(commands)
    _add_encoder_commands(commands)
    _add_search_commands(commands)
    _add_question_commands(commands)
    _add_evaluation_commands(commands)
    _add_package_commands(commands)
    _add_hub_commands(commands)
    add_serve(commands)
    return parser


def _add_demo(commands: Any) -> None:
    demo = _command(
        commands, "demo", _demo, "classify, answer and draw with the shipped models",
        "perception-rt demo", "perception-rt demo --out /tmp/demo --json",
    )  # fmt: skip
    demo.add_argument(
        "--out", default="perception-rt-demo", metavar="DIR",
        help="folder for the pictures (default: perception-rt-demo)",
    )  # fmt: skip


def _add_encoder_commands(commands: Any) -> None:
    embed = _command(
        commands, "embed", _embed, "embed images, texts or videos",
        'perception-rt embed demo:pe --image a.jpg b.jpg --text "a red three" --out rows.npy',
        "perception-rt embed demo:pe photos/ --out rows/ --skip-errors",
        "perception-rt embed demo:pe 'shards/*.tar' --out rows.parquet --resume",
    )  # fmt: skip
    add_embed_arguments(embed)

    classify = _command(
        commands, "classify", _classify, "choose between labels for images",
        "perception-rt classify demo:pe --image digit.png --label two three eight",
        'perception-rt classify demo:pe --image *.png --label 2 3 --template "the digit {}"',
    )  # fmt: skip
    package_arguments(classify)
    list_argument(classify, "--image", "FILE", required=True)
    list_argument(classify, "--label", "LABEL", required=True)
    list_argument(
        classify, "--template", "TEXT", help="sentences with {} for the label (default: {})"
    )

    features = _command(
        commands, "features", _drawing(FeaturesCommand), "draw the dense features of images",
        "perception-rt features demo:pe --image digit.png --layer -1 --out features.png",
        "perception-rt features demo:pe --image *.png --shared --smooth --out pictures/",
    )  # fmt: skip
    add_features_arguments(features)

    match = _command(
        commands, "match", _drawing(MatchCommand),
        "draw lines between the matching patches of images",
        "perception-rt match demo:pe a.png b.png --out lines.png",
    )  # fmt: skip
    add_match_arguments(match)

    track = _command(
        commands, "track", _drawing(TrackCommand), "carry the masks of a video's first frame on",
        "perception-rt track demo:pe video.mp4 --mask first.png --out masks/",
    )  # fmt: skip
    add_track_arguments(track)


def _add_search_commands(commands: Any) -> None:
    search = _command(
        commands, "search", _search, "find the items of an embed result nearest to a query",
        'perception-rt search rows/ "a red three" --package demo:pe',
        "perception-rt search rows.npy --image digit.png --package demo:pe -k 50 --html page.html",
    )  # fmt: skip
    add_search_arguments(search)

    index = _command(
        commands, "index", run_index, "build an index of an embed result, and measure its recall",
        "perception-rt index rows/", "perception-rt index rows/ --queries texts.npy",
    )  # fmt: skip
    add_index_arguments(index)


def _add_question_commands(commands: Any) -> None:
    generate = _command(
        commands, "generate", _generate, "answer a question on images and videos",
        'perception-rt generate demo:plm --image row.png --prompt "Where is the 5?"',
        "perception-rt generate demo:plm --image row.png --prompt - --json < question.txt",
    )  # fmt: skip
    package_arguments(generate)
    generate.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the question, or - for standard input; "
        "images and videos replace its <image> and <video> marks, or come first"
    )  # fmt: skip
    question_arguments(generate)
    generate.add_argument("--stream", action="store_true", help="print the answer as it grows")

    chat = _command(
        commands, "chat", _chat, "answer the lines of standard input",
        "perception-rt chat demo:plm --image row.png",
        "perception-rt chat demo:plm --image row.png --json < questions.txt",
        json_help="print each answer as a line of JSON",
    )  # fmt: skip
    chat.epilog = (
        "`/image FILE` adds an image to the next question, `/clear` and `/reset` forget the\n"
        f"conversation, `/help` lists the commands, `/quit` ends.\n\n{chat.epilog}"
    )
    package_arguments(chat)
    question_arguments(chat)


def _add_evaluation_commands(commands: Any) -> None:
    evaluate = _command(
        commands, "eval", _evaluate, "score a package on a task, alone or against another",
        "perception-rt eval demo:pe --task zero-shot --data digits/ --out report.json",
        "perception-rt eval pe-int8 --task zero-shot --data digits/ --against pe-fp32",
    )  # fmt: skip
    add_evaluate_arguments(evaluate)

    conform = _command(
        commands, "conform", run_conform, "compare a package with timm, open_clip or transformers",
        "perception-rt conform pe-core-l --against open_clip",
        "perception-rt conform plm-1b --against transformers --weights Perception-LM-1B/",
    )  # fmt: skip
    add_conform_arguments(conform)


def _add_package_commands(commands: Any) -> None:
    inspect = _command(
        commands, "inspect", _inspect, "show what a package contains",
        "perception-rt inspect demo:pe",
    )  # fmt: skip
    inspect.add_argument("package", metavar="DIR")
    inspect.add_argument("--expect", metavar="ID", help="refuse any other package id")

    verify = _command(
        commands, "verify", _verify, "check every byte of a package",
        "perception-rt verify my-package --expect sha256:3f5597a3...",
    )  # fmt: skip
    verify.add_argument("package", metavar="DIR")
    verify.add_argument("--expect", metavar="ID", help="refuse any other package id")

    refit = _command(
        commands, "refit", run_refit, REFIT_HELP,
        "perception-rt refit my-package --weights my-finetune/ --out my-new-package",
    )  # fmt: skip
    add_refit_arguments(refit)

    doctor = _command(
        commands, "doctor", _doctor, "show what can run here; check a package",
        "perception-rt doctor", "perception-rt doctor my-package",
    )  # fmt: skip
    doctor.add_argument("package", metavar="DIR", nargs="?")


def _add_hub_commands(commands: Any) -> None:
    push = _command(
        commands, "push", _push, "upload a package to a hub",
        "perception-rt push my-package org/name", "perception-rt push my-package org/name@int8",
    )  # fmt: skip
    push.add_argument("package", metavar="DIR")
    push.add_argument("name", metavar="ORG/NAME", help="the repository, with @BRANCH for a branch")
    push.add_argument("--private", action="store_true", help="make a new repository private")
    push.add_argument("--message", metavar="TEXT", help="first line of the commit's message")

    pull = _command(
        commands, "pull", _pull, "fetch a package from a hub and verify it",
        "perception-rt pull org/name", "perception-rt pull org/name@int8 --out my-package",
    )  # fmt: skip
    pull.add_argument("name", metavar="ORG/NAME", help="the repository, with @REVISION for a "
                      "branch, tag or commit")  # fmt: skip
    pull.add_argument("--out", metavar="DIR", help="folder to make (default: one in the cache)")
    pull.add_argument("--expect", metavar="ID", help="refuse any other package id")


def _command(
    commands: Any,
    name: str,
    function: Command,
    text: str,
    *examples: str,
    json_help: str = "print the result as JSON",
) -> CommandParser:
    parser: CommandParser = commands.add_parser(
        name, help=text, description=text, examples=examples
    )
    parser.add_argument("--json", action="store_true", help=json_help)
    parser.set_defaults(command=function)
    return parser


def _load(options: argparse.Namespace, progress: Progress, family: Family = PE, **more: Any) -> Any:
    """Loads the package; InputError if it is of another family."""
    from perception_rt.runtime.load import load

    progress.step(f"opening {escaped(options.package)}")
    engine = load(
        options.package,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        expect=options.expect,
        formats=options.formats,
        background=options.background,
        **more,
    )
    found = get_family(engine.manifest.content.family)
    if found != family:
        engine.close()
        raise InputError(f"{options.package} is {found.label}: it is for {found.commands}")
    return engine


def _load_generator(options: argparse.Namespace, progress: Progress, **more: Any) -> Any:
    return _load(
        options,
        progress,
        PLM,
        cache=not options.no_cache,
        cache_dir=options.cache_dir,
        max_batch=1,  # the commands ask one question at a time
        **more,
    )


def _demo(options: argparse.Namespace) -> int:
    from perception_rt.cli.demo import run_demo

    return run_demo(options)


def _embed(options: argparse.Namespace) -> int:
    command = EmbedCommand(options)
    if command.on_cluster:
        with Progress() as progress:
            return command.run_on_cluster(progress)
    with Progress() as progress, _load(options, progress) as engine:
        return command.run(engine, progress)


def _search(options: argparse.Namespace) -> None:
    command = SearchCommand(options)
    with Progress() as progress, _load(options, progress) as engine:
        command.run(engine, progress)


def _evaluate(options: argparse.Namespace) -> None:
    command = EvaluateCommand(options)
    with Progress() as progress:

        def open_package(package: str) -> Any:
            own = package == options.package
            named = {"package": package, "expect": options.expect if own else None}
            return _load(argparse.Namespace(**{**vars(options), **named}), progress, command.family)

        command.run(open_package, progress)


def _classify(options: argparse.Namespace) -> None:
    with Progress() as progress, _load(options, progress) as engine:
        probabilities = engine.classify(
            options.image,
            options.label,
            options.template or None,
            on_progress=progress.counter("items"),
        )
    rows = [dict(zip(options.label, map(float, row), strict=True)) for row in probabilities]
    if options.json:
        pairs = zip(options.image, rows, strict=True)
        _print_json([{"image": image, "probabilities": row} for image, row in pairs])
        return
    for image, row in zip(options.image, rows, strict=True):
        ranked = sorted(row.items(), key=lambda item: -item[1])
        print(f"{escaped(image)}: " + ", ".join(f"{label} {p:.1%}" for label, p in ranked[:5]))


def _drawing(kind: Any) -> Command:
    """A command that draws: `kind` is made of the options, run with the engine, and shown."""

    def run(options: argparse.Namespace) -> None:
        command = kind(options)
        with Progress() as progress, _load(options, progress) as engine:
            found = command.run(engine, progress)
        if options.json:
            _print_json(found[0] if isinstance(found, list) and len(found) == 1 else found)
        else:
            command.show(found)

    return run


def _generate(options: argparse.Namespace) -> None:
    from perception_rt.cli.generate import generate, read_prompt

    if options.stream and options.json:
        raise InputError("--stream and --json exclude each other")
    options.prompt = read_prompt(options.prompt)
    # No second question follows, so a copy of the prompt's keys and values would waste memory.
    more = {} if options.cache_dir is not None else {"prefix_cache_bytes": 0}
    with Progress() as progress, _load_generator(options, progress, **more) as engine:
        generate(engine, options, progress)


def _chat(options: argparse.Namespace) -> None:
    from perception_rt.cli.generate import chat

    with Progress() as progress:
        engine = _load_generator(options, progress)
    with engine:
        chat(engine, options)


def _inspect(options: argparse.Namespace) -> None:
    from perception_rt.cli.report import describe
    from perception_rt.package.reader import read_manifest

    manifest = read_manifest(options.package, expect=options.expect)
    if options.json:
        _print_json(manifest.to_dict())
    else:
        print("\n".join(describe(manifest)))


def _verify(options: argparse.Namespace) -> None:
    from perception_rt.package.reader import verify_package

    with Progress() as progress:
        progress.step("hashing")
        manifest = verify_package(options.package, expect=options.expect)
    total = sum(entry.size_bytes for entry in manifest.content.files.values())
    if options.json:
        _print_json({"ok": True, "id": manifest.id, "bytes": total})
    else:
        print(f"ok: {len(manifest.content.files)} files, {total:,} bytes, {manifest.id}")


def _push(options: argparse.Namespace) -> None:
    from perception_rt.hub import push

    with _hub_progress("verifying and uploading"):
        pushed = push(
            options.package, options.name, private=options.private, message=options.message
        )
    if options.json:
        _print_json({"name": str(pushed.name), "id": pushed.id})
    else:
        print(f"{pushed.name} {pushed.id}")


def _pull(options: argparse.Namespace) -> None:
    from perception_rt.hub import pull
    from perception_rt.package.reader import read_manifest

    with _hub_progress("fetching and verifying"):
        folder = pull(options.name, options.out, options.expect)
    manifest = read_manifest(folder)
    if options.json:
        _print_json({"package": str(folder), "id": manifest.id})
    else:
        print(escaped(f"{folder} {manifest.id}"))


@contextmanager
def _hub_progress(step: str) -> Iterator[None]:
    """Leaves a terminal to huggingface_hub's bars; elsewhere, shows our own lines without bars."""
    if is_terminal(sys.stderr):
        yield
        return
    from perception_rt.hub import hide_bars

    hide_bars()
    with Progress() as progress:
        progress.step(step)
        yield


def _doctor(options: argparse.Namespace) -> int:
    from perception_rt.cli.report import UNUSABLE, environment, environment_lines, lint

    with Progress() as progress:
        progress.step("checking the environment")
        found = environment()
        notes = [] if options.package is None else lint(options.package)
    if options.json:
        _print_json({"environment": found, "package": notes})
    else:
        print("\n".join(environment_lines(found)))
        for note in notes:
            print(escaped(f"{options.package}: {note}"))
    return 2 if any(note.startswith(UNUSABLE) for note in notes) else 0


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=lambda v: dict(v)))


if __name__ == "__main__":
    sys.exit(main())
