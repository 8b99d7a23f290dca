"""PEFT's LoRA adapters: merged as PEFT merges them, and refused where they are something else."""

import json
import math

import pytest
import torch
from golden_data import PLM_FILES, plm_golden
from golden_weights import our_names, read_golden
from safetensors.torch import load_file, save_file

from perception_rt.checkpoint.adapter import AdaptedWeights
from perception_rt.checkpoint.names import stored_tensors
from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.errors import CheckpointError
from perception_rt.plm_config import PlmConfig

PLM = plm_golden(PLM_FILES[1])  # untied, so that the head is a layer
CLIP_CONFIG, CLIP_WEIGHTS = read_golden("clip_core")
CLIP_WEIGHTS = our_names(CLIP_WEIGHTS)
CORE_CONFIG, CORE_WEIGHTS = read_golden("pe_core_cls")
CORE_WEIGHTS = our_names(CORE_WEIGHTS)
SETTINGS = {
    "peft_type": "LORA", "r": 2, "lora_alpha": 6, "bias": "none", "use_dora": False,
    "target_modules": ["q_proj"], "fan_in_fan_out": False, "init_lora_weights": True,
    "modules_to_save": None, "rank_pattern": {}, "alpha_pattern": {}, "lora_dropout": 0.1,
}  # fmt: skip
PREFIX = "base_model.model."


