import hashlib
from dataclasses import replace

import pytest
import torch
from golden_weights import FILES, read_golden

from perception_rt.archs import PE_MODELS, PLM_MODELS
from perception_rt.checkpoint import random as random_weights
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import expected_tensors, state_dict
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import INIT_LOGIT_SCALE, PerceptionEncoder
from perception_rt.models.plm import PerceptionLM
from perception_rt.plm_config import DecoderConfig, PlmConfig

DEEP = PeConfig(
    vision=VisionConfig(
        patch_size=4, width=64, layers=50, heads=4, mlp_ratio=4.0, output_dim=32, image_size=16
    )
)

DEEP_PLM = PlmConfig(
    decoder=DecoderConfig(
        dim=64, n_layers=40, n_heads=4, n_kv_heads=2, vocab_size=500, multiple_of=32
    ),
    vision=replace(DEEP.vision, output_dim=None, pool_type="none", ls_init_value=0.1, layers=23),
    pooling_ratio=2,
    image_token_id=499,
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


@pytest.mark.parametrize("tied", [False, True])
@torch.inference_mode()
def test_deep_decoders_stay_in_range(tied):
    config = replace(DEEP_PLM, decoder=replace(DEEP_PLM.decoder, weight_tying=tied))
    model = PerceptionLM(config)
    model.load_state_dict(state_dict(RandomWeights(config, 0), expected_tensors(config)))
    hidden = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _layer, _inputs, output: hidden.append(output))
    generator = torch.Generator().manual_seed(0)
    tiles = torch.rand(2, 3, 16, 16, generator=generator) * 2 - 1
    tokens = torch.randint(499, (2, 40), generator=generator)
    tokens[:, 5:9] = config.image_token_id
    logits = model(tokens, tiles)
    last = hidden[-1]
    assert 0.05 < hidden[0].std() < 5.0
    assert 0.5 < last.std() < 20.0
    # Tokens and sequences stay apart: a collapsed decoder would make parity checks blind.
    assert (last - last.mean(dim=1, keepdim=True)).std() > 0.2 * last.std()
    assert (last[0] - last[1]).std() > 0.2 * last.std()
    assert 0.5 < logits.std() < 5.0
    assert len(logits.argmax(-1).unique()) > 20


def test_rows_are_those_of_the_whole(monkeypatch):
    monkeypatch.setattr(random_weights, "BLOCK_ROWS", 7)
    for config in (DEEP, DEEP_PLM):
        weights = RandomWeights(config, 3)
        names = [n for n in expected_tensors(config) if "resblocks" not in n and n != "logit_scale"]
        for name in names:
            whole = weights.load(name)
            for start, stop in ((0, 1), (6, 8), (7, 14), (3, len(whole)), (0, len(whole))):
                assert torch.equal(weights.load_rows(name, start, stop), whole[start:stop]), name


def test_blocks_of_rows_differ_and_are_as_they_were():
    weights = RandomWeights(PLM_MODELS["PLM-1B"], 0)
    rows = weights.load_rows("tok_embeddings.weight", 4090, 4102)
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
    assert digest == "b338ad0539aaa48be05056d40e054200d8d59ca2d5a663194b21ea917e45a1e9"
    first = weights.load_rows("tok_embeddings.weight", 0, 1)
    assert not torch.equal(first, weights.load_rows("tok_embeddings.weight", 4096, 4097))
    assert rows.std() == pytest.approx(2048**-0.5, rel=0.05)


def test_unknown_parameter():
    with pytest.raises(CheckpointError, match=r"no parameter 'text\.ln_final\.bias'"):
        RandomWeights(DEEP, 0).load("text.ln_final.bias")
    with pytest.raises(CheckpointError, match=r"no parameter 'output\.bias'"):
        RandomWeights(DEEP_PLM, 0).load_rows("output.bias", 0, 1)
