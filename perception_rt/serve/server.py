"""Runs the server: listens, starts worker processes, and drains on SIGTERM."""

import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

import uvicorn
from starlette.applications import Starlette
from uvicorn.supervisors import Multiprocess

from perception_rt.cores import available_cores
from perception_rt.errors import InputError
from perception_rt.serve.options import ServeOptions, read_key_digests
from perception_rt.serve.protocol import BoundedProtocol

_OPTIONS_VARIABLE = "PERCEPTION_RT_SERVE"
_METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_BACKLOG = 256
_KEEP_ALIVE_S = 75  # longer than clients and proxies keep connections, so that they close first
_CONNECTIONS = 16  # per request in progress


def serve(options: ServeOptions) -> None:
    """Serves until SIGTERM or SIGINT, then finishes the requests in progress.

    Prints the address on standard error once every package is loaded.

    Raises:
        PerceptionError: a package cannot be loaded, or an option is unusable.
        KeyboardInterrupt: after SIGINT.
    """
    read_key_digests(options.api_key_file)
    with listen(options) as listener:
        if options.workers == 1:
            _run_one(options, listener)
        else:
            _run_many(options, listener)


def app_of_worker() -> Starlette:
    """The application of a worker process, whose options are in the environment."""
    return _app(ServeOptions.from_json(os.environ[_OPTIONS_VARIABLE]))


def _app(options: ServeOptions) -> Starlette:
    # With several workers, the variable that Prometheus reads must be set before these imports.
    from perception_rt.serve.app import make_app
    from perception_rt.serve.service import Service

    return make_app(Service(options))


class _Workers(Multiprocess):
    def terminate_all(self) -> None:
        """Ends the workers; clients that connect from now on are refused, and do not wait."""
        for listener in self.sockets:
            listener.close()
        super().terminate_all()


def _run_one(options: ServeOptions, listener: socket.socket) -> None:
    app = _app(options)
    _announce(options, listener)
    server = uvicorn.Server(uvicorn_config(options, lambda: app))
    signal.signal(signal.SIGTERM, _nothing)  # uvicorn raises it again after draining
    server.run(sockets=[listener])


def _run_many(options: ServeOptions, listener: socket.socket) -> None:
    from perception_rt.runtime.load import load
    from perception_rt.serve.models import model_paths

    for path in model_paths(options).values():
        # An error ends the command, not every worker.
        load(path, expect=options.expect.get(path), **options.load).close()
    load_options = dict(options.load)
    if load_options.get("threads") is None:
        load_options["threads"] = max(1, available_cores() // options.workers)
    shared = ServeOptions.from_json(options.to_json())
    object.__setattr__(shared, "load", load_options)
    with tempfile.TemporaryDirectory(prefix="perception-rt-") as directory:
        os.environ[_METRICS_VARIABLE] = directory
        os.environ[_OPTIONS_VARIABLE] = shared.to_json()
        _announce(options, listener)
        config = uvicorn_config(options, "perception_rt.serve.server:app_of_worker")
        _Workers(config, sockets=[listener]).run()


def uvicorn_config(options: ServeOptions, app: str | Callable[[], Starlette]) -> uvicorn.Config:
    """Settings of the HTTP server; `app` makes the application, or names what makes it."""
    return uvicorn.Config(
        app,
        factory=True,
        host=options.host,
        port=options.port,
        workers=options.workers,
        http=BoundedProtocol,
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        limit_concurrency=_CONNECTIONS * options.max_requests,
        timeout_graceful_shutdown=options.drain_s,
    )


def listen(options: ServeOptions) -> socket.socket:
    """A listening socket; InputError if the address cannot be used."""
    try:
        found = socket.getaddrinfo(options.host, options.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.set_inheritable(True)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen on {options.host[:80]!r} port {options.port}: {error.strerror}"
        ) from None
    return listener


def _announce(options: ServeOptions, listener: socket.socket) -> None:
    listener.listen(_BACKLOG)  # clients may connect from the moment they read the address
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    print(f"listening on http://{shown}:{port}", file=sys.stderr, flush=True)
    if not options.is_loopback and options.api_key_file is None:
        print(
            "perception-rt: other machines can connect, and no --api-key-file was given",
            file=sys.stderr,
            flush=True,
        )


def _nothing(*_: object) -> None:
    """Handles SIGTERM that is raised again after draining."""