def write_adapter(folder, layers, *, prefix=PREFIX, suffix=".safetensors", **settings):
    """Writes an adapter with random matrices; `layers` maps paths to (out, in) or (out, in, r)."""
    folder.mkdir(exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    matrices = {}
    for path, (rows, columns, *rank) in layers.items():
        (r,) = rank or [2]
        matrices[path] = (
            torch.randn(rows, r, generator=generator),
            torch.randn(r, columns, generator=generator),
        )
    tensors = {f"{prefix}{path}.lora_A.weight": a for path, (_, a) in matrices.items()}
    tensors |= {f"{prefix}{path}.lora_B.weight": b for path, (b, _) in matrices.items()}
    file = folder / f"adapter_model{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    (folder / "adapter_config.json").write_text(json.dumps(SETTINGS | settings))
    return {path: b @ a for path, (b, a) in matrices.items()}


class Base:
    """A `WeightSource` of tensors in memory."""

    def __init__(self, weights):
        self.weights = weights
        self.provenance = {"source": "memory"}

    def load(self, name):
        return self.weights[name]

    def load_rows(self, name, start, stop):
        return self.weights[name][start:stop]


def check(folder, weights, config, products, scale):
    """All tensors are the base's, plus `scale * product` of each of our names."""
    adapted = AdaptedWeights(Base(weights), folder, config)
    for name, tensor in weights.items():
        found = adapted.load(name)
        if name not in products:
            assert found is tensor
            continue
        torch.testing.assert_close(found, tensor + scale * products[name], rtol=1e-5, atol=1e-5)
        assert torch.equal(adapted.load_rows(name, 1, 3), found[1:3])
    return adapted


def linear_layers(layout, weights, config):
    """Layer path in a layout -> (entry, part), for all matrices except embeddings."""
    shapes = {name: tuple(t.shape) for name, t in weights.items()}
    head_dim = config.decoder.head_dim if isinstance(config, PlmConfig) else None
    layers = {}
    for entry in stored_tensors(layout, shapes, head_dim):
        for part, (key, shape) in enumerate(zip(entry.keys, entry.shapes, strict=True)):
            stem = key.removesuffix(".weight").removesuffix(".in_proj_weight")
            if len(shape) == 2 and stem != key and "embed" not in stem:
                layers[stem] = (entry, part)
    return layers


def ours(layers, products):
    """Products by our names, from those of stored parts."""
    found = {}
    for path, (entry, part) in layers.items():
        parts = [torch.zeros(shape) for shape in entry.shapes]
        parts[part] = products[path]
        found[entry.name] = found.get(entry.name, 0) + entry.unpack(parts)
    return found


@pytest.mark.parametrize(
    ("layout", "weights", "config"),
    [
        ("hf", PLM.weights, PLM.config),
        ("original", PLM.weights, PLM.config),
        ("reference", CLIP_WEIGHTS, CLIP_CONFIG),
        ("open_clip", CLIP_WEIGHTS, CLIP_CONFIG),
        ("timm", CORE_WEIGHTS, CORE_CONFIG),
    ],
    ids=["hf", "original", "reference", "open_clip", "timm"],
)
def test_every_linear_layer_in_every_naming(tmp_path, layout, weights, config):
    suffix = ".bin" if layout == "timm" else ".safetensors"
    layers = linear_layers(layout, weights, config)
    products = write_adapter(
        tmp_path / "a", {path: e.shapes[part] for path, (e, part) in layers.items()}, suffix=suffix
    )
    adapted = check(tmp_path / "a", weights, config, ours(layers, products), 3.0)
    assert adapted.provenance["adapter"] == "a" and len(adapted.provenance["adapter_sha256"]) == 64


def test_rows_of_a_query_in_transformers_order(tmp_path):
    """Independently of the name tables: transformers rotates halves of a head, we rotate pairs."""
    dim, size = PLM.config.decoder.dim, PLM.config.decoder.head_dim
    path = "model.language_model.layers.0.self_attn.q_proj"
    product = write_adapter(tmp_path / "a", {path: (dim, dim)})[path]
    adapted = AdaptedWeights(Base(PLM.weights), tmp_path / "a", PLM.config)
    name = "layers.0.attention.wq.weight"
    change = adapted.load(name) - PLM.weights[name]
    for row in (0, 1, 2, size - 1, size, dim - 1):
        head, channel = divmod(row, size)
        there = head * size + channel % 2 * size // 2 + channel // 2
        torch.testing.assert_close(change[row], 3.0 * product[there], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 3.0),
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"lora_alpha": 0.5}, 0.25),
        ({"fan_in_fan_out": True}, 3.0),  # PEFT ignores it for linear layers
        ({"r": 8, "rank_pattern": {"wo": 2}}, 3.0),
        ({"r": 8, "rank_pattern": {r".*\.0\.attention\.w[oq]": 2}, "use_rslora": True},
         6 / math.sqrt(2)),
        ({"alpha_pattern": {"attention.wo": 16, "wo": 2}}, 8.0),
        ({"alpha_pattern": {"o": 16, r"layers\.1\.attention\.wo": 2}}, 3.0),
    ],
)  # fmt: skip
def test_scales(tmp_path, settings, scale):
    dim = PLM.config.decoder.dim
    path = "layers.0.attention.wo"
    products = write_adapter(tmp_path / "a", {path: (dim, dim)}, **settings)
    check(tmp_path / "a", PLM.weights, PLM.config, {f"{path}.weight": products[path]}, scale)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("language_model.model.layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("language_model.layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("model.layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("model.model.language_model.layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("_orig_mod.model.language_model.layers.1.self_attn.o_proj", "layers.1.attention.wo"),
        ("model.layers.1.attention.wo", "layers.1.attention.wo"),
        ("multi_modal_projector.linear_2", "vision_projector.projector.2"),
        ("projector.2", "vision_projector.projector.2"),
    ],
)
def test_paths_that_begin_elsewhere(tmp_path, path, name):
    dim = PLM.config.decoder.dim
    products = write_adapter(tmp_path / "a", {path: (dim, dim)})
    check(tmp_path / "a", PLM.weights, PLM.config, {f"{name}.weight": products[path]}, 3.0)


def test_transformers_earlier_names_of_tower_and_decoder_together(tmp_path):
    dim, width = PLM.config.decoder.dim, PLM.config.vision.width
    decoder = "language_model.model.layers.0.self_attn.o_proj"
    tower = "vision_tower.timm_model.blocks.0.attn.proj"
    products = write_adapter(tmp_path / "a", {decoder: (dim, dim), tower: (width, width)})
    expected = {
        "layers.0.attention.wo.weight": products[decoder],
        "vision_model.transformer.resblocks.0.attn.out_proj.weight": products[tower],
    }
    check(tmp_path / "a", PLM.weights, PLM.config, expected, 3.0)


def test_a_packed_attention_below_its_base_layer(tmp_path):
    width = CLIP_CONFIG.text.width
    attention = "text.transformer.resblocks.0.attn"
    layers = {attention: (3 * width, width), f"{attention}.base_layer.out_proj": (width, width)}
    products = write_adapter(tmp_path / "a", layers)
    expected = {
        f"{attention}.in_proj_weight": products[attention],
        # PEFT adds it twice, when it trains and when it merges.
        f"{attention}.out_proj.weight": 2 * products[f"{attention}.base_layer.out_proj"],
    }
    check(tmp_path / "a", CLIP_WEIGHTS, CLIP_CONFIG, expected, 3.0)
    write_adapter(tmp_path / "a", layers, peft_version="0.21.2")
    check(tmp_path / "a", CLIP_WEIGHTS, CLIP_CONFIG, expected, 3.0)
    write_adapter(tmp_path / "a", layers, peft_version="0.22.0")
    with pytest.raises(CheckpointError, match="is part of a packed attention, which this version"):
        AdaptedWeights(Base(CLIP_WEIGHTS), tmp_path / "a", CLIP_CONFIG)


