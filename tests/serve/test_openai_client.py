"""The `openai` client against `perception-rt serve`: answers and vectors equal Python's."""

import base64
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import numpy as np
import openai
import pytest
from server_process import SAME, data_url, metric, picture, picture_url, question

import perception_rt as prt

TEXTS = ["a red three", "the handwritten digit seven"]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["PE-Demo", "PLM-Demo"]
    assert client.models.retrieve("PE-Demo").owned_by == "perception_rt"


@pytest.mark.parametrize("form", ["float", "base64", None])
def test_text_embeddings(client: openai.OpenAI, pe: prt.Embedder, form: str | None) -> None:
    more = {} if form is None else {"encoding_format": form}
    found = client.embeddings.create(model="PE-Demo", input=TEXTS, **more)
    rows = [item.embedding for item in found.data]
    if form == "base64":
        rows = [np.frombuffer(base64.b64decode(row), "<f4") for row in rows]
    assert found.data[1].index == 1
    np.testing.assert_allclose(rows, pe.embed_texts(TEXTS), atol=1e-6)
    assert found.usage.prompt_tokens == 5 + 6
    one = client.embeddings.create(model="PE-Demo", input=TEXTS[0], dimensions=pe.dim)
    np.testing.assert_allclose(one.data[0].embedding, pe.embed_texts(TEXTS)[0], atol=1e-6)


def test_as_many_texts_as_are_accepted(client: openai.OpenAI, pe: prt.Embedder) -> None:
    texts = [f"{number} is a number" for number in range(2048)]
    found = client.embeddings.create(model="PE-Demo", input=texts)
    np.testing.assert_allclose([d.embedding for d in found.data], pe.embed_texts(texts), atol=1e-5)


def test_image_embeddings_in_both_forms(client: openai.OpenAI, pe: prt.Embedder, base: str) -> None:
    names = ["digit_3", "digit_7"]
    expected = pe.embed_images([picture(name) for name in names])
    urls = [picture_url(name) for name in names]
    found = client.embeddings.create(model="PE-Demo", input=urls, extra_body={"modality": "image"})
    np.testing.assert_allclose([item.embedding for item in found.data], expected, atol=1e-6)
    part = {"type": "image_url", "image_url": {"url": urls[1]}}
    body = {"model": "PE-Demo", "messages": [{"role": "user", "content": [part]}]}
    (item,) = httpx.post(f"{base}/v1/embeddings", json=body).json()["data"]
    np.testing.assert_allclose(item["embedding"], expected[1], atol=1e-6)


def test_videos(
    client: openai.OpenAI, pe: prt.Embedder, plm: prt.Generator, tmp_path: Path
) -> None:
    path = tmp_path / "v.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2)
        stream.width = stream.height = 64
        for level in (0, 80, 160, 240):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), level, np.uint8))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    url = data_url(path.read_bytes(), "video/mp4")
    more = {"modality": "video", "num_frames": 3}
    found = client.embeddings.create(model="PE-Demo", input=[url], extra_body=more)
    expected = pe.embed_videos([path], num_frames=3)
    np.testing.assert_allclose([found.data[0].embedding], expected, atol=1e-6)
    parts = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "Is there a 4?"},
    ]
    answer = client.chat.completions.create(
        model="PLM-Demo", messages=[{"role": "user", "content": parts}], max_tokens=8
    )
    python = plm.generate("Is there a 4?", videos=[path], max_new_tokens=8)
    assert answer.choices[0].message.content == python.text


def test_many_clients_share_batches(client: openai.OpenAI, pe: prt.Embedder, base: str) -> None:
    texts = [f"a photo of the handwritten digit {number}" for number in range(40)]
    before = metric(base, "perception_rt_batch_items_count", kind="text")

    def embed(text: str) -> list[float]:
        return client.embeddings.create(model="PE-Demo", input=text).data[0].embedding

    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(embed, texts))
    np.testing.assert_allclose(rows, pe.embed_texts(texts), atol=1e-5)
    assert metric(base, "perception_rt_batch_items_count", kind="text") - before < 40


def test_chat_with_two_images(client: openai.OpenAI, plm: prt.Generator) -> None:
    names = ("compare_1", "compare_2")
    expected = plm.generate(SAME, images=[picture(name) for name in names])
    messages = question(SAME, *names)
    found = client.chat.completions.create(model="PLM-Demo", messages=messages)
    assert found.choices[0].message.content == expected.text == "no"
    assert found.choices[0].finish_reason == "stop"
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.timings.prompt_tokens
    assert found.usage.completion_tokens == len(expected.tokens)


def test_streaming_gives_the_same_text_and_usage(client: openai.OpenAI, plm: prt.Generator) -> None:
    text = "Where is the 5?"
    expected = plm.generate(text, images=[picture("locate")], lookup=True)
    chunks = list(
        client.chat.completions.create(
            model="PLM-Demo",
            messages=question(text, "locate"),
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"lookup": True, "max_tiles": 1},
        )
    )
    pieces = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert "".join(pieces) == expected.text
    assert len([piece for piece in pieces if piece]) > 1
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == len(expected.tokens)
    assert len({chunk.id for chunk in chunks}) == 1


