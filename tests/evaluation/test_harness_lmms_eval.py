"""The model `perception_rt` of lmms-eval: what it asks the generator, and what it returns."""

import logging
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from harness_stand_ins import harness_module
from PIL import Image

from perception_rt.demo import pictures_path
from perception_rt.errors import InputError
from perception_rt.evaluation import harness
from perception_rt.runtime.generator import Generator

ROOT = Path(__file__).parents[2]
TASK, SPLIT = "task", "test"
READ = "What number is written here?"
COMPARE = "Do both images show the same number?"


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return harness_module("lmms_eval", monkeypatch)


@pytest.fixture
def model(module: ModuleType) -> Iterator[Any]:
    found = module.PerceptionRt("demo:plm", batch_size=4, strip_period=True)
    yield found
    found.clean()


@pytest.fixture(scope="module")
def plm() -> Iterator[Generator]:
    with Generator.load("demo:plm") as found:
        yield found


def picture(name: str) -> Image.Image:
    return Image.open(pictures_path() / f"{name}.png")


def asked(model: Any, question: str, second: Any, visuals: Any) -> Any:
    """A request about a document that is its own images and videos."""
    documents = model.task_dict.setdefault(TASK, {SPLIT: []})[SPLIT]
    documents.append(visuals)
    arguments = (question, second, lambda document: document, len(documents) - 1, TASK, SPLIT)
    return SimpleNamespace(args=arguments)


def choice(model: Any, question: str, text: Any, visuals: Any) -> Any:
    context, target, *where = asked(model, question, text, visuals).args
    return SimpleNamespace(args=(context, target, *where))


def test_answers_are_the_generators_and_in_order(model: Any, plm: Generator) -> None:
    read, first, second = picture("read"), picture("compare_1"), picture("compare_2")
    video = np.repeat(np.asarray(read.convert("RGB"))[None], 3, axis=0)
    requests = [
        asked(model, READ, {"max_new_tokens": 8}, [read]),
        asked(model, COMPARE, {"max_new_tokens": 8}, [[first, second]]),
        asked(model, READ, {"max_new_tokens": 8}, [video]),
        asked(model, "Read the digits.", {"max_new_tokens": 8}, None),
    ]
    wanted = [
        plm.generate(READ, images=[read], max_new_tokens=8),
        plm.generate(COMPARE, images=[first, second], max_new_tokens=8),
        plm.generate(READ, videos=[video], max_new_tokens=8),
        plm.generate("Read the digits.", max_new_tokens=8),
    ]
    assert model.generate_until(requests) == [result.text.removesuffix(".") for result in wanted]
    assert wanted[0].text != wanted[1].text