def test_half_precision_is_merged_in_float32(tmp_path):
    weights = {name: tensor.bfloat16() for name, tensor in PLM.weights.items()}
    dim = PLM.config.decoder.dim
    path = "layers.0.attention.wo"
    product = write_adapter(tmp_path / "a", {path: (dim, dim)}, lora_alpha=1e-3)[path]
    adapted = AdaptedWeights(Base(weights), tmp_path / "a", PLM.config)
    merged = adapted.load(f"{path}.weight")
    assert merged.dtype == torch.float32
    change = merged - weights[f"{path}.weight"].float()
    torch.testing.assert_close(change, 5e-4 * product, rtol=1e-2, atol=1e-6)
    assert adapted.load("norm.weight").dtype == torch.bfloat16


DIM = PLM.config.decoder.dim
WO = {"layers.0.attention.wo": (DIM, DIM)}


@pytest.mark.parametrize(
    ("layers", "settings", "message"),
    [
        (WO, {"peft_type": "LOHA"}, "peft_type is 'LOHA'; only LORA"),
        (WO, {"use_dora": True}, "use_dora is True, which cannot be merged"),
        (WO, {"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        (WO, {"bias": "all"}, "bias is 'all'"),
        (WO, {"lora_bias": True}, "lora_bias is True"),
        (WO, {"init_lora_weights": "pissa_niter_4"}, "it is for changed base weights"),
        (WO, {"r": 0}, "r must be a number above 0, not 0"),
        (WO, {"r": None}, "r must be a number above 0, not None"),
        (WO, {"lora_alpha": "16"}, "lora_alpha must be a number"),
        (WO, {"rank_pattern": {"(": 2}}, "rank_pattern has a bad expression"),
        (WO, {"rank_pattern": [2]}, "rank_pattern must be an object"),
        (WO, {"r": 4}, "'layers.0.attention.wo' has rank 2, and its configuration says 4"),
        ({"layers.9.attention.wo": (DIM, DIM)}, {}, "'layers.9.attention.wo' is no linear layer"),
        ({"layers.0.attention.wo": (DIM, 3)}, {}, r"is for \(\d+, 3\), not \(\d+, \d+\)"),
        (WO | {"layers.0.self_attn.q_proj": (DIM, DIM)}, {}, "is no linear layer"),
        ({}, {}, "it has no tensors"),
    ],
)
def test_what_cannot_be_merged_is_refused(tmp_path, layers, settings, message):
    write_adapter(tmp_path / "a", layers, **settings)
    with pytest.raises(CheckpointError, match=message) as caught:
        AdaptedWeights(Base(PLM.weights), tmp_path / "a", PLM.config)
    assert "\n" not in str(caught.value) and "a" in str(caught.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"x.lora_magnitude_vector": torch.zeros(2)},
            "is not a LoRA matrix of a linear layer: merge the",
        ),
        ({"model.embed_tokens.lora_embedding_A": torch.zeros(2, 2)}, "is not a LoRA matrix"),
        ({"layers.0.attention.wo.bias": torch.zeros(2)}, "is not a LoRA matrix"),
        ({"layers.0.attention.wo.lora_A.weight": torch.zeros(2, DIM)}, "has lora_A or lora_B only"),
        (
            {
                "layers.0.attention.wo.lora_A.weight": torch.zeros(2, DIM),
                "layers.0.attention.wo.lora_B.weight": torch.zeros(DIM, 3),
            },
            r"has lora_A \(2, \d+\) and lora_B \(\d+, 3\), which is no linear layer: merge the",
        ),
        ({"a.lora_A.weight": torch.zeros(2, 2, dtype=torch.int8)}, "is dtype I8"),
    ],
)
def test_foreign_tensors_are_refused(tmp_path, tensors, message):
    write_adapter(tmp_path / "a", {})
    keyed = {PREFIX + key: tensor for key, tensor in tensors.items()}
    save_file(keyed, tmp_path / "a" / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=message):
        AdaptedWeights(Base(PLM.weights), tmp_path / "a", PLM.config)


