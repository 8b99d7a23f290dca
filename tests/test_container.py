"""The Dockerfile: what it copies, installs and starts exists; no image is built."""

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

from perception_rt.cli.commands import main_parser

ROOT = Path(__file__).parents[1]
# One line per instruction.
DOCKERFILE = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text("utf-8"))


def instruction(name: str) -> str:
    (found,) = re.findall(rf"^{name} (.+)$", DOCKERFILE, re.MULTILINE)
    return str(found)


def test_what_is_copied_exists_and_is_sent_to_the_engine() -> None:
    ignored = (ROOT / ".dockerignore").read_text("utf-8").splitlines()
    copied = {
        name
        for line in re.findall(r"^COPY (?!--from)(.+)$", DOCKERFILE, re.MULTILINE)
        for name in line.split()[:-1]
    }
    assert ignored[0] == "*" and copied == {n[1:] for n in ignored if n.startswith("!")}
    assert all((ROOT / name).exists() for name in copied)


def test_its_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = re.findall(r"^ARG EXTRAS=(.+)$", DOCKERFILE, re.MULTILINE)[0].split(",")
    assert "serve" in extras and set(extras) <= project["optional-dependencies"].keys()


def test_its_command_is_one_of_ours() -> None:
    (program, *first), rest = json.loads(instruction("ENTRYPOINT")), json.loads(instruction("CMD"))
    options = main_parser().parse_args([*first, *rest])
    assert program == "perception-rt" and rest[0] == "serve"
    assert f":{options.port}/ready" in instruction("HEALTHCHECK")
    assert instruction("EXPOSE") == str(options.port)


def test_it_runs_without_rights() -> None:
    assert instruction("USER") == "10001:10001" and instruction("VOLUME") == "/cache"
    assert "-o 10001 -g 10001 -m 0700 /cache" in DOCKERFILE


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_has_no_remark() -> None:
    result = subprocess.run(["hadolint", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")
