"""Model families as data: how each is called, and which code configures, exports and runs it.

Code is named by strings and imported when it is needed, so this module needs the standard library
only. Adding a family takes a record here, an export component and a class that runs its packages.
"""

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.plm_config import PlmConfig, is_plm

Config = PeConfig | PlmConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model family.

    Attributes:
        name: name in manifests.
        label: noun phrase for messages.
        commands: `perception-rt` commands that run its packages, as a phrase for messages.
        license: licence of the published weights.
        generates: whether a package has a decoder with key-value caches.
        config: class of the architecture.
        model: "module:class" of the torch module that has the parameters.
        component: "module:class" of the export component.
        export_options: fields of `ExportOptions` that only this family takes.
        runtime: "module:class" of the object that `perception_rt.load` returns.
    """

    name: str
    label: str
    commands: str
    license: str
    generates: bool
    config: type[PeConfig] | type[PlmConfig]
    model: str
    component: str
    export_options: tuple[str, ...]
    runtime: str


PE = Family(
    name="pe",
    label="an encoder",
    commands="embed, classify and features",
    license="Apache-2.0",
    generates=False,
    config=PeConfig,
    model="perception_rt.models.pe:PerceptionEncoder",
    component="perception_rt.export.components.pe:PeExport",
    export_options=(
        "towers",
        "image_size",
        "center_crop",
        "taps",
        "detection",
        "window",
        "global_blocks",
    ),
    runtime="perception_rt.runtime.embedder:Embedder",
)
PLM = Family(
    name="plm",
    label="a language model",
    commands="generate and chat",
    license="FAIR Noncommercial Research License",
    generates=True,
    config=PlmConfig,
    model="perception_rt.models.plm:PerceptionLM",
    component="perception_rt.export.components.plm:PlmExport",
    export_options=("tokenizer", "blocks", "max_length"),
    runtime="perception_rt.runtime.generator:Generator",
)
FAMILIES = {family.name: family for family in (PE, PLM)}


def get_family(name: str) -> Family:
    """The record of a family; InputError names the known ones."""
    try:
        return FAMILIES[name]
    except KeyError:
        known = ", ".join(FAMILIES)
        raise InputError(f"unknown model family {name!r:.40}; known are {known}") from None


def family_of(config: Config) -> Family:
    """The family of an architecture."""
    return next(family for family in FAMILIES.values() if isinstance(config, family.config))


def parse_config(data: Any) -> Config:
    """The architecture in JSON values, of the family that they describe.

    Raises:
        InputError: names unknown, missing and mistyped keys.
    """
    return (PLM if is_plm(data) else PE).config.from_dict(data)


def import_named(name: str) -> Any:
    """The object that "module:name" stands for in a record."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)
