"""The public methods of a language model: results, errors and caches."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_plm import LONG_PLM, picture, write_plm
from soak import eventually

import perception_rt as prt
from perception_rt.errors import CapacityError, InputError, PackageError
from perception_rt.limits import Limits
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Exchange, GenerationProgress, Request

IMAGE_ID = LONG_PLM.image_token_id


@pytest.fixture
def fresh(package: Path):
    """A generator with empty caches."""
    with prt.load(package) as plm:
        yield plm


def clip(seed: int, frames: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (frames, 30, 40, 3), np.uint8)


def pixels(seed: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 1, (count, 3, 28, 28)).astype(np.float32)


def test_an_answer(plm: Generator, preprocessor: RequestPreprocessor) -> None:
    seen = []
    result = plm.generate(
        "What is this?", images=[picture(0)], max_new_tokens=30, on_progress=seen.append
    )
    assert result.finish_reason in ("stop", "length")
    assert result.text == preprocessor.tokenizer.decode(result.tokens)
    assert len(result.tokens) == result.timings.new_tokens <= 30
    assert IMAGE_ID not in result.tokens
    timings = result.timings
    assert timings.image_tiles == 5 and timings.prompt_tokens > 186 + 5 * 4
    assert 0 < timings.preprocess_s < timings.ttft_s <= timings.total_s
    assert [p.phase for p in seen][:1] == ["vision"] and seen[-1].phase == "decode"
    assert seen[-1].done == len(result.tokens) and seen[-1].total == 30


def test_repr_names_model_precision_backend_and_size(tmp_path: Path) -> None:
    with prt.load(write_plm(tmp_path / "plm", name="<PLM>")) as plm:
        size = f"{sum(f.size_bytes for f in plm.manifest.content.files.values()) / 1e6:.1f} MB"
        assert repr(plm) == (
            "Generator(model='<PLM>', precision='fp32', backend='reference', device='cpu', "
            f"size='{size}')"
        )
        shown = plm._repr_html_()
        assert "<td>&lt;PLM&gt;</td>" in shown and f"<td>{size}</td>" in shown
        assert "<PLM>" not in shown


def test_without_images_and_with_an_empty_question(plm: Generator) -> None:
    assert plm.generate("", max_new_tokens=3).timings.image_tiles == 0
    assert plm.generate("<|image|>", max_new_tokens=3).timings.image_tiles == 0


@pytest.mark.parametrize(
    ("prompt", "images", "videos", "message"),
    [
        ("<image> and <image>", 1, 1, "2 <image> marks for 1"),
        ("<video>", 1, 0, "1 <video> marks for 0"),
        ("<video><video>", 0, 1, "2 <video> marks for 1"),
        ("<image><image><image>", 2, 0, "3 <image> marks for 2"),
    ],
)
def test_more_marks_than_images(
    plm: Generator, prompt: str, images: int, videos: int, message: str
) -> None:
    picture, film = np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3), np.uint8)
    with pytest.raises(InputError, match=message):
        plm.generate(prompt, images=[picture] * images, videos=[film] * videos)


def test_a_stream_is_the_answer_in_pieces(plm: Generator) -> None:
    result = plm.generate("Tell me.", max_new_tokens=60)
    pieces = list(plm.stream("Tell me.", max_new_tokens=60))
    assert len(pieces) > 10 and all(pieces) and "".join(pieces) == result.text


def test_stop_strings_end_an_answer_and_are_not_in_it(plm: Generator) -> None:
    whole = plm.generate("Tell me more.", max_new_tokens=60)
    for stop in (whole.text[7], whole.text[5:8], whole.text[:1]):
        result = plm.generate("Tell me more.", max_new_tokens=60, stop=["\x00never", stop])
        assert result.finish_reason == "stop"
        assert result.text == whole.text[: whole.text.index(stop)]
        assert result.tokens == whole.tokens[: len(result.tokens)]
        assert "".join(plm.stream("Tell me more.", max_new_tokens=60, stop=[stop])) == result.text


def test_seeded_draws_repeat_in_any_company(plm: Generator) -> None:
    """GEN-06."""

    def request(seed: int) -> Request:
        return Request("Draw.", temperature=1.0, top_k=100, top_p=0.9, seed=seed, max_new_tokens=9)

    alone = [plm.generate_batch([request(seed)])[0].tokens for seed in range(5)]
    together = [result.tokens for result in plm.generate_batch([request(s) for s in range(5)])]
    assert together == alone and len(set(alone)) == 5
    assert plm.generate("Draw.", temperature=1e-9, max_new_tokens=9).tokens == (
        plm.generate("Draw.", max_new_tokens=9).tokens
    )


def test_a_batch_is_its_requests_in_order(package: Path) -> None:
    """More requests than the queue holds, with images, videos and answers of different lengths."""
    requests = [
        Request(
            f"Question {i}",
            images=[picture(i % 3)] if i % 2 else (),
            videos=[clip(i)] if i % 5 == 0 else (),
            max_new_tokens=5 + i % 7,
            lookup=i % 3 == 0,
        )
        for i in range(24)
    ]
    with prt.load(package, cache=False, limits=Limits(queued_requests=3)) as plm:
        together = plm.generate_batch(requests)
        assert plm.stats.running == 0 and plm.generate_batch([]) == []
        alone = [plm.generate_batch([request])[0] for request in requests]
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert len({r.tokens for r in alone}) == 24


@pytest.mark.parametrize(
    "bad", [Request("a", top_k=0), Request("a", images=[b"no image"]), "a"], ids=str
)
def test_a_batch_names_the_request_that_is_unusable(plm: Generator, bad: Request) -> None:
    with pytest.raises(InputError, match=r"^request 1: ") as caught:
        plm.generate_batch([Request("a", max_new_tokens=1000), bad])
    assert caught.traceback  # which keeps the frames of the call alive
    assert eventually(lambda: plm.stats.queued + plm.stats.running == 0)
    assert plm.stats.running == 0


@pytest.mark.parametrize("name", ["images", "requests"])
def test_one_item_is_not_a_list(plm: Generator, name: str) -> None:
    with pytest.raises(InputError, match=f"{name} must be a list"):
        plm.generate("a", images="cat.png") if name == "images" else plm.generate_batch("a")


def test_unusable_media_are_named(plm: Generator) -> None:
    for message, arguments in (
        ("^image 1: ", {"images": [picture(0), b"no image"]}),
        ("^video 0: ", {"videos": [picture(0)]}),
        (
            "^history 1: image 0: ",
            {
                "history": [
                    Exchange(prompt="a", answer="b", images=[picture(0)]),
                    Exchange(prompt="a", answer="b", images=[b"no image"]),
                ]
            },
        ),
        ("marks", {"prompt": "<image>" * 3, "images": [picture(0)], "videos": [clip(0)]}),
    ):
        with pytest.raises(InputError, match=message):
            plm.generate(**{"prompt": "a", **arguments})


def test_images_and_videos_go_to_their_marks(preprocessor: RequestPreprocessor) -> None:
    image, video = picture(0), clip(0)
    first, frames = preprocessor.tiles.tile_size, 3

    def tiles(prompt: str) -> np.ndarray:
        return preprocessor.prepare(Request(prompt, images=[image], videos=[video])).tiles

    assert tiles("a").shape == (5 + frames, first, first, 3)
    assert np.array_equal(tiles("<image> and <video>"), tiles("a"))
    turned = tiles("<video> and <image>")
    assert np.array_equal(turned, np.roll(tiles("a"), frames, axis=0))


def test_budgets_of_tiles_and_frames(plm: Generator) -> None:
    def tiles(**arguments) -> int:
        return plm.generate("a", max_new_tokens=1, **arguments).timings.image_tiles

    assert [tiles(images=[picture(0)], max_tiles=n) for n in (0, 1, 2, 4)] == [1, 2, 2, 5]
    assert [tiles(videos=[clip(0, 9)], num_frames=n) for n in (1, 3, None)] == [1, 3, 4]


def test_too_long_a_prompt_is_refused_with_its_counts(plm: Generator) -> None:
    """GEN-05: at the context length, one token beyond, and images too many to open."""
    base = plm.generate("", max_new_tokens=1).timings.prompt_tokens
    room = plm.max_length - base
    result = plm.generate("a" * (room - 5), max_new_tokens=5)
    assert result.timings.prompt_tokens == plm.max_length - 5
    with pytest.raises(InputError, match=r"has 2044 tokens and max_new_tokens is 5; .* 2048"):
        plm.generate("a" * (room - 4), max_new_tokens=5)
    with pytest.raises(InputError, match=r"max_new_tokens is 9223372036854775807; .* 2048"):
        plm.generate("a", max_new_tokens=2**63 - 1)
    with pytest.raises(InputError, match="513 tiles or more have 2052 tokens"):
        plm.generate("a", images=["nowhere.png"] * 513)
    with pytest.raises(InputError, match="515 tiles or more"):
        plm.generate("a", images=[*[picture(0)] * 103, *["nowhere.png"] * 9])
    with pytest.raises(InputError, match="limit is 65536"):
        plm.generate("a" * 65537)


def test_what_does_not_fit_the_budget_is_refused(package: Path) -> None:
    with prt.load(package, kv_bytes=256 * 128) as plm:  # 256 tokens
        with pytest.raises(CapacityError, match="kv_bytes is 32768"):
            plm.generate("What is this?" * 3, max_new_tokens=20)
        assert len(plm.generate_tokens([1, 2, 3], max_new_tokens=9)) <= 9


def test_the_queue_is_bounded(package: Path) -> None:
    """GEN-08: further requests are refused before their images are opened."""
    at_work, go_on = threading.Event(), threading.Event()

    def wait(_: GenerationProgress) -> None:
        at_work.set()
        assert go_on.wait(10)

    with prt.load(package, limits=Limits(queued_requests=2)) as plm:
        first = plm.submit(Request("b", max_new_tokens=3, on_progress=wait))
        assert at_work.wait(10)
        handles = [plm.submit(Request("a", max_new_tokens=3)) for _ in range(2)]
        with pytest.raises(CapacityError, match="2 requests wait already"):
            plm.submit(Request("a", images=["nowhere.png"]))
        go_on.set()
        assert first.result().finish_reason in ("stop", "length")
        results = [handle.result() for handle in handles]
        assert results[0].tokens == results[1].tokens
        assert plm.generate("a", max_new_tokens=3).tokens == results[0].tokens


def test_the_second_question_about_an_image_is_cheap(fresh: Generator) -> None:
    first = fresh.generate("What is this?", images=[picture(1)], max_new_tokens=8)
    assert first.timings.cached_tokens == 0
    second = fresh.generate("Who made it?", images=[picture(1)], max_new_tokens=8)
    # Everything up to the text of the question, which differs.
    assert second.timings.cached_tokens >= second.timings.prompt_tokens - 40
    other = fresh.generate("Who made it?", images=[picture(2)], max_new_tokens=8)
    assert other.timings.cached_tokens < other.timings.prompt_tokens - 5 * 4
    assert other.tokens != second.tokens


def test_a_chat_goes_on_where_it_was(fresh: Generator) -> None:
    image = picture(3)
    first = fresh.generate("What is this?", images=[image], max_new_tokens=20)
    history = [Exchange(prompt="What is this?", answer="A cat.", images=[image])]
    second = fresh.generate("And what color?", history=history, max_new_tokens=20)
    assert second.timings.image_tiles == 5
    assert second.timings.cached_tokens >= first.timings.prompt_tokens
    assert second.tokens != first.tokens


def test_drafting_changes_no_token(plm: Generator, preprocessor: RequestPreprocessor) -> None:
    request = Request("again and again and again", images=[picture(7)], lookup=True)
    state = preprocessor.prepare(request)
    assert state.lookup is not None and state.lookup.draft(3) == []
    plain = plm.generate_batch([replace(request, lookup=False)])
    assert plm.generate_batch([request])[0].tokens == plain[0].tokens


def test_expected_tokens_are_drafted(plm: Generator) -> None:
    """A known answer takes one step per nine tokens, with the same tokens."""
    request = Request("again", images=[picture(7)], max_new_tokens=60, ignore_eos=True)
    plain = plm.submit(request).result()
    for tokens, most in ((plain.tokens, 9), (plain.tokens[30:], 45), ([5, 6, 7], 59)):
        drafting = replace(request, lookup=True, lookup_tokens=tokens)
        found = plm.submit(drafting).result()
        assert found.tokens == plain.tokens and found.timings.steps <= most
    assert plain.timings.steps == 59


def test_end_tokens_can_be_ignored(plm: Generator, preprocessor: RequestPreprocessor) -> None:
    ends, ended = preprocessor.tokenizer.end_ids, 0
    for index in range(20):
        prompt, options = f"Question {index}", {"max_new_tokens": 60}
        result = plm.generate(prompt, **options)
        whole = plm.generate(prompt, ignore_eos=True, **options)
        assert whole.finish_reason == "length" and len(whole.tokens) == 60
        assert whole.tokens[: len(result.tokens)] == result.tokens
        if result.finish_reason == "stop":
            ended += 1
            assert whole.tokens[len(result.tokens)] in ends
            assert whole.text.startswith(result.text)
        assert plm.generate(prompt, ignore_eos=True, stop=[whole.text[2]]).finish_reason == "stop"
    assert ended > 3


def test_caches_change_no_token(package: Path, plm: Generator) -> None:
    requests = [Request(q, images=[picture(4)], max_new_tokens=12) for q in ("a", "b", "a")]
    with prt.load(package, cache=False) as bare:
        expected = [bare.generate_batch([request])[0] for request in requests]
        assert not any(result.timings.cached_tokens for result in expected)
    found = [plm.generate_batch([request])[0] for request in requests]
    assert [r.tokens for r in found] == [r.tokens for r in expected]
    assert found[2].timings.cached_tokens == found[2].timings.prompt_tokens - 1


def test_caches_outlive_a_process_in_a_directory(package: Path, tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        with prt.load(package, cache_dir=tmp_path / "cache") as plm:
            answers.append(plm.generate("What?", images=[picture(5)], max_new_tokens=9))
    assert answers[0].tokens == answers[1].tokens
    assert [a.timings.cached_tokens > 0 for a in answers] == [False, True]


def test_tokens_in_tokens_out(plm: Generator) -> None:
    ids = [5, IMAGE_ID, IMAGE_ID, 6, IMAGE_ID, IMAGE_ID, 7]
    tokens = plm.generate_tokens(ids, pixels(0), max_new_tokens=12)
    assert tokens == plm.generate_tokens(np.array(ids, np.int32), pixels(0), max_new_tokens=12)
    assert tokens != plm.generate_tokens(ids, pixels(1), max_new_tokens=12)
    assert IMAGE_ID not in tokens and 0 < len(tokens) <= 12
    logits = plm.prefill_logits(ids, pixels(0))
    assert logits.shape == (320,) and logits.dtype == np.float32
    masked = np.where(np.arange(320) == IMAGE_ID, -np.inf, logits)
    assert int(np.argmax(masked)) == tokens[0]
    longer = plm.prefill_logits([*ids, tokens[0]], pixels(0))
    masked = np.where(np.arange(320) == IMAGE_ID, -np.inf, longer)
    assert int(np.argmax(masked)) == tokens[1]
    assert plm.stats.running == 0


def test_pictures_and_their_pixels_are_not_the_same_key(preprocessor: RequestPreprocessor) -> None:
    """The two graphs give different features on the reference backend, so the keys must differ."""
    square = picture(6, 28, 28)
    state = preprocessor.prepare(Request("a", images=[square], max_tiles=0))
    normalised = (state.tiles.transpose(0, 3, 1, 2) / 127.5 - 1).astype(np.float32)
    assert preprocessor.prepare_tokens(state.ids, normalised, 1).tile_keys != state.tile_keys


def test_a_package_without_tokenizer_takes_ids_only(
    tmp_path: Path, plm: Generator, preprocessor: RequestPreprocessor
) -> None:
    with prt.load(write_plm(tmp_path / "plm", config=LONG_PLM, text=None)) as bare:
        for seed in range(40):  # some answers would end early
            ids = np.random.default_rng(seed).integers(0, 300, 9)
            tokens = bare.generate_tokens(ids, max_new_tokens=40)
            assert len(tokens) == 40 and IMAGE_ID not in tokens
            ended = plm.generate_tokens(ids, max_new_tokens=40)
            assert ended == tokens[: len(ended)]
            assert len(ended) == 40 or tokens[len(ended)] in preprocessor.tokenizer.end_ids
        for call in (lambda: bare.generate("a"), lambda: bare.stream("a")):
            with pytest.raises(InputError, match="PLM-Fake has no tokenizer"):
                call()


@pytest.mark.parametrize(
    ("ids", "tiles", "new", "message"),
    [
        ([], None, 1, "at least one integer"),
        ([1.5], None, 1, "at least one integer"),
        ([True], None, 1, "at least one integer"),
        ([[1]], None, 1, "at least one integer"),
        ([[1], [2, 3]], None, 1, "at least one integer"),
        ("12", None, 1, "at least one integer"),
        (None, None, 1, "at least one integer"),
        ([-1], None, 1, "0 to 319"),
        ([320], None, 1, "0 to 319"),
        ([2**63], None, 1, "0 to 319"),
        ([2**70], None, 1, "at least one integer"),
        ([1], None, 0, "max_new_tokens"),
        ([1], None, True, "max_new_tokens"),
        ([1] * 2000, None, 49, "2000 tokens and max_new_tokens is 49"),
        ([1, IMAGE_ID], None, 1, "1 image tokens; 0 tiles of 4 tokens need 0"),
        ([1], pixels(0), 1, "0 image tokens; 1 tiles of 4 tokens need 4"),
        ([IMAGE_ID] * 4, pixels(0, 2), 1, "4 image tokens; 2 tiles of 4 tokens need 8"),
        ([IMAGE_ID] * 4, pixels(0)[0], 1, "not float32 (3, 28, 28)"),
        ([IMAGE_ID] * 4, pixels(0).astype(np.float64), 1, "not float64"),
        ([IMAGE_ID] * 4, pixels(0)[:0], 1, "not float32 (0, 3, 28, 28)"),
        ([IMAGE_ID] * 4, pixels(0) * np.nan, 1, "finite"),
        ([IMAGE_ID] * 4, [1], 1, "a list"),
    ],
)
def test_unusable_tokens_and_pixels(plm: Generator, ids, tiles, new, message: str) -> None:
    with pytest.raises(InputError) as caught:
        plm.generate_tokens(ids, tiles, max_new_tokens=new)
    assert message in str(caught.value)


def test_a_deadline_gives_what_there_is(plm: Generator) -> None:
    result = plm.generate("a", deadline_s=0)
    assert (result.finish_reason, result.tokens) == ("deadline", ())
    result = plm.generate("a", max_new_tokens=1500, deadline_s=0.03)
    assert result.finish_reason in ("deadline", "stop")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kv_bytes": 0}, "kv_bytes"),
        ({"kv_bytes": True}, "kv_bytes"),
        ({"max_batch": 0}, "max_batch must be an integer from 1 to 256"),
        ({"max_batch": 257}, "max_batch"),
        ({"cache": 1}, "cache must be True or False"),
        ({"feature_cache_bytes": -1}, "feature_cache_bytes"),
        ({"prefix_cache_bytes": 1.5}, "prefix_cache_bytes"),
        ({"cache_dir": 5}, "cache_dir"),
        ({"cache_dir": ""}, "cache_dir is empty; name a directory"),
        ({"threads": 10**3}, "threads is 1000, but this process may use"),
        ({"limits": 5}, "limits must be a Limits or None, not 5"),
    ],
)
def test_unusable_arguments_of_load(package: Path, arguments: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        prt.load(package, **arguments)


def test_a_package_whose_parts_differ_is_refused(tmp_path: Path) -> None:
    text = TokenizerSpec(kind="bytes", vocab_size=320, image_token_id=IMAGE_ID).to_dict()
    for name, changes in (
        ("tile", {"image": TileSpec(tile_size=56).to_dict()}),
        ("vocabulary", {"text": {**text, "vocab_size": 330}}),
        ("image", {"text": {**text, "image_token_id": 300}}),
        ("kind", {"text": {**text, "kind": "tiktoken"}}),
        ("field", {"text": {**text, "more": 1}}),
        ("images", {"image": {"tile_size": "28"}}),
    ):
        with pytest.raises(PackageError):
            prt.load(write_plm(tmp_path / name, config=LONG_PLM, **changes))
