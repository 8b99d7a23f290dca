"""The public methods: shapes, norms, batching, errors, threads; and the reference backend."""

import hashlib
import io
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_plm import write_plm
from PIL import Image

import perception_rt as prt
from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import read_manifest
from perception_rt.package.store import Stage
from perception_rt.processing.image_loader import THREAD_NAME
from perception_rt.runtime.backends import onnxruntime


def _images(count: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(20, 90, (count, 2))
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in sizes]


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module", params=["onnxruntime", "reference"])
def engine(request: pytest.FixtureRequest, tiny_package: Path):
    with prt.load(tiny_package, backend=request.param, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def ort_engine(tiny_package: Path):
    with prt.load(tiny_package, threads=2) as engine:
        yield engine


def test_embeddings_are_unit_rows(engine) -> None:
    images = engine.embed_images(_images(5))
    texts = engine.embed_texts(["a cat", "", "two dogs"])
    videos = engine.embed_videos([np.stack([np.full((24, 30, 3), v, np.uint8) for v in range(9)])])
    for rows, count in ((images, 5), (texts, 3), (videos, 1)):
        assert rows.shape == (count, 32) and rows.dtype == np.float32
        np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert engine.embed_images([]).shape == (0, 32)
    assert engine.embed_texts([]).shape == (0, 32)


def test_video_is_the_mean_of_its_frames(engine) -> None:
    rng = np.random.default_rng(1)
    video = rng.integers(0, 256, (15, 40, 40, 3), np.uint8)
    chosen = [video[int(i * 14 / 7)] for i in range(8)]
    mean = engine.embed_images(chosen).mean(axis=0)
    (row,) = engine.embed_videos([video], num_frames=8)
    np.testing.assert_allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_every_kind_of_source_gives_the_same_row(engine, tmp_path: Path) -> None:
    (array,) = _images(1)
    path = tmp_path / "image.png"
    path.write_bytes(_png(array))
    rows = engine.embed_images([array, Image.fromarray(array), _png(array), path, str(path)])
    assert (rows == rows[0]).all()


def test_classify_is_a_softmax_over_labels(engine) -> None:
    images, labels = _images(4), ["cat", "dog", "tree"]
    odds = engine.classify(images, labels)
    assert odds.shape == (4, 3)
    np.testing.assert_allclose(odds.sum(axis=1), 1, atol=1e-6)
    logits = engine.logit_scale * engine.embed_images(images) @ engine.embed_texts(labels).T
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(odds, expected, atol=1e-6)


def test_templates_are_averaged(engine) -> None:
    templates = ["a photo of a {}", "{}, drawn"]
    vectors = engine.embed_texts(["a photo of a cat", "cat, drawn"]).mean(axis=0)
    (row,) = engine.embed_labels(["cat"], templates)
    np.testing.assert_allclose(row, vectors / np.linalg.norm(vectors), atol=1e-6)
    for bad in ([], ["no place"]):
        with pytest.raises(InputError, match="templates"):
            engine.classify(_images(1), ["cat"], bad)


def test_a_label_that_its_template_pushes_out_is_named(engine) -> None:
    """The context of 16 tokens has 14 for the text: 12 words and a label of one or two tokens."""
    before = "a " * 12
    fits = engine.embed_labels(["cat", "tree house"], [before + "{} behind it", "{}"])
    assert fits.shape == (2, 32) and not np.allclose(*fits)
    for label, template in (
        ("cat", "a " * 14 + "{}"),
        ("cat", "a " * 70 + "{}, {}"),
        ("two tree houses", before + "{} and {}"),
        ("long " * 14, "a {}"),
    ):
        with pytest.raises(InputError, match=r"does not fit behind 'a .* the context has 14") as e:
            engine.classify(_images(1), [label, "dog"], ["{}", template])
        assert repr(label)[:50] in str(e.value)
    # A label that comes first is truncated like any text.
    assert engine.embed_labels(["a " * 20], ["{}", "{} b"]).shape == (1, 32)


def test_numbers_of_numpy_are_numbers(engine) -> None:
    images = _images(3)
    rows = engine.embed_images(images, batch_size=np.int64(2), workers=np.uint8(2))
    assert np.array_equal(rows, engine.embed_images(images, batch_size=2))
    assert np.array_equal(engine.features(images, np.int32(-1)), engine.features(images, -1))
    video = np.stack([images[0]] * 3)
    assert np.array_equal(
        engine.embed_videos([video], num_frames=np.int16(2)),
        engine.embed_videos([video], num_frames=2),
    )


def test_no_limits_are_the_default_ones(tiny_package: Path, tmp_path: Path) -> None:
    with prt.load(tiny_package, limits=None) as engine:
        assert len(engine.embed_images(_images(1))) == 1
        with pytest.raises(InputError, match="limit is 65536"):
            engine.embed_texts(["a" * 65537])
    with (
        prt.Embedder.load(tiny_package, limits=None),
        prt.load(write_plm(tmp_path / "plm"), limits=None) as plm,
    ):
        assert plm.generate("a", max_new_tokens=1).tokens is not None
    with pytest.raises(InputError, match="limits must be a Limits or None, not a dict"):
        prt.load(tiny_package, limits={})


def test_more_threads_than_cores_can_run_are_refused(
    tiny_package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "perception_rt.runtime.load_options.available_cores"
    monkeypatch.setattr(name, lambda: 3)
    for threads in (1, 6, np.int64(6)):
        prt.load(tiny_package, threads=threads).close()
    for threads in (7, 64, 1024):
        with pytest.raises(InputError, match=rf"threads is {threads}, .* 3 cores: use at most 6"):
            prt.load(tiny_package, threads=threads)


def test_features_drop_the_class_token(engine) -> None:
    dense = engine.features(_images(3), layer=0)
    assert dense.shape == (3, 4, 4, 64) and dense.dtype == np.float32
    with pytest.raises(InputError, match="layer 2 is out of range for 2 blocks"):
        engine.features(_images(1), layer=2)


def test_progress_counts_to_the_end(engine) -> None:
    seen: list[tuple[int, int]] = []
    engine.embed_images(_images(7), batch_size=3, on_progress=lambda *n: seen.append(n))
    assert seen == [(3, 7), (6, 7), (7, 7)]


def test_bad_images_in_a_batch_leave_the_others_alone(ort_engine) -> None:
    """IMG-05: 56 rows bit-equal to single runs, and 8 errors with their indices."""
    images: list = _images(64)
    bad = [0, 7, 13, 14, 31, 40, 62, 63]
    for index in bad:
        images[index] = b"not an image" if index % 2 else np.zeros((3, 8, 8), np.uint8)
    errors: dict[int, InputError] = {}
    rows = ort_engine.embed_images(images, on_error=errors.__setitem__)
    assert sorted(errors) == bad
    for index, image in enumerate(images):
        if index in errors:
            assert not rows[index].any()
        else:
            assert np.array_equal(rows[index], ort_engine.embed_images([image])[0])
    with pytest.raises(InputError, match="image 7: "):
        ort_engine.embed_images([images[1]] * 7 + [images[7]])


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_row_does_not_depend_on_its_batch(precision: str, tiny_packages) -> None:
    images, texts = _images(9), [f"text number {i}" for i in range(9)]
    with prt.load(tiny_packages[precision], threads=2) as engine:
        for embed, items in ((engine.embed_images, images), (engine.embed_texts, texts)):
            together = embed(items)
            alone = np.concatenate([embed([item]) for item in items])
            assert np.array_equal(together, alone)


def test_64_threads_share_one_engine(ort_engine) -> None:
    """CON-02: bit-equal to serial runs, with different graphs at once."""
    images = _images(8)
    expected = [ort_engine.embed_images([image])[0] for image in images]
    dense = ort_engine.features(images[:1])
    barrier = threading.Barrier(64)

    def work(index: int) -> bool:
        barrier.wait()
        same = True
        for step in range(50):
            image = (index + step) % 8
            same &= np.array_equal(ort_engine.embed_images([images[image]])[0], expected[image])
            if step % 10 == index % 10:
                same &= np.array_equal(ort_engine.features(images[:1]), dense)
        return same

    with ThreadPoolExecutor(64) as pool:
        assert all(pool.map(work, range(64)))


def test_wrong_arguments_are_named(engine) -> None:
    for call, message in (
        (lambda: engine.embed_texts("a cat"), "texts must be a list"),
        (lambda: engine.classify(_images(1), []), "labels"),
        (lambda: engine.classify(_images(1), "cat"), "labels"),
        (lambda: engine.embed_images("a.jpg"), "images must be a list, not one str"),
        (lambda: engine.embed_images(_images(1)[0]), "images must be a list, not one ndarray"),
        (lambda: engine.embed_images(None), "images must be a list, not one NoneType"),
        (lambda: engine.embed_videos("a.mp4"), "videos must be a list, not one str"),
        (lambda: engine.embed_videos(["absent.mp4"]), "video 0: "),
        (lambda: engine.classify(_images(1), [1]), "labels must be at least one string"),
        (lambda: engine.classify(_images(1), ["a"], [5]), "templates"),
        (lambda: engine.features(_images(1), layer="1"), "layer '1' is out of range"),
        (lambda: engine.encode_tokens([["a"] * 16]), "int64"),
        (lambda: engine.encode_pixels([[1], [1, 2]]), "array of at least one row"),
        (lambda: engine.embed_images(_images(1), batch_size=2.5), "batch_size must be"),
        (lambda: engine.embed_images([], workers=0), "workers must be an integer from 1 to 64"),
        (lambda: engine.features([], workers=65), "workers must be an integer from 1 to 64"),
        (lambda: engine.classify([], ["a"], workers=True), "workers must be .* not True"),
        (
            lambda: engine.embed_images(_images(1), batch_size=0),
            "batch_size must be an integer from 1 to 256",
        ),
        (lambda: engine.encode_pixels(np.zeros((1, 3, 32, 32))), "float32, not float64"),
        (lambda: engine.encode_pixels(np.zeros((1, 3, 32, 40), np.float32)), r"\(1, 3, 32, 40\)"),
        (lambda: engine.encode_pixels(np.zeros((0, 3, 32, 32), np.float32)), "at least one row"),
        (lambda: engine.encode_tokens(np.full((1, 16), 49408)), "0 to 49407"),
        (lambda: engine.encode_tokens(np.full((1, 16), -1)), "0 to 49407"),
        (lambda: engine.encode_tokens(np.zeros((1, 16), np.int32)), "int64, not int32"),
        (lambda: engine.encode_tokens(np.zeros((1, 8), np.int64)), r"\(1, 8\)"),
    ):
        with pytest.raises(InputError, match=message):
            call()


@pytest.mark.parametrize("workers", [None, 2, 7])
def test_rows_are_the_same_for_any_number_of_workers(workers: int | None, ort_engine) -> None:
    images: list = _images(30)
    images[::3] = [_png(image) for image in images[::3]]
    images[7], images[21] = b"not an image", np.zeros((3, 8, 8), np.uint8)
    seen: dict[int | None, list] = {1: [], workers: []}
    for count, calls in seen.items():
        rows = ort_engine.embed_images(
            images,
            batch_size=4,
            workers=count,
            on_error=lambda index, error: calls.append((index, str(error))),  # noqa: B023
            on_progress=lambda *numbers: calls.append(numbers),  # noqa: B023
        )
        calls.append(rows.tobytes())
    assert seen[1] == seen[workers]
    assert [call[0] for call in seen[1][:-1]] == [4, 7, 8, 12, 16, 20, 21, 24, 28, 30]
    dense = [ort_engine.features(images[:3], workers=count) for count in (1, workers)]
    assert np.array_equal(*dense)
    odds = [ort_engine.classify(images[:3], ["a", "b"], workers=n) for n in (1, workers)]
    assert np.array_equal(*odds)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_the_first_unusable_image_is_the_error(workers: int, engine) -> None:
    """Even if earlier images take longer to decode."""
    large = _png(np.zeros((1200, 1200, 3), np.uint8))
    images = [large, large, b"bad", large, np.zeros(3, np.uint8), b"bad"]
    with pytest.raises(InputError, match="image 2: image of 3 bytes"):
        engine.embed_images(images, batch_size=6, workers=workers)


@pytest.mark.parametrize("workers", [1, 2, 7])
def test_iterators_are_read_as_they_are_needed(workers: int, engine) -> None:
    """At most a batch and an image per worker ahead; the total is unknown until the end."""
    images, taken, seen = _images(40), 0, []

    def source():
        nonlocal taken
        for image in images:
            taken += 1
            yield image

    def on_progress(*numbers: int) -> None:
        assert taken <= numbers[0] + (0 if workers == 1 else 4 + workers)
        seen.append(numbers)

    rows = engine.embed_images(source(), batch_size=4, workers=workers, on_progress=on_progress)
    assert seen == [(done, done) for done in range(4, 41, 4)]
    assert np.array_equal(rows, engine.embed_images(images, batch_size=4, workers=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_of_callbacks_come_out_and_leave_no_thread(workers: int, engine) -> None:
    def fail(*_: object) -> None:
        assert threading.current_thread() is threading.main_thread()
        raise error

    good = _images(30)
    for error in (RuntimeError("mine"), KeyboardInterrupt()):
        for images, callbacks in (
            (good, {"on_progress": fail}),
            ([good[0], b"bad", *good], {"on_error": fail}),
        ):
            with pytest.raises(type(error)):
                engine.embed_images(images, batch_size=4, workers=workers, **callbacks)
            assert not [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def test_closing_while_images_are_decoded(tiny_package: Path) -> None:
    engine = prt.load(tiny_package, threads=1)

    def images():
        for index, image in enumerate(_images(100)):
            if index == 30:
                engine.close()
            yield image

    with pytest.raises((BackendError, PackageError), match="closed"):
        engine.embed_images(images(), workers=2)
    assert not [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


def test_each_class_loads_its_family_and_names_the_other(
    tiny_package: Path, tmp_path: Path
) -> None:
    plm = write_plm(tmp_path / "plm", name="PLM-1B")
    with prt.Embedder.load(tiny_package, threads=1) as engine, prt.load(tiny_package) as loaded:
        assert type(engine) is type(loaded) is prt.Embedder
        images = _images(2)
        assert np.array_equal(engine.embed_images(images), loaded.embed_images(images))
    with prt.Generator.load(plm, max_batch=2) as generator, prt.load(plm, max_batch=2) as loaded:
        assert type(generator) is type(loaded) is prt.Generator
        assert generator.generate("a").tokens == loaded.generate("a").tokens
    wrong = r"PLM-1B is a language model \(family plm\): use Generator.load"
    with pytest.raises(InputError, match=wrong):
        prt.Embedder.load(plm)
    with pytest.raises(InputError, match=r"tiny is an encoder \(family pe\): use Embedder.load"):
        prt.Generator.load(tiny_package)
    with pytest.raises(InputError, match="threads must be an integer from 1 to 1024, not 0"):
        prt.Embedder.load(tiny_package, threads=0)
    with pytest.raises(InputError, match="cache must be True or False, not a str"):
        prt.Generator.load(plm, cache="no")
    with pytest.raises(PackageError, match="sha256:"):
        prt.Generator.load(plm, expect="sha256:" + hashlib.sha256(b"").hexdigest())


def test_repr_names_model_precision_backend_and_size(tiny_packages) -> None:
    with prt.load(tiny_packages["int8"]) as engine:
        size = sum(entry.size_bytes for entry in engine.manifest.content.files.values()) / 1e6
        assert repr(engine) == (
            "Embedder(model='tiny', precision='int8', backend='onnxruntime', device='cpu', "
            f"size='{size:.1f} MB')"
        )
        assert "<td>tiny</td>" in engine._repr_html_()


def test_nan_never_comes_back(ort_engine) -> None:
    pixels = np.full((1, 3, 32, 32), np.nan, np.float32)
    with pytest.raises(BackendError, match="not finite"):
        ort_engine.encode_pixels(pixels)


def test_what_cannot_be_had_is_an_error(
    tiny_package: Path, tiny_packages, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_id = prt.load(tiny_package).manifest.id
    prt.load(tiny_package, expect=package_id).close()
    wrong = "sha256:" + hashlib.sha256(b"").hexdigest()
    with pytest.raises(PackageError, match="sha256:"):
        prt.load(tiny_package, expect=wrong)
    with pytest.raises(InputError, match="unknown backend 'tensorflow'"):
        prt.load(tiny_package, backend="tensorflow")
    with pytest.raises(InputError, match="threads must be an integer from 1 to 1024"):
        prt.load(tiny_package, threads=0)
    with pytest.raises(BackendError, match="CUDAExecutionProvider is not in this ONNX Runtime"):
        prt.load(tiny_package, device="cuda")
    with pytest.raises(InputError, match="unknown device 'tpu'"):
        prt.load(tiny_package, device="tpu")
    monkeypatch.setattr("perception_rt.runtime.backends.onnxruntime.check_device", lambda d: None)
    with pytest.raises(BackendError, match="int8 package for onnxruntime does not run on cuda"):
        prt.load(tiny_packages["int8"], device="cuda")


def test_libraries_of_cuda_are_loaded_for_a_gpu_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From where pip put them; what ONNX Runtime prints of others is no news."""
    looked: list[str] = []

    def preload(*, directory: str) -> None:
        looked.append(directory)
        print("Failed to load libcudnn")

    monkeypatch.setattr(onnxruntime.ort, "preload_dlls", preload)
    onnxruntime.load_cuda.cache_clear()
    onnxruntime.check_device("cpu")
    assert not looked
    for device in ("cuda", "tensorrt"):
        with pytest.raises(BackendError, match="is not in this ONNX Runtime"):
            onnxruntime.check_device(device)
    assert looked == [""] and capsys.readouterr().out == ""


def test_iterables_and_stacked_arrays_are_lists(engine) -> None:
    images = np.stack([np.full((20, 30, 3), value, np.uint8) for value in (0, 90, 200)])
    rows = engine.embed_images(images)
    assert np.array_equal(rows, engine.embed_images(image for image in images))
    assert np.array_equal(rows, engine.embed_images(tuple(images)))


def test_manifest_that_disagrees_with_itself_is_refused(tiny_package: Path, tmp_path: Path) -> None:
    manifest = read_manifest(tiny_package)
    content = manifest.content
    text = dict(content.text or {})
    for index, change in enumerate(
        (
            {"image": {**content.image, "height": 40}},
            {"image": {"height": 32}},
            {"text": None},
            {"text": {"tokenizer": "clip_bpe"}},
            {"text": text | {"context_length": 12}},
            {"text": text | {"tokenizer": "bert"}},
        )
    ):
        dest = tmp_path / str(index)
        with Stage.create(dest) as stage:
            for name in content.files:
                stage.write(name, [(tiny_package / name).read_bytes()])
            stage.seal(Manifest.create(replace(content, **change), record={"fidelity": 3}))
            stage.publish()
        with pytest.raises(PackageError, match="package 'tiny'"):
            prt.load(dest)


def test_close_twice_and_use_after_close(tiny_package: Path) -> None:
    engine = prt.load(tiny_package)
    engine.embed_images(_images(1))
    engine.close()
    engine.close()
    with pytest.raises((BackendError, PackageError), match="closed"):
        engine.embed_images(_images(1))


def test_reference_backend_is_predictable(tiny_package: Path) -> None:
    images = _images(3)
    with prt.load(tiny_package, backend="reference") as engine:
        rows = engine.embed_images([*images, images[0]])
        assert np.array_equal(rows[0], rows[3])
        assert not np.array_equal(rows[0], rows[1])
        assert np.array_equal(rows[1], engine.embed_images([images[1]])[0])
