"""The commands `perception-rt` and `perception-export`: parse arguments, print lines or JSON.

Each sub-command makes the calls that a program would make, and imports what it needs itself:
`perception-rt embed` never imports torch.
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from perception_rt._version import __version__
from perception_rt.cli.export import REFIT_HELP, add_refit_arguments, export_parser, run_refit
from perception_rt.errors import InputError, PerceptionError, escaped
from perception_rt.families import PE, PLM, Family, get_family
from perception_rt.progress import Progress

_SHOWN_COSINES = 8

Command = Callable[[argparse.Namespace], int | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `perception-rt`; returns the exit status."""
    return _run(main_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `perception-export`; returns the exit status."""
    return _run(export_parser(), arguments)


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Runs a command. A PerceptionError becomes one line on standard error and status 2."""
    options = parser.parse_args(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):  # print "?" for characters it cannot encode
            stream.reconfigure(errors="replace")
    try:
        status = options.command(options) or 0
        sys.stdout.flush()
        return status
    except PerceptionError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            # Otherwise the rest of the buffer fails again when the interpreter exits.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        where = "" if error.filename is None else escaped(f": {error.filename}")
        print(f"{parser.prog}: {error.strerror or type(error).__name__}{where}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


def main_parser() -> argparse.ArgumentParser:
    """Parser of `perception-rt`; each sub-command sets its function as `command`."""
    parser = argparse.ArgumentParser(prog="perception-rt", description="Run engine packages.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    embed = _command(commands, "embed", _embed, "embed images, texts or videos")
    _package_arguments(embed)
    _list_argument(embed, "--image", "FILE")
    _list_argument(embed, "--text", "TEXT")
    _list_argument(embed, "--video", "FILE")
    embed.add_argument("--num-frames", type=int, default=8, help="frames per video (default: 8)")
    embed.add_argument("--out", metavar="FILE.npy", help="array to write, float32 (N, D): images, "
                       "then texts, then videos")  # fmt: skip

    classify = _command(commands, "classify", _classify, "choose between labels for images")
    _package_arguments(classify)
    _list_argument(classify, "--image", "FILE", required=True)
    _list_argument(classify, "--label", "LABEL", required=True)
    _list_argument(
        classify, "--template", "TEXT", help="sentences with {} for the label (default: {})"
    )

    features = _command(commands, "features", _features, "draw the dense features of an image")
    _package_arguments(features)
    features.add_argument("--image", required=True, metavar="FILE")
    features.add_argument("--layer", type=int, default=-1, help="block index (default: -1)")
    features.add_argument("--out", required=True, metavar="FILE.png", help="image to write")

    generate = _command(commands, "generate", _generate, "answer a question on images and videos")
    _package_arguments(generate)
    generate.add_argument(
        "--prompt", required=True, metavar="TEXT", help="the question; images and videos replace "
        "its <image> and <video> marks, or come first"
    )  # fmt: skip
    _question_arguments(generate)
    generate.add_argument("--stream", action="store_true", help="print the answer as it grows")

    chat = _command(commands, "chat", _chat, "answer the lines of standard input", as_json=False)
    chat.epilog = (
        "`/image FILE` adds an image to the next question, `/reset` forgets the conversation, "
        "`/quit` ends."
    )
    _package_arguments(chat)
    _question_arguments(chat)

    inspect = _command(commands, "inspect", _inspect, "show what a package contains")
    inspect.add_argument("package", metavar="DIR")

    verify = _command(commands, "verify", _verify, "check every byte of a package")
    verify.add_argument("package", metavar="DIR")
    verify.add_argument("--expect", metavar="ID", help="refuse any other package id")

    add_refit_arguments(_command(commands, "refit", run_refit, REFIT_HELP))

    doctor = _command(commands, "doctor", _doctor, "show what can run here; check a package")
    doctor.add_argument("package", metavar="DIR", nargs="?")
    return parser


def _command(
    commands: Any, name: str, function: Command, text: str, *, as_json: bool = True
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    if as_json:
        parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.set_defaults(command=function)
    return parser


def _list_argument(
    parser: argparse.ArgumentParser,
    name: str,
    metavar: str,
    *,
    required: bool = False,
    help: str = "one or more",
) -> None:
    parser.add_argument(
        name, action="extend", nargs="+", default=[], metavar=metavar, required=required, help=help
    )


def _package_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("package", metavar="DIR", help="an engine package")
    parser.add_argument(
        "--backend", default="auto", help="backend to run on (default: the package's own)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or tensorrt")
    parser.add_argument(
        "--threads", type=int, help="threads per engine call (default: one per physical core)"
    )
    parser.add_argument("--expect", metavar="ID", help="refuse any other package id")
    parser.add_argument(
        "--formats", metavar="NAMES", default="", help="further image formats to accept: any of "
        "gif,bmp,tiff,avif,heic"
    )  # fmt: skip
    parser.add_argument(
        "--background", metavar="COLOUR", help="colour behind transparent pixels, such as white or "
        "#ffffff (default: alpha is dropped)"
    )  # fmt: skip


def _question_arguments(parser: argparse.ArgumentParser) -> None:
    _list_argument(parser, "--image", "FILE")
    _list_argument(parser, "--video", "FILE")
    parser.add_argument("--max-tiles", type=int, metavar="N", help="most tiles per image")
    parser.add_argument("--num-frames", type=int, metavar="N", help="most frames per video")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="longest answer (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, metavar="T", help="0 (default) is greedy"
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help="sample from the likeliest tokens that sum to P"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="R",
        help="above 1 repeats fewer tokens of prompt and answer (default: 1, off)",
    )
    parser.add_argument("--seed", type=int, help="RNG seed (default: a fresh one)")
    _list_argument(parser, "--stop", "TEXT", help="strings that end the answer")
    parser.add_argument(
        "--lookup", action="store_true", help="speculate by copying from the prompt; changes "
        "answers only in ties"
    )  # fmt: skip
    parser.add_argument(
        "--literal", action="store_true", help="<image> and <video> in a question are text"
    )
    caches = parser.add_mutually_exclusive_group()
    caches.add_argument(
        "--cache-dir", metavar="DIR", help="private folder that keeps image features and prompts"
    )
    caches.add_argument("--no-cache", action="store_true", help="keep neither, not even in memory")


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


def _embed(options: argparse.Namespace) -> None:
    import numpy as np

    if not options.image + options.text + options.video:
        raise InputError("nothing to embed: give --image, --text or --video")
    out = None if options.out is None else _output(options.out, ".npy")
    with Progress() as progress, _load(options, progress) as engine:
        parts = []
        if options.image:
            count = progress.counter("images")
            parts.append(engine.embed_images(options.image, on_progress=count))
        if options.text:
            parts.append(engine.embed_texts(options.text, on_progress=progress.counter("texts")))
        if options.video:
            parts.append(
                engine.embed_videos(
                    options.video,
                    num_frames=options.num_frames,
                    on_progress=progress.counter("videos"),
                )
            )
    rows = np.concatenate(parts)
    names = [*options.image, *options.text, *options.video]
    if out is not None:
        np.save(out, rows)
    if options.json:
        vectors = None if out is not None else rows.tolist()
        _print_json({"items": names, "dim": rows.shape[1], "embeddings": vectors})
        return
    cosines = rows @ rows.T
    for index, name in enumerate(names):
        shown = " ".join(f"{cosine:.3f}" for cosine in cosines[index, :_SHOWN_COSINES])
        print(f"{escaped(name)}: dim {rows.shape[1]}, cosines {shown}")


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


def _features(options: argparse.Namespace) -> None:
    from perception_rt.processing.image import decode_image
    from perception_rt.processing.image_options import image_options
    from perception_rt.processing.pca import side_by_side

    out = _output(options.out, ".png")
    with Progress() as progress, _load(options, progress) as engine:
        count = progress.counter("images")
        (dense,) = engine.features([options.image], options.layer, on_progress=count)
        picture = decode_image(
            options.image,
            options=image_options(options.formats, options.background),
            upright=engine.image_spec.exif_orientation,
        )
    side_by_side(picture, dense).save(out)
    shape = "x".join(map(str, dense.shape))
    if options.json:
        _print_json({"image": options.image, "shape": list(dense.shape), "picture": options.out})
    else:
        print(f"{escaped(options.out)}: {shape} features of layer {options.layer}")


def _generate(options: argparse.Namespace) -> None:
    from perception_rt.cli.generate import generate

    if options.stream and options.json:
        raise InputError("--stream and --json exclude each other")
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

    manifest = read_manifest(options.package)
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


def _doctor(options: argparse.Namespace) -> int:
    from perception_rt.cli.report import DAMAGED, environment, lint

    with Progress() as progress:
        progress.step("checking the environment")
        found = environment()
        notes = [] if options.package is None else lint(options.package)
    if options.json:
        _print_json({"environment": found, "package": notes})
    else:
        for name, value in found.items():
            print(f"{name}: {value}")
        for note in notes:
            print(escaped(f"{options.package}: {note}"))
    return 2 if any(note.startswith(DAMAGED) for note in notes) else 0


def _output(path: str, ending: str) -> Path:
    """Checks, before any work, that a file can be written."""
    out = Path(path)
    if out.suffix != ending:
        raise InputError(f"--out must end in {ending}, not {path!r:.80}")
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"cannot write {path!r:.80}: its folder is missing, or it is a folder")
    return out


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=lambda v: dict(v)))


if __name__ == "__main__":
    sys.exit(main())
