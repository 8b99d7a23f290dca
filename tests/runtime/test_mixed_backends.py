"""Packages whose graphs are for several backends, and graph files that are not ONNX."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from fake_plm import graph_specs, write_plm

import perception_rt as prt
from perception_rt import targets
from perception_rt.cli import report
from perception_rt.errors import InputError, PackageError
from perception_rt.export import refit
from perception_rt.package import contract
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import Package, open_package, read_manifest, verify_package
from perception_rt.package.store import Stage
from perception_rt.runtime.backends import reference
from perception_rt.targets import ONNX, Target

OLD_PACKAGES = Path(__file__).parents[1] / "compatibility" / "packages"
NATIVE = b"native weights, which are no ONNX model"
NATIVE_KIND = "toy-weights"
IMAGES = [np.full((40, 30, 3), value, np.uint8) for value in (0, 100, 200)]

Changes = dict[str, dict[str, Any]]
Repack = Callable[[str, Changes], Path]


@pytest.fixture
def repack(tmp_path: Path) -> Repack:
    """Copies an old package with other fields of its graphs, and files that these name."""

    def make(name: str, changes: Changes) -> Path:
        with open_package(OLD_PACKAGES / name) as old, Stage.create(tmp_path / name) as stage:
            content = old.manifest.content
            for file in content.files:
                stage.write(file, [old.read(file)])
            for file in {change["file"] for change in changes.values() if "file" in change}:
                stage.write(file, [NATIVE])
            graphs = {
                graph: replace(spec, **changes.get(graph, {}))
                for graph, spec in content.graphs.items()
            }
            content = replace(content, graphs=graphs, files=dict(stage.entries))
            stage.seal(Manifest.create(content, record={}))
            return stage.publish()

    return make


@pytest.fixture
def native(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Registers a backend that opens native weights; returns the bytes that it was given."""
    opened: dict[str, bytes] = {}

    def open_session(package: Package, graph: str, **_: object) -> Any:
        opened[graph] = bytes(package.map(package.graph(graph).file))
        return reference.open_session(package, graph)

    module = ModuleType("native_session")
    module.__dict__.update(open_session=open_session, check_device=lambda device: None)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    target = Target(
        name="toy",
        precisions={"fp32": ("cpu",)},
        domains=frozenset(),
        emitter="",
        session=module.__name__,
        install="",
        kinds=frozenset({NATIVE_KIND}),
    )
    monkeypatch.setitem(targets.TARGETS, target.name, target)
    return opened


def test_each_graph_runs_on_its_own_backend(repack: Repack) -> None:
    mixed = repack("pe", {contract.FEATURES: {"backend": "reference"}})
    with (
        prt.load(mixed) as both,
        prt.load(OLD_PACKAGES / "pe") as onnxruntime,
        prt.load(OLD_PACKAGES / "pe", backend="reference") as stand_in,
    ):
        np.testing.assert_array_equal(both.embed_images(IMAGES), onnxruntime.embed_images(IMAGES))
        np.testing.assert_array_equal(both.features(IMAGES), stand_in.features(IMAGES))
        assert not np.array_equal(both.features(IMAGES), onnxruntime.features(IMAGES))


def test_a_backend_by_name_runs_every_graph_or_none(repack: Repack) -> None:
    mixed = repack("pe", {contract.FEATURES: {"backend": "reference"}})
    with prt.load(mixed, backend="reference") as engine:
        assert engine.embed_images(IMAGES).shape == (3, engine.dim)
    message = "graph 'features' of this package was exported for backend reference, not onnxruntime"
    with pytest.raises(PackageError, match=message):
        prt.load(mixed, backend="onnxruntime")
    with pytest.raises(InputError, match="unknown backend 'openvino'"):
        prt.load(repack("plm", {contract.EMBED: {"backend": "openvino"}}))


@pytest.mark.parametrize(
    ("graphs", "count"), [((contract.VISION, contract.EMBED), 2), (("decoder_0",), 2)]
)
def test_a_language_model_of_two_backends_answers(
    repack: Repack, graphs: tuple[str, ...], count: int
) -> None:
    mixed = repack("plm", {graph: {"backend": "reference"} for graph in graphs})
    with prt.load(mixed) as plm:
        assert len(plm.backend.split(", ")) == count
        first, second = (
            plm.generate("What is it?", images=IMAGES[:1], max_new_tokens=5).tokens
            for _ in range(2)
        )
        assert len(first) == 5 and first == second


