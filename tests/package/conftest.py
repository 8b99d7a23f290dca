"""Fixtures: a tiny engine package (four files, a few KB) and tools to damage one."""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.filesystem import FileSystem
from perception_rt.package.manifest import Content, FileEntry, Manifest, Target
from perception_rt.package.store import Stage

X = TensorSpec(name="x", dtype="float32", shape=("batch", 4))
Y = TensorSpec(name="y", dtype="float32", shape=("batch", 4))


def external(name: str, entries: Iterable[tuple[str, str]], dims: Iterable[int]) -> TensorProto:
    """A float32 tensor with external data; `entries` may be invalid."""
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=list(dims))
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


@dataclass(kw_only=True)
class Tiny:
    """Builds the tiny package; tests vary its fields, whose defaults are valid."""

    seed: int = 0
    offset: int = 0
    record: dict[str, Any] = field(default_factory=lambda: {"latency_ms": 1.25})
    tensor: TensorProto | None = None
    nodes: list[onnx.NodeProto] | None = None

    def weights(self) -> bytes:
        return bytes((self.seed * 31 + i * 7) % 256 for i in range(640))

    def model(self) -> bytes:
        """y = x + w, with w in weights.bin."""
        where = [("location", "weights.bin"), ("offset", str(self.offset)), ("length", "16")]
        tensor = self.tensor or external("w", where, [4])
        graph = helper.make_graph(
            self.nodes or [helper.make_node("Add", ["x", "w"], ["y"])],
            "tiny",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 4])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 4])],
            [tensor],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        return bytes(model.SerializeToString())

    def files(self) -> dict[str, bytes]:
        return {
            "vision.onnx": self.model(),
            "weights.bin": self.weights(),
            "text/vocab.txt": b"a b c\n" * 40,
            "text/empty.txt": b"",
        }

    def graphs(self) -> dict[str, GraphSpec]:
        spec = GraphSpec(file="vision.onnx", data=("weights.bin",), inputs=(X,), outputs=(Y,))
        return {"vision": spec}

    def content(self, entries: dict[str, FileEntry] | None = None) -> Content:
        if entries is None:
            entries = {
                path: FileEntry(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
                for path, data in self.files().items()
            }
        return Content(
            name="PE-Tiny",
            family="pe",
            architecture={"vision": {"width": 64, "mlp_ratio": 4.0, "ls_init_value": None}},
            target=Target(backend="ort-cpu", precision="fp32", options={"opset": 20}),
            image={"size_px": 32, "mean": [0.5, 0.5, 0.5]},
            text=None,
            graphs=self.graphs(),
            files=entries,
            weights={"source": "random", "seed": self.seed},
            versions={"onnx": "1.22"},
        )

    def manifest(self) -> Manifest:
        return Manifest.create(self.content(), record=self.record)

    def fill(self, stage: Stage) -> Manifest:
        """Stages the files and seals; returns the manifest."""
        for path, data in self.files().items():
            stage.write(path, [data[:100], memoryview(data)[100:]])
        manifest = Manifest.create(self.content(dict(stage.entries)), record=self.record)
        stage.seal(manifest)
        return manifest

    def publish(self, dest: Path, *, force: bool = False, fs: FileSystem | None = None) -> Manifest:
        with Stage.create(dest, force=force, fs=fs) as stage:
            manifest = self.fill(stage)
            stage.publish()
        return manifest

    def forge(self, dest: Path) -> Path:
        """Writes the package without `Stage` and its checks."""
        for path, data in self.files().items():
            (dest / path).parent.mkdir(parents=True, exist_ok=True)
            (dest / path).write_bytes(data)
        (dest / "manifest.json").write_bytes(resign(self.manifest().to_dict()))
        return dest


def resign(value: dict[str, Any]) -> bytes:
    """Canonical bytes of a changed manifest, with matching id and digest."""

    def digest(part: Any) -> str:
        return "sha256:" + hashlib.sha256(dump(part)).hexdigest()

    value = dict(value) | {"id": digest(value["content"])}
    value.pop("digest", None)
    return dump(value | {"digest": digest(value)})


def dump(value: Any) -> bytes:
    """The canonical form, computed independently of the library."""
    return (json.dumps(value, sort_keys=True, indent=2) + "\n").encode()


def overwrite(path: Path, data: bytes) -> None:
    """Replaces a read-only file."""
    path.unlink()
    path.write_bytes(data)


def change_manifest(package: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes a published manifest and updates its digests."""
    value = json.loads((package / "manifest.json").read_bytes())
    change(value)
    overwrite(package / "manifest.json", resign(value))


class Unsynced(FileSystem):
    """Does not flush to the disk, for tests that publish often."""

    def fsync(self, fd: int) -> None:
        pass

    def fsync_directory(self, path: Path) -> None:
        pass


@pytest.fixture(scope="session")
def tools() -> SimpleNamespace:
    """The classes and functions of this file, as tests cannot import a conftest."""
    return SimpleNamespace(
        Tiny=Tiny,
        Unsynced=Unsynced,
        external=external,
        resign=resign,
        overwrite=overwrite,
        change_manifest=change_manifest,
    )


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A published tiny package."""
    dest = tmp_path / "tiny"
    Tiny().publish(dest)
    return dest
