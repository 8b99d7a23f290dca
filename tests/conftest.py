"""Shared by all tests: no network, tiny packages exported once per session, shared traces."""

import gc
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from perception_rt.config import PeConfig, TextConfig, VisionConfig

_CONNECTING = ("socket.connect", "socket.sendto", "socket.sendmsg")
_RESOLVING = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")
_LOOPBACK = (None, "", b"", "localhost", b"localhost", "127.0.0.1", b"127.0.0.1", "::1", b"::1")


def pytest_configure() -> None:
    """Installs an audit hook, which no Python code of this process can remove or avoid."""
    # Native code can avoid it. The library disables telemetry, but a test may import ONNX Runtime
    # before the library does.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.addaudithook(_refuse_network)
    if "PYTEST_XDIST_WORKER" in os.environ:
        _take_one_thread()


def _take_one_thread() -> None:
    """Limits this process to one thread, because its neighbours use the other cores."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for torch and NumPy, which are imported later
    import onnxruntime

    options = onnxruntime.SessionOptions

    def one_thread() -> onnxruntime.SessionOptions:
        found = options()
        found.intra_op_num_threads = 1  # the caller may set another number
        return found

    onnxruntime.SessionOptions = one_thread


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Fails a test that connects to another machine; `except Exception` does not catch it."""
    if event in _CONNECTING:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # AF_UNIX has a path
    elif event in _RESOLVING:
        host = arguments[0]
    else:
        return
    if host not in _LOOPBACK:
        pytest.fail(f"a test used the network: {event} to {host!a:.80}", pytrace=True)


def pytest_collection_finish() -> None:
    """Makes exports share their traces, if any of the selected tests exports."""
    if "perception_rt.export.graph.trace" in sys.modules:
        import shared_traces

        shared_traces.share()


@pytest.fixture(scope="module", autouse=True)
def _settled_heap() -> None:
    """Excludes objects of earlier files from garbage collection, which some tests run often."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_config() -> PeConfig:
    """An architecture with all parts of PE-Core and CLIP's vocabulary; 1.8 M weights."""
    vision = VisionConfig(
        patch_size=8,
        width=64,
        layers=2,
        heads=2,
        mlp_ratio=4.0,
        output_dim=32,
        image_size=32,
        use_cls_token=True,
        attn_pooler_heads=2,
    )
    return PeConfig(
        vision=vision,
        text=TextConfig(
            context_length=16, width=32, layers=2, heads=2, output_dim=32, vocab_size=49408
        ),
    )


class TinyPackages(dict[str, Path]):
    """Packages of `tiny_config` with random weights, by precision; exported on first use."""

    def __init__(self, config: PeConfig, directory: Path) -> None:
        super().__init__()
        self._config = config
        self._directory = directory

    def __missing__(self, precision: str) -> Path:
        # Only tests that need a package import torch and onnx.
        from perception_rt.checkpoint.random import RandomWeights
        from perception_rt.export.build import export_package
        from perception_rt.export.plan import ExportPlan
        from perception_rt.processing.image import ImageSpec

        size = self._config.vision.image_size
        plan = ExportPlan(
            name="tiny",
            config=self._config,
            backend="onnxruntime",
            precision=precision,
            image=ImageSpec(height=size, width=size),
        )
        out = self._directory / f"tiny-{precision}"
        export_package(plan, RandomWeights(self._config, 0), out)
        self[precision] = out
        return out


@pytest.fixture(scope="session")
def tiny_packages(
    tiny_config: PeConfig, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Packages by precision, as `tiny_packages["int8"]`; shared, so copy one to change it."""
    return TinyPackages(tiny_config, tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def tiny_package(tiny_packages: dict[str, Path]) -> Path:
    """The tiny package in fp32; shared, so copy it to change it."""
    return tiny_packages["fp32"]


@pytest.fixture(scope="session")
def tuned(tiny_config: PeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with other weights for `tiny_config`, under the reference's names."""
    from safetensors.torch import save_file

    from perception_rt.checkpoint.random import RandomWeights
    from perception_rt.checkpoint.source import expected_tensors

    source = RandomWeights(tiny_config, seed=7)
    file = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    names = expected_tensors(tiny_config)
    save_file({n.removeprefix("text."): source.load(n).contiguous() for n in names}, file)
    return file
