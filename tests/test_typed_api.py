"""The types of the public interface, as mypy sees them in a user's script."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).with_name("typed_script.py")
# NumPy's own `NDArray[np.float32]` leaves the shape open.
OPEN_SHAPE = "ndarray[tuple[Any, ...], dtype["


def test_a_users_script_passes_strict_mypy_and_sees_no_any(tmp_path: Path) -> None:
    """Outside of this repository's configuration. The script asserts each type that it gets."""
    command = [sys.executable, "-m", "mypy", "--strict", "--disallow-any-expr"]
    command += ["--no-error-summary", "--cache-dir", str(tmp_path / "cache"), str(SCRIPT)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.stderr == ""
    allowed = 'error: Expression type contains "Any" (has type '
    errors = [
        line
        for line in result.stdout.splitlines()
        if allowed not in line or "Any" in line.replace(OPEN_SHAPE, "").replace(allowed, "")
    ]
    assert errors == []
