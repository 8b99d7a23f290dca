"""The notebooks in examples/ run from top to bottom and store the outputs of such a run."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from examples.run_notebook import main, run

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples").rglob("*.ipynb"))
MAX_BYTES = 200_000


def shown(notebook: dict[str, Any]) -> list[list[str]]:
    """Outputs of each code cell; numbers are masked, as another processor rounds differently."""
    found = []
    for cell in notebook["cells"]:
        outputs = []
        for output in cell.get("outputs", []):
            media = output.get("data", {"stream": None})
            text = "".join(output.get("text") or media["text/plain"])
            outputs.append(f"{sorted(media)} {re.sub(r'[0-9.]+', '#', text)}")
        found.append(outputs)
    return found


def test_there_is_a_notebook_of_each_kind() -> None:
    names = ["pe_demo", "plm_captioning", "plm_grounding", "plm_several_images"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_stores_what_it_shows(path: Path) -> None:
    stored = json.loads(path.read_text("utf-8"))
    assert any(shown(stored))
    assert shown(run(path)) == shown(stored)
    assert path.stat().st_size < MAX_BYTES


def write(path: Path, *cells: str) -> Path:
    code = [{"cell_type": "code", "source": cell, "outputs": []} for cell in cells]
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": "#"}, *code]}))
    return path


def test_cells_share_a_namespace_and_show_their_last_value(tmp_path: Path) -> None:
    cells = ("a = 2", "print('first')\na + 1", "None", "a = 5;\nf = lambda: a", "f()")
    path = write(tmp_path / "n.ipynb", *cells)
    assert main([str(path)]) == 0
    code = json.loads(path.read_text("utf-8"))["cells"][1:]
    values = [[o.get("text") or o["data"]["text/plain"] for o in c["outputs"]] for c in code]
    assert values == [[], [["first\n"], ["3"]], [], [], [["5"]]]
    assert [cell["execution_count"] for cell in code] == [1, 2, 3, 4, 5]


def test_pictures_and_tables_are_stored_in_their_format(tmp_path: Path) -> None:
    table = "class T:\n    def _repr_html_(self): return '<table>'\nT()"
    picture = "from PIL import Image\nImage.new('RGB', (3, 2))"
    notebook = run(write(tmp_path / "n.ipynb", table, picture))
    first, second = (cell["outputs"][0]["data"] for cell in notebook["cells"][1:])
    assert first["text/html"] == ["<table>"]
    assert second["text/plain"] == ["<picture of 3x2 pixels>"]
    assert Image.MIME["PNG"] in second


def test_a_failing_cell_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "n.ipynb", "1", "{}['x']")
    before = path.read_bytes()
    with pytest.raises(KeyError) as found:
        main([str(path)])
    assert found.value.__notes__ == [f"in code cell 2 of {path}"]
    assert path.read_bytes() == before
