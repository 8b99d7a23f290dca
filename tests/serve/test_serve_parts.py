"""Parts of the server without a socket: batches, fetching, options, a missing extra."""

import asyncio
import builtins
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perception_rt.cli import main
from perception_rt.errors import InputError, QueueFullError
from perception_rt.serve import batcher
from perception_rt.serve.batcher import Batcher
from perception_rt.serve.fetch import MediaFetcher
from perception_rt.serve.options import ServeOptions, read_key_digests


def squares(items: list[Any]) -> Any:
    if "bad" in items:
        raise InputError(f"item {items.index('bad')} is bad")
    return np.array([[float(item) ** 2] for item in items], np.float32)


def embed_all(parts: list[list[Any]], **options: Any) -> tuple[list[Any], list[int]]:
    """Results or errors of jobs that start together, and the sizes of the batches."""
    sizes: list[int] = []

    async def run() -> list[Any]:
        with ThreadPoolExecutor(1) as pool:
            made = Batcher(squares, pool, on_batch=sizes.append, **{"window_s": 0.01, **options})
            jobs = [made.embed(part) for part in parts]
            return await asyncio.gather(*jobs, return_exceptions=True)

    return asyncio.run(run()), sizes


def test_jobs_share_a_batch_and_get_their_own_rows() -> None:
    found, sizes = embed_all([[1], [2, 3], [4]])
    assert [rows.tolist() for rows in found] == [[[1]], [[4], [9]], [[16]]]
    assert sizes == [4]


def test_a_bad_item_fails_its_own_job() -> None:
    (first, second, third), _ = embed_all([[1], [2, "bad"], [3]])
    assert (first.tolist(), third.tolist()) == ([[1]], [[9]])
    assert str(second) == "item 1 is bad"


def test_batches_are_bounded_and_large_jobs_run_alone() -> None:
    found, sizes = embed_all([[1] * 40, [2] * 40, [3] * 100, [4]], window_s=0)
    assert [len(rows) for rows in found] == [40, 40, 100, 1]
    assert sizes == [40, 40, 100, 1]


def test_the_queue_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batcher, "MOST_WAITING", 10)
    found, _ = embed_all([[1] * 20, [2]])
    assert len(found[0]) == 20
    assert isinstance(found[1], QueueFullError)


def test_cancelled_jobs_are_left_out() -> None:
    ran: list[list[Any]] = []

    async def run() -> Any:
        def note(items: list[Any]) -> Any:
            ran.append(items)
            return squares(items)

        with ThreadPoolExecutor(1) as pool:
            made = Batcher(note, pool, window_s=0.05)
            dropped = asyncio.create_task(made.embed([1]))
            kept = asyncio.create_task(made.embed([2]))
            await asyncio.sleep(0.01)
            dropped.cancel()
            return await kept

    assert asyncio.run(run()).tolist() == [[4]]
    assert ran == [[2]]


def fetcher(*addresses: str) -> Callable[[str], bytes]:
    found = MediaFetcher(["Media.example"], resolve=lambda *_: list(addresses))
    return lambda url: found.fetch(url, 100)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("http://other.example/a.png", "the server fetches nothing from 'other.example'"),
        ("http://media.example.evil.org/", "fetches nothing from"),
        ("http://media.example@evil.org/", "fetches nothing from 'evil.org'"),
        ("http://user@media.example/", "only plain http and https URLs"),
        ("http://media.example:22/", "only plain http and https URLs"),
        ("ftp://media.example/", "only plain http and https URLs"),
        ("http://media.example/a b", "is not a URL"),
        ("http://media.example:x/", "is not a URL"),
        ("http://[::1", "is not a URL"),
    ],
)
def test_urls_that_are_not_fetched(url: str, said: str) -> None:
    with pytest.raises(InputError, match=said):
        fetcher("93.184.215.14")(url)


def test_options_travel_as_json() -> None:
    options = ServeOptions(
        packages=("demo:pe",), names={"a": "b"}, media_hosts=("c",), load={"threads": 1}
    )
    assert ServeOptions.from_json(options.to_json()) == options


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("a-long-secret\n\n  another-secret \n")
    assert len(read_key_digests(str(path))) == 2
    for text, said in (("", "must have one key per line"), ("short", "fewer than 8 characters")):
        path.write_text(text)
        with pytest.raises(InputError, match=said):
            read_key_digests(str(path))


def test_a_missing_extra_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *arguments: Any) -> Any:
        if name == "starlette":
            raise ModuleNotFoundError(name=name)
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "demo:pe"]) == 2
    said = 'the server needs starlette: pip install "perception_rt[serve]"'
    assert said in capsys.readouterr().err
