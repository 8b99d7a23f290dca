"""The shipped demo model loads strictly and is as accurate as its card says."""

import json
import re

import pytest
import torch
from safetensors import safe_open

from perception_rt.config import PeConfig
from perception_rt.demo import config_path, weights_path
from perception_rt.models.pe import PerceptionEncoder
from training.demo.digits import held_out
from training.demo.zero_shot import evaluate
from training.model.export import load_weights


@pytest.fixture(scope="module")
def model() -> PerceptionEncoder:
    torch.set_num_threads(1)
    return load_weights(weights_path())


def test_the_file_is_small_and_half_precision(model: PerceptionEncoder) -> None:
    assert weights_path().stat().st_size <= 12_000_000
    with safe_open(weights_path(), "pt") as stored:
        names = set(stored.keys())
        assert {stored.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert names == {name.removeprefix("text.") for name in model.state_dict()}
    assert PeConfig.from_dict(json.loads(config_path().read_text())) == model.config


def test_held_out_accuracy_is_what_the_card_says(model: PerceptionEncoder) -> None:
    accuracy = evaluate(model, held_out())
    assert accuracy["plain"] >= 0.95
    card = config_path().with_name("CARD.md").read_text()
    for name, row in (("plain", "digit, plain page"), ("scene", "digit, coloured scene")):
        stated = re.search(rf"\| {row} \| ([0-9.]+) % \|", card)
        assert stated is not None
        # One digit of 450 is 0.22 %: rounding on another processor may flip one.
        assert accuracy[name] == pytest.approx(float(stated[1]) / 100, abs=0.003)
