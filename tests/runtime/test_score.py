"""Scores of given answers equal those of the logits, in any company, cached or not."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_plm import CONFIG, write_plm
from gpu_bench import Bench, put
from soak import assert_idle, onnx_package, picture

import perception_rt as prt
from perception_rt.errors import BackendError, CapacityError, InputError
from perception_rt.limits import Limits
from perception_rt.package.contract import ENGINE_POSITIONS
from perception_rt.package.reader import open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import normalize
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Exchange, Request, Score

LONG = "An answer of more tokens than one prompt chunk has, and than an engine predicts. " * 2
TOKEN_BYTES = 16 + 2 * 2 * 1 * 16 * 4  # key; layers, keys and values, heads, channels, float32
ANSWERS = {"one token": "A", "three": "yes", "long": LONG}


@pytest.fixture(scope="module")
def onnx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_package(tmp_path_factory)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)


@pytest.fixture
def plm(onnx: Path):
    with prt.load(onnx, threads=1) as plm:
        yield plm
        assert_idle(plm)


def preprocessor(package: Path) -> RequestPreprocessor:
    with open_package(package) as opened:
        config = PlmConfig.from_dict(opened.manifest.content.architecture)
        return RequestPreprocessor(
            opened, config, limits=Limits(), cached=False, clock=time.monotonic
        )


def expected(package: Path, request: Request, tokens: tuple[int, ...]) -> list[float]:
    """Log-softmax of the logits before each token, one prompt at a time, without caches."""
    state = preprocessor(package).prepare(request)
    found = []
    with prt.load(package, threads=1, cache=False) as plm:
        pixels = None if state.tiles is None else normalize(state.tiles, plm.tile_spec.tile)
        for index, token in enumerate(tokens):
            logits = plm.prefill_logits([*state.ids, *tokens[:index]], pixels).astype(np.float64)
            shifted = logits - logits.max()
            found.append(shifted[token] - np.log(np.exp(shifted).sum()))
    return found


@pytest.mark.parametrize("answer", ANSWERS.values(), ids=ANSWERS)
@pytest.mark.parametrize("images", [0, 1])
def test_scores_are_the_log_softmax_of_the_logits(
    plm: Generator, onnx: Path, images: int, answer: str
) -> None:
    history = [Exchange(prompt="Hello?", answer="Hello.")]
    media = {"images": [picture(0)][:images], "history": history[images:], "max_tiles": 1}
    score = plm.score("What is this?", answer, **media)
    assert score.tokens == tuple(preprocessor(onnx).tokenizer.encode_text(answer))
    assert score.logprobs.shape == (len(score.tokens),) and score.logprobs.dtype == np.float64
    wanted = expected(onnx, Request("What is this?", **media), score.tokens)
    np.testing.assert_allclose(score.logprobs, wanted, atol=1e-4)
    assert score.total == pytest.approx(sum(wanted), abs=1e-4 * len(wanted))


def test_answers_to_one_prompt_share_its_cache(
    plm: Generator, onnx: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    forward = PlmEngine.forward

    def counted(self: PlmEngine, hidden: np.ndarray, *rest: Any) -> np.ndarray:
        lengths.append(hidden.shape[1])
        return forward(self, hidden, *rest)

    monkeypatch.setattr(PlmEngine, "forward", counted)
    question = {"prompt": "Which one is it?", "images": [picture(1)], "max_tiles": 1}
    with prt.load(onnx, threads=1, cache=False) as bare:
        alone = [bare.score(**question, answer=answer) for answer in "ABCD"]
    prompt = sum(lengths) // 4
    lengths.clear()
    cached = [plm.score(**question, answer=answer) for answer in "ABCD"]
    assert sum(lengths) == prompt + 3
    for one, other in zip(alone, cached, strict=True):
        assert one.tokens == other.tokens
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)
    assert plm.stats.prefix_cache_bytes == prompt * TOKEN_BYTES  # no answer is kept
    assert plm.generate(**question, max_new_tokens=1).timings.cached_tokens == prompt - 1


def test_scores_do_not_depend_on_company(reference: Path) -> None:
    """Many threads at once, among requests that generate, in little memory."""
    questions = [f"Question {index}?" for index in range(8)]

    def ask(plm: Generator, index: int) -> Any:
        question = questions[index % 8]
        if index % 3 == 0:
            return plm.generate(question, max_new_tokens=12).tokens
        return plm.score(question, f"{LONG[: 1 + 40 * (index % 5)]}").logprobs.tolist()

    with prt.load(reference, cache=False, max_batch=1) as plm:
        alone = [ask(plm, index) for index in range(40)]
    with prt.load(reference, max_batch=3) as plm, ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda index: ask(plm, index), range(40))) == alone
        assert_idle(plm)


def test_an_engine_predicts_from_as_many_positions_as_it_can(
    reference: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Engines for GPUs are built for nine; the scores are the same."""
    with prt.load(reference, cache=False) as plm:
        whole = plm.score("What?", LONG)
    positions: list[int] = []
    forward, init = PlmEngine.forward, PlmEngine.__init__

    def limited(self: PlmEngine, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        self.max_positions = ENGINE_POSITIONS

    def counted(self: PlmEngine, *arguments: Any) -> np.ndarray:
        positions.append(arguments[-1].shape[1])
        return forward(self, *arguments)

    monkeypatch.setattr(PlmEngine, "__init__", limited)
    monkeypatch.setattr(PlmEngine, "forward", counted)
    with prt.load(reference, cache=False) as plm:
        assert plm.score("What?", LONG).logprobs.tolist() == whole.logprobs.tolist()
    assert max(positions) == ENGINE_POSITIONS and len(positions) > len(whole.tokens) // 9


def test_scores_of_an_engine_for_a_gpu_are_those_of_its_graphs(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(monkeypatch, bench, "plm")
    question = {"prompt": "What?", "answer": "An answer of more than nine tokens."}
    with (
        prt.load(bench.plm, backend="onnxruntime") as cpu,
        prt.load(bench.plm, device="cuda") as gpu,
    ):
        wanted, found = cpu.score(**question), gpu.score(**question)
    assert found.tokens == wanted.tokens
    np.testing.assert_allclose(found.logprobs, wanted.logprobs, atol=1e-3)


def test_unusable_answers_are_refused(reference: Path) -> None:
    with prt.load(reference) as plm:
        for answer, message in (
            (5, "answer must be a string, not 5"),
            (None, "a NoneType"),
            ("", "at least one token"),
            ("a" * 2000, r"the prompt has \d+ tokens and answer has 2000 tokens; .* has 1024"),
            ("a" * 70_000, "limit is 65536"),
        ):
            with pytest.raises(InputError, match=message):
                plm.score("What?", answer)
        with pytest.raises(InputError, match="image 0"):
            plm.score("What?", "a", images=[b"no image"])
        with pytest.raises(InputError, match="images must be a list"):
            plm.score("What?", "a", images="cat.png")
        most = plm.max_length - plm.generate("What?", max_new_tokens=1).timings.prompt_tokens
        assert len(plm.score("What?", "a" * most).tokens) == most
        with pytest.raises(InputError, match="the context has"):
            plm.score("What?", "a" * (most + 1))
    with pytest.raises(BackendError, match="is closed"):
        plm.score("What?", "a")
    with prt.load(reference, kv_bytes=2**15) as plm, pytest.raises(CapacityError, match="kv_bytes"):
        plm.score("What?", "a" * 500)


def test_control_tokens_in_an_answer_are_text(reference: Path) -> None:
    with prt.load(reference) as plm:
        assert len(plm.score("What?", "<|eot_id|>").tokens) == len("<|eot_id|>")


def test_a_score_adds_up() -> None:
    score = Score(tokens=(1, 2), logprobs=np.array([-1.0, -0.5]))
    assert score.total == -1.5 and isinstance(score.total, float)
