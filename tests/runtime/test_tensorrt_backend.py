"""The TensorRT backend on a GPU of paper: what it loads, what it refuses, where its memory is."""

import gc
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from fake_gpu import (
    CAPABILITY,
    FakeCache,
    FakeConfig,
    FakeCuda,
    FakeRefitter,
    FakeRtx,
    FakeTensorRt,
)

import perception_rt as prt
from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig
from perception_rt.demo import language_model_path
from perception_rt.errors import (
    BackendError,
    CapacityError,
    ExportError,
    InputError,
    PackageError,
)
from perception_rt.export import build, engines, gate, refit
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.plm_decoder import GATE_STEPS
from perception_rt.package import contract
from perception_rt.package.contract import CHUNK_TOKENS
from perception_rt.package.trust import built_file
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.backends import onnxruntime, tensorrt
from perception_rt.runtime.cuda import Cuda
from perception_rt.runtime.decoder import Decoder
from perception_rt.tensorrt_library import TensorRt

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


class Bench:
    """A TensorRT, a GPU, and the packages that were exported with them."""

    def __init__(self, folder: Path) -> None:
        self.plm, self.pe = folder / "plm", folder / "pe"
        self.trt = {name: FakeTensorRt(folder / name) for name in ("plm", "pe")}
        self.cuda = FakeCuda()


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, tiny_config: PeConfig
) -> Iterator[tuple[Bench, Path]]:
    """Packages of a tiny encoder and of a golden language model, and where exports are noted."""
    bench = Bench(tmp_path_factory.mktemp("tensorrt"))
    state = tmp_path_factory.mktemp("state")
    config = find_config(language_model_path())
    assert isinstance(config, PlmConfig)
    config = replace(config, decoder=replace(config.decoder, max_seqlen=320))
    tokens = TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=config.image_token_id + 300)
    config = replace(config, image_token_id=tokens.image_token_id)
    tiles = TileSpec(tile_size=config.vision.image_size)
    plm = PlmPlan(
        name="plm", config=config, backend="tensorrt", precision="fp16",
        tiles=tiles, tokenizer=(tokens, None), engines=(CAPABILITY,),
    )  # fmt: skip
    pe = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16",
        image=ImageSpec(height=32, width=32, resize="squash"), engines=(CAPABILITY,),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        for plan, source, out in (
            (plm, RandomWeights(config, 0), bench.plm),
            (pe, RandomWeights(tiny_config, 0), bench.pe),
        ):
            trt = bench.trt[out.name]
            patch.setattr(engines, "library_for", lambda *_, trt=trt, **__: trt.library)
            patch.setattr(engines, "build_engine", trt.build)
            build.export_package(plan, source, out)
    yield bench, state


