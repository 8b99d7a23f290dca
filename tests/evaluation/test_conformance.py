"""Conformance runs, with our eager models in place of a library.

`test_conformance_libraries.py` runs the libraries themselves where they are installed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_folder import HF

import perception_rt as prt
from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint
from perception_rt.cli import export_main, main
from perception_rt.config import PeConfig
from perception_rt.demo import DEMO_PLM, language_model_path
from perception_rt.errors import BackendError, InputError
from perception_rt.evaluation.conformance.encoder import EncoderComparison
from perception_rt.evaluation.conformance.language import LanguageComparison
from perception_rt.evaluation.conformance.library import (
    LIBRARIES,
    LibraryEntry,
    get_library,
    is_hub_name,
    open_library,
)
from perception_rt.evaluation.conformance.report import (
    Check,
    Comparison,
    Layer,
    first_below,
    least_cosine,
    lowest_cosine,
    share_equal,
)
from perception_rt.families import PE
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.models.plm import PerceptionLM
from perception_rt.package.manifest import Target
from perception_rt.package.reader import open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec, load_image, normalize
from perception_rt.processing.tiles import TileSpec, load_tiles

SIZE = 32  # of the tiny model's images


def ignore(*_: object) -> None:
    """A progress callback that does nothing."""


def eager(config: PeConfig | PlmConfig, source: Any) -> Any:
    """A model of `models/` with the weights of a source."""
    kind: Any = PerceptionEncoder if isinstance(config, PeConfig) else PerceptionLM
    model = kind(config).eval().requires_grad_(False)
    weights = {name: source.load(name).float() for name in expected_tensors(config)}
    model.load_state_dict(weights, strict=False)
    return model


@dataclass
class EagerEncoder:
    """An `EncoderLibrary` of our own model."""

    model: Any
    spec: ImageSpec
    logit_scale: float | None = None

    def pixels(self, picture: Any) -> Any:
        return normalize(load_image(picture, self.spec), self.spec)

    def outputs(self, pixels: Any) -> Any:
        return self.model.encode_image(torch.from_numpy(pixels)).numpy()

    def tokens(self, pixels: Any) -> Any:
        return self.model.visual.forward_features(torch.from_numpy(pixels), norm=True).numpy()

    def blocks(self, pixels: Any) -> list[Any]:
        tower = self.model.visual
        taps = tower.forward_taps(torch.from_numpy(pixels), range(len(tower.transformer.resblocks)))
        return [tap[:, tower.num_prefix :].numpy() for tap in taps]

    def tokenize(self, texts: Sequence[str]) -> Any:
        return ClipTokenizer(context_length=16)(texts)

    def texts(self, ids: Any) -> Any:
        return self.model.encode_text(torch.from_numpy(ids)).numpy()


@pytest.fixture
def library(tiny_config: PeConfig) -> EagerEncoder:
    """The weights of the tiny packages."""
    model = eager(tiny_config, RandomWeights(tiny_config, 0))
    scale = float(model.logit_scale.exp())
    return EagerEncoder(model, ImageSpec(height=SIZE, width=SIZE), scale)


def compare(package: Path, library: Any, *, model_only: bool = False) -> Comparison:
    with prt.load(package) as engine:
        assert isinstance(engine, prt.Embedder)
        return EncoderComparison(engine, library, model_only=model_only, on_progress=ignore).run()


def failed(comparison: Comparison) -> set[str]:
    return {check.part for check in comparison.checks if not check.passed}


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_faithful_encoder(
    precision: str, tiny_packages: dict[str, Path], library: EagerEncoder
) -> None:
    found = compare(tiny_packages[precision], library)
    assert failed(found) == set() and found.location == "" and not found.layers
    assert [check.name for check in found.checks] == [
        "pixels of the pictures", "outputs of equal pixels", "embeddings of the pictures",
        "token ids", "outputs of texts", "factor on cosines, relative",
    ]  # fmt: skip


@pytest.mark.parametrize("block", [0, 1])
def test_the_block_with_a_changed_weight_is_named(
    block: int, tiny_package: Path, library: EagerEncoder
) -> None:
    library.model.visual.transformer.resblocks[block].mlp.c_proj.weight[:] *= 10
    found = compare(tiny_package, library)
    assert failed(found) == {"vision tower"}
    assert found.location.startswith(f"block {block} (cosine ")


def test_a_changed_projection_is_behind_the_blocks(
    tiny_package: Path, library: EagerEncoder
) -> None:
    library.model.visual.proj[0] += 1
    found = compare(tiny_package, library)
    assert found.location == "behind block 1: the final norm, the pooling or the projection"


def test_another_mean_is_a_difference_of_the_preprocessing(
    tiny_package: Path, library: EagerEncoder
) -> None:
    library.spec = replace(library.spec, mean=(0.48, 0.46, 0.41))
    found = compare(tiny_package, library)
    assert failed(found) == {"preprocessing"} and not found.layers
    assert found.notes[0].startswith("the package's preprocessing is squash, bilinear, mean [0.5")
    assert failed(compare(tiny_package, library, model_only=True)) == set()


def test_texts(tiny_package: Path, library: EagerEncoder) -> None:
    library.model.text.transformer.resblocks[1].mlp.c_fc.weight[:] *= 1.5
    assert failed(compare(tiny_package, library)) == {"text tower"}
    library.logit_scale = 100.0
    assert "logit scale" in failed(compare(tiny_package, library))
    library.logit_scale = None
    found = compare(tiny_package, library)
    assert failed(found) == set() and "no text tower" in found.notes[0]


def test_another_tokenizer(tiny_package: Path, library: EagerEncoder) -> None:
    library.tokenize = lambda texts: ClipTokenizer(context_length=16)([t + "!" for t in texts])  # type: ignore[method-assign]
    assert failed(compare(tiny_package, library)) == {"tokenizer"}


def test_another_model_is_one_clear_error(tiny_package: Path, library: EagerEncoder) -> None:
    library.model.visual.proj = torch.nn.Parameter(torch.zeros(64, 48), requires_grad=False)
    with pytest.raises(InputError, match=r"are \(8, 32\), the library's \(8, 48\): the weights"):
        compare(tiny_package, library)


@dataclass
class EagerPlm:
    """A `LanguageLibrary` of our own model."""

    model: Any
    spec: TileSpec
    ends: tuple[int, ...] = ()
    chat: Any = None

    def tiles(self, picture: Any) -> Any:
        return normalize(load_tiles(picture, self.spec), self.spec.tile)

    def prompt(self, question: str, picture: Any) -> Any:
        return self.chat

    def logits(self, ids: Any, pixels: Any) -> Any:
        tiles = None if pixels is None else torch.from_numpy(pixels)
        return self.model(torch.from_numpy(ids)[None], tiles)[0, -1].numpy()

    def greedy(self, ids: Any, pixels: Any, count: int) -> Any:
        model, tokens = self.model, list[int]()
        tiles = None if pixels is None else torch.from_numpy(pixels)
        hidden = model.embed(torch.from_numpy(ids)[None], tiles)
        while len(tokens) < count:
            logits = model.decode(hidden)[0, -1]
            logits[model.config.image_token_id] = -torch.inf
            token = logits.argmax()
            if int(token) in self.ends:
                break
            tokens.append(int(token))
            hidden = torch.cat([hidden, model.tok_embeddings(token[None, None])], dim=1)
        return np.array(tokens, np.int64)

    def image_features(self, pixels: Any) -> Any:
        return self.model.encode_tiles(torch.from_numpy(pixels)).numpy()

    def values(self, ids: Any, pixels: Any) -> list[Any]:
        found: list[Any] = []
        heads, width = self.model.decoder_config.kv_heads, self.model.decoder_config.head_dim
        hooks = [
            layer.attention.wv.register_forward_hook(lambda _m, _i, out: found.append(out))
            for layer in self.model.layers
        ]
        self.logits(ids, pixels)
        for hook in hooks:
            hook.remove()
        # (1, T, K * E) -> (K, T, E)
        return [value[0].unflatten(-1, (heads, width)).transpose(0, 1).numpy() for value in found]


@pytest.fixture(scope="module")
def plm_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("conform") / "plm"
    assert export_main(["--checkpoint", str(HF), "--out", str(out)]) == 0
    return out


@pytest.fixture
def plm_library(plm_package: Path) -> EagerPlm:
    config = find_config(HF)
    assert isinstance(config, PlmConfig)
    with open_package(plm_package) as package:
        spec = TileSpec.from_dict(package.manifest.content.image)
    return EagerPlm(eager(config, open_checkpoint(HF, config)), spec, ends=(1001, 1009))


def compare_plm(package: Path | str, library: Any, *, model_only: bool = False) -> Comparison:
    with prt.load(package, cache=False) as engine, open_package(package) as opened:
        assert isinstance(engine, prt.Generator)
        return LanguageComparison(
            engine, opened, library, threads=None, model_only=model_only, on_progress=ignore
        ).run()


def test_the_demo_in_int8() -> None:
    config = find_config(language_model_path())
    assert isinstance(config, PlmConfig)
    with open_package(DEMO_PLM) as package:
        spec = TileSpec.from_dict(package.manifest.content.image)
    model = eager(config, open_checkpoint(language_model_path(), config))
    found = compare_plm(DEMO_PLM, EagerPlm(model, spec))
    assert failed(found) == set() and found.location == ""
    assert sum("greedy tokens" in note for note in found.notes) == 2
    model.layers[1].attention.wo.weight[:] *= -1
    found = compare_plm(DEMO_PLM, EagerPlm(model, spec), model_only=True)
    assert failed(found) == {"model"}
    assert found.location.startswith("values of decoder layer 2 (cosine ")


def test_a_faithful_language_model(plm_package: Path, plm_library: EagerPlm) -> None:
    found = compare_plm(plm_package, plm_library)
    assert failed(found) == set() and found.location == ""
    assert [check.name for check in found.checks] == [
        "tiles of the pictures", "logits, text", "greedy tokens, text", "image features",
        "logits, picture", "greedy tokens, picture",
    ]  # fmt: skip
    assert "no chat template" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "location"),
    [
        ("layers.1.attention.wv", "values of decoder layer 1 (cosine"),
        ("layers.0.feed_forward.w2", "values of decoder layer 1 (cosine"),
        ("layers.2.feed_forward.w2", "behind the values of decoder layer 2"),
    ],
)
def test_the_decoder_layer_with_a_changed_weight_is_named(
    name: str, location: str, plm_package: Path, plm_library: EagerPlm
) -> None:
    plm_library.model.get_parameter(f"{name}.weight")[:8] *= -1
    found = compare_plm(plm_package, plm_library, model_only=True)
    assert failed(found) == {"model"}
    assert found.location.startswith(location)


def test_a_changed_tile_encoder_is_named(plm_package: Path, plm_library: EagerPlm) -> None:
    plm_library.model.vision_projector.projector[0].weight[:8] *= -1
    found = compare_plm(plm_package, plm_library, model_only=True)
    assert found.location.startswith("image features (cosine")


def test_another_prompt_and_other_tiles(plm_package: Path, plm_library: EagerPlm) -> None:
    plm_library.chat = np.arange(5)
    plm_library.spec = replace(plm_library.spec, max_tiles=4)
    found = compare_plm(plm_package, plm_library)
    assert failed(found) == {"preprocessing", "prompt"}
    assert found.checks[0].to_dict()["value"] is None  # another number of tiles


def open_tiny(content: Any, weights: str | None) -> tuple[EagerEncoder, str]:
    """An opener for the tiny package; `weights` is a factor for those of a layer."""
    config = PeConfig.from_dict(content.architecture)
    model = eager(config, RandomWeights(config, 0))
    if weights is not None:
        model.visual.transformer.resblocks[1].mlp.c_proj.weight[:] *= float(weights)
    return EagerEncoder(model, ImageSpec.from_dict(content.image)), weights or "released"


def use_tiny(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """Puts our own model in the place of timm."""
    entry = LibraryEntry(
        name="timm", family=PE, opener="test_conformance:open_tiny", modules=("numpy",),
        distribution="numpy", install="pip install timm",
    )  # fmt: skip
    monkeypatch.setitem(LIBRARIES, "timm", replace(entry, **changes))


def test_the_command(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny(monkeypatch)
    command = ["conform", str(tiny_package), "--against", "timm"]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"faithful: {tiny_package} (tiny, fp32) agrees with timm ")
    assert sum(line.endswith("ok") for line in lines) == 3
    assert main([*command, "--weights", "10"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith("not faithful: ")
    assert "differs from timm" in lines[-1] and "first difference: block 1 (" in lines[-1]
    assert main([*command, "--weights", "10", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["faithful"] is False and report["verdict"] == lines[-1]
    assert [layer["name"] for layer in report["layers"]] == ["block 0", "block 1"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"modules": ("no_such_module",)}, "timm needs no_such_module, .*: pip install timm"),
        ({"opener": "test_conformance:fail"}, "cannot load tiny: OSError: offline"),
    ],
)
def test_a_library_that_does_not_load_is_one_line(
    changes: Any,
    message: str,
    tiny_package: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    use_tiny(monkeypatch, **changes)
    assert main(["conform", str(tiny_package), "--against", "timm"]) == 2
    error = capsys.readouterr().err
    with pytest.raises(BackendError, match=message), prt.load(tiny_package) as engine:
        open_library(get_library("timm"), engine.manifest.content, None)
    assert error.splitlines()[-1].startswith("perception-rt: timm")


def fail(*_: object) -> None:
    """An opener of a library without a network."""
    raise OSError("offline\nsecond line")


def test_a_package_of_another_family(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    use_tiny(monkeypatch)
    assert main(["conform", DEMO_PLM, "--against", "timm"]) == 2
    assert "is a language model; timm is for an encoder" in capsys.readouterr().err


def test_names_of_weights(tmp_path: Path) -> None:
    assert is_hub_name("timm/PE-Core-L-14-336")
    assert not is_hub_name(str(tmp_path))
    for missing in ("./missing/file", str(tmp_path / "missing"), "missing"):
        with pytest.raises(InputError, match="does not exist"):
            is_hub_name(missing)
    with pytest.raises(InputError, match="known are timm, open_clip, transformers"):
        get_library("clip")


def test_limits_and_figures() -> None:
    def target(precision: str, **options: Any) -> Target:
        return Target(backend="onnxruntime", precision=precision, options=options)

    assert least_cosine(target("fp32")) == 1 - 1e-8
    assert least_cosine(target("int4")) == least_cosine(target("int8"))
    blocks = least_cosine(target("int4", blocks="int4"), decoder=True)
    assert blocks < least_cosine(target("int4"), decoder=True)
    assert least_cosine(target("fp8"), decoder=True) < least_cosine(target("fp8"))
    nan = Check(name="x", part="x", kind="difference", value=float("nan"), limit=1)
    assert not nan.passed and not replace(nan, kind="cosine").passed
    assert first_below([Layer(name="a", cosine=1), Layer(name="b", cosine=float("nan"))], 0.9) == 1
    assert first_below([Layer(name="a", cosine=1)], 0.9) is None
    assert share_equal(np.array([1, 2, 3]), np.array([1, 2])) == pytest.approx(2 / 3)
    assert share_equal(np.array([]), np.array([])) == 1
    assert lowest_cosine(np.eye(2), -np.eye(2), "rows") == -1
