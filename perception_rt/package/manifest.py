"""`manifest.json`, schema 1: content of a package, measurements on it, and a digest of both.

The bytes are canonical, so any changed bit breaks the canonical form or a digest. `parse` checks
everything, opens no file and raises only PackageError.
"""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from perception_rt.errors import PackageError
from perception_rt.families import FAMILIES
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.contract import GraphSpec

SCHEMA = 1
MANIFEST_FILE = "manifest.json"

_INT_BOUND = 2**63  # integers are in [-2^63, 2^63)
_MAX_PATH = 128
_MAX_SEGMENTS = 3
_SEGMENT = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9._-]*[A-Za-z0-9_-])?")
# Names of devices on Windows, in every folder and with every suffix.
_RESERVED = re.compile(r"(con|prn|aux|nul|com[0-9]|lpt[0-9])(\..*)?", re.IGNORECASE)
_HEX = re.compile(r"[0-9a-f]{64}")
# A string may lack its closing quote: this scan only counts depth, the JSON parser reports it.
_STRINGS_AND_BRACKETS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    """Lower-case hexadecimal SHA-256 and size of one file."""

    sha256: str
    size_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"sha256": self.sha256, "bytes": self.size_bytes}

    @classmethod
    def from_dict(cls, data: Any, where: str) -> Self:
        """Strict inverse of `to_dict`; PackageError on anything else."""
        entry = _object(data, where, ("sha256", "bytes"))
        digest, size = _text(entry["sha256"], f"{where}.sha256"), entry["bytes"]
        if not _HEX.fullmatch(digest):
            raise PackageError(f"manifest: {where}.sha256 must be 64 lower-case hex digits")
        if type(size) is not int or size < 0:
            raise PackageError(f"manifest: {where}.bytes must be a non-negative integer")
        return cls(sha256=digest, size_bytes=size)


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Backend, precision and backend-specific options of an export."""

    backend: str
    precision: str
    options: Mapping[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "backend": self.backend,
            "precision": self.precision,
            "options": dict(self.options),
        }

    @classmethod
    def from_dict(cls, data: Any) -> Self:
        """Strict inverse of `to_dict`; PackageError on anything else."""
        target = _object(data, "content.target", ("backend", "precision", "options"))
        return cls(
            backend=_label(target["backend"], "content.target.backend"),
            precision=_label(target["precision"], "content.target.precision"),
            options=_object(target["options"], "content.target.options"),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """Content of a package. Two exports of the same inputs have equal contents, hence one id.

    Attributes:
        name: model name, 1 to 128 printable characters.
        family: name of a record in `families.FAMILIES`.
        architecture: resolved configuration, `to_dict()` of the family's configuration class.
        target: backend, precision and options.
        image: parameters of image preprocessing.
        text: parameters of the tokenizer; None for a package without text.
        graphs: engine graphs by name.
        files: every file except the manifest, by relative POSIX path.
        weights: provenance of the weights, scalars only.
        versions: versions of the software that made the package.
    """

    name: str
    family: str
    architecture: Mapping[str, Any]
    target: Target
    image: Mapping[str, Any]
    text: Mapping[str, Any] | None
    graphs: Mapping[str, GraphSpec]
    files: Mapping[str, FileEntry]
    weights: Mapping[str, str | int | float | bool | None]
    versions: Mapping[str, str]

    def backend_of(self, graph: str) -> str:
        """Name of the backend that `graph` was exported for."""
        return self.graphs[graph].backend or self.target.backend

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "name": self.name,
            "family": self.family,
            "architecture": dict(self.architecture),
            "target": self.target.to_dict(),
            "processing": {
                "image": dict(self.image),
                "text": None if self.text is None else dict(self.text),
            },
            "graphs": {name: spec.to_dict() for name, spec in self.graphs.items()},
            "files": {path: entry.to_dict() for path, entry in self.files.items()},
            "weights": dict(self.weights),
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, data: Any, limits: Limits = DEFAULT_LIMITS) -> Self:
        """Strict inverse of `to_dict`; PackageError names the offending field."""
        content = _object(data, "content", _CONTENT_FIELDS)
        family = _label(content["family"], "content.family")
        if family not in FAMILIES:
            raise PackageError(
                f"manifest: family {family!a} is not known here; known are {list(FAMILIES)}"
            )
        processing = _object(content["processing"], "content.processing", ("image", "text"))
        text = processing["text"]
        files = _files(content["files"], limits)
        target = Target.from_dict(content["target"])
        return cls(
            name=_label(content["name"], "content.name"),
            family=family,
            architecture=_object(content["architecture"], "content.architecture"),
            target=target,
            image=_object(processing["image"], "content.processing.image"),
            text=None if text is None else _object(text, "content.processing.text"),
            graphs=_graphs(content["graphs"], files, target.backend),
            files=files,
            weights=_scalars(content["weights"]),
            versions=_strings(content["versions"], "content.versions"),
        )


_CONTENT_FIELDS = (
    "name",
    "family",
    "architecture",
    "target",
    "processing",
    "graphs",
    "files",
    "weights",
    "versions",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A valid manifest.

    Attributes:
        id: digest of `content`, which identifies the package.
        content: content of the package.
        record: measurements made during the export; not part of the id.
        digest: digest of all the above and the schema.
    """

    id: str
    content: Content
    record: Mapping[str, Any]
    digest: str

    @classmethod
    def create(cls, content: Content, *, record: Mapping[str, Any]) -> Self:
        """Computes id and digest.

        Args:
            content: content of the package.
            record: measurements (fidelity, latency, host), any JSON object.

        Raises:
            PackageError: a reader would refuse the result.
        """
        body = {
            "schema": SCHEMA,
            "id": _digest(content.to_dict()),
            "content": content.to_dict(),
            "record": dict(record),
        }
        # Through bytes, so that the result equals what a reader parses.
        return cls._from_bytes(canonical_json(body | {"digest": _digest(body)}), DEFAULT_LIMITS)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "schema": SCHEMA,
            "id": self.id,
            "content": self.content.to_dict(),
            "record": dict(self.record),
            "digest": self.digest,
        }

    def to_bytes(self) -> bytes:
        """The canonical bytes of this manifest."""
        return canonical_json(self.to_dict())

    @classmethod
    def _from_bytes(cls, data: bytes, limits: Limits) -> Self:
        value = _decode(data, limits)
        if not isinstance(value, dict):
            raise PackageError("manifest: must be an object")
        schema = value.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise PackageError(
                f"manifest: made by a newer version of perception_rt (schema {schema}; this "
                f"version reads schema {SCHEMA})"
            )
        _object(value, "manifest", ("schema", "id", "content", "record", "digest"))
        if type(schema) is not int or schema != SCHEMA:
            raise PackageError(f"manifest: schema must be {SCHEMA}")
        manifest = cls(
            id=_check_digest(value["id"], "manifest: id"),
            content=Content.from_dict(value["content"], limits),
            record=_object(value["record"], "record"),
            digest=_check_digest(value["digest"], "manifest: digest"),
        )
        if canonical_json(value) != data:
            raise PackageError("manifest: the bytes are not in canonical form")
        if manifest.id != _digest(value["content"]):
            raise PackageError("manifest: id does not match the content")
        if manifest.digest != _digest({k: v for k, v in value.items() if k != "digest"}):
            raise PackageError("manifest: digest does not match")
        return manifest


