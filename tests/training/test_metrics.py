"""Rates, MFU, memory and time in progress lines."""

from dataclasses import dataclass, field, replace
from typing import Self

import pytest
import torch
from torch import nn

from perception_rt.archs import PLM_MODELS
from perception_rt.models.plm import PerceptionLM
from training.distributed import Group
from training.metrics import CLOCK, Meter
from training.planning.flops import Work, step_flops
from training.recipe.schema import RunConfig, ScheduleConfig, TrainConfig


@dataclass(frozen=True)
class Part:
    """A part of a batch: two documents of 50 tokens, one tile, 30 labels."""

    weight: int = 30
    counts: dict[str, int] = field(
        default_factory=lambda: {"tokens": 100, "images": 1, "samples": 2}
    )
    names: tuple[str, ...] = ()

    def to(self, device: torch.device) -> Self:
        return self


def config(peak: float | None = None) -> TrainConfig:
    run = RunConfig(out_dir="none", peak_tflops=peak)
    return TrainConfig(run=run, schedule=ScheduleConfig(steps=10, warmup=0))


def test_rates_are_of_all_ranks_since_the_last_line() -> None:
    meter = Meter(config(), nn.Linear(1, 1), replace(Group(), ranks=3))
    meter.add([Part(), Part()], 4.0)
    meter.add([Part(), Part()], 1.0)
    figures = meter.figures(6)
    assert figures["tokens_per_s"] == 4 * 100 * 3 / 5
    assert figures["images_per_s"] == 4 * 3 / 5
    assert figures["remaining_s"] == 4 * 5.0 / 2
    assert 0 <= figures["elapsed_s"] < 60
    meter.add([Part()], 1.0)
    assert meter.figures(7)["tokens_per_s"] == 300


def test_what_depends_on_the_clock_is_marked() -> None:
    meter = Meter(config(1.0), nn.Linear(1, 1), Group())
    meter.add([Part()], 1.0)
    assert all(name in CLOCK or name.endswith("_per_s") for name in meter.figures(1))


def test_utilisation_is_of_the_models_own_operations() -> None:
    with torch.device("meta"):
        model = PerceptionLM(PLM_MODELS["PLM-1B"])
    meter = Meter(config(2.0), model, replace(Group(), ranks=3))
    meter.add([Part(), Part()], 4.0)
    work = Work(tokens=200, pairs=4 * 50 * 51 // 2, tiles=2, labelled=60)
    assert meter.figures(1)["mfu"] == pytest.approx(step_flops(model, work).model / 4.0 / 2e12)
    unknown_peak = Meter(config(), model, Group())
    unknown_peak.add([Part()], 1.0)
    assert "mfu" not in unknown_peak.figures(1)


def test_memory_is_what_the_process_has_had() -> None:
    meter = Meter(config(), nn.Linear(1, 1), Group())
    meter.add([Part()], 1.0)
    block = torch.ones(64 * 2**20)  # 256 MiB
    figure = meter.figures(1)["memory_gib"]
    assert block.nbytes / 2**30 < figure < 64
