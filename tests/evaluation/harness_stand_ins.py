"""The parts of lmms-eval, CLIP_benchmark and mteb that our modules import, for tests without them.

Where a harness is installed, tests use it instead.
"""

import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


@dataclass
class Instance:
    """A request of lmms-eval."""

    args: tuple[Any, ...]


@dataclass
class GenerationResult:
    """An answer of lmms-eval."""

    text: Any


class Lmms:
    """The base class of lmms-eval's models."""

    rank = 0

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = SimpleNamespace(add_partial=lambda *_: None)

    def clean(self) -> None:
        pass


@dataclass
class ModelManifest:
    """An entry of lmms-eval's registry."""

    model_id: str
    simple_class_path: str


class ModelMeta(SimpleNamespace):
    """The description of a model in mteb."""


@dataclass
class _Table:
    TYPE2FUNC: dict[str, Any] = field(default_factory=dict)
    MODEL_TYPES: list[str] = field(default_factory=list)


def _modules() -> dict[str, dict[str, Any]]:
    """Names of each stand-in module."""
    return {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"Instance": Instance, "GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "clip_benchmark": {},
        "clip_benchmark.cli": {"main": lambda: None},
        "clip_benchmark.models": vars(_Table()),
        "mteb": {},
        "mteb.models": {"ModelMeta": ModelMeta},
        "mteb.models.abs_encoder": {"AbsEncoder": object},
        "mteb.models.model_meta": {"ScoringFunction": SimpleNamespace(COSINE="cosine")},
    }


def harness_module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Imports `perception_rt.evaluation.harness.<name>`, on stand-ins if its harness is missing."""
    full = f"perception_rt.evaluation.harness.{name}"
    if find_spec(name) is not None:
        return import_module(full)
    for module, names in _modules().items():
        if module.partition(".")[0] == name:
            stand_in = ModuleType(module)
            vars(stand_in).update(names)
            monkeypatch.setitem(sys.modules, module, stand_in)
            parent, _, child = module.rpartition(".")
            if parent:
                setattr(sys.modules[parent], child, stand_in)
    monkeypatch.delitem(sys.modules, full, raising=False)
    try:
        return import_module(full)
    finally:
        sys.modules.pop(full, None)  # another test may have the harness itself
