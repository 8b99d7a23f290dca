"""Packages of the native decoder: equal to the golden data, and to themselves in any batch."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden_data import PLM_FILES, plm_golden
from hf_folder import HF

import perception_rt as prt
from perception_rt.archs import PLM_MODELS
from perception_rt.cli import export_main, main
from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.export import ExportOptions, export
from perception_rt.export.build import export_package
from perception_rt.export.plan import PlmPlan, build_settings
from perception_rt.native import layout, library
from perception_rt.package import contract
from perception_rt.package.manifest import MANIFEST_FILE
from perception_rt.package.reader import open_package, read_manifest
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.generation.plm_engine import PlmEngine

if not library.is_compiled():
    pytest.skip("the native decoder is not compiled", allow_module_level=True)

PRECISIONS = ("fp32", "int8", "int4")
Packages = Callable[..., Path]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Packages:
    """`package(name, precision)`: the package of a golden model, exported once."""
    made: dict[tuple[str, str], Path] = {}

    def get(name: str, precision: str = "fp32") -> Path:
        if (name, precision) not in made:
            data = plm_golden(name)
            out = tmp_path_factory.mktemp("native") / f"{name}-{precision}"
            plan = PlmPlan(
                name="golden",
                config=data.config,
                backend="native",
                precision=precision,
                blocks="int4" if precision == "int4" else "int8",
                tiles=TileSpec(tile_size=data.config.vision.image_size),
            )
            export_package(plan, data, out)
            made[name, precision] = out
        return made[name, precision]

    return get


@contextmanager
def decoder_of(path: Path, threads: int = 2) -> Iterator[PlmEngine]:
    with open_package(path) as opened:
        decoder = PlmEngine(opened, backend="auto", device="cpu", threads=threads)
        yield decoder
        decoder.close()


@pytest.mark.parametrize("name", PLM_FILES)
def test_golden_logits_and_greedy_tokens(name: str, package: Packages) -> None:
    data = plm_golden(name)
    with prt.Generator.load(package(name)) as plm:
        assert plm.backend == "native, onnxruntime"
        tokens, tiles = data.inputs["tokens"][0], data.inputs["tiles"]
        logits = plm.prefill_logits(tokens, tiles)
        text_only = plm.prefill_logits(data.inputs["text_only_tokens"][0])
        greedy = plm.generate_tokens(tokens, tiles, max_new_tokens=12)
    assert np.abs(logits - data.outputs["logits"][0, -1]).max() <= 1e-3
    assert np.abs(text_only - data.outputs["text_only_logits"][0, -1]).max() <= 1e-3
    assert greedy == data.outputs["greedy_tokens"].tolist()


def test_logits_and_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(HF), "--backend", "native", "--precision", "fp32"]
    assert export_main([*arguments, "--out", str(tmp_path / "hf")]) == 0
    with np.load(HF / "expected.npz") as stored, prt.Generator.load(tmp_path / "hf") as plm:
        for case in ("t0", "t3", "t9", "multi", "img_tall.png"):
            pixels = stored.get(f"{case}/pixels")
            if pixels is not None:
                pixels = pixels.reshape(-1, *pixels.shape[-3:])
            ids, greedy = stored[f"{case}/ids"].ravel(), stored[f"{case}/greedy"].ravel()
            logits = plm.prefill_logits(ids, pixels)
            assert np.abs(logits.ravel() - stored[f"{case}/logits"].ravel()).max() < 1e-3
            found = plm.generate_tokens(ids, pixels, max_new_tokens=len(greedy))
            assert found == greedy.tolist()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_any_pieces_and_neighbours_give_the_same_bits(precision: str, package: Packages) -> None:
    rng = np.random.default_rng(0)
    for name in PLM_FILES:
        with (
            decoder_of(package(name, precision)) as decoder,
            decoder_of(package(name, precision), threads=1) as other,
        ):
            hidden = decoder.embed(rng.integers(0, 300, 90))
            whole = logits_of(decoder, hidden, [90])
            for edges in ([*range(1, 91)], [33, 64, 65, 90], [16, 17, 90], [89, 90]):
                assert np.array_equal(logits_of(decoder, hidden, edges), whole)
            assert np.array_equal(logits_of(other, hidden, [90]), whole)
            together = np.stack([hidden, hidden[::-1], hidden])
            cache = CacheBlock(decoder.cache_shape, 4, 100)
            past, last = np.zeros(3, np.int32), np.full((3, 1), 89)
            found = decoder.forward(together, past, cache, slice(1, 4), last)
            assert np.array_equal(found[0, 0], whole) and np.array_equal(found[2, 0], whole)
            assert not np.array_equal(found[1, 0], whole)


def logits_of(decoder: PlmEngine, hidden: np.ndarray, edges: list[int]) -> np.ndarray:
    """Logits (V,) after the last token of a sequence that is fed in pieces ending at `edges`."""
    cache, start = CacheBlock(decoder.cache_shape, 1, len(hidden) + 1), 0
    for stop in edges:
        past, last = np.asarray([start], np.int32), np.asarray([[stop - start - 1]])
        logits = decoder.forward(hidden[None, start:stop], past, cache, slice(0, 1), last)
        start = stop
    return logits[0, 0]


def batches_agree(path: Path, count: int) -> None:
    """Answers of random batches, with and without lookup, equal those of single requests."""
    rng = np.random.default_rng(1)
    with prt.Generator.load(path, max_batch=8) as plm:
        prompts = ["".join(rng.choice(list("abc 12"), 20)) for _ in range(12)]
        alone = [plm.generate(prompt, max_new_tokens=16, ignore_eos=True) for prompt in prompts]
        for _ in range(count):
            chosen = rng.integers(0, len(prompts), rng.integers(1, 9)).tolist()
            requests = []
            for index in chosen:
                lookup = rng.integers(3)  # none, in the prompt, or in the answer itself
                tokens = alone[index].tokens if lookup == 2 else None
                requests.append(
                    prt.Request(
                        prompts[index],
                        max_new_tokens=16,
                        ignore_eos=True,
                        lookup=bool(lookup),
                        lookup_tokens=tokens,
                    )
                )
            for index, result in zip(chosen, plm.generate_batch(requests), strict=True):
                assert result.tokens == alone[index].tokens


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """PLM-Demo in int4."""
    out = tmp_path_factory.mktemp("native") / "demo"
    assert export_main(["--model", "PLM-Demo", "--precision", "int4", "--out", str(out)]) == 0
    return out


def test_batches_and_lookup_give_the_same_tokens(demo: Path) -> None:
    batches_agree(demo, 40)


@pytest.mark.slow
def test_500_batches_and_lookup_give_the_same_tokens(demo: Path) -> None:
    batches_agree(demo, 500)


def test_int4_takes_the_native_decoder_unless_told_otherwise(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert read_manifest(demo).content.backend_of("decoder_0") == "native"
    assert read_manifest(demo).content.backend_of("vision") == "onnxruntime"
    options = ExportOptions(model="PLM-Demo", precision="int4", out=tmp_path)
    assert build_settings(options, decodes=True).backend == "native"
    for more in ({"blocks": "int8"}, {"backend": "onnxruntime"}):
        assert build_settings(replace(options, **more), decodes=True).backend == "onnxruntime"
    monkeypatch.setattr(library, "library_path", lambda: tmp_path / "none.so")
    library.load_library.cache_clear()
    try:
        assert build_settings(options, decodes=True).backend == "onnxruntime"
        with pytest.raises(BackendError, match="not compiled here"):
            prt.load(demo)
    finally:
        library.load_library.cache_clear()


def test_blocks_and_encoders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--blocks is not for backend native"):
        export(
            ExportOptions(
                model="PLM-Demo", precision="int4", backend="native", blocks="int4", out=tmp_path
            )
        )
    with pytest.raises(InputError, match="backend native runs decoders; an encoder's is onnx"):
        export(ExportOptions(model="PE-Demo", backend="native", out=tmp_path / "x"))


def test_a_tied_head_is_stored_once(package: Packages) -> None:
    files = read_manifest(package("plm_tied_ropescaled", "int4")).content.files
    config = plm_golden("plm_tied_ropescaled").config.decoder
    matrices = [*layout.decoder_matrices(config).values()]
    table = layout.matrix_bytes("int4", config.vocab_size, config.dim)
    assert files["embed.data"].size_bytes == table
    whole = sum(layout.matrix_bytes("int4", *shape) for shape in matrices) - table
    assert whole <= files["decoder_0.data"].size_bytes <= whole + 100_000


def test_plm_1b_has_at_most_three_quarters_of_a_gigabyte() -> None:
    config = PLM_MODELS["PLM-1B"].decoder
    sizes = [layout.matrix_bytes("int4", *s) for s in layout.decoder_matrices(config).values()]
    assert config.weight_tying and sum(sizes) <= 0.75e9


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("norm"), "has no tensor 'norm'"),
        (lambda t: t.update(more=t["norm"]), "has an unknown tensor 'more'"),
        (lambda t: t["norm"].update(offset=1 << 40), "does not fit"),
        (lambda t: t["norm"].update(offset=-64), "does not fit"),
        (lambda t: t["norm"].update(offset=8), "does not fit"),
        (lambda t: t["norm"].update(offset=True), "does not fit"),
        (lambda t: t["norm"].update(format="int4"), "has the format 'int4'"),
        (lambda t: t["head"].update(format="int2"), "has the format 'int2'"),
        (lambda t: t["head"].update(format="float32"), "does not fit"),
        (lambda t: t["head"].update(file="vision.data"), "no data file of its graph"),
        (lambda t: t["head"].update(more=1), "must have exactly the keys"),
    ],
)
def test_a_graph_file_that_does_not_fit_is_refused(
    change: Callable[[dict], object], message: str, package: Packages
) -> None:
    path = package("plm_tied_ropescaled", "int4")
    config = plm_golden("plm_tied_ropescaled").config.decoder
    values = json.loads((path / "decoder_0.json").read_bytes())
    change(values["tensors"])
    sizes = {file: (path / file).stat().st_size for file in ("decoder_0.data", "embed.data")}
    with pytest.raises(PackageError, match=message):
        layout.parse(
            json.dumps(values).encode(),
            layout.decoder_matrices(config),
            layout.decoder_vectors(config),
            sizes,
        )
    for data in (b"", b"[]", b"{}", b'{"schema": 2, "tensors": {}}', b"[" * 100_000):
        with pytest.raises(PackageError, match="a native graph file"):
            layout.parse(data, {}, {}, sizes)


def test_damaged_data_is_found(demo: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in demo.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    data = bytearray((copy / "decoder_0.data").read_bytes())
    data[1000] ^= 1
    (copy / "decoder_0.data").write_bytes(data)
    with (
        pytest.raises(PackageError, match="is damaged"),
        prt.Generator.load(copy) as plm,
    ):
        plm.generate("a", max_new_tokens=1)
    (copy / "decoder_0.data").write_bytes(data[:-64])
    with pytest.raises(PackageError, match="bytes instead of"):
        prt.load(copy)
    assert (copy / MANIFEST_FILE).exists()


def test_unusable_calls_are_refused_before_a_kernel_runs(package: Packages) -> None:
    with decoder_of(package("plm_tied_ropescaled")) as decoder:
        hidden = decoder.embed(np.arange(8))
        cache = CacheBlock(decoder.cache_shape, 1, 8)
        with pytest.raises(BackendError, match="not finite"):
            decoder.forward(hidden[None] * np.nan, np.zeros(1, np.int32), cache, slice(0, 1), ZERO)
    with open_package(package("plm_tied_ropescaled")) as opened:
        from perception_rt.runtime.session import open_session

        session = open_session(opened, "decoder_0", backend="auto", device="cpu", threads=1)
        state = cache.states(range(3), slice(0, 1))

        def call(past: int, position: int) -> None:
            inputs = {
                contract.HIDDEN: hidden[None],
                contract.PAST_LENGTHS: np.asarray([past], np.int32),
                contract.LOGIT_POSITIONS: np.asarray([[position]]),
            }
            session.run(inputs, [contract.LOGITS], state)

        call(0, 7)
        for past, position in ((1, 0), (-1, 0), (0, 8), (0, -1)):
            with pytest.raises(InputError, match=r"do not fit 8 slots|not in 0 to 7"):
                call(past, position)
        session.close()
        with pytest.raises(BackendError, match="closed"):
            call(0, 0)


ZERO = np.zeros((1, 1), np.int64)


def test_closing_waits_for_a_call(package: Packages) -> None:
    """Without a crash; some threads find the engine closed."""
    path, errors = package("plm_untied_noscale", "int8"), []
    for _ in range(10):
        with decoder_of(path) as decoder:
            hidden = decoder.embed(np.arange(100))

            def work(decoder: PlmEngine = decoder, hidden: np.ndarray = hidden) -> None:
                cache = CacheBlock(decoder.cache_shape, 1, 100)
                past, last = np.zeros(1, np.int32), np.asarray([[99]])
                try:
                    for _ in range(50):
                        decoder.forward(hidden[None], past, cache, slice(0, 1), last)
                except BackendError as error:
                    errors.append(str(error))

            threads = [threading.Thread(target=work) for _ in range(3)]
            for thread in threads:
                thread.start()
            decoder.close()
            for thread in threads:
                thread.join()
    assert all("closed" in error for error in errors)


def test_doctor_and_inspect_name_the_native_decoder(
    demo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", str(demo)]) == 0
    assert library.best_instruction_set() in capsys.readouterr().out
    assert main(["inspect", str(demo)]) == 0
    assert "decoder_0 of kind native-decoder" in capsys.readouterr().out