def test_a_path_that_two_towers_have_is_ambiguous(tmp_path):
    text = CLIP_CONFIG.text
    layers = {"transformer.resblocks.0.attn.out_proj": (text.width, text.width)}
    write_adapter(tmp_path / "a", layers)
    assert text.width == CLIP_CONFIG.vision.width
    with pytest.raises(CheckpointError, match=r"can be text\..* or visual\..*: put the path"):
        AdaptedWeights(Base({}), tmp_path / "a", CLIP_CONFIG)


def test_a_matrix_that_is_not_finite(tmp_path):
    write_adapter(tmp_path / "a", WO)
    tensors = {
        f"{PREFIX}layers.0.attention.wo.lora_A.weight": torch.full((2, DIM), float("nan")),
        f"{PREFIX}layers.0.attention.wo.lora_B.weight": torch.zeros(DIM, 2),
    }
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    adapted = AdaptedWeights(Base(PLM.weights), tmp_path / "a", PLM.config)
    with pytest.raises(CheckpointError, match=r"lora_A\.weight' has elements that are not finite"):
        adapted.load("layers.0.attention.wo.weight")


def test_folders_that_are_no_adapters(tmp_path):
    with pytest.raises(CheckpointError, match=r"it has no adapter_config\.json$"):
        AdaptedWeights(Base({}), tmp_path, PLM.config)
    write_adapter(tmp_path / "first", WO)
    with pytest.raises(CheckpointError, match=r"pass one of its folders first"):
        AdaptedWeights(Base({}), tmp_path, PLM.config)
    (tmp_path / "first" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"it has no adapter_model\.safetensors or \.bin"):
        AdaptedWeights(Base({}), tmp_path / "first", PLM.config)
    (tmp_path / "first" / "adapter_model.bin").write_text(
        "version https://git-lfs.github.com/spec/v1\n"
    )
    with pytest.raises(CheckpointError, match="git lfs pull"):
        AdaptedWeights(Base({}), tmp_path / "first", PLM.config)
    with pytest.raises(
        CheckpointError, match=r"\.bin is a file: pass the adapter's folder, .*first"
    ):
        AdaptedWeights(Base({}), tmp_path / "first" / "adapter_model.bin", PLM.config)


def test_an_adapter_is_not_a_checkpoint(tmp_path):
    write_adapter(tmp_path / "a", WO)
    for path in (tmp_path / "a", tmp_path / "a" / "adapter_model.safetensors"):
        with pytest.raises(CheckpointError, match=r"is a LoRA adapter, not a whole model: pass"):
            open_checkpoint(path, PLM.config)
    (tmp_path / "a" / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match="it holds LoRA matrices: pass the base model"):
        open_checkpoint(tmp_path / "a" / "adapter_model.safetensors", PLM.config)
    # A folder with both is that of the model.
    write_adapter(tmp_path / "a", WO)
    save_checkpoint(PLM.weights, tmp_path / "a" / "model.safetensors", "original")
    open_checkpoint(tmp_path / "a", PLM.config)


def test_a_head_with_the_copy_that_peft_saves(tmp_path):
    vocab = PLM.config.decoder.vocab_size
    product = write_adapter(tmp_path / "a", {"lm_head": (vocab, DIM)})["lm_head"]
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in ("output.weight", "tok_embeddings.weight"):
        copy = {f"{PREFIX}lm_head.base_layer.weight": PLM.weights[name].bfloat16()}
        save_file(tensors | copy, file)
        if name == "output.weight":
            check(tmp_path / "a", PLM.weights, PLM.config, {name: product}, 3.0)
    adapted = AdaptedWeights(Base(PLM.weights), tmp_path / "a", PLM.config)
    with pytest.raises(CheckpointError, match="a was trained for another base model: its copy of"):
        adapted.load("output.weight")
    tied = plm_golden(PLM_FILES[0])
    with pytest.raises(CheckpointError, match="'lm_head' is"):
        AdaptedWeights(Base(tied.weights), tmp_path / "a", tied.config)


def test_a_packed_matrix_by_its_own_name(tmp_path):
    width = PLM.config.vision.width
    path = "vision_model.transformer.resblocks.0.attn.in_proj"
    product = write_adapter(tmp_path / "a", {path: (3 * width, width)})[path]
    check(tmp_path / "a", PLM.weights, PLM.config, {f"{path}_weight": product}, 3.0)
