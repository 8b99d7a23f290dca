"""The command `perception-rt serve`."""

import argparse
from typing import Any

from perception_rt.cli.arguments import CommandParser, image_arguments
from perception_rt.errors import BackendError, InputError

_HELP = "serve packages over HTTP with OpenAI's routes"
_LOAD_OPTIONS = (
    "backend",
    "device",
    "threads",
    "max_batch",
    "cache_dir",
    "formats",
    "background",
)


def add_serve(commands: Any) -> None:
    """Adds the command."""
    parser: CommandParser = commands.add_parser(
        "serve",
        help=_HELP,
        description=_HELP,
        examples=(
            "perception-rt serve demo:pe demo:plm --port 8000",
            "perception-rt serve my-package --expect sha256:3f5597a3...",
            "perception-rt serve --name digits=my-package --host 0.0.0.0 --api-key-file keys.txt",
        ),
    )
    parser.set_defaults(command=_serve)
    _add_address(parser)
    _add_bounds(parser)
    parser.add_argument("--backend", default="auto", help="backend to run on")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or tensorrt")
    parser.add_argument("--threads", type=int, help="threads per engine call")
    parser.add_argument(
        "--max-batch", type=int, default=8, metavar="N", help="most questions that are decoded "
        "together (default: 8)"
    )  # fmt: skip
    parser.add_argument("--cache-dir", metavar="DIR", help="private folder for caches")
    image_arguments(parser)


def _add_address(parser: CommandParser) -> None:
    parser.add_argument(
        "packages", metavar="PKG", nargs="*", help="engine packages, or demo:pe or demo:plm"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000); 0 for any")
    parser.add_argument(
        "--name", action="append", default=[], metavar="ID=PKG", help="serve a package under "
        "another model id than its model name"
    )  # fmt: skip
    parser.add_argument(
        "--expect", action="append", default=[], metavar="[PKG=]ID", help="refuse any other "
        "package id; PKG= tells which of several packages"
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=1, metavar="N", help="processes; each loads every package"
    )
    parser.add_argument(
        "--api-key-file", metavar="FILE", help="file with one API key per line, which clients need"
    )


def _add_bounds(parser: CommandParser) -> None:
    parser.add_argument(
        "--batch-window", type=float, default=2.0, metavar="MS", help="milliseconds that an item "
        "to embed waits for others (default: 2)"
    )  # fmt: skip
    parser.add_argument(
        "--max-body-mb", type=int, default=64, metavar="MB", help="largest request (default: 64)"
    )
    parser.add_argument(
        "--max-requests", type=int, default=64, metavar="N", help="requests in progress per "
        "process; more get status 429 (default: 64)"
    )  # fmt: skip
    parser.add_argument(
        "--allow-media-host", action="append", default=[], metavar="HOST", help="fetch images and "
        "videos from this host; without it, only data URLs are accepted"
    )  # fmt: skip
    parser.add_argument(
        "--drain", type=int, default=30, metavar="S", help="seconds for requests in progress after "
        "SIGTERM (default: 30)"
    )  # fmt: skip


def _serve(options: argparse.Namespace) -> None:
    """Serves until a signal.

    Raises:
        BackendError: the extra `serve` is not installed.
        PerceptionError: a package cannot be loaded, or an option is unusable.
    """
    try:
        import prometheus_client  # noqa: F401
        import starlette  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise BackendError(
            f'the server needs {error.name}: pip install "perception_rt[serve]"'
        ) from None
    from perception_rt.serve.options import ServeOptions
    from perception_rt.serve.server import serve

    load: dict[str, Any] = {name: getattr(options, name) for name in _LOAD_OPTIONS}
    names = _names(options.name)
    serve(
        ServeOptions(
            packages=tuple(options.packages),
            names=names,
            expect=_expected(options.expect, (*options.packages, *names.values())),
            host=options.host,
            port=options.port,
            workers=options.workers,
            api_key_file=options.api_key_file,
            batch_window_ms=options.batch_window,
            max_body_mb=options.max_body_mb,
            max_requests=options.max_requests,
            media_hosts=tuple(options.allow_media_host),
            drain_s=options.drain,
            load=load,
        )
    )


def _names(given: list[str]) -> dict[str, str]:
    names: dict[str, str] = {}
    for item in given:
        name, equals, path = item.partition("=")
        if not equals or not name or not path or name in names:
            raise InputError(f"--name must be ID=PKG with an ID of its own, not {item!r:.80}")
        names[name] = path
    return names


def _expected(given: list[str], paths: tuple[str, ...]) -> dict[str, str]:
    """Package id by path; an id alone is that of the only package."""
    expected: dict[str, str] = {}
    for item in given:
        path, equals, package_id = item.rpartition("=")  # a path may contain "="
        if not equals and len(paths) == 1:
            path = paths[0]
        if path not in paths or path in expected:
            raise InputError(
                f"--expect must be PKG=ID with a served package of its own, or ID if there is one "
                f"package, not {item!r:.200}"
            )
        expected[path] = package_id
    return expected
