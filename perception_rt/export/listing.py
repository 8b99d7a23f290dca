"""The models that can be exported by name."""

from collections.abc import Iterator
from dataclasses import dataclass

from perception_rt.archs import PE_MODELS, PLM_MODELS
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.export.plan import demo_configs
from perception_rt.families import Config


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedModel:
    """A model: its name, its number of parameters and its architecture."""

    name: str
    parameters: int
    config: Config


def list_models() -> Iterator[ListedModel]:
    """Lists the released models and the demos."""
    models: dict[str, Config] = {**PE_MODELS, **PLM_MODELS, **demo_configs()}
    for name, config in models.items():
        parameters = sum(shape.numel() for shape in expected_tensors(config).values())
        yield ListedModel(name=name, parameters=parameters, config=config)