def test_parts_of_a_decoder_for_several_backends_are_refused(
    tmp_path: Path, native: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = graph_specs()
    kinds = frozenset({graphs["decoder_1"].kind})
    monkeypatch.setitem(targets.TARGETS, "toy", replace(targets.TARGETS["toy"], kinds=kinds))
    graphs["decoder_1"] = replace(graphs["decoder_1"], backend="toy")
    package = write_plm(tmp_path / "plm", graphs=graphs)
    with pytest.raises(PackageError, match="are for 2 backends: reference, toy"):
        prt.load(package)


def test_a_file_that_is_not_onnx_is_opened_by_a_backend_for_its_kind(
    repack: Repack, native: dict[str, bytes]
) -> None:
    change = {"backend": "toy", "kind": NATIVE_KIND, "file": "features.toy", "data": ()}
    package = repack("pe", {contract.FEATURES: change})
    verify_package(package)
    with prt.load(package) as engine:
        assert engine.embed_images(IMAGES).shape == (3, engine.dim)
        assert native == {}
        engine.features(IMAGES)
    assert native == {contract.FEATURES: NATIVE}
    with (
        open_package(package) as opened,
        pytest.raises(PackageError, match="graph 'features' is of kind toy-weights, not ONNX"),
    ):
        opened.read_graph(contract.FEATURES)


def test_damage_to_a_file_that_is_not_onnx_is_found(
    repack: Repack, native: dict[str, bytes]
) -> None:
    change = {"backend": "toy", "kind": NATIVE_KIND, "file": "features.toy", "data": ()}
    package = repack("pe", {contract.FEATURES: change})
    file = package / "features.toy"
    file.chmod(0o644)
    file.write_bytes(NATIVE[::-1])
    for load in (verify_package, prt.load):
        with pytest.raises(PackageError, match=r"features\.toy is damaged"):
            load(package)
    assert native == {}


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_a_kind_that_the_backend_does_not_open_is_refused(repack: Repack, backend: str) -> None:
    package = repack("pe", {contract.FEATURES: {"kind": NATIVE_KIND}})
    message = "graph 'features' is of kind 'toy-weights', which backend onnxruntime does not"
    with pytest.raises(PackageError, match=message):
        prt.load(package, backend=backend)
    with prt.load(package, backend="reference") as engine:  # which reads no file
        assert engine.features(IMAGES).shape[0] == 3


def test_an_onnx_graph_is_refused_by_a_backend_for_other_kinds(
    repack: Repack, native: dict[str, bytes]
) -> None:
    package = repack("pe", {contract.FEATURES: {"backend": "toy"}})
    message = "graph 'features' is of kind 'onnx', which backend toy does not open"
    with pytest.raises(PackageError, match=message):
        prt.load(package)


def test_operators_are_limited_to_the_domains_of_each_graphs_backend(
    repack: Repack, tmp_path: Path
) -> None:
    package = repack("pe", {contract.FEATURES: {"backend": "tensorrt"}})
    with open_package(package) as opened, Stage.create(tmp_path / "sealed") as stage:
        for file in opened.manifest.content.files:
            stage.write(file, [opened.read(file)])
        with pytest.raises(PackageError, match=r"domain 'com.microsoft'; allowed are \[''\]"):
            stage.seal(opened.manifest, domains=targets.operator_domains)
    with prt.load(package, backend="onnxruntime") as engine:
        engine.embed_images(IMAGES)
        with pytest.raises(PackageError, match=r"domain 'com.microsoft'; allowed are \[''\]"):
            engine.features(IMAGES)


def test_every_backend_of_a_package_must_run_on_the_device(
    repack: Repack, native: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repack("pe", {contract.FEATURES: {"backend": "toy", "kind": NATIVE_KIND}})
    gpu_only = replace(targets.TARGETS["toy"], precisions={"fp32": ("gpu",)})
    monkeypatch.setitem(targets.TARGETS, "toy", gpu_only)
    with pytest.raises(prt.BackendError, match="package for toy does not run on cpu"):
        prt.load(package)


def test_inspect_and_doctor_name_backends_and_kinds(repack: Repack) -> None:
    change = {"backend": "toy", "kind": NATIVE_KIND, "file": "features.toy", "data": ()}
    package = repack("pe", {contract.FEATURES: change})
    lines = report.describe(read_manifest(package))
    (line,) = [line for line in lines if line.startswith("graph       features")]
    assert line.startswith("graph       features by toy of kind toy-weights: images uint8")
    notes = report.lint(package)
    assert "this version does not know backend toy" in notes


@pytest.mark.parametrize("change", [{"backend": "reference"}, {"kind": NATIVE_KIND}])
def test_a_package_of_several_backends_is_not_refitted(
    repack: Repack, change: dict[str, Any]
) -> None:
    with (
        open_package(repack("pe", {contract.FEATURES: change})) as package,
        pytest.raises(PackageError, match="graphs for several backends or in other formats"),
    ):
        refit.plan_of(package)


def test_old_packages_name_no_backend_of_a_graph() -> None:
    for name in ("pe", "plm"):
        content = read_manifest(OLD_PACKAGES / name).content
        for spec in content.graphs.values():
            assert spec.backend is None and spec.kind == ONNX
            assert not {"backend", "kind"} & set(spec.to_dict())
