"""Architectures, and parameter counts equal to the published table."""

import pytest
import torch

from perception_rt.archs import PE_MODELS, get_config
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.errors import InputError
from perception_rt.models.pe import PerceptionEncoder

VISION_PARAMETERS = {
    "PE-Core-T16-384": 6_140_544,
    "PE-Core-S16-384": 23_782_656,
    "PE-Core-B16-224": 93_672_960,
    "PE-Core-L14-336": 317_151_232,
    "PE-Core-G14-448": 1_882_032_640,
    "PE-Lang-L14-448": 291_415_040,
    "PE-Lang-L14-448-Tiling": 291_415_040,
    "PE-Lang-G14-448": 1_740_922_624,
    "PE-Lang-G14-448-Tiling": 1_740_922_624,
    "PE-Spatial-T16-512": 5_683_200,
    "PE-Spatial-S16-512": 21_983_232,
    "PE-Spatial-B16-512": 86_433_792,
    "PE-Spatial-L14-448": 303_964_160,
    "PE-Spatial-G14-448": 1_851_887_104,
}
TEXT_PARAMETERS = {
    "PE-Core-T16-384": 63_405_056,
    "PE-Core-S16-384": 63_405_056,
    "PE-Core-B16-224": 353_986_560,
    "PE-Core-L14-336": 353_986_560,
    "PE-Core-G14-448": 537_233_920,
}


def test_all_released_models_are_there() -> None:
    assert set(PE_MODELS) == set(VISION_PARAMETERS)


@pytest.mark.parametrize("name", VISION_PARAMETERS)
def test_parameter_counts(name: str) -> None:
    with torch.device("meta"):
        model = PerceptionEncoder(get_config(f"facebook/{name}"))
    vision = sum(p.numel() for p in model.visual.parameters())
    assert vision == VISION_PARAMETERS[name]
    if name in TEXT_PARAMETERS:
        assert sum(p.numel() for p in model.text.parameters()) == TEXT_PARAMETERS[name]
    else:
        assert model.config.text is None


def test_config_round_trip() -> None:
    for config in PE_MODELS.values():
        assert PeConfig.from_dict(config.to_dict()) == config


TINY = {"patch_size": 4, "width": 16, "layers": 2, "heads": 2, "mlp_ratio": 4, "image_size": 8}


def test_flat_and_nested_configs_are_one() -> None:
    assert PeConfig.from_dict(TINY) == PeConfig.from_dict({"vision": TINY, "text": None})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"widht": 3}, "widht"),
        ({"width": "16"}, "vision.width must be int"),
        ({"width": True}, "vision.width must be int"),
        ({"heads": 3}, "not divisible"),
        ({"image_size": 9}, "patch_size 4"),
        ({"pool_type": "max"}, "pool_type"),
        ({"pool_type": "tok"}, "use_cls_token"),
        ({"layers": 0}, "at least 1"),
        ({"output_dim": 0}, "output_dim"),
        ({"heads": 8}, "divisible by 4"),
    ],
)
def test_bad_config_names_the_key(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        PeConfig.from_dict({"vision": TINY | change})


def test_missing_key_is_named() -> None:
    with pytest.raises(InputError, match="heads"):
        VisionConfig.from_dict({k: v for k, v in TINY.items() if k != "heads"})


def test_unknown_model_lists_known() -> None:
    with pytest.raises(InputError, match="PE-Core-L14-336"):
        get_config("PE-Core-XXL")


@pytest.mark.parametrize("pool_type", ["attn", "tok", "avg", "none"])
@pytest.mark.parametrize("use_rope2d", [True, False])
def test_every_switch_of_the_reference_works(pool_type: str, use_rope2d: bool) -> None:
    config = VisionConfig.from_dict(
        TINY
        | {"pool_type": pool_type, "use_rope2d": use_rope2d, "use_cls_token": True}
        | {"attn_pooler_heads": 2, "output_dim": 6, "use_abs_posemb": not use_rope2d}
        | {"use_ln_pre": False}
    )
    model = PerceptionEncoder(PeConfig(vision=config)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    output = model.encode_image(torch.randn(3, 3, 8, 12))
    assert output.shape == ((3, 1 + 2 * 3, 6) if pool_type == "none" else (3, 6))
    assert output.isfinite().all()


def test_drop_path_acts_in_training_only() -> None:
    config = VisionConfig.from_dict(TINY | {"drop_path": 0.5, "pool_type": "avg"})
    tower = PerceptionEncoder(PeConfig(vision=config)).visual
    for parameter in tower.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    pixels = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(tower.eval()(pixels), tower(pixels))
        tower.train()
        assert not torch.equal(tower(pixels), tower(pixels))