def parse(data: bytes, limits: Limits = DEFAULT_LIMITS) -> Manifest:
    """Parses and checks a manifest.

    Raises:
        PackageError: the bytes are not a valid manifest; no bytes raise any other error.
    """
    return Manifest._from_bytes(data, limits)


def canonical_json(value: Any) -> bytes:
    """Serialises a value as ASCII JSON with sorted keys, indent 2 and a final newline.

    Raises:
        PackageError: JSON cannot represent a part of `value`.
    """
    try:
        _check_value(value)
        text = json.dumps(value, sort_keys=True, indent=2, ensure_ascii=True, allow_nan=False)
    except RecursionError:
        raise PackageError("manifest: a value is nested too deeply") from None
    return text.encode("ascii") + b"\n"


def _check_digest(value: Any, where: str) -> str:
    """Returns `value` if it is `sha256:` and 64 lower-case hexadecimal digits."""
    algorithm, _, digest = value.partition(":") if isinstance(value, str) else ("", "", "")
    if algorithm != "sha256" or not _HEX.fullmatch(digest):
        raise PackageError(f"{where} must be 'sha256:' and 64 lower-case hex digits")
    return f"sha256:{digest}"


def check_path(path: str) -> None:
    """PackageError unless `path` is a valid path of a package file on every file system."""
    segments = path.split("/")
    if (
        len(path) > _MAX_PATH
        or len(segments) > _MAX_SEGMENTS
        or not all(_SEGMENT.fullmatch(s) and not s.startswith(".") for s in segments)
        or path.lower() == MANIFEST_FILE
    ):
        raise PackageError(
            f"{path!a:.80} is not a file path of a package: at most {_MAX_SEGMENTS} segments of "
            f"[A-Za-z0-9._-], none with a dot at an end, {_MAX_PATH} characters, not the manifest"
        )
    reserved = [s for s in segments if _RESERVED.fullmatch(s)]
    if reserved:
        raise PackageError(
            f"{path!a:.80} is not a file path of a package: "
            f"Windows reserves the name {reserved[0]!a}"
        )


def _check_paths(paths: Iterable[str]) -> None:
    """PackageError unless all paths are valid, and distinct if case is ignored.

    A file that is also another file's folder, or a folder in two spellings, is a conflict.
    """
    seen: dict[str, str] = {}
    for path in paths:
        check_path(path)
        segments = path.split("/")
        folders = ["/".join(segments[:i]) + "/" for i in range(1, len(segments))]
        for spelled in [*folders, path]:
            other = seen.setdefault(spelled.rstrip("/").lower(), spelled)
            if other != spelled:
                raise PackageError(f"manifest: files {other!a} and {spelled!a} are in conflict")


