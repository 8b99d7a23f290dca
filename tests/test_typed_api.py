"""The types of the public interface, as mypy sees them in a user's script."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("typed_script.py")
# Not this repository's configuration. It skips large libraries that no public type comes from.
CONFIG = """
[mypy]
strict = true
disallow_any_expr = true
[mypy-torch.*,onnx.*,onnxscript.*,onnx_ir.*,huggingface_hub.*,safetensors.*,ml_dtypes.*]
follow_imports = skip
"""
# NumPy's own `NDArray[np.float32]` leaves the shape open.
OPEN_SHAPE = "ndarray[tuple[Any, ...], dtype["


def test_a_users_script_passes_strict_mypy_and_sees_no_any(tmp_path: Path) -> None:
    """The script asserts each type that it gets."""
    (tmp_path / "mypy.ini").write_text(CONFIG)
    command = [sys.executable, "-m", "mypy", "--config-file", "mypy.ini", "--no-error-summary"]
    result = subprocess.run(
        [*command, "--cache-dir", "cache", str(SCRIPT)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.stderr == ""
    allowed = 'error: Expression type contains "Any" (has type '
    errors = [
        line
        for line in result.stdout.splitlines()
        if allowed not in line or "Any" in line.replace(OPEN_SHAPE, "").replace(allowed, "")
    ]
    assert errors == []
