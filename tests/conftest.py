"""For the whole suite: no network, tiny engine packages that are exported once per session, and
traces that exports share.
"""

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
    """An audit hook stays for the life of the process, and no Python code can go around it."""
    # Native code can. The library sees to this itself, but a test may import ONNX Runtime first.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    sys.addaudithook(_refuse_network)
    if "PYTEST_XDIST_WORKER" in os.environ:
        _take_one_thread()


def _take_one_thread() -> None:
    """Gives this process one core: workers that each take all cores wait for each other."""
    os.environ["OMP_NUM_THREADS"] = "1"  # of torch and NumPy, which are not imported yet
    import onnxruntime

    options = onnxruntime.SessionOptions

    def one_thread() -> onnxruntime.SessionOptions:
        found = options()
        found.intra_op_num_threads = 1  # unless the caller sets another number
        return found

    onnxruntime.SessionOptions = one_thread


def _refuse_network(event: str, arguments: tuple[Any, ...]) -> None:
    """Fails a test that leaves this machine; `pytest.fail` is not swallowed as an Exception."""
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
    """Exports share their traces, if any of the tests to run exports."""
    if "perception_rt.export.graph.trace" in sys.modules:
        import shared_traces

        shared_traces.share()


@pytest.fixture(scope="module", autouse=True)
def _settled_heap() -> None:
    """Keeps objects of earlier files out of the garbage collections that tests wait for."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_config() -> PeConfig:
    """An architecture with all parts of PE-Core, and CLIP's vocabulary; 1.8 M weights."""
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
    """Packages of `tiny_config` with random weights, by precision; each exported when asked for."""

    def __init__(self, config: PeConfig, directory: Path) -> None:
        super().__init__()
        self._config = config
        self._directory = directory

    def __missing__(self, precision: str) -> Path:
        # torch and onnx are imported only for those tests that need a package.
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
    """`tiny_packages["int8"]` and so on; tests share them, so copy one to change it."""
    return TinyPackages(tiny_config, tmp_path_factory.mktemp("packages"))


@pytest.fixture(scope="session")
def tiny_package(tiny_packages: dict[str, Path]) -> Path:
    """The tiny package in fp32; tests share it, so copy to change it."""
    return tiny_packages["fp32"]


@pytest.fixture(scope="session")
def tuned(tiny_config: PeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of other weights for `tiny_config`, under the names of the reference."""
    from safetensors.torch import save_file

    from perception_rt.checkpoint.random import RandomWeights
    from perception_rt.checkpoint.source import expected_tensors

    source = RandomWeights(tiny_config, seed=7)
    file = tmp_path_factory.mktemp("tuned") / "tuned.safetensors"
    names = expected_tensors(tiny_config)
    save_file({n.removeprefix("text."): source.load(n).contiguous() for n in names}, file)
    return file
