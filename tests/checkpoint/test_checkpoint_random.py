import hashlib

import pytest
import torch
from golden_weights import FILES, read_golden

from perception_rt.archs import PE_MODELS
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import expected_tensors, state_dict
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import INIT_LOGIT_SCALE, PerceptionEncoder

DEEP = PeConfig(
    vision=VisionConfig(
        patch_size=4, width=64, layers=50, heads=4, mlp_ratio=4.0, output_dim=32, image_size=16
    )
)


@pytest.mark.parametrize("name", FILES)
def test_same_seed_same_tensors_in_any_order(name):
    config, _ = read_golden(name)
    names = list(expected_tensors(config))
    first, second = RandomWeights(config, 5), RandomWeights(config, 5)
    forward = {n: first.load(n) for n in names}
    backward = {n: second.load(n) for n in reversed(names)}
    assert all(torch.equal(forward[n], backward[n]) for n in names)
    assert all(forward[n].shape == s for n, s in expected_tensors(config).items())
    assert first.provenance == {"source": "random", "seed": 5}


def test_seeds_and_names_make_a_difference():
    config = PE_MODELS["PE-Core-T16-384"]
    one, two = RandomWeights(config, 1), RandomWeights(config, 2)
    query = "visual.transformer.resblocks.{}.attn.in_proj_weight".format
    assert not torch.equal(one.load(query(0)), two.load(query(0)))
    assert not torch.equal(one.load(query(0)), one.load(query(1)))
    assert two.load("logit_scale").item() == pytest.approx(INIT_LOGIT_SCALE)


def test_the_values_do_not_change_between_versions():
    config = PE_MODELS["PE-Lang-L14-448"]
    tensor = RandomWeights(config, 0).load("visual.conv1.weight")
    digest = hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
    assert digest == "223c8a0fa6d748c7294809fde5301d146a7cd9e6f0372144ee600363e678f817"


def test_deep_towers_stay_in_range():
    model = PerceptionEncoder(DEEP)
    model.load_state_dict(state_dict(RandomWeights(DEEP, 0), expected_tensors(DEEP)))
    pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.inference_mode():
        features = model.visual.forward_features(pixels)
    assert 0.5 < features.std() < 20.0
    # Tokens and images stay apart: a collapsed tower would make parity checks blind.
    assert (features - features.mean(dim=1, keepdim=True)).std() > 0.2 * features.std()
    assert (features[0] - features[1]).std() > 0.1 * features.std()


def test_unknown_parameter():
    with pytest.raises(CheckpointError, match=r"no parameter 'text\.ln_final\.bias'"):
        RandomWeights(DEEP, 0).load("text.ln_final.bias")
