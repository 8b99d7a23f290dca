"""Options of the server, as one record that also travels to worker processes."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from perception_rt.errors import InputError
from perception_rt.records import check_integer

MIB = 1024 * 1024
_MAX_KEY_FILE = 64 * 1024
_MIN_KEY_CHARS = 8
_LOOPBACK = ("127.0.0.1", "::1", "localhost")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeOptions:
    """Settings of the server.

    Attributes:
        packages: paths of packages, or names of demos.
        names: model id to path of a package, for ids other than the packages' model names.
        expect: path of a package to the package id ("sha256:...") that it must have. Packages with
            executable engines, such as TensorRT's, need it unless this user exported them here.
        host: address to listen on.
        port: port to listen on; 0 takes a free one.
        workers: processes; each loads every package.
        api_key_file: file with one API key per line; None for no keys.
        batch_window_ms: how long the first item of a batch of embeddings waits for others.
        max_body_mb: most MiB of one request's body.
        max_requests: most requests in progress in one process; more get status 429.
        media_hosts: hosts whose http and https URLs of images and videos are fetched.
        drain_s: seconds that requests in progress may take after SIGTERM.
        load: arguments of `perception_rt.load`.
    """

    packages: tuple[str, ...]
    names: Mapping[str, str] = field(default_factory=dict)
    expect: Mapping[str, str] = field(default_factory=dict)
    host: str = "127.0.0.1"
    port: int = 8000
    workers: int = 1
    api_key_file: str | None = None
    batch_window_ms: float = 2.0
    max_body_mb: int = 64
    max_requests: int = 64
    media_hosts: tuple[str, ...] = ()
    drain_s: int = 30
    load: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.packages and not self.names:
            raise InputError("nothing to serve: name a package")
        for path in self.expect:
            if path not in (*self.packages, *self.names.values()):
                raise InputError(f"an id is expected of {path!r:.200}, which is not served")
        for name, least, most in (
            ("port", 0, 65535),
            ("workers", 1, 256),
            ("max_body_mb", 1, 4096),
            ("max_requests", 1, 4096),
            ("drain_s", 0, 3600),
        ):
            check_integer(name, getattr(self, name), least, most)
        if not 0 <= self.batch_window_ms <= 1000:
            raise InputError(f"batch_window must be from 0 to 1000 ms, not {self.batch_window_ms}")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect."""
        return self.host in _LOOPBACK

    def to_json(self) -> str:
        """The options as JSON.

        Raises:
            InputError: a value, such as an argument in `load`, has no JSON form.
        """
        try:
            return json.dumps(asdict(self))
        except TypeError as error:
            raise InputError(f"options of the server must be plain values: {error}") from None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Inverse of `to_json`."""
        data = json.loads(text)
        for name in ("packages", "media_hosts"):
            data[name] = tuple(data[name])
        return cls(**data)


def read_key_digests(path: str | None) -> frozenset[bytes]:
    """Returns SHA-256 digests of the keys in a file; none for None.

    Raises:
        InputError: the file cannot be read, has no key, or a key is too short.
    """
    if path is None:
        return frozenset()
    try:
        with Path(path).open("rb") as file:
            data = file.read(_MAX_KEY_FILE + 1)
    except OSError as error:
        raise InputError(f"API key file {path!r:.200}: {error.strerror}") from None
    keys = data.split()
    if not keys or len(data) > _MAX_KEY_FILE:
        raise InputError(f"API key file {path!r:.200} must have one key per line, at most 64 KiB")
    if min(map(len, keys)) < _MIN_KEY_CHARS:
        raise InputError(
            f"API key file {path!r:.200}: a key has fewer than {_MIN_KEY_CHARS} characters"
        )
    return frozenset(hashlib.sha256(key).digest() for key in keys)
