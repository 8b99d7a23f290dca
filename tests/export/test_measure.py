"""Measurement of linear layers under quantisation, and smoothing of large channels."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.config import PeConfig
from perception_rt.demo import config_path, language_model_path, weights_path
from perception_rt.errors import BackendError, InputError
from perception_rt.export.build import export_package
from perception_rt.export.components.component import ranges_of
from perception_rt.export.components.plm_decoder import EmbedComponent
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.head import MeasuredHead
from perception_rt.export.quantization.sensitivity import (
    MAX_LAYER_ERROR,
    Measured,
    exclude_layers,
    measure_layers,
)
from perception_rt.export.refit import refit_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec, open_tokenizer
from perception_rt.processing.prompt import Tiles, Turn, encode_prompt
from perception_rt.processing.tiles import TileSpec


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(64, 128, generator=torch.Generator().manual_seed(0))


def layer() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(128, 96).requires_grad_(False)


def test_a_layer_of_equal_channels_is_left_as_it_is(inputs: Tensor) -> None:
    module = layer()
    result, measured = measure_layers(module, lambda: module(inputs), "fp8")
    torch.testing.assert_close(result, module(inputs))
    assert 0.02 < measured.errors["weight"] < MAX_LAYER_ERROR
    assert measured.smoothed == set() and measured.smoothing("weight") is None
    assert measured.range("weight") == float(inputs.abs().max())


@pytest.mark.parametrize("use", [0.0, 1e-4])
def test_a_large_channel_is_smoothed(inputs: Tensor, use: float) -> None:
    """The channel is useless or nearly so, and others vanish beside it on E4M3's grid."""
    module = layer()
    inputs[:, 5] *= 3e4
    module.weight[:, 5] *= use
    _, measured = measure_layers(module, lambda: module(inputs), "fp8")
    assert measured.smoothed == {"weight"} and measured.excluded() == []
    assert measured.errors["weight"] < MAX_LAYER_ERROR
    smoothing = measured.smoothing("weight")
    assert smoothing is not None and smoothing.argmax() == 5
    assert measured.range("weight") < 1e-2 * float(inputs.abs().max())


def test_a_layer_that_smoothing_does_not_help_stays_in_float(inputs: Tensor) -> None:
    module = layer()
    # All channels of one token are large, and its exact product is zero.
    nothing = torch.linalg.svd(module.weight).Vh[-1]
    inputs[0] = 1e6 * nothing
    _, measured = measure_layers(module, lambda: module(inputs), "fp8")
    assert measured.smoothed == set() and measured.excluded() == ["weight"]


class Percentile:
    """The part of ModelOpt's TensorQuantizer that is used."""

    def __init__(self, attributes: SimpleNamespace) -> None:
        assert attributes.num_bits == (4, 3)
        self.seen: list[Tensor] = []

    def disable_quant(self) -> None:
        pass

    enable_calib = disable_quant

    def __call__(self, x: Tensor) -> None:
        self.seen.append(x.abs().flatten())

    def load_calib_amax(self, method: str, percentile: float, strict: bool) -> None:
        assert method == "percentile"
        self.amax = torch.cat(self.seen).quantile(percentile / 100)


