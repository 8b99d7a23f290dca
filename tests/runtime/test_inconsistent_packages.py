"""Whole packages that do not fit their architecture, and data that is cut after loading."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perception_rt as prt
from perception_rt.errors import PackageError
from perception_rt.package.manifest import canonical_json

PLM = Path(__file__).parents[1] / "compatibility" / "packages" / "plm"
GRAPHS = {
    "pe": ("attention", "features", "features_1", "pixels", "text", "vision"),
    "plm": ("decoder_0", "embed", "pixels", "vision"),
}
IMAGE = np.full((40, 30, 3), 100, np.uint8)
Graph = dict[str, Any]


@pytest.fixture
def sources(tiny_package: Path) -> dict[str, Path]:
    return {"pe": tiny_package, "plm": PLM}


def copy(source: Path, dest: Path) -> Path:
    """A writable copy of a package."""
    shutil.copytree(source, dest, copy_function=shutil.copyfile)
    return dest


def changed(source: Path, dest: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy of a package whose manifest was changed and is intact again."""
    file = copy(source, dest) / "manifest.json"
    value = json.loads(file.read_bytes())
    change(value["content"])
    value["id"] = digest(value["content"])
    del value["digest"]
    file.write_bytes(canonical_json(value | {"digest": digest(value)}))
    return dest


def digest(value: Any) -> str:
    return f"sha256:{hashlib.sha256(canonical_json(value)).hexdigest()}"


def no_inputs(graph: Graph) -> None:
    graph["inputs"] = []


def two_inputs(graph: Graph) -> None:
    graph["inputs"].append({"name": "more", "dtype": "float32", "shape": ["batch", 4]})


def no_outputs(graph: Graph) -> None:
    graph["outputs"] = []


def two_outputs(graph: Graph) -> None:
    graph["outputs"].append({"name": "more", "dtype": "float32", "shape": ["batch", 4]})


def other_name(graph: Graph) -> None:
    graph["inputs"][0]["name"] = "other"


def other_input_dtype(graph: Graph) -> None:
    graph["inputs"][0]["dtype"] = "int8"


def other_output_dtype(graph: Graph) -> None:
    graph["outputs"][-1]["dtype"] = "int8"


def other_width(graph: Graph) -> None:
    graph["outputs"][0]["shape"][-1] += 1


def other_rank(graph: Graph) -> None:
    graph["inputs"][0]["shape"].append(3)


def fixed_batch(graph: Graph) -> None:
    graph["inputs"][0]["shape"][0] = 1


CHANGES = (
    no_inputs, two_inputs, no_outputs, two_outputs, other_name, other_input_dtype,
    other_output_dtype, other_width, other_rank, fixed_batch,
)  # fmt: skip