def test_requests_beyond_a_chunk_keep_their_order(
    module: ModuleType, model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CHUNK", 2)
    names = ["digit_3", "digit_7", "digit_1", "digit_4", "digit_0"]
    requests = [asked(model, READ, {"max_new_tokens": 4}, [picture(name)]) for name in names]
    alone = [model.generate_until([request])[0] for request in requests]
    assert model.generate_until(requests) == alone
    assert len(set(alone)) > 2


def test_choices_have_a_cost_and_expected_answers_a_log_probability(
    model: Any, plm: Generator
) -> None:
    image = [picture("read")]
    greedy = plm.generate(READ, images=image).text
    texts = [greedy[:1], "9999", greedy]
    scores = [plm.score(READ, text, images=image).total for text in texts]
    # lmms-eval puts a space before a choice.
    requests = [choice(model, READ, f" {text}", image) for text in texts]
    requests.append(choice(model, READ, lambda _: greedy, image))
    pairs = [result.text for result in model.loglikelihood(requests)]
    costs = [-score for score in scores]
    assert [value for value, _ in pairs] == pytest.approx([*costs, scores[2]], abs=1e-5)
    assert [is_greedy for _, is_greedy in pairs] == [True, False, True, True]
    assert pairs[2][0] < pairs[1][0]


def test_a_choice_without_its_question_has_no_document(model: Any, plm: Generator) -> None:
    """lmms-eval asks so for the mutual information."""
    (result,) = model.loglikelihood([SimpleNamespace(args=("", "7"))])
    assert result.text[0] == pytest.approx(-plm.score("", "7").total)


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({}, {"stop": [], "temperature": 0.0}),
        ({"until": "\n\n"}, {"stop": ["\n\n"], "temperature": 0.0}),
        ({"until": ["a", ""], "max_new_tokens": 5, "num_beams": 1},
         {"stop": ["a"], "max_new_tokens": 5, "temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": None},
         {"stop": [], "temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"stop": [], "temperature": 1.0}),
        ({"do_sample": False, "temperature": 0.7}, {"stop": []}),
    ],
)  # fmt: skip
def test_generation_options(
    module: ModuleType, options: dict[str, Any], wanted: dict[str, Any]
) -> None:
    assert module.generation_options(options) == wanted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "num_beams is 4"),
        ({"until": [3]}, "until must be a string or a list of strings"),
    ],
)
def test_unusable_generation_options(
    module: ModuleType, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        module.generation_options(options)


def test_options_of_other_models_are_named_once(
    model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"max_new_tokens": 2, "image_aspect_ratio": "original"}
    request = asked(model, READ, options, [picture("read")])
    with caplog.at_level(logging.WARNING):
        model.generate_until([request, request])
        model.generate_until([request])
    found = [record.message for record in caplog.records if "image_aspect" in record.message]
    assert found == ["generation options without effect: image_aspect_ratio"]


def test_media_are_sorted(module: ModuleType) -> None:
    image, frames = Image.new("RGB", (2, 2)), np.zeros((3, 2, 2, 3), np.uint8)
    visuals = [[image, "a.mp4"], ("b.JPG", frames), frames[0], None]
    found = module.sort_media(visuals)
    assert found["images"][:2] == [image, "b.JPG"]
    assert found["images"][2].ndim == 3
    assert found["videos"][0] == "a.mp4"
    assert found["videos"][1] is frames
    assert module.sort_media(None) == {"images": [], "videos": []}


@pytest.mark.parametrize("item", [{"array": [0.0], "sampling_rate": 16000}, "a.wav", 3])
def test_other_media_are_refused(module: ModuleType, item: Any) -> None:
    with pytest.raises(InputError, match="no image or video"):
        module.sort_media([item])


@pytest.mark.parametrize(
    ("prompt", "literal"),
    [("<image>What number?", False), ("Which <image> has <image> a number?", True)],
)
def test_marks_that_do_not_fit_are_text(
    model: Any, plm: Generator, prompt: str, literal: bool
) -> None:
    images = [picture("read")]
    wanted = plm.generate(prompt, images=images, max_new_tokens=8, literal=literal).text
    request = asked(model, prompt, {"max_new_tokens": 8}, images)
    assert model.generate_until([request]) == [wanted.removesuffix(".")]


def test_several_rounds_are_refused(model: Any) -> None:
    with pytest.raises(InputError, match="several rounds"):
        model.generate_until_multi_round([])


@pytest.mark.parametrize(
    ("size", "most", "wanted"), [("auto", None, 8), ("auto", 3, 3), ("5", 3, 5)]
)
def test_batch_sizes(module: ModuleType, size: str, most: int | None, wanted: int) -> None:
    assert module.batch_limit(size, most) == wanted
    with pytest.raises(InputError, match="batch_size must be a number or auto"):
        module.batch_limit("large", None)


def test_the_entry_point_names_the_class(module: ModuleType) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    where, _, name = project["entry-points"]["lmms_eval.models"]["perception_rt"].partition(":")
    assert (where, name) == (harness.__name__, harness.lmms_eval_model.__name__)
    manifest = harness.lmms_eval_model()
    assert manifest.model_id == "perception_rt"
    assert manifest.simple_class_path == f"{module.__name__}.{module.PerceptionRt.__name__}"