def test_a_range_that_clips_is_taken_where_it_is_better(
    inputs: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SimpleNamespace(calibrator="modelopt")
    for name in ("nn", "config"):
        monkeypatch.setitem(sys.modules, f"modelopt.torch.quantization.{name}", None)
    with pytest.raises(BackendError, match="pip install nvidia-modelopt"):
        ranges_of(plan)  # type: ignore[arg-type]
    library = SimpleNamespace(TensorQuantizer=Percentile, QuantizerAttributeConfig=SimpleNamespace)
    for name in ("nn", "config"):
        monkeypatch.setitem(sys.modules, f"modelopt.torch.quantization.{name}", library)  # type: ignore[arg-type]
    inputs = inputs.repeat(20, 1)
    good, module = layer(), layer()
    _, measured = measure_layers(good, lambda: good(inputs), "fp8", ranges_of(plan))  # type: ignore[arg-type]
    assert measured.clipped == set()  # clipping gains nothing
    module.weight[:, 5] = 0
    inputs[0, 5] = 1e6  # one useless value dwarfs all others
    _, measured = measure_layers(module, lambda: module(inputs), "fp8", ranges_of(plan))  # type: ignore[arg-type]
    assert measured.clipped == {"weight"} and measured.excluded() == []
    assert measured.range("weight") == measured.ranges["weight"] < 10
    assert measured.errors["weight"] < MAX_LAYER_ERROR


def test_other_schemes_smooth_nothing(inputs: Tensor) -> None:
    module = layer()
    inputs[:, 5] *= 3e4
    module.weight[:, 5] = 0
    _, measured = measure_layers(module, lambda: module(inputs), "int8_rows")
    assert measured.excluded() == ["weight"] and measured.smoothed == set()


def test_prompts_are_read_from_lines_of_a_file(tmp_path: Path) -> None:
    assert calibration.prompts(None) == calibration.prompts(tmp_path) == calibration.PROMPTS
    (tmp_path / "prompts.txt").write_text("What?\n\n  Where?  \n")
    assert calibration.prompts(tmp_path) == ("What?", "Where?")
    for bad in (b"", b"\n \n", b"\xff\xfe", b"word " * 20_000):
        (tmp_path / "prompts.txt").write_bytes(bad)
        with pytest.raises(InputError, match=r"--calibration: .*prompts\.txt"):
            calibration.prompts(tmp_path)


def test_a_head_takes_fp8_if_the_likeliest_tokens_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(1, 200, 64, generator=generator)
    weight = torch.randn(512, 64, generator=generator)
    for scale, rejected in ((1.0, True), (20.0, False)):
        # With a scale, each token points to one word, and all words are far apart.
        head = weight.clone()
        if scale > 1:
            head[:200] = tokens[0] * scale
        measured, rows = Measured(), MeasuredHead(tokens)
        for start in (0, 256):
            rows.add(tokens @ head[start : start + 256].T, head[start : start + 256], start)
        rows.put(measured, "output.weight")
        assert ("output.weight" in measured.rejected) == rejected
        assert 0.01 < measured.errors["output.weight"] < MAX_LAYER_ERROR
        assert measured.range("output.weight") == float(tokens.abs().max())


def test_excluded_layers_are_the_worst(inputs: Tensor) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(128, 128) for _ in range(8))).requires_grad_(False)
    exact, measured = measure_layers(module, lambda: module(inputs), "fp8")
    exclude_layers(module, lambda: module(inputs), exact, measured, 0.9995)
    errors = [measured.errors[name] for name in measured.rejected]
    kept = [error for name, error in measured.errors.items() if name not in measured.rejected]
    assert errors and kept and min(errors) >= max(kept)
    other = measure_layers(module, lambda: module(inputs), "fp8")[1]
    exclude_layers(module, lambda: module(inputs), exact, other, 2.0)  # no cosine reaches it
    assert other.rejected == set(other.errors)


def test_an_engine_with_smoothed_channels_is_as_faithful(tmp_path: Path) -> None:
    large = "visual.transformer.resblocks.1.mlp.c_fc.weight"
    checkpoint = with_large_channel(tmp_path / "large.safetensors", block=1)
    config = PeConfig.from_dict(json.loads(config_path().read_text()))
    plan = ExportPlan(
        name="pe", config=config, backend="tensorrt", precision="fp8", taps=(),
        image=ImageSpec(height=32, width=32),
    )  # fmt: skip
    manifest = export_package(plan, open_checkpoint(checkpoint, config), tmp_path / "package")
    assert manifest.content.target.options["balanced_layers"] == [large]
    assert large not in manifest.content.target.options["float_layers"]
    assert manifest.record["fidelity"]["vision.embedding"]["cosine"] > 0.998
    refitted = refit_package(tmp_path / "package", weights_path(), tmp_path / "refitted")
    assert refitted.content.target == manifest.content.target


def with_large_channel(file: Path, block: int) -> Path:
    """PE-Demo with small channels before a product, but for one that is large and has no use."""
    tensors = load_file(weights_path())
    prefix = f"visual.transformer.resblocks.{block}"
    for name in ("ln_2.weight", "ln_2.bias"):
        tensors[f"{prefix}.{name}"] *= 0.01
        tensors[f"{prefix}.{name}"][0] *= 8e5
    tensors[f"{prefix}.mlp.c_fc.weight"] *= 100
    tensors[f"{prefix}.mlp.c_fc.weight"][:, 0] = 0
    save_file(tensors, file)
    return file


def test_a_decoder_is_measured_on_a_real_prompt() -> None:
    config = find_config(language_model_path())
    assert isinstance(config, PlmConfig)
    spec = TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=511)
    config = replace(config, image_token_id=511)
    plan = PlmPlan(
        name="plm", config=config, backend="tensorrt", precision="fp8",
        tiles=TileSpec(tile_size=config.vision.image_size), tokenizer=(spec, None),
    )  # fmt: skip
    source = RandomWeights(config, 0)
    count = config.tokens_per_tile
    features = torch.full((1, count, config.decoder.dim), 7.0)
    reference = EmbedComponent(plan, source).reference(features)
    assert reference.carry is not None
    turn = Turn("user", (Tiles(1), " ".join(calibration.PROMPTS)))
    prompt = encode_prompt(open_tokenizer(spec), [turn], count)
    ((start, _),) = prompt.image_spans
    table = source.load("tok_embeddings.weight")
    wanted = table[torch.from_numpy(prompt.ids)]
    wanted[start : start + count] = 7.0
    torch.testing.assert_close(reference.carry[0], wanted)
    ids = reference.inputs["embed"]["tokens"][0]
    assert (ids == prompt.ids[prompt.ids != 511]).all()
    # Random tokens stand in if the question does not fit.
    short = replace(plan, config=replace(config, decoder=replace(config.decoder, max_seqlen=64)))
    shortened = EmbedComponent(short, source).reference(features)
    assert shortened.carry is not None and shortened.carry.shape[1] <= 64
