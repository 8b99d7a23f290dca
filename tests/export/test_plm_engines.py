"""Language models from golden weights through export and runtime, in every precision."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import PLM_FILES, Golden, plm_golden

import perception_rt as prt
from perception_rt.archs import PLM_MODELS
from perception_rt.errors import BackendError, ExportError, InputError
from perception_rt.export.backends import onnxruntime as emitter
from perception_rt.export.build import export_package
from perception_rt.export.components import plm_decoder
from perception_rt.export.components.plm_decoder import decoder_parts
from perception_rt.export.graph import lazy_weights
from perception_rt.export.plan import PlmPlan
from perception_rt.export.quantization.formats import BLOCK, quantize_blocks
from perception_rt.models.plm import PerceptionLM, pool_tokens
from perception_rt.package import contract
from perception_rt.package.onnx_scan import scan_graph
from perception_rt.package.reader import open_package
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.generation.plm_engine import PlmEngine

MAX_LOGIT_ERROR = 1e-3
# Between two orders of the same sums. Rounding to integers amplifies a difference in the last bit,
# so integers are less close; a wrong scale or position moves logits by about 1.
MAX_ORDER_ERROR = {"fp32": 1e-4, "int8": 0.05, "int4": 0.05}
PRECISIONS = [
    ("fp32", "int8"),
    ("fp16", "int8"),
    ("int8", "int8"),
    ("int4", "int8"),
    ("int4", "int4"),
]


def plan_of(data: Golden, precision: str = "fp32", **options: object) -> PlmPlan:
    size = data.config.vision.image_size
    return PlmPlan(
        name="golden",
        config=data.config,
        backend="onnxruntime",
        precision=precision,
        tiles=TileSpec(tile_size=size),
        **options,
    )


Packages = Callable[..., Path]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """`package(name, precision, blocks)`: the package of a golden model, exported once."""
    made: dict[tuple[str, str, str], Path] = {}

    def get(name: str, precision: str = "fp32", blocks: str = "int8") -> Path:
        key = (name, precision, blocks)
        if key not in made:
            out = tmp_path_factory.mktemp("plm") / "-".join(key)
            data = plm_golden(name)
            export_package(plan_of(data, precision, blocks=blocks), data, out)
            made[key] = out
        return made[key]

    return get


@contextmanager
def decoder_of(path: Path) -> Iterator[PlmEngine]:
    with open_package(path) as opened:
        decoder = PlmEngine(opened, backend="onnxruntime", device="cpu", threads=2)
        yield decoder
        decoder.close()


def logits_of(decoder: PlmEngine, hidden: np.ndarray, edges: list[int]) -> np.ndarray:
    """Logits (V,) after the last token of a sequence that is fed in pieces ending at `edges`."""
    cache = CacheBlock(decoder.cache_shape, 1, hidden.shape[0] + 1)
    start = 0
    for stop in edges:
        piece = hidden[None, start:stop]
        past = np.asarray([start], np.int32)
        last = np.asarray([[stop - start - 1]], np.int64)
        logits = decoder.forward(piece, past, cache, slice(0, 1), last)
        start = stop
    return logits[0, 0]


@pytest.mark.parametrize("name", PLM_FILES)
def test_golden_logits_and_greedy_tokens_through_engines(name: str, package: Packages) -> None:
    data = plm_golden(name)
    with prt.load(package(name)) as plm:
        tokens, tiles = data.inputs["tokens"][0], data.inputs["tiles"]
        logits = plm.prefill_logits(tokens, tiles)
        text_only = plm.prefill_logits(data.inputs["text_only_tokens"][0])
        greedy = plm.generate_tokens(tokens, tiles, max_new_tokens=12)
    assert np.abs(logits - data.outputs["logits"][0, -1]).max() <= MAX_LOGIT_ERROR
    assert np.abs(text_only - data.outputs["text_only_logits"][0, -1]).max() <= MAX_LOGIT_ERROR
    assert greedy == data.outputs["greedy_tokens"].tolist()


@pytest.mark.parametrize("name", PLM_FILES)
def test_every_position_equals_the_golden_logits(name: str, package: Packages) -> None:
    """Compares all positions of one call with image tokens, and not only the last."""
    data = plm_golden(name)
    ids = data.inputs["tokens"][0]
    with decoder_of(package(name)) as decoder:
        hidden = decoder.embed(ids)
        features = decoder.encode_pixels(data.inputs["tiles"])
        hidden[ids == data.config.image_token_id] = features.reshape(-1, hidden.shape[1])
        cache = CacheBlock(decoder.cache_shape, 1, len(ids))
        positions = np.arange(len(ids))[None]
        past = np.zeros(1, np.int32)
        logits = decoder.forward(hidden[None], past, cache, slice(0, 1), positions)
    assert np.abs(features - data.outputs["projected"]).max() <= 1e-4
    assert np.abs(logits - data.outputs["logits"]).max() <= MAX_LOGIT_ERROR


def test_prefill_then_decode_equals_a_longer_prefill(package: Packages) -> None:
    """PAR-05, for every prompt length from 1 to 64."""
    data = plm_golden("plm_tied_ropescaled")
    ids = np.random.default_rng(0).integers(0, 300, 65)
    with decoder_of(package("plm_tied_ropescaled")) as decoder:
        hidden = decoder.embed(ids)
        for n in range(1, 65):
            whole = logits_of(decoder, hidden[: n + 1], [n + 1])
            stepped = logits_of(decoder, hidden[: n + 1], [n, n + 1])
            assert np.abs(whole - stepped).max() <= 1e-4, n
    assert data.config.decoder.kv_heads < data.config.decoder.n_heads


@pytest.mark.parametrize("chunk", [1, 7, 32])
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_chunked_prefill_equals_whole(chunk: int, precision: str, package: Packages) -> None:
    """PAR-05: integer activations are scaled per row, so chunk edges change nothing."""
    ids = np.random.default_rng(1).integers(0, 300, 80)
    with decoder_of(package("plm_untied_noscale", precision)) as decoder:
        hidden = decoder.embed(ids)
        whole = logits_of(decoder, hidden, [80])
        edges = [*range(chunk, 80, chunk), 80]
        error = np.abs(whole - logits_of(decoder, hidden, edges)).max()
        assert error <= MAX_ORDER_ERROR[precision]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_a_sequence_does_not_depend_on_its_neighbours(precision: str, package: Packages) -> None:
    """One step of three sequences with different lengths equals three single steps."""
    rng = np.random.default_rng(2)
    lengths = [5, 17, 11]
    with decoder_of(package("plm_tied_ropescaled", precision)) as decoder:
        cache = CacheBlock(decoder.cache_shape, 3, 32)
        for array in cache.keys + cache.values:
            array[...] = np.nan
        alone, step = [], []
        for row, length in enumerate(lengths):
            hidden = decoder.embed(rng.integers(0, 300, length + 1))
            alone.append(logits_of(decoder, hidden, [length, length + 1]))
            rows, last = slice(row, row + 1), np.asarray([[length - 1]])
            decoder.forward(hidden[None, :-1], np.zeros(1, np.int32), cache, rows, last)
            step.append(hidden[-1:])
        past = np.asarray(lengths, np.int32)
        together = decoder.forward(
            np.stack(step), past, cache, slice(0, 3), np.zeros((3, 1), np.int64)
        )
    error = np.abs(together[:, 0] - np.stack(alone)).max()
    assert error <= MAX_ORDER_ERROR[precision]


@pytest.mark.parametrize(("precision", "blocks"), PRECISIONS[1:])
@pytest.mark.parametrize("name", PLM_FILES)
def test_other_precisions_are_close(
    name: str, precision: str, blocks: str, package: Packages
) -> None:
    data = plm_golden(name)
    with prt.load(package(name, precision, blocks)) as plm:
        record = plm.manifest.record["fidelity"]
        logits = plm.prefill_logits(data.inputs["tokens"][0], data.inputs["tiles"])
    golden = data.outputs["logits"][0, -1]
    cosine = logits @ golden / np.linalg.norm(logits) / np.linalg.norm(golden)
    least = 0.85 if blocks == "int4" else {"fp16": 0.9995, "int8": 0.99, "int4": 0.96}[precision]
    assert cosine >= least
    assert set(record) >= {"vision.image_features", "embed.hidden", "decoder_0.logits"}


def test_a_tied_int4_model_stores_its_table_once(package: Packages) -> None:
    """Embedding and head use the same bytes, each through its own operator."""
    with open_package(package("plm_tied_ropescaled", "int4")) as opened:
        graphs = {name: scan_graph(opened.read_graph(name)) for name in ("embed", "decoder_0")}
        assert opened.graph("decoder_0").data == ("decoder_0.data", "embed.data")
    places = [
        {
            (t.entries["location"], t.entries.get("offset", "0"))
            for t in graph.externals
            if t.name.startswith("tok_embeddings.weight.int4")
        }
        for graph in graphs.values()
    ]
    assert places[0] == places[1]
    assert len(places[0]) == 2  # values and scales


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_parts_chain_to_the_same_logits(
    precision: str, package: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = plm_golden("plm_tied_ropescaled")
    with prt.load(package("plm_tied_ropescaled", precision)) as plm:
        whole = plm.prefill_logits(data.inputs["tokens"][0], data.inputs["tiles"])
    monkeypatch.setattr(plm_decoder, "PART_BYTES", 300_000)
    parts = len(decoder_parts(plan_of(data, precision)))
    assert parts > 1
    export_package(plan_of(data, precision), data, tmp_path / "p")
    with prt.load(tmp_path / "p") as plm:
        names = [n for n in plm.manifest.content.graphs if n.startswith(contract.DECODER)]
        assert names == [contract.decoder_part(i) for i in range(parts)]
        logits = plm.prefill_logits(data.inputs["tokens"][0], data.inputs["tiles"])
    assert np.abs(whole - logits).max() <= 1e-5


def test_parts_of_the_released_models() -> None:
    """Parts have all layers, in order; PLM-1B in int4 is one part."""
    for name, config in PLM_MODELS.items():
        for precision, blocks in PRECISIONS:
            plan = PlmPlan(
                name=name,
                config=config,
                backend="onnxruntime",
                precision=precision,
                blocks=blocks,
                tiles=TileSpec(tile_size=448),
            )
            parts = decoder_parts(plan)
            assert [i for part in parts for i in part] == list(range(config.decoder.n_layers))
            assert all(parts)
            if name == "PLM-1B":
                assert len(parts) == {"fp32": 4, "fp16": 2, "int8": 1, "int4": 1}[precision]


def test_a_layer_that_w8a8_would_hurt_takes_blocks(tmp_path: Path) -> None:
    """A channel 30 times as large as the others leaves few steps for them in W8A8 by rows."""
    data = plm_golden("plm_untied_noscale")
    tensors = dict(data.weights)
    norm = tensors["layers.1.ffn_norm.weight"].clone()
    norm[3] = 30.0
    tensors["layers.1.ffn_norm.weight"] = norm
    for name in ("w1", "w3"):
        key = f"layers.1.feed_forward.{name}.weight"
        tensors[key] = tensors[key].clone()
        tensors[key][:, 3] /= 30.0
    manifest = export_package(plan_of(data, "int8"), replace(data, weights=tensors), tmp_path / "p")
    hurt = ["layers.1.feed_forward.w1.weight", "layers.1.feed_forward.w3.weight"]
    assert manifest.content.target.options["float_layers"] == []
    assert manifest.content.target.options["block_layers"] == hurt
    assert sorted(manifest.record["layer_error"]) == hurt


def test_a_wrong_engine_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EXP-06: an engine with swapped 4-bit values fails the gate."""

    def swapped(weight: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
        packed, scale = quantize_blocks(weight, bits)
        return (packed >> 4) | (packed << 4), scale

    monkeypatch.setattr(emitter, "quantize_blocks", swapped)
    data = plm_golden("plm_tied_ropescaled")
    with pytest.raises(ExportError, match="not faithful to eager"):
        export_package(plan_of(data, "int4"), data, tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("bits", "error"), [(8, 0.008), (4, 0.12)])
@pytest.mark.parametrize("channels", [96, 100])
def test_blocks_round_to_whole_steps(bits: int, error: float, channels: int) -> None:
    weight = np.random.default_rng(3).standard_normal((7, channels)).astype(np.float32)
    weight[2, :32] = 0
    packed, scale = quantize_blocks(weight, bits)
    blocks = -(-channels // BLOCK)
    assert packed.shape == (7, blocks, BLOCK * bits // 8) and scale.shape == (7, blocks)
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(7, blocks, -1)
    values = (packed if bits == 8 else values).astype(np.float32) - 2 ** (bits - 1)
    restored = (values * scale[..., None]).reshape(7, -1)[:, :channels]
    assert np.linalg.norm(restored - weight) / np.linalg.norm(weight) < error
    assert not restored[2, :32].any()


def test_pooling_before_the_second_layer_is_exact() -> None:
    data = plm_golden("plm_untied_noscale")
    model = PerceptionLM(data.config).double()
    first, gelu, second = model.vision_projector.projector
    patches = torch.randn(2, 16, data.config.vision.width, dtype=torch.float64)
    last = pool_tokens(second(gelu(first(patches))), 2)
    assert torch.allclose(model.vision_projector(patches), last, atol=1e-12)


def test_tokenizer_goes_into_the_package(tmp_path: Path) -> None:
    data = plm_golden("plm_tied_ropescaled")
    spec = TokenizerSpec(kind="bytes", vocab_size=320, image_token_id=319)
    export_package(plan_of(data, tokenizer=(spec, None)), data, tmp_path / "p")
    size = data.config.vision.image_size
    image = np.full((size, size, 3), 200, np.uint8)
    with prt.load(tmp_path / "p") as plm:
        result = plm.generate("What is this?", images=[image], max_tiles=0, max_new_tokens=4)
    assert len(result.tokens) <= 4
    assert result.timings.image_tiles == 1


def test_a_table_goes_through_memory_in_pieces(
    package: Packages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = plm_golden("plm_tied_ropescaled")
    monkeypatch.setattr(lazy_weights, "PIECE_BYTES", 7 * 4 * data.config.decoder.dim)
    export_package(plan_of(data, "int4"), data, tmp_path / "p")
    with (
        open_package(package("plm_tied_ropescaled", "int4")) as whole,
        open_package(tmp_path / "p") as pieces,
    ):
        for name in ("embed.data", "decoder_0.data"):
            assert whole.manifest.content.files[name] == pieces.manifest.content.files[name]


@pytest.mark.parametrize(
    ("changes", "precision", "message"),
    [
        ({"n_heads": 16, "n_kv_heads": 4}, "fp32", "heads have 8 channels; .* multiple of 16"),
        ({"dim": 144, "n_heads": 9, "n_kv_heads": 3}, "int4", "a multiple of 32, not 144"),
    ],
)
def test_plan_refuses_shapes(changes: dict[str, int], precision: str, message: str) -> None:
    data = plm_golden("plm_tied_ropescaled")
    config = replace(data.config, decoder=replace(data.config.decoder, **changes))
    with pytest.raises(InputError, match=message):
        plan_of(replace(data, config=config), precision)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8"}, "precision fp8 is not for backend onnxruntime"),
        ({"precision": "int8", "blocks": "int4"}, "blocks can be int4 in precision int4 only"),
        ({"precision": "int4", "blocks": "int2"}, "blocks must be int8 or int4"),
        ({"tiles": TileSpec(tile_size=448)}, "tiles of 448 pixels are not for a tower of 56"),
    ],
)
def test_plan_refuses(options: dict[str, object], message: str) -> None:
    plan = plan_of(plm_golden("plm_tied_ropescaled"))
    with pytest.raises(InputError, match=message):
        replace(plan, **options)


def test_float32_is_refused_on_a_gpu_without_a_kernel_for_it(
    package: Packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perception_rt.runtime.backends.onnxruntime.check_device", lambda d: None)
    with pytest.raises(BackendError, match="fp32 package for onnxruntime does not run on cuda; it"):
        prt.load(package("plm_tied_ropescaled", "fp32"), device="cuda")
