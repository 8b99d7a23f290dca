"""Promises of SECURITY.md that show from outside: no side effects, no traces, its limits."""

import ast
import getpass
import json
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from perception_rt.limits import Limits

ROOT = Path(__file__).parents[1]

# SEC-03: prints all audited events of a process that verifies, loads and runs a package. NumPy sets
# and unsets a variable for its BLAS library while it is imported.
RUN_AUDITED = """
import json, os, sys

HARMLESS = ("os.listdir", "os.scandir", "os.putenv", "os.unsetenv")
FAMILIES = ("os.", "shutil.", "tempfile.", "subprocess.", "pty.", "socket.", "urllib.", "pickle.")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
events = []

def watch(event, arguments):
    if event == "open":
        if arguments[2] & WRITING:
            events.append(f"open {arguments}")
    elif event.startswith(FAMILIES) and event not in HARMLESS:
        events.append(f"{event} {arguments}")

sys.addaudithook(watch)
if len(sys.argv) > 3:  # an event that the hook must report
    exec(sys.argv[3])

import numpy as np
import perception_rt
from perception_rt.package.reader import verify_package

images = [np.full((40, 30, 3), value, np.uint8) for value in (0, 100)]
verify_package(sys.argv[1])
with perception_rt.load(sys.argv[1], backend=sys.argv[2]) as engine:
    engine.classify(images, ["cat", "dog"], ["a photo of a {}"])
    engine.features(images, 0)
print(json.dumps(events))
"""


def audited(directory: Path, *arguments: str) -> list[str]:
    """Runs the child with `directory` as its home, temporary and working folder."""
    result = subprocess.run(
        [sys.executable, "-B", "-c", RUN_AUDITED, *arguments],
        cwd=directory,
        env={"HOME": str(directory), "TMPDIR": str(directory)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    events: list[str] = json.loads(result.stdout)
    return events


@pytest.mark.parametrize("backend", ["reference", "onnxruntime"])
def test_running_a_package_writes_nothing_and_starts_nothing(
    tiny_package: Path, tmp_path: Path, backend: str
) -> None:
    before = tree(tiny_package)
    assert audited(tmp_path, str(tiny_package), backend) == []
    # Native code raises no audit events: ONNX Runtime's telemetry would leave files here.
    assert list(tmp_path.iterdir()) == []
    assert tree(tiny_package) == before


@pytest.mark.parametrize(
    "code",
    [
        "open('x', 'w').close()",
        "os.mkdir('x')",
        "os.system('true')",
        "import subprocess; subprocess.run('true')",
        "import socket; socket.socket()",
        "import pickle; pickle.loads(b'cos\\ngetcwd\\n.')",
    ],
)
def test_the_audit_sees(tiny_package: Path, tmp_path: Path, code: str) -> None:
    assert audited(tmp_path, str(tiny_package), "reference", code) != []


def tree(directory: Path) -> list[tuple[str, int, int]]:
    paths = [directory, *sorted(directory.rglob("*"))]
    return [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in paths]


def test_the_suite_cannot_reach_the_network() -> None:
    address = ("192.0.2.1", 9)  # in a network that is reserved for documentation
    for attempt in (
        lambda: socket.create_connection(address, timeout=1),
        lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", address),
        lambda: socket.getaddrinfo("example.org", 443),
    ):
        with pytest.raises(pytest.fail.Exception, match="a test used the network"):
            attempt()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_package_tells_nothing_of_where_it_was_made(
    tiny_packages: dict[str, Path], precision: str
) -> None:
    package = tiny_packages[precision]
    traces = {str(ROOT), str(Path.home()), str(package.parent), sys.prefix, "site-packages", ".py"}
    traces |= {name for name in (socket.gethostname(), getpass.getuser()) if len(name) > 5}
    for file in package.iterdir():
        if file.suffix == ".data":  # weights
            continue
        found = [t for t in traces if t.encode() in file.read_bytes()]
        assert found == [], file.name


def limits_table() -> str:
    """Writes the table of SECURITY.md: names, values and meanings of `limits.Limits`."""
    meanings = dict(re.findall(r"^ {8}(\w+): (.+)\.$", Limits.__doc__ or "", re.MULTILINE))
    rows = [
        f"| `{item.name}` | {_value(item.name, item.default)} | {meanings[item.name]} |"
        for item in fields(Limits)
    ]
    return "\n".join(["| limit | value | of |", "|---|---|---|", *rows])


def _value(name: str, value: float) -> str:
    if name.endswith("_bytes"):
        unit, size = ("MiB", value / 2**20) if value >= 2**20 else ("KiB", value / 2**10)
        return f"{size:,g} {unit}"
    if name.endswith("_seconds"):
        return f"{value / 3600:g} hours"
    return f"{value:,}"


def test_the_limits_in_the_document_are_those_of_the_code() -> None:
    # After a change of limits.py, replace the table in the document by the printed one.
    print(limits_table())
    assert limits_table() in (ROOT / "SECURITY.md").read_text("utf-8")


def test_every_limit_is_enforced_somewhere_and_tested() -> None:
    names = {item.name for item in fields(Limits)}
    modules = (ROOT / "perception_rt").rglob("*.py")
    used = {
        node.attr
        for path in modules
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).endswith("limits")
    }
    set_in_tests = {
        keyword.arg
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call)
        for keyword in node.keywords
    }
    assert used >= names
    assert names - set_in_tests == set()


def test_a_changed_package_is_refused_by_its_pin(tiny_package: Path, tmp_path: Path) -> None:
    import perception_rt
    from perception_rt.package.reader import read_manifest

    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    pinned = read_manifest(copy).id
    perception_rt.load(copy, expect=pinned).close()
    with pytest.raises(perception_rt.PackageError, match="expected"):
        perception_rt.load(copy, expect=f"sha256:{'0' * 64}")
