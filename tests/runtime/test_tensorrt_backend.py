"""The TensorRT backend on a fake GPU: results, refusals, CUDA graphs and memory."""

import gc
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_gpu import CAPABILITY, FakeCache, FakeConfig, FakeContext, FakeRtx
from gpu_bench import PICTURE, Bench, put

import perception_rt as prt
from perception_rt.errors import BackendError, CapacityError, InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.trust import built_file
from perception_rt.runtime.backends import onnxruntime, tensorrt
from perception_rt.runtime.generation.plm_engine import PlmEngine


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


def test_a_decoder_updates_its_cache_in_gpu_memory(
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
    assert bench.cuda.launched > 10  # all steps except the first two
    assert bench.cuda.live == 0


def test_captured_graphs_serve_the_next_request(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, bench, "plm")
    enqueued: list[str] = []
    execute = FakeContext.execute_async_v3

    def counted(self: FakeContext, stream: int) -> bool:
        enqueued.append(self.engine.spec.file)
        return execute(self, stream)

    monkeypatch.setattr(FakeContext, "execute_async_v3", counted)
    with prt.load(bench.plm, device="cuda", cache=False) as plm:
        answers = []
        for _ in range(3):
            enqueued.clear()
            answers.append(plm.generate_tokens(range(10, 40), max_new_tokens=12))
        assert not enqueued  # the third request needs launches only
        assert answers[0] == answers[1] == answers[2]
        assert plm.stats.running == 0 and bench.cuda.live > 0
    assert bench.cuda.live == 0


def test_repeated_calls_become_one_launch_each(bench: Bench) -> None:
    pictures = [np.roll(PICTURE, shift, axis=1) for shift in range(6)]
    with prt.load(bench.pe, backend="onnxruntime") as cpu:
        wanted = cpu.embed_images(pictures, batch_size=1)
    with prt.load(bench.pe, device="cuda") as gpu:
        for index, picture in enumerate(pictures[:4]):
            found = gpu.embed_images([picture])
            np.testing.assert_allclose(found, wanted[index : index + 1], atol=2e-3)
            assert bench.cuda.launched == max(0, index - 1)
        # A batch needs larger buffers, so captured graphs have outdated addresses.
        np.testing.assert_allclose(gpu.embed_images(pictures), wanted, atol=2e-3)
        assert bench.cuda.launched == 2
        for picture, row in zip(pictures[3:], wanted[3:], strict=True):
            np.testing.assert_allclose(gpu.embed_images([picture])[0], row, atol=2e-3)
        assert bench.cuda.launched == 3
    assert bench.cuda.live == 0


def test_compiled_kernels_are_kept_for_the_next_process(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rtx = FakeRtx(bench.trt["pe"])
    library = replace(bench.trt["pe"].library, api=rtx)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)
    compiled: list[bytes] = []
    monkeypatch.setattr(FakeConfig, "compiled", compiled)

    def embed(cache_dir: Path | None) -> int:
        """Number of compilations in two calls, which use two profiles."""
        compiled.clear()
        with prt.load(bench.pe, device="cuda", cache_dir=cache_dir) as gpu:
            gpu.embed_images([PICTURE])
            gpu.embed_images([PICTURE] * 2)
        return len(compiled)

    cache = tmp_path / "cache"
    assert [embed(None), embed(None)] == [2, 2]
    assert [embed(cache), embed(cache)] == [1, 0]
    assert bench.cuda.launched == 0  # TensorRT for RTX captures graphs itself
    # Another driver needs other kernels; damaged kernels are compiled again.
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


def test_calls_that_cannot_be_captured_still_run(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench.cuda, "capture", lambda work, stream: None)
    with prt.load(bench.pe, device="cuda") as gpu:
        first, *others = [gpu.embed_images([PICTURE]) for _ in range(4)]
        for other in others:
            np.testing.assert_array_equal(first, other)


def test_the_engine_picks_the_likeliest_tokens(
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
    encode = PlmEngine.encode_tiles

    def counted(self: PlmEngine, tiles: Any) -> Any:
        sizes.append(len(tiles))
        return encode(self, tiles)

    monkeypatch.setattr(PlmEngine, "encode_tiles", counted)
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


def test_an_error_names_the_gpus_that_engines_are_for(bench: Bench) -> None:
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
            BackendError, match=r"built by .tensorrt_rtx 0., but tensorrt_rtx 1.8 is installed here"
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
    package_id = str(caught.value).partition("expect='")[2].partition("'")[0]
    assert package_id == manifest["id"]
    prt.load(bench.pe, device="cuda", expect=package_id).close()
    # A file that others can write is ignored.
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


def test_a_failing_gpu_ends_every_request(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after an illegal access, every driver call fails from then on."""
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
    del handle, handles  # their errors refer to frames that refer to memory
    gc.collect()
    assert bench.cuda.live == 0


def test_states_in_host_memory_are_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, bench, "plm")
    monkeypatch.setattr(
        "perception_rt.runtime.generation.plm_engine.block_maker", lambda backend, device: None
    )
    with (
        prt.load(bench.plm, device="cuda") as plm,
        pytest.raises(BackendError, match="is in host memory, where a GPU cannot update"),
    ):
        plm.generate("What?", max_new_tokens=2)


def test_other_devices_than_cuda_are_refused(made: tuple[Bench, Path]) -> None:
    with pytest.raises(BackendError, match=r"TensorRT runs on cuda.*backend='onnxruntime'"):
        prt.load(made[0].pe)
    with pytest.raises(InputError, match="unknown device 'tpu'; TensorRT knows cuda"):
        prt.load(made[0].pe, device="tpu")


def test_onnxruntime_updates_caches_in_gpu_memory(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnxruntime, "open_cuda", lambda: bench.cuda)
    monkeypatch.setitem(onnxruntime.PROVIDERS, "cuda", ("CPUExecutionProvider",))
    monkeypatch.setitem(onnxruntime.PLACES, "cuda", "cpu")  # the fake GPU is in host memory
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
