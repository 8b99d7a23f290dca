"""Answers through the `openai` client: streams, stop strings, seeds in batches, parsed schemas."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import httpx
import openai
import pydantic
import pytest
from server_process import SAME, metric, picture, question, until

import perception_rt as prt

WHERE = question("Where is the 5?", "locate")
SAMPLED: dict[str, Any] = {"temperature": 5, "top_p": 0.95, "max_tokens": 16}


def whole(client: openai.OpenAI, messages: Any, **fields: Any) -> str:
    found = client.chat.completions.create(model="PLM-Demo", messages=messages, **fields)
    return found.choices[0].message.content or ""


def streamed(client: openai.OpenAI, messages: Any, **fields: Any) -> str:
    chunks = client.chat.completions.create(
        model="PLM-Demo", messages=messages, stream=True, **fields
    )
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


@pytest.mark.parametrize("ask", [whole, streamed])
def test_no_part_of_a_stop_string_is_sent(client: openai.OpenAI, ask: Any) -> None:
    full = whole(client, WHERE)
    for start in range(1, len(full), 3):
        for size in (1, 2, 5):  # also across tokens
            stop = full[start : start + size]
            expected = full.partition(stop)[0]
            assert ask(client, WHERE, stop=stop) == expected
            assert ask(client, WHERE, stop=["never", stop]) == expected
    assert ask(client, WHERE, stop=f"{full[-2:]}never") == full


def test_seeds_repeat_in_any_batch(client: openai.OpenAI) -> None:
    questions = [WHERE, question("Is there a 4?"), question(SAME, "compare_1", "compare_2")]

    def ask(seed: int) -> str:
        form = streamed if seed % 2 else whole
        return form(client, questions[seed % 3], seed=seed, **SAMPLED)

    alone = [ask(seed) for seed in range(12)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, [*range(12)] * 3)) == alone * 3
    assert len(set(alone)) > 6


def test_conversation_goes_on_with_images_in_the_history(
    client: openai.OpenAI, plm: prt.Generator
) -> None:
    """The client's own message goes back as it came; developer text is system text."""
    messages = [{"role": "developer", "content": [{"type": "text", "text": "Hi"}]}, *WHERE]
    first = client.chat.completions.create(model="PLM-Demo", messages=messages).choices[0].message
    messages += [first, *question(SAME, "compare_1", "compare_2")]
    asked, images = "Where is the 5?", [picture("locate")]
    text = plm.generate(asked, images=images, system="Hi").text
    earlier = prt.Exchange(prompt=asked, answer=text, images=images)
    pair = [picture("compare_1"), picture("compare_2")]
    expected = plm.generate(SAME, images=pair, history=[earlier], system="Hi")
    assert (first.content, whole(client, messages)) == (text, expected.text)


class Digit(pydantic.BaseModel):
    colour: Literal["red", "blue"]
    name: str | None


class Found(pydantic.BaseModel):
    """A schema with $ref, enum, anyOf, arrays, and values without bounds."""

    digits: list[Digit]
    count: int
    note: str
    share: float


def test_schemas_of_pydantic(client: openai.OpenAI) -> None:
    fields: Any = {"model": "PLM-Demo", "messages": WHERE, "response_format": Found}

    def ask(seed: int) -> bool:
        temperature = float(seed > 0)
        found = client.chat.completions.parse(**fields, temperature=temperature, seed=seed)
        return isinstance(found.choices[0].message.parsed, Found)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(ask, range(20)))
    with client.chat.completions.stream(**fields) as stream:
        final = stream.get_final_completion()
    assert isinstance(final.choices[0].message.parsed, Found)


def test_concurrent_streams_some_of_which_are_closed(client: openai.OpenAI, base: str) -> None:
    async def ask(number: int) -> str | None:
        text = ""
        stream = await asking.chat.completions.create(model="PLM-Demo", messages=WHERE, stream=True)
        async for chunk in stream:
            text += chunk.choices[0].delta.content or ""
            if number % 3 == 0 and text:
                await stream.close()
                return None
        return text

    async def all_of_them() -> list[str | None]:
        async with asking:
            return await asyncio.gather(*map(ask, range(24)))

    asking = openai.AsyncOpenAI(base_url=f"{base}/v1", api_key="none", max_retries=0)
    full = whole(client, WHERE)
    assert asyncio.run(all_of_them()) == [None if n % 3 == 0 else full for n in range(24)]
    until(lambda: metric(base, "perception_rt_running_requests") == 0)


def test_a_stream_ends_as_openai_says(base: str) -> None:
    body = {"model": "PLM-Demo", "messages": WHERE, "stream": True, "max_tokens": 1}
    answer = httpx.post(f"{base}/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n") and '"usage"' not in answer.text