@pytest.fixture
def bench(made: tuple[Bench, Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The packages, on a machine with the GPU."""
    bench, state = made
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    bench.cuda = FakeCuda()
    for trt in bench.trt.values():
        trt.cuda = bench.cuda
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: bench.cuda)
    put(monkeypatch, bench, "pe")
    return bench


def put(monkeypatch: pytest.MonkeyPatch, bench: Bench, name: str, **changes: str) -> None:
    """Installs the TensorRT that built a package, or another one."""
    library: TensorRt = replace(bench.trt[name].library, **changes)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)


def test_embeddings_are_those_of_the_graphs(bench: Bench) -> None:
    texts = ["one", "two", "three"]
    with prt.load(bench.pe, backend="onnxruntime") as cpu:
        wanted = cpu.embed_images([PICTURE] * 2), cpu.embed_texts(texts)
        dense = cpu.features([PICTURE], layer=-1)
    with prt.load(bench.pe, device="cuda") as gpu:
        found = gpu.embed_images([PICTURE] * 2), gpu.embed_texts(texts)
        np.testing.assert_array_equal(gpu.features([PICTURE], layer=-1), dense)
    for mine, theirs in zip(found, wanted, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-3)
    assert bench.cuda.live == 0


def test_a_decoder_updates_its_cache_where_the_gpu_has_it(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, bench, "plm")
    answers = []
    for arguments in ({"backend": "onnxruntime"}, {"device": "cuda"}):
        with prt.load(bench.plm, **arguments) as plm:
            first = plm.generate("What is this?", images=[PICTURE], max_tiles=0, max_new_tokens=12)
            again = plm.generate("What is that?", images=[PICTURE], max_tiles=0, max_new_tokens=12)
            answers.append((first.tokens, again.tokens))
    assert answers[0] == answers[1]
    assert bench.cuda.launched > 10  # steps, but for the first two
    assert bench.cuda.live == 0


def test_calls_that_are_alike_become_one_launch(bench: Bench) -> None:
    pictures = [np.roll(PICTURE, shift, axis=1) for shift in range(6)]
    with prt.load(bench.pe, backend="onnxruntime") as cpu:
        wanted = cpu.embed_images(pictures, batch_size=1)
    with prt.load(bench.pe, device="cuda") as gpu:
        for index, picture in enumerate(pictures[:4]):
            found = gpu.embed_images([picture])
            np.testing.assert_allclose(found, wanted[index : index + 1], atol=2e-3)
            assert bench.cuda.launched == max(0, index - 1)
        # A batch needs more memory, so what was captured does not know where things are now.
        np.testing.assert_allclose(gpu.embed_images(pictures), wanted, atol=2e-3)
        assert bench.cuda.launched == 2
        for picture, row in zip(pictures[3:], wanted[3:], strict=True):
            np.testing.assert_allclose(gpu.embed_images([picture])[0], row, atol=2e-3)
        assert bench.cuda.launched == 3
    assert bench.cuda.live == 0


def test_what_rtx_compiles_is_kept_for_the_next_process(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = FakeRtx(bench.trt["pe"])
    library = replace(bench.trt["pe"].library, api=rtx)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)
    compiled: list[bytes] = []
    monkeypatch.setattr(FakeConfig, "compiled", compiled)

    def embed(cache_dir: Path | None) -> int:
        """How often the two calls, of two profiles, had something compiled."""
        compiled.clear()
        with prt.load(bench.pe, device="cuda", cache_dir=cache_dir) as gpu:
            gpu.embed_images([PICTURE])
            gpu.embed_images([PICTURE] * 2)
        return len(compiled)

    cache = tmp_path / "cache"
    assert [embed(None), embed(None)] == [2, 2]
    assert [embed(cache), embed(cache)] == [1, 0]
    assert bench.cuda.launched == 0  # its own graphs, not ours
    # Kernels of another driver are not looked for; and what is damaged is compiled again.
    bench.cuda.driver_version += 10
    assert [embed(cache), embed(cache)] == [1, 0]
    files = list(cache.rglob("*.kernels"))
    assert len(files) == 2
    for file in files:
        data = file.read_bytes()
        file.write_bytes(data[:-33] + b"?" + data[-32:])
    assert [embed(cache), embed(cache)] == [1, 0]
    monkeypatch.setattr(FakeCache, "deserialize", lambda self, data: False)
    assert embed(cache) == 1
    (file.parent).chmod(0o777)
    with (
        prt.load(bench.pe, device="cuda", cache_dir=cache) as gpu,
        pytest.raises(InputError, match="can be written to by others"),
    ):
        gpu.embed_images([PICTURE])
    assert bench.cuda.live == 0


def test_what_cannot_be_captured_runs_all_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.cuda, "capture", lambda work, stream: None)
    with prt.load(bench.pe, device="cuda") as gpu:
        first, *others = [gpu.embed_images([PICTURE]) for _ in range(4)]
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_the_likeliest_tokens_are_found_where_the_logits_are(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, bench, "plm")
    fetched: list[str] = []
    fetch = tensorrt.TensorRtEngine.run

    def run(
        self: tensorrt.TensorRtEngine, inputs: Any, outputs: Sequence[str], state: Any
    ) -> list[Any]:
        fetched.extend(outputs)
        return fetch(self, inputs, outputs, state)

    monkeypatch.setattr(tensorrt.TensorRtEngine, "run", run)
    with prt.load(bench.plm, device="cuda") as plm:
        greedy = plm.generate("What?", max_new_tokens=8)
        assert contract.TOP_ID in fetched and contract.LOGITS not in fetched
        drawn = plm.generate("What?", max_new_tokens=8, temperature=1.0, top_k=1)
        assert contract.LOGITS in fetched
    assert greedy.tokens == drawn.tokens


def test_tiles_are_encoded_together(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, bench, "plm")
    wide = np.random.default_rng(1).integers(0, 256, (40, 160, 3), np.uint8)
    with prt.load(bench.plm, backend="onnxruntime") as cpu:
        wanted = cpu.generate("What?", images=[wide], max_tiles=4, max_new_tokens=4)
    sizes: list[int] = []
    encode = Decoder.encode_tiles

    def counted(self: Decoder, tiles: Any) -> Any:
        sizes.append(len(tiles))
        return encode(self, tiles)

    monkeypatch.setattr(Decoder, "encode_tiles", counted)
    with prt.load(bench.plm, device="cuda") as gpu:
        found = gpu.generate("What?", images=[wide], max_tiles=4, max_new_tokens=4)
    assert found.tokens == wanted.tokens and found.timings.image_tiles > 2
    assert sizes == [found.timings.image_tiles]


def test_a_batch_beyond_the_profiles_is_refused(bench: Bench) -> None:
    with (
        prt.load(bench.pe, device="cuda") as gpu,
        pytest.raises(InputError, match=r"'images' has shape \(38, 32, 32, 3\).*\(37, 32, 32, 3\)"),
    ):
        gpu.embed_images([PICTURE] * 38, batch_size=38)


def test_another_gpu_is_told_what_there_is(bench: Bench) -> None:
    bench.cuda.capability = "sm90"
    with (
        prt.load(bench.pe, device="cuda") as gpu,
        pytest.raises(BackendError, match=r"no engines for sm90, it has .sm89.*--target sm90"),
    ):
        gpu.embed_images([PICTURE])


def test_engines_of_another_version_are_not_loaded(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, bench, "pe", version="1.8")
    with (
        prt.load(bench.pe, device="cuda") as gpu,
        pytest.raises(
            BackendError, match=r"built by .tensorrt_rtx 0., and here is tensorrt_rtx 1.8"
        ),
    ):
        gpu.embed_images([PICTURE])


def test_no_memory_on_the_gpu_is_an_error_of_one_call(bench: Bench) -> None:
    with prt.load(bench.pe, device="cuda") as gpu:
        bench.cuda.room = 100
        with pytest.raises(CapacityError, match="the GPU has no memory for"):
            gpu.embed_images([PICTURE])
        bench.cuda.room = 1 << 40
        assert gpu.embed_images([PICTURE]).shape == (1, 32)


def test_engines_are_loaded_only_if_exported_here_or_named(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((bench.pe / "manifest.json").read_text())
    built_here = built_file()
    assert built_here.stat().st_mode & 0o077 == 0
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    with pytest.raises(PackageError, match=r"code for a GPU.*expect='sha256:") as caught:
        prt.load(bench.pe, device="cuda")
    package_id = str(caught.value).split("'")[1]
    assert package_id == manifest["id"]
    prt.load(bench.pe, device="cuda", expect=package_id).close()
    # A list that others could have written is not believed.
    monkeypatch.setenv("XDG_STATE_HOME", str(built_here.parents[1]))
    built_here.chmod(0o622)
    with pytest.raises(PackageError, match="code for a GPU"):
        prt.load(bench.pe, device="cuda")
    built_here.chmod(0o600)
    prt.load(bench.pe, device="cuda").close()


def test_a_tampered_engine_is_not_loaded(bench: Bench) -> None:
    file = bench.pe / f"vision.{CAPABILITY}.engine"
    data = file.read_bytes()
    file.chmod(0o600)
    file.write_bytes(data[:-1] + b"?")
    try:
        with pytest.raises(PackageError, match=r"vision\.sm89\.engine"):
            prt.load(bench.pe, device="cuda")
    finally:
        file.write_bytes(data)


def test_a_gpu_that_fails_leaves_nobody_waiting(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after an illegal access: from then on every call of the driver returns an error."""
    put(monkeypatch, bench, "plm")
    questions = [prt.Request("What is this?", max_new_tokens=n) for n in (40, 50, 60)]
    with prt.load(bench.plm, device="cuda", cache=False) as plm:
        wanted = [plm.generate("What is this?", max_new_tokens=n).tokens for n in (40, 50, 60)]
        calls = iter(range(10**6))

        def fails() -> None:
            if next(calls) > 40:
                raise BackendError("CUDA failed: cuMemcpyHtoDAsync returned LAUNCH_FAILED")

        def failing(call: Callable[..., None]) -> Callable[..., None]:
            return lambda *arguments: (fails(), call(*arguments))[1]

        with monkeypatch.context() as patch:
            for name in ("copy_in", "clear"):
                patch.setattr(bench.cuda, name, failing(getattr(bench.cuda, name)))
            handles = [plm.submit(question) for question in questions]
            for handle in handles:
                with pytest.raises(BackendError, match="LAUNCH_FAILED"):
                    handle.result()
        assert [r.tokens for r in plm.generate_batch(questions)] == wanted
    del handle, handles  # whose errors refer to frames, and those to memory
    gc.collect()
    assert bench.cuda.live == 0


def test_memory_of_the_host_is_not_a_state(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, bench, "plm")
    monkeypatch.setattr("perception_rt.runtime.decoder.block_maker", lambda backend, device: None)
    with (
        prt.load(bench.plm, device="cuda") as plm,
        pytest.raises(BackendError, match="not in memory that a GPU updates"),
    ):
        plm.generate("What?", max_new_tokens=2)


def test_without_a_gpu_or_on_the_cpu_it_says_so(made: tuple[Bench, Path]) -> None:
    with pytest.raises(BackendError, match=r"TensorRT runs on cuda.*backend='onnxruntime'"):
        prt.load(made[0].pe)
    with pytest.raises(InputError, match="unknown device 'tpu'; TensorRT knows cuda"):
        prt.load(made[0].pe, device="tpu")


def test_onnxruntime_updates_caches_where_the_gpu_has_them(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "open_cuda", lambda: bench.cuda)
    monkeypatch.setitem(onnxruntime._PROVIDERS, "cuda", ("CPUExecutionProvider",))
    monkeypatch.setitem(onnxruntime._PLACES, "cuda", "cpu")  # where the paper is
    monkeypatch.setattr(onnxruntime, "check_device", lambda device: None)
    blocks: list[int] = []
    allocate = bench.cuda.allocate
    monkeypatch.setattr(
        bench.cuda, "allocate", lambda nbytes: (blocks.append(nbytes), allocate(nbytes))[1]
    )
    answers = []
    for device in ("cpu", "cuda"):
        with prt.load(bench.plm, backend="onnxruntime", device=device) as plm:
            answers.append(plm.generate("What is this?", max_new_tokens=12).tokens)
    assert answers[0] == answers[1]
    assert blocks and bench.cuda.live == 0


def test_engines_are_compared_with_eager_where_their_gpu_is(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = find_config(language_model_path())
    assert isinstance(config, PlmConfig)
    config = replace(config, decoder=replace(config.decoder, max_seqlen=320))
    tiles = TileSpec(tile_size=config.vision.image_size)
    tokens = TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=config.image_token_id + 300)
    config = replace(config, image_token_id=tokens.image_token_id)
    plan = PlmPlan(
        name="plm", config=config, backend="tensorrt", precision="fp8", tiles=tiles,
        tokenizer=(tokens, None), engines=(CAPABILITY,),
    )  # fmt: skip
    monkeypatch.setattr(gate, "open_cuda", lambda: bench.cuda)
    trt = install(monkeypatch, bench, tmp_path / "package")
    manifest = build.export_package(plan, RandomWeights(config, 0), tmp_path / "package")
    # A real prompt, which is longer than an engine takes at once.
    assert manifest.record["engine_latency"]["decoder_0"]["prompt_tokens"] > CHUNK_TOKENS
    found = manifest.record["engine_fidelity"]
    assert set(found) == set(manifest.record["fidelity"]) - {"pixels.image_features"}
    assert manifest.record["engine_latency"]["decoder_0"]["runs"] == GATE_STEPS
    assert bench.cuda.live == 0
    trt.broken = True
    with pytest.raises(ExportError, match=r"not faithful to eager: cosine of vision"):
        build.export_package(plan, RandomWeights(config, 0), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def install(monkeypatch: pytest.MonkeyPatch, bench: Bench, folder: Path) -> FakeTensorRt:
    """A TensorRT that builds and runs the package that will be in a folder."""
    trt = FakeTensorRt(folder)
    trt.cuda = bench.cuda
    for module in (engines, build):
        monkeypatch.setattr(module, "library_for", lambda *_, **__: trt.library)
    monkeypatch.setattr(engines, "build_engine", trt.build)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: trt.library)
    return trt


@pytest.mark.parametrize("refittable", [True, False])
def test_new_weights_without_a_new_engine(
    bench: Bench,
    tiny_config: PeConfig,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refittable: bool,
) -> None:
    trt = install(monkeypatch, bench, tmp_path / "new")
    plan = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16", taps=(),
        image=ImageSpec(height=32, width=32), engines=(CAPABILITY,), refittable=refittable,
    )  # fmt: skip
    build.export_package(plan, RandomWeights(tiny_config, 0), tmp_path / "old")
    builds = trt.builds
    refit.refit_package(tmp_path / "old", tuned, tmp_path / "new")
    assert (trt.builds == builds) == refittable
    with prt.load(tmp_path / "new", backend="onnxruntime") as cpu:
        wanted = cpu.embed_images([PICTURE])
    with prt.load(tmp_path / "new", device="cuda") as gpu:
        np.testing.assert_allclose(gpu.embed_images([PICTURE]), wanted, atol=2e-3)
    monkeypatch.setattr(FakeRefitter, "refit_cuda_engine", lambda self: False)
    if refittable:
        with (
            prt.load(tmp_path / "new", device="cuda") as gpu,
            pytest.raises(BackendError, match="does not take the weights of graph 'vision'"),
        ):
            gpu.embed_images([PICTURE])
    assert bench.cuda.live == 0


def test_kept_engines_of_another_gpu_are_not_compared(
    bench: Bench, tiny_config: PeConfig, tuned: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trt = install(monkeypatch, bench, tmp_path / "new")
    plan = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16", taps=(),
        image=ImageSpec(height=32, width=32), engines=(CAPABILITY,), refittable=True,
    )  # fmt: skip
    build.export_package(plan, RandomWeights(tiny_config, 0), tmp_path / "old")
    monkeypatch.setattr(gate, "open_cuda", lambda: bench.cuda)
    library = replace(trt.library, version="9")
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)
    lines: list[str] = []
    manifest = refit.refit_package(
        tmp_path / "old", tuned, tmp_path / "new", on_progress=lines.append
    )
    assert "engine_fidelity" not in manifest.record
    assert any("not compared: the engines were built by" in line for line in lines)


def test_a_capture_without_memory_is_no_capture() -> None:
    class Driver:
        CUstreamCaptureMode = int
        calls: ClassVar[list[str]] = []

        def __getattr__(self, name: str) -> Any:
            def call(*arguments: Any) -> tuple[Any, ...]:
                self.calls.append(name)
                return (OutOfMemory(),) if name == "cuGraphInstantiate" else (0, 7)

            return call

    class OutOfMemory:
        name = "CUDA_ERROR_OUT_OF_MEMORY"

        def __int__(self) -> int:
            return 2

    cuda = Cuda.__new__(Cuda)
    cuda._driver = Driver()
    assert cuda.capture(lambda: None, 1) is None
    assert Driver.calls[-1] == "cuGraphDestroy"

    def interrupted() -> None:
        raise KeyboardInterrupt

    Driver.calls.clear()
    with pytest.raises(KeyboardInterrupt):
        cuda.capture(interrupted, 1)
    assert Driver.calls == ["cuStreamBeginCapture", "cuStreamEndCapture", "cuGraphDestroy"]
