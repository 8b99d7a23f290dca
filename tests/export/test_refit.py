"""A refit changes the weights of a package and nothing else, or is refused."""

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.torch import load_file, save_file

import perception_rt as prt
from perception_rt.cli import export_main, main
from perception_rt.config import PeConfig
from perception_rt.demo import language_model_path, weights_path
from perception_rt.errors import BackendError, ExportError, InputError, PackageError
from perception_rt.export.backends.refit_source import structure
from perception_rt.export.backends.tensorrt_engines import library_for
from perception_rt.export.plan import ExportPlan
from perception_rt.export.refit import plan_of, refit_package
from perception_rt.package.reader import open_package, read_manifest
from perception_rt.processing.image import ImageSpec
from perception_rt.tensorrt_library import gpu_capability

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


def exported(config: PeConfig, weights: Path, precision: str, out: Path) -> Path:
    (out.parent / "config.json").write_text(json.dumps(config.to_dict()))
    command = ["--checkpoint", weights, "--config", out.parent / "config.json", "--out", out]
    assert export_main([*map(str, command), "--precision", precision]) == 0
    return out


def test_a_refit_equals_an_export_of_the_new_weights(
    tiny_config: PeConfig, tiny_packages: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    manifest = refit_package(tiny_packages["fp16"], tuned, tmp_path / "refitted")
    direct = exported(tiny_config, tuned, "fp16", tmp_path / "direct")
    wanted = read_manifest(direct).content
    assert manifest.content.files == wanted.files and manifest.content.name == "tiny"
    assert manifest.content.weights == wanted.weights
    with prt.load(tmp_path / "refitted") as mine, prt.load(direct) as theirs:
        np.testing.assert_array_equal(mine.embed_images([PICTURE]), theirs.embed_images([PICTURE]))
    with prt.load(tiny_packages["fp16"]) as old, prt.load(direct) as new:
        assert np.abs(old.embed_images([PICTURE]) - new.embed_images([PICTURE])).max() > 0.1


def test_the_same_layers_are_smoothed_and_stay_in_float(
    tiny_config: PeConfig, tuned: Path, tmp_path: Path
) -> None:
    file = tmp_path / "old.safetensors"
    tensors = load_file(tuned)
    large = "visual.transformer.resblocks.0.mlp.c_fc.weight"
    # A useless channel dwarfs the others.
    tensors["visual.transformer.resblocks.0.ln_2.weight"][0] *= 8e3
    tensors[large][:, 0] = 0
    save_file(tensors, file)
    old = exported(tiny_config, file, "int8", tmp_path / "old")
    before = read_manifest(old).content.target.options
    direct = exported(tiny_config, tuned, "int8", tmp_path / "direct")
    assert large in before["balanced_layers"] and before["float_layers"]
    assert large not in read_manifest(direct).content.target.options.get("balanced_layers", [])
    after = refit_package(old, tuned, tmp_path / "new")
    assert after.content.target.options == before


def test_a_language_model_keeps_its_tokenizer_and_tiles(tmp_path: Path) -> None:
    old = tmp_path / "old"
    assert export_main(["--model", "PLM-Demo", "--precision", "int8", "--out", str(old)]) == 0
    status = main(
        ["refit", str(old), "--weights", str(language_model_path()), "--out", str(tmp_path / "new")]
    )
    assert status == 0
    before, after = read_manifest(old).content, read_manifest(tmp_path / "new").content
    assert (before.files, before.text, before.image) == (after.files, after.text, after.image)
    assert before.target == after.target


def test_a_package_can_take_its_own_place(
    tiny_packages: dict[str, Path], tuned: Path, tmp_path: Path
) -> None:
    first = refit_package(tiny_packages["fp32"], tuned, tmp_path / "package")
    with pytest.raises(ExportError, match="exists"):
        refit_package(tmp_path / "package", tuned, tmp_path / "package")
    again = refit_package(
        tmp_path / "package", tuned, tmp_path / "package", expect=first.id, force=True
    )
    assert again.content.files == first.content.files


def test_other_architectures_and_structures_are_refused(
    tiny_package: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with pytest.raises(prt.PerceptionError, match="visual"):
        refit_package(tiny_package, weights_path(), out)
    with pytest.raises(PackageError, match="sha256:"):
        refit_package(tiny_package, tuned, out, expect=f"sha256:{'0' * 64}")
    # As if this version made other graphs than the one that made the package.
    monkeypatch.setattr("perception_rt.export.graph.lowering.IR_VERSION", 9)
    with pytest.raises(ExportError, match=r"graph 'vision'.*structure [0-9a-f]{12}.*export anew"):
        refit_package(tiny_package, tuned, out)
    assert not out.exists()


def test_structure_ignores_the_values_of_float_weights_only(
    tiny_package: Path, tmp_path: Path
) -> None:
    data = (tiny_package / "vision.onnx").read_bytes()
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.data_type == onnx.TensorProto.FLOAT and tensor.HasField("raw_data"):
            tensor.raw_data = bytes(len(tensor.raw_data))
    assert structure(model.SerializeToString()) == structure(data)
    model.graph.node[3].attribute.append(onnx.helper.make_attribute("axis", 1))
    assert structure(model.SerializeToString()) != structure(data)
    model = onnx.load_model_from_string(data)
    (shape, *_) = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT64]
    shape.raw_data = bytes(len(shape.raw_data))
    assert structure(model.SerializeToString()) != structure(data)


def test_the_plan_of_a_package_is_that_of_its_export(
    tiny_config: PeConfig, tiny_package: Path
) -> None:
    with open_package(tiny_package) as package:
        plan = plan_of(package)
    size = ImageSpec(height=32, width=32)
    assert plan == ExportPlan(
        name="tiny", config=tiny_config, backend="onnxruntime", precision="fp32", image=size,
        taps=(0, 1),
    )  # fmt: skip


def test_refittable_engines_need_a_gpu_to_be_built(tiny_config: PeConfig) -> None:
    common = {"name": "x", "config": tiny_config, "image": ImageSpec(height=32, width=32)}
    with pytest.raises(InputError, match="--refittable is for engines"):
        ExportPlan(backend="tensorrt", precision="fp16", refittable=True, **common)  # type: ignore[arg-type]
    pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT has wheels for x86-64 only")
    if gpu_capability() is None:
        with pytest.raises(BackendError, match="builds refittable engines only where a GPU is"):
            library_for(["sm89"], refittable=True)