@pytest.mark.parametrize("name", ["pe", "plm"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_graph_that_does_not_fit_is_refused(
    name: str, change: Callable[[Graph], None], tmp_path: Path, sources: dict[str, Path]
) -> None:
    for graph in GRAPHS[name]:
        path = changed(
            sources[name], tmp_path / graph, lambda c, graph=graph: change(c["graphs"][graph])
        )
        for backend in ("auto", "reference"):
            with pytest.raises(PackageError, match=f"'{graph}'"):
                prt.load(path, backend=backend)


@pytest.mark.parametrize("name", ["pe", "plm"])
def test_a_missing_or_unknown_graph_is_refused(
    name: str, tmp_path: Path, sources: dict[str, Path]
) -> None:
    for graph in set(GRAPHS[name]) - {"attention", "features", "features_1"}:
        dest = tmp_path / graph
        path = changed(sources[name], dest, lambda c, graph=graph: c["graphs"].pop(graph))
        with pytest.raises(PackageError, match=f"no graph '{graph}'"):
            prt.load(path)
    other = changed(
        sources[name],
        tmp_path / "unknown",
        lambda c: c["graphs"].update(audio=c["graphs"]["vision"]),
    )
    with pytest.raises(PackageError, match="graph 'audio' is none of"):
        prt.load(other)


def input_of_another_block(graphs: dict[str, Graph]) -> None:
    graphs["features_1"]["inputs"][0]["name"] = "block_1"
    graphs["features_1"]["outputs"] = [{**graphs["features_1"]["outputs"][0], "name": "block_7"}]


def a_block_twice(graphs: dict[str, Graph]) -> None:
    graphs["features_1"]["outputs"][0]["name"] = "block_0"
    graphs["features_1"]["inputs"][0]["name"] = "block_1"


def no_first_graph(graphs: dict[str, Graph]) -> None:
    del graphs["features"]


def images_again(graphs: dict[str, Graph]) -> None:
    graphs["features_1"]["inputs"] = graphs["features"]["inputs"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (input_of_another_block, "graph 'features_1' returns no block from 1 on"),
        (a_block_twice, "graph 'features_1' returns no block from 1 on"),
        (no_first_graph, "graph 'attention' is none of"),
        (images_again, "graph 'features_1' has an unknown input 'images'|has no input 'block_0'"),
    ],
)
def test_a_chain_of_blocks_that_does_not_fit_is_refused(
    change: Callable[[dict[str, Graph]], None], words: str, tmp_path: Path, tiny_package: Path
) -> None:
    path = changed(tiny_package, tmp_path / "p", lambda content: change(content["graphs"]))
    with pytest.raises(PackageError, match=words):
        prt.load(path)


def architecture(**fields: Any) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        for name, value in fields.items():
            part = content["architecture"]
            *path, last = name.split("__")
            for key in path:
                part = part[key]
            part[last] = value

    return change


def one_token(content: dict[str, Any]) -> None:
    """Texts of one token, for which there is no tokenizer, wherever the manifest has a length."""
    content["architecture"]["text"]["context_length"] = 1
    content["processing"]["text"]["context_length"] = 1
    content["graphs"]["text"]["inputs"][0]["shape"][1] = 1


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("pe", architecture(vision__image_size=10**4, vision__patch_size=10**4)),
        ("pe", architecture(vision__layers=1)),
        ("pe", architecture(vision__width=96)),
        ("pe", architecture(vision__use_cls_token=False)),
        ("pe", architecture(text=None)),
        ("pe", architecture(text__context_length=8)),
        ("pe", architecture(text__vocab_size=49407)),
        ("pe", lambda c: c["processing"]["image"].update(height=64)),
        ("pe", lambda c: c["processing"].update(text=None)),
        ("pe", lambda c: c["processing"]["text"].update(context_length=1)),
        ("pe", one_token),
        ("plm", architecture(n_layers=1)),
        ("plm", architecture(dim=64, n_heads=2)),
        ("plm", architecture(vocab_size=4000)),
        ("plm", architecture(pooling_ratio=2)),
        ("plm", architecture(max_seqlen=255)),
        ("plm", architecture(max_seqlen=4096)),
        ("plm", lambda c: c["processing"]["image"].update(tile_size=56)),
    ],
)
def test_an_architecture_that_does_not_fit_is_refused(
    name: str, change: Callable[[dict[str, Any]], None], tmp_path: Path, sources: dict[str, Path]
) -> None:
    with pytest.raises(PackageError):
        prt.load(changed(sources[name], tmp_path / "p", change))


def cut(package: Path, pattern: str, size: int) -> None:
    for file in package.glob(pattern):
        os.truncate(file, min(size, file.stat().st_size))


@pytest.mark.parametrize("pattern", ["*.data", "*.onnx"])
@pytest.mark.parametrize("size", [0, 1, 5000])
def test_data_that_is_cut_before_a_graph_opens(
    pattern: str, size: int, tmp_path: Path, sources: dict[str, Path]
) -> None:
    package = copy(sources["pe"], tmp_path / "pe")
    with prt.load(package) as pe:
        cut(package, pattern, size)
        with pytest.raises(PackageError, match="bytes instead of"):
            pe.embed_images([IMAGE])
        with pytest.raises(PackageError, match="bytes instead of"):
            pe.embed_texts(["a cat"])
    package = copy(PLM, tmp_path / "plm")
    with prt.load(package) as plm:
        cut(package, pattern, size)
        with pytest.raises(PackageError, match="bytes instead of"):
            plm.generate("Why?", images=[IMAGE], max_new_tokens=1)


def test_data_that_is_cut_while_another_graph_has_it_mapped(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    package = copy(sources["pe"], tmp_path / "pe")
    with prt.load(package) as pe:
        pe.embed_images([IMAGE])
        cut(package, "vision.data", 100)
        with pytest.raises(PackageError, match=r"vision\.data has 100 bytes instead of"):
            pe.features([IMAGE])


def test_data_that_is_changed_before_a_graph_opens(
    tmp_path: Path, sources: dict[str, Path]
) -> None:
    package = copy(sources["pe"], tmp_path / "pe")
    with prt.load(package) as pe:
        with (package / "vision.data").open("r+b") as file:
            file.seek(1000)
            byte = file.read(1)
            file.seek(1000)
            file.write(bytes([byte[0] ^ 1]))
        with pytest.raises(PackageError, match=r"vision\.data is damaged"):
            pe.embed_images([IMAGE])
