"""Runs `perception-rt serve` as a process, and makes the requests of tests."""

import base64
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from perception_rt.demo import pictures_path

SAME = "Do both images show the same number?"


@contextmanager
def running(*arguments: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """The base URL and the process of a server on a free port; killed at the end."""
    command = [sys.executable, "-m", "perception_rt", "serve", *arguments, "--port", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stderr is not None
        line = process.stderr.readline()
        found = re.fullmatch(r"listening on (http://\S+:\d+)\n", line)
        assert found is not None, line + process.stderr.read()
        yield found[1], process
    finally:
        process.kill()
        process.communicate()


def picture(name: str) -> Path:
    return pictures_path() / f"{name}.png"


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def picture_url(name: str) -> str:
    return data_url(picture(name).read_bytes())


def question(text: str, *images: str) -> list[Any]:
    """Messages of one question about demo pictures."""
    parts: list[Any] = [
        {"type": "image_url", "image_url": {"url": picture_url(image)}} for image in images
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def metric(base: str, name: str, headers: dict[str, str] | None = None, /, **labels: str) -> float:
    """Sum of a metric's values over all samples with these labels; 0 without one."""
    return total(httpx.get(f"{base}/metrics", headers=headers).text, name, **labels)


def total(text: str, name: str, /, **labels: str) -> float:
    """As `metric`, in the text of all metrics."""
    found = 0.0
    for line in text.splitlines():
        if re.match(rf"{name}[{{ ]", line) and all(f'{k}="{v}"' in line for k, v in labels.items()):
            found += float(line.rpartition(" ")[2])
    return found


def until(condition: Callable[[], bool]) -> None:
    """Waits until a condition holds; fails after 30 seconds."""
    end = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