def test_stop_limits_history_and_system_text(client: openai.OpenAI, plm: prt.Generator) -> None:
    image = picture("locate")
    full = plm.generate("Where is the 5?", images=[image]).text
    messages = question("Where is the 5?", "locate")
    found = client.chat.completions.create(model="PLM-Demo", messages=messages, stop=",")
    assert found.choices[0].message.content == full.partition(",")[0]
    found = client.chat.completions.create(
        model="PLM-Demo", messages=messages, max_completion_tokens=2
    )
    assert found.choices[0].finish_reason == "length"
    assert (
        found.choices[0].message.content
        == plm.generate("Where is the 5?", images=[image], max_new_tokens=2).text
    )
    messages = [{"role": "system", "content": "Hi"}, *messages]
    messages += [{"role": "assistant", "content": full}, *question("Is there a 4?")]
    found = client.chat.completions.create(model="PLM-Demo", messages=messages)
    earlier = prt.Exchange(prompt="Where is the 5?", answer=full, images=[image])
    expected = plm.generate("Is there a 4?", history=[earlier], system="Hi")
    assert found.choices[0].message.content == expected.text
    assert found.usage is not None
    assert found.usage.prompt_tokens == expected.timings.prompt_tokens


def test_seeds_repeat(client: openai.OpenAI, plm: prt.Generator) -> None:
    def ask(seed: int) -> str | None:
        return (
            client.chat.completions.create(
                model="PLM-Demo",
                messages=question("Where is the 5?", "locate"),
                temperature=8,
                top_p=0.95,
                seed=seed,
                max_tokens=12,
            )
            .choices[0]
            .message.content
        )

    expected = plm.generate(
        "Where is the 5?", images=[picture("locate")], temperature=8, top_p=0.95, seed=5,
        max_new_tokens=12,
    )  # fmt: skip
    assert ask(5) == ask(5) == expected.text != ask(6)


def test_answers_follow_a_schema_choices_or_an_expression(
    client: openai.OpenAI, plm: prt.Generator
) -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 9}, "s": {"enum": ["a"]}},
        "required": ["n", "s"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "found", "schema": schema}}

    def ask(seed: int, **fields: Any) -> str:
        found = client.chat.completions.create(
            model="PLM-Demo", messages=question("Is there a 4?"), temperature=1, seed=seed, **fields
        )
        assert found.choices[0].finish_reason == "stop"
        return found.choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda seed: ask(seed, response_format=form), range(100)))
    for answer in answers:
        value = json.loads(answer)
        assert list(value) == ["n", "s"] and 0 <= value["n"] <= 9 and value["s"] == "a"
    python = plm.generate("Is there a 4?", json_schema=schema, temperature=1, seed=3)
    assert answers[3] == python.text
    assert ask(0, extra_body={"choices": ["one", "two"]}) in ("one", "two")
    assert re.fullmatch("[0-9]{2}", ask(0, extra_body={"regex": "[0-9]{2}"}))
    chunks = client.chat.completions.create(
        model="PLM-Demo", messages=question("Is there a 4?"), stream=True, response_format=form
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == plm.generate("Is there a 4?", json_schema=schema).text


def test_classify_and_features(base: str, pe: prt.Embedder) -> None:
    labels, images = ["two", "three"], [picture_url("digit_3")]
    body = {"model": "PE-Demo", "images": images, "labels": labels, "templates": ["a {}"]}
    found = httpx.post(f"{base}/v1/classify", json=body).json()
    expected = pe.classify([picture("digit_3")], labels, ["a {}"])
    np.testing.assert_allclose(found["data"][0]["probabilities"], expected[0], atol=1e-5)
    assert found["labels"] == labels
    body = {"model": "PE-Demo", "image": images[0], "layer": -1}
    found = httpx.post(f"{base}/v1/features", json=body).json()
    assert found["shape"] == list(pe.features([picture("digit_3")]).shape[1:])
    assert found["picture"].startswith("data:image/png;base64,iVBOR")


def test_metrics_count_tokens_and_times(client: openai.OpenAI, base: str) -> None:
    tokens = metric(base, "perception_rt_tokens_total", model="PLM-Demo", kind="answer")
    client.chat.completions.create(
        model="PLM-Demo", messages=question("Is there a 4?", "exists"), max_tokens=1
    )
    after = metric(base, "perception_rt_tokens_total", model="PLM-Demo", kind="answer")
    assert after - tokens == 1
    assert metric(base, "perception_rt_ttft_seconds_count", model="PLM-Demo") > 0
    assert metric(base, "perception_rt_running_requests", model="PLM-Demo") == 0
    assert metric(base, "perception_rt_requests_in_progress") == 1  # this one
