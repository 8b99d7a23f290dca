"""The models for CLIP_benchmark and mteb give the engine's own embeddings."""

import pickle
import sys
from collections.abc import Iterator
from types import ModuleType

import numpy as np
import pytest
import torch
from harness_stand_ins import harness_module
from PIL import Image

from perception_rt.demo import pictures_path
from perception_rt.errors import InputError, PackageError
from perception_rt.runtime.embedder import Embedder

TEXTS = ["a handwritten seven", "seven"]


@pytest.fixture
def clip(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return harness_module("clip_benchmark", monkeypatch)


@pytest.fixture
def mteb(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return harness_module("mteb", monkeypatch)


@pytest.fixture(scope="module")
def engine() -> Iterator[Embedder]:
    with Embedder.load("demo:pe") as found:
        yield found


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    """Pictures of another size than the model's."""
    found = [Image.open(pictures_path() / f"digit_{number}.png") for number in range(3)]
    return [image.resize((90, 70)) for image in found]


def test_clip_benchmark_gets_the_engines_embeddings(
    clip: ModuleType, engine: Embedder, pictures: list[Image.Image]
) -> None:
    model, transform, tokenizer = clip.load_model("PE-Demo", "demo:pe", None, "cpu")
    images = torch.stack([transform(image) for image in pictures])
    vectors = model.eval().encode_image(images)
    np.testing.assert_array_equal(vectors.numpy(), engine.embed_images(pictures))
    texts = torch.nn.functional.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)
    np.testing.assert_allclose(texts.numpy(), engine.embed_texts(TEXTS), atol=1e-6)


def test_worker_processes_can_have_the_transform(
    clip: ModuleType, pictures: list[Image.Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, transform, _ = clip.load_model("PE-Demo", "demo:pe")
    monkeypatch.setitem(sys.modules, clip.__name__, clip)  # pickle finds functions by name
    copy = pickle.loads(pickle.dumps(transform))
    assert torch.equal(copy(pictures[0]), transform(pictures[0]))


def test_the_name_of_the_model_is_checked(clip: ModuleType) -> None:
    with pytest.raises(InputError, match="'PE-Core-B16-224', but package 'demo:pe' has PE-Demo"):
        clip.load_model("PE-Core-B16-224", "demo:pe")


def test_clip_benchmarks_command_line_knows_the_model_type(
    clip: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(clip.models, "TYPE2FUNC", {})
    monkeypatch.setattr(clip.models, "MODEL_TYPES", [])
    seen = []
    monkeypatch.setattr(clip.cli, "main", lambda: seen.extend(clip.models.MODEL_TYPES))
    assert clip.main() == 0
    assert seen == ["perception_rt"]
    assert clip.models.TYPE2FUNC["perception_rt"] is clip.load_model

    def fail() -> None:
        raise PackageError("package 'x' is damaged")

    monkeypatch.setattr(clip.cli, "main", fail)
    assert clip.main() == 2
    assert capsys.readouterr().err == "error: package 'x' is damaged\n"


def test_mteb_gets_the_engines_embeddings(
    mteb: ModuleType, engine: Embedder, pictures: list[Image.Image]
) -> None:
    with mteb.PerceptionRtEncoder("demo:pe") as encoder:
        texts = encoder.encode([{"text": TEXTS[:1]}, {"text": TEXTS[1:]}], task_metadata=None)
        images = encoder.encode([{"image": pictures, "label": [0, 1, 2]}])
        both = encoder.encode([{"image": pictures[:2], "text": TEXTS}])
        nothing = encoder.encode([])
        with pytest.raises(InputError, match="text or image, not audio"):
            encoder.encode([{"audio": []}])
    wanted_texts, wanted_images = engine.embed_texts(TEXTS), engine.embed_images(pictures)
    np.testing.assert_allclose(texts.numpy(), wanted_texts, atol=1e-6)
    np.testing.assert_array_equal(images.numpy(), wanted_images)
    np.testing.assert_allclose(both.numpy(), wanted_texts + wanted_images[:2], atol=1e-6)
    assert nothing.shape == (0, engine.dim)


def test_mteb_records_the_package(mteb: ModuleType, engine: Embedder) -> None:
    with mteb.PerceptionRtEncoder("demo:pe") as encoder:
        meta = encoder.mteb_model_meta
    assert meta.name == "perception_rt/PE-Demo-fp16"
    assert meta.revision == engine.manifest.id
    assert meta.embed_dim == engine.dim
    assert meta.modalities == ["image", "text"]
