"""Fixtures for tests of the server: one process with both demos, and clients of it."""

from collections.abc import Iterator

import openai
import pytest
from server_process import running

import perception_rt as prt


@pytest.fixture(scope="session")
def base() -> Iterator[str]:
    """Base URL of a server with both demos."""
    with running("demo:pe", "demo:plm", "--max-body-mb", "1", "--threads", "1") as (url, _):
        yield url


@pytest.fixture(scope="session")
def client(base: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="session")
def pe() -> Iterator[prt.Embedder]:
    with prt.Embedder.load("demo:pe", threads=1) as engine:
        yield engine


@pytest.fixture(scope="session")
def plm() -> Iterator[prt.Generator]:
    with prt.Generator.load("demo:plm", threads=1) as engine:
        yield engine
