"""The records of model families, and that code asks records instead of comparing names."""

import ast
from pathlib import Path

import pytest

import perception_rt
from perception_rt.archs import PE_MODELS, PLM_MODELS
from perception_rt.errors import InputError
from perception_rt.families import FAMILIES, family_of, get_family, import_named, parse_config
from perception_rt.targets import TARGETS

# "reference" is also a checkpoint layout, and "tensorrt" the name of a library.
NAMES = {*FAMILIES, *TARGETS} - {"reference"}
LIBRARY_NAMES = "tensorrt_library.py"


@pytest.mark.parametrize("name", FAMILIES)
def test_every_class_of_a_family_can_be_imported(name: str) -> None:
    family = get_family(name)
    assert family.name == name
    for path in (family.model, family.component, family.runtime):
        assert import_named(path).__name__ == path.partition(":")[2]


def test_an_unknown_family_is_named_with_the_known_ones() -> None:
    with pytest.raises(InputError, match="unknown model family 'vit'; known are pe, plm"):
        get_family("vit")


@pytest.mark.parametrize(("family", "models"), [("pe", PE_MODELS), ("plm", PLM_MODELS)])
def test_an_architecture_in_json_is_recognised(family: str, models) -> None:
    for config in models.values():
        assert family_of(config) is FAMILIES[family]
        assert parse_config(config.to_dict()) == config


def test_no_option_of_an_export_belongs_to_two_families() -> None:
    options = [option for family in FAMILIES.values() for option in family.export_options]
    assert len(options) == len(set(options))


def test_no_code_compares_names_of_families_or_backends() -> None:
    root = Path(perception_rt.__file__).parent
    found = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in sorted(root.rglob("*.py"))
        if path.name != LIBRARY_NAMES
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Compare)
        for side in (node.left, *node.comparators)
        for part in (side.elts if isinstance(side, ast.Tuple | ast.Set | ast.List) else (side,))
        if isinstance(part, ast.Constant) and part.value in NAMES
    ]
    assert found == []