def _decode(data: bytes, limits: Limits) -> Any:
    """Parses ASCII JSON; checks size and depth before the JSON parser runs."""
    if len(data) > limits.manifest_bytes:
        raise PackageError(
            f"manifest: {len(data)} bytes are more than the limit of {limits.manifest_bytes}"
        )
    if not data.isascii():
        raise PackageError("manifest: must be ASCII JSON")
    text = data.decode("ascii")
    depth = 0
    for token in _STRINGS_AND_BRACKETS.finditer(text):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.group(), 0)
        if depth > limits.manifest_depth:
            raise PackageError(
                f"manifest: nested more deeply than the limit of {limits.manifest_depth}"
            )
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise PackageError(
            f"manifest: not JSON at line {error.lineno}, column {error.colno}"
        ) from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise PackageError(f"manifest: key {key!a:.80} occurs twice")
        result[key] = value
    return result


def _parse_int(text: str) -> int:
    if len(text) > 20:  # the time of int() grows with the square of the length
        raise PackageError(f"manifest: the integer {text:.20}... is outside 64 bits")
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        raise PackageError(f"manifest: the number {text:.40} is out of range")
    return value


def _refuse_constant(text: str) -> None:
    raise PackageError(f"manifest: {text} is not a number")


def _check_value(value: Any) -> None:
    """PackageError unless `value` survives a round trip through JSON."""
    if isinstance(value, str):
        if any("\ud800" <= c <= "\udfff" for c in value):
            raise PackageError("manifest: a string holds a lone surrogate")
    elif isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise PackageError(f"manifest: a key is of type {type(key).__name__}, not str")
            _check_value(key)
            _check_value(item)
    elif isinstance(value, list | tuple):
        for item in value:
            _check_value(item)
    elif isinstance(value, int):  # and bool
        if not -_INT_BOUND <= value < _INT_BOUND:
            raise PackageError("manifest: an integer is outside 64 bits")
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise PackageError(f"manifest: {value} is not a number of JSON")
    elif value is not None:
        raise PackageError(f"manifest: a value is of type {type(value).__name__}")


def _digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(canonical_json(value)).hexdigest()}"


def _object(value: Any, where: str, keys: Collection[str] | None = None) -> dict[str, Any]:
    """Returns `value` if it is an object, with exactly `keys` unless these are None."""
    if not isinstance(value, dict):
        raise PackageError(f"manifest: {where} must be an object")
    if keys is None:
        return value
    for problem, names in (
        ("unknown", set(value) - set(keys)),
        ("missing", set(keys) - set(value)),
    ):
        if names:
            listed = ", ".join(f"{name!a:.60}" for name in sorted(names)[:5])
            raise PackageError(f"manifest: {where} has {problem} fields: {listed}")
    return value


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise PackageError(f"manifest: {where} must be a string")
    return value


def _label(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= 128 or not value.isprintable():
        raise PackageError(f"manifest: {where} must be 1 to 128 printable characters")
    return value


def _strings(value: Any, where: str) -> dict[str, str]:
    return {key: _text(item, f"{where}.{key!a:.60}") for key, item in _object(value, where).items()}


def _scalars(value: Any) -> dict[str, Any]:
    weights = _object(value, "content.weights")
    for key, item in weights.items():
        if isinstance(item, dict | list):
            raise PackageError(f"manifest: content.weights.{key!a:.60} must be a scalar")
    return weights


def _files(value: Any, limits: Limits) -> dict[str, FileEntry]:
    files = _object(value, "content.files")
    if len(files) > limits.package_files:
        raise PackageError(
            f"manifest: {len(files)} files are more than the limit of {limits.package_files}"
        )
    _check_paths(files)
    return {path: FileEntry.from_dict(entry, f"file {path!a}") for path, entry in files.items()}


def _graphs(value: Any, files: Collection[str], backend: str) -> dict[str, GraphSpec]:
    graphs: dict[str, GraphSpec] = {}
    for name, data in _object(value, "content.graphs").items():
        _label(name, "a graph's name")
        spec = GraphSpec.from_dict(data)
        if spec.backend == backend:
            raise PackageError(
                f"manifest: graph {name!a} must leave out its backend, which is the package's own"
            )
        names = (spec.file, *spec.data)
        if len(set(names)) != len(names):
            raise PackageError(f"manifest: graph {name!a} names a file twice")
        for file in names:
            if file not in files:
                raise PackageError(
                    f"manifest: graph {name!a} needs {file!a:.80}, which is not listed"
                )
        graphs[name] = spec
    if not graphs:
        raise PackageError("manifest: content.graphs must not be empty")
    return graphs
