"""Runs notebooks without Jupyter: `python examples/run_notebook.py FILE...` stores their outputs.

The code cells run in order in one namespace, as in a kernel. What they print is stored, and the
value of a last line that is an expression: a picture as PNG, anything else as text.
"""

import argparse
import ast
import base64
import io
import json
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from PIL import Image

JsonObject = dict[str, Any]


def run(path: Path) -> JsonObject:
    """Runs a notebook.

    Args:
        path: an `.ipynb` file, which stays as it is.

    Returns:
        The notebook with the outputs of this run.

    Raises:
        Exception: that of a cell, with a note of its number.
    """
    notebook: JsonObject = json.loads(path.read_text("utf-8"))
    namespace: JsonObject = {"__name__": "__main__"}
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    for number, cell in enumerate(cells, 1):
        cell["execution_count"] = number
        try:
            cell["outputs"] = _run_cell("".join(cell["source"]), namespace, number)
        except Exception as error:
            error.add_note(f"in code cell {number} of {path}")
            raise
    return notebook


def text(notebook: JsonObject) -> str:
    """The notebook as the text of a file."""
    return json.dumps(notebook, indent=1) + "\n"


def _run_cell(source: str, namespace: JsonObject, number: int) -> list[JsonObject]:
    """Outputs of a cell: what it printed, then its value."""
    tree = ast.parse(source)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    printed, value = io.StringIO(), None
    with redirect_stdout(printed):
        exec(compile(tree, f"cell {number}", "exec"), namespace)  # noqa: S102
        if isinstance(last, ast.Expr):
            expression = ast.Expression(last.value)
            value = eval(compile(expression, f"cell {number}", "eval"), namespace)  # noqa: S307
    outputs: list[JsonObject] = []
    if printed.getvalue():
        lines = printed.getvalue().splitlines(keepends=True)
        outputs.append({"name": "stdout", "output_type": "stream", "text": lines})
    if value is not None:
        outputs.append(
            {
                "data": _data(value),
                "execution_count": number,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return outputs


def _data(value: Any) -> JsonObject:
    """Formats of a value, by media type."""
    if not isinstance(value, Image.Image):
        plain: JsonObject = {"text/plain": repr(value).splitlines(keepends=True)}
        table = getattr(value, "_repr_html_", None)
        return plain if table is None else {"text/html": [table()], **plain}
    stream = io.BytesIO()
    value.save(stream, "PNG", optimize=True)
    size = f"{value.width}x{value.height}"
    return {
        "image/png": base64.b64encode(stream.getvalue()).decode("ascii"),
        "text/plain": [f"<picture of {size} pixels>"],
    }


def main(arguments: list[str]) -> int:
    """Runs the notebooks and writes them with their outputs; returns the exit status."""
    parser = argparse.ArgumentParser(description="Runs notebooks and stores their outputs.")
    parser.add_argument("notebooks", metavar="FILE", nargs="+", type=Path)
    for path in parser.parse_args(arguments).notebooks:
        path.write_text(text(run(path)), encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
