import pytest
import torch
from golden_weights import FILES, VISION_FILES, our_names, read_golden

from perception_rt.archs import PE_MODELS
from perception_rt.checkpoint.names import (
    detect_layout,
    stored_tensors,
    to_layout,
    zero_tensors,
)
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError

TIMM_BLOCK = (
    "norm1.weight norm1.bias attn.qkv.weight attn.qkv.bias attn.proj.weight attn.proj.bias "
    "norm2.weight norm2.bias mlp.fc1.weight mlp.fc1.bias mlp.fc2.weight mlp.fc2.bias"
)
TIMM_TOWER = (
    "patch_embed.proj.weight cls_token pos_embed norm_pre.weight norm_pre.bias norm.weight "
    "norm.bias head.weight head.bias attn_pool.latent attn_pool.q.weight attn_pool.q.bias "
    "attn_pool.kv.weight attn_pool.kv.bias attn_pool.proj.weight attn_pool.proj.bias "
    "attn_pool.norm.weight attn_pool.norm.bias attn_pool.mlp.fc1.weight attn_pool.mlp.fc1.bias "
    "attn_pool.mlp.fc2.weight attn_pool.mlp.fc2.bias"
)


@pytest.mark.parametrize("name", FILES)
def test_expected_tensors_are_those_of_the_reference(name):
    config, weights = read_golden(name)
    ours = our_names(weights)
    assert {k: tuple(v) for k, v in expected_tensors(config).items()} == {
        k: tuple(v.shape) for k, v in ours.items()
    }


@pytest.mark.parametrize("name", FILES)
def test_reference_layout_is_the_golden_file(name):
    _, weights = read_golden(name)
    stored = to_layout(our_names(weights), "reference")
    assert stored.keys() == weights.keys()
    assert all(torch.equal(stored[key], weights[key]) for key in weights)


def test_a_vision_tower_in_timm_names():
    _, weights = read_golden("pe_core_cls")
    stored = to_layout(our_names(weights), "timm")
    width, out = weights["proj"].shape
    block = "blocks.1."
    assert {k.removeprefix(block) for k in stored if k.startswith(block)} == set(TIMM_BLOCK.split())
    assert {k for k in stored if not k.startswith("blocks.")} == set(TIMM_TOWER.split())
    assert stored["cls_token"].shape == (1, 1, width)
    assert stored["pos_embed"].shape == (1, *weights["positional_embedding"].shape)
    assert torch.equal(stored["head.weight"], weights["proj"].T)
    assert torch.equal(stored["head.bias"], torch.zeros(out))
    packed = weights["attn_pool.attn.in_proj_weight"]
    assert torch.equal(stored["attn_pool.q.weight"], packed[:width])
    assert torch.equal(stored["attn_pool.kv.weight"], packed[width:])


def test_layer_scale_in_timm_names():
    _, weights = read_golden("pe_lang")
    stored = to_layout(our_names(weights), "timm")
    gamma = weights["transformer.resblocks.2.ls_2.gamma"]
    assert torch.equal(stored["blocks.2.gamma_2"], gamma)
    assert not any(key.startswith(("head", "norm.", "attn_pool")) for key in stored)


def test_open_clip_layout():
    _, weights = read_golden("clip_core")
    ours = our_names(weights)
    stored = to_layout(ours, "open_clip")
    trunk = to_layout({k: v for k, v in ours.items() if k.startswith("visual.")}, "timm")
    rest = {k for k in ours if not k.startswith("visual.")}
    assert stored.keys() == {f"visual.trunk.{key}" for key in trunk} | rest


@pytest.mark.parametrize("model", PE_MODELS)
@pytest.mark.parametrize("layout", ["reference", "timm", "open_clip"])
def test_every_architecture_has_one_key_per_tensor(model, layout):
    config = PE_MODELS[model]
    if layout == "timm":
        config = PeConfig(vision=config.vision)
    shapes = {name: tuple(shape) for name, shape in expected_tensors(config).items()}
    table = stored_tensors(layout, shapes)
    keys = [key for entry in table for key in entry.keys]
    assert [entry.name for entry in table] == list(shapes)
    assert len(set(keys) | zero_tensors(layout, shapes).keys()) == len(keys) + (
        layout != "reference" and config.vision.output_dim is not None
    )
    assert detect_layout(keys, config) == layout


@pytest.mark.parametrize("name", VISION_FILES)
def test_a_layout_is_recognised_without_any_one_key(name):
    config, weights = read_golden(name)
    for layout in ("reference", "timm", "open_clip"):
        keys = to_layout(our_names(weights), layout).keys()
        assert all(detect_layout(keys - {key}, config) == layout for key in keys)


def test_foreign_keys_and_impossible_layouts_are_refused():
    vision, clip = read_golden("pe_lang")[0], read_golden("clip_core")[0]
    with pytest.raises(CheckpointError, match=r"fit none of them, such as 'encoder\.0\.weight'"):
        detect_layout(["encoder.0.weight"], vision)
    with pytest.raises(CheckpointError, match="because there are none"):
        detect_layout([], vision)
    with pytest.raises(CheckpointError, match="this architecture has a text tower"):
        detect_layout(["blocks.0.norm1.weight"], clip)
    one = torch.zeros(1)
    with pytest.raises(CheckpointError, match="timm layout has no place for 'logit_scale'"):
        to_layout({"logit_scale": one}, "timm")
    with pytest.raises(CheckpointError, match=r"no place for 'visual\.surprise'"):
        to_layout({"visual.surprise": one}, "timm")
    with pytest.raises(CheckpointError, match="no place for 'surprise'"):
        to_layout({"surprise": one}, "reference")
