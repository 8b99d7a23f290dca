"""Argument parsing that the commands share: options with several values, examples, the package."""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from perception_rt.demo import package_paths
from perception_rt.errors import InputError, escaped

_NUMBER = re.compile(r"-\d+$|-\d*\.\d+$")  # argparse takes these for values


class CommandParser(argparse.ArgumentParser):
    """A parser whose help ends with examples, and whose package may come last.

    In `classify --image a.png b.png PACKAGE --label x`, argparse takes the package for an image. If
    no package is named elsewhere, the last value of an option that names one is the package.
    """

    def __init__(self, *, examples: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **settings)
        self.add_examples(*examples)

    def add_examples(self, *lines: str) -> None:
        """Adds command lines to the end of the help."""
        if lines:
            shown = "\n".join(["examples:", *(f"  {line}" for line in lines)])
            self.epilog = shown if self.epilog is None else f"{self.epilog}\n\n{shown}"

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parses, with the package moved to the front if an option would swallow it."""
        positions = [action for action in self._actions if not action.option_strings]
        names = [action.dest for action in positions]
        if args is not None and names[:1] == ["package"]:
            args = self._package_first(list(args))
        namespace, rest = super().parse_known_args(args, namespace)
        last = positions[-1] if positions else None
        if last is not None and last.nargs in ("*", "?"):  # argparse takes none after an option
            late = [value for value in rest if not value.startswith("-")]
            if last.nargs == "*":
                setattr(namespace, last.dest, [*getattr(namespace, last.dest), *late])
                rest = [value for value in rest if value.startswith("-")]
            elif len(late) == 1 and getattr(namespace, last.dest) is None:
                setattr(namespace, last.dest, late[0])
                rest.remove(late[0])
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        """Prints how the command is used, and ends the program with status 2."""
        if message.endswith("are required: DIR"):
            message += " (the package, before options that take several values)"
        super().error(escaped(message))

    def _package_first(self, args: list[str]) -> list[str]:
        last: list[int] = []  # positions of the last values of options that take several
        open_list, skip, first = False, False, 0
        for position, value in enumerate(args):
            if skip:
                skip = False
            elif value == "--":
                return args
            elif value.startswith("-") and value != "-" and not _NUMBER.match(value):
                action = self._option(value)
                open_list = action is not None and action.nargs == "+" and "=" not in value
                skip = action is not None and action.nargs is None and "=" not in value
                first = position + 1
            elif not open_list:
                return args  # the package is where argparse finds it
            elif position > first:
                if last and last[-1] == position - 1:
                    last.pop()
                last.append(position)
        named = [position for position in last if is_package(args[position])]
        if len(named) != 1:
            return args
        return [args.pop(named[0]), *args]

    def _option(self, value: str) -> argparse.Action | None:
        """The option that an argument begins, which may be shortened."""
        name = value.partition("=")[0]
        found = self._option_string_actions.get(name)
        if found is not None or not name.startswith("--"):
            return found
        matches = [a for s, a in self._option_string_actions.items() if s.startswith(name)]
        return matches[0] if len(matches) == 1 else None


def is_package(value: str) -> bool:
    """Whether an argument names a shipped demo, a package on a hub, or a folder with a manifest."""
    from perception_rt.package.manifest import MANIFEST_FILE

    if value.startswith("hf:"):
        return True
    try:
        return value in package_paths() or (Path(value) / MANIFEST_FILE).is_file()
    except (OSError, ValueError):
        return False


def list_argument(
    parser: argparse.ArgumentParser,
    name: str,
    metavar: str,
    *,
    required: bool = False,
    help: str = "one or more",
) -> None:
    """Adds an option that takes one or more values and may be repeated."""
    parser.add_argument(
        name, action="extend", nargs="+", default=[], metavar=metavar, required=required, help=help
    )


def package_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the package, and the options of all commands that run one."""
    parser.add_argument(
        "package", metavar="DIR", help="an engine package, or demo:pe, demo:plm or "
        "hf:org/name@revision"
    )  # fmt: skip
    engine_arguments(parser)


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of all commands that run a package."""
    parser.add_argument(
        "--backend", default="auto", help="backend to run on (default: the package's own)"
    )
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or tensorrt")
    parser.add_argument(
        "--threads", type=int, help="threads per engine call (default: one per physical core)"
    )
    parser.add_argument("--expect", metavar="ID", help="refuse any other package id")
    image_arguments(parser)


def image_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options for opening images."""
    parser.add_argument(
        "--formats", metavar="NAMES", default="", help="further image formats to accept: any of "
        "gif,bmp,tiff,avif,heic"
    )  # fmt: skip
    parser.add_argument(
        "--background", metavar="COLOUR", help="colour behind transparent pixels, such as white or "
        "#ffffff (default: alpha is dropped)"
    )  # fmt: skip


def output_path(option: str, path: str, ending: str) -> Path:
    """Checks, before any work, that the file of an option can be written."""
    out = Path(path)
    if out.suffix != ending:
        raise InputError(f"{option} must end in {ending}, not {path!r:.80}")
    if not out.parent.is_dir() or out.is_dir():
        raise InputError(f"cannot write {path!r:.80}: its folder is missing, or it is a folder")
    return out


def question_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the commands that ask a language model."""
    list_argument(parser, "--image", "FILE")
    list_argument(parser, "--video", "FILE")
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
    list_argument(parser, "--stop", "TEXT", help="strings that end the answer")
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
