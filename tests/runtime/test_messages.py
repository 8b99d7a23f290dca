"""Conversations in OpenAI's form: what becomes of them, what is refused, and `Generator.chat`."""

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

import perception_rt as prt
from perception_rt.demo import pictures_path
from perception_rt.limits import Limits
from perception_rt.runtime.generation.messages import (
    MediaReader,
    parse_messages,
    parse_response_format,
)

SAME = "Do both images show the same number?"
REMOTE = MediaReader()


def text(value: str) -> dict[str, object]:
    return {"type": "text", "text": value}


def url(value: str, kind: str = "image") -> dict[str, object]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": value}}


def data(value: bytes, kind: str = "image/png") -> dict[str, object]:
    encoded = base64.b64encode(value).decode()
    return url(f"data:{kind};base64,{encoded}", kind.partition("/")[0])


def user(*parts: object) -> dict[str, object]:
    return {"role": "user", "content": list(parts)}


def test_media_and_texts_keep_their_order() -> None:
    found = parse_messages(
        [user(text("a"), data(b"1"), text("b"), data(b"2", "video/mp4"), text("c"), text("d"))],
        REMOTE,
    )
    assert found.prompt == "a<image>b<video>c\nd"
    assert (found.images, found.videos, found.literal) == ((b"1",), (b"2",), False)


def test_a_single_image_and_plain_texts_need_no_marks() -> None:
    assert parse_messages([user(text("a"), data(b"1"), text("b"))], REMOTE).prompt == "a\nb"
    assert parse_messages([user(text("a <image>"))], REMOTE).prompt == "a <image>"


def test_marks_in_texts_are_text() -> None:
    found = parse_messages([user(data(b"1"), data(b"2"), text("what is <image>?"))], REMOTE)
    assert (found.prompt, found.literal, len(found.images)) == ("what is <image>?", True, 2)
    with pytest.raises(prt.InputError, match=r"messages\[0\]: a text with <image> or <video>"):
        parse_messages([user(text("<image>"), data(b"1"), text("x"))], REMOTE)


def test_system_texts_and_history() -> None:
    messages = [
        {"role": "system", "content": "one"},
        {"role": "developer", "content": [text("two")]},
        user(data(b"1"), text("q1")),
        {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"},
    ]
    found = parse_messages(messages, REMOTE)
    assert (found.system, found.prompt, found.images) == ("one\ntwo", "q2", ())
    (past,) = found.history
    assert (past.prompt, past.answer, past.images) == ("q1", "a1", (b"1",))


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages must be a list of at least one"),
        ("hello", "messages must be a list of at least one, not a str"),
        ([user(text("a"))] * 515, "there are 515 messages; the limit is 514"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"role": "tool", "content": "x"}], r"messages\[0\]: role must be one of .*, not 'tool'"),
        ([{"role": "user"}], r"messages\[0\]: content must be a text or a list of parts"),
        ([user(text("a")), user(text("b"))], r"messages\[1\] is of the user, where the assistant"),
        ([{"role": "assistant", "content": "a"}], "where the user's belongs"),
        ([user(text("a")), {"role": "assistant", "content": "b"}], "last message must be the user"),
        ([user(text("a")), {"role": "system", "content": "b"}], "system message must come first"),
        ([{"role": "system", "content": "a"}], "the last message must be the user's"),
        ([{"role": "system", "content": [data(b"1")]}, user(text("a"))], "only users' messages"),
        ([user({"type": "input_audio"})], r"content\[0\]: type 'input_audio' is none of"),
        ([user({"type": "image", "image": "/etc/passwd"})], "type 'image' is none of"),
        ([user({"type": "text"})], "text must be a string, not a NoneType"),
        ([user(url("file:///etc/passwd"))], "URL 'file:///etc/passwd' is refused"),
        ([user(url("https://example.org/a.png"))], "URL 'https://example.org/a.png' is refused"),
        ([user(url("data:image/png,abc"))], "is refused: send the image itself as a data URL"),
        ([user(url("data:image/png;base64,a?c="))], "not valid base64"),
        ([user(url("data:video/mp4;base64,AAAA"))], "a data URL of type 'video/mp4' is no image"),
        ([user({"type": "image_url", "image_url": 3})], "image_url must be .*, not 3"),
        ([{"role": "assistant", "content": "", "tool_calls": [1]}], "tools are not supported"),
    ],
)
def test_what_is_refused_is_named(messages: object, said: str) -> None:
    with pytest.raises(prt.InputError, match=said):
        parse_messages(messages, REMOTE)


def test_sizes_are_bounded_before_they_are_decoded() -> None:
    reader = MediaReader(limits=Limits(image_bytes=10))
    parse_messages([user(data(b"x" * 10))], reader)
    with pytest.raises(prt.InputError, match="image has about 300 bytes; the limit is 10 bytes"):
        parse_messages([user(data(b"x" * 300))], reader)


def test_urls_are_fetched_only_by_the_given_function() -> None:
    asked = []

    def fetch(address: str, most: int) -> bytes:
        asked.append((address, most))
        return b"fetched"

    reader = MediaReader(fetch=fetch, limits=Limits(image_bytes=10))
    assert parse_messages([user(url("HTTPS://a.org/b"))], reader).images == (b"fetched",)
    assert asked == [("HTTPS://a.org/b", 10)]


@pytest.fixture(scope="module")
def plm() -> Iterator[prt.Generator]:
    with prt.load("demo:plm", threads=1) as generator:
        assert isinstance(generator, prt.Generator)
        yield generator


def picture(name: str) -> Path:
    return pictures_path() / f"{name}.png"


def test_chat_equals_generate(plm: prt.Generator) -> None:
    images = [picture("compare_1"), picture("compare_2")]
    expected = plm.generate(SAME, images=images)
    parts = [data(image.read_bytes()) for image in images]
    found = plm.chat([user(*parts, text(SAME))])
    assert (found.text, found.tokens) == (expected.text, expected.tokens)
    again = [{"type": "image", "image": image} for image in images]
    handle = plm.submit(prt.chat_request([user(*again, text(SAME))], max_new_tokens=1))
    assert handle.result().tokens == expected.tokens[:1]


def test_system_text_replaces_that_of_the_training(plm: prt.Generator) -> None:
    def prompt_tokens(*messages: object) -> int:
        return plm.chat(messages, max_new_tokens=1).timings.prompt_tokens

    question = user(text("Is there a 4?"))
    short = prompt_tokens({"role": "system", "content": "Hi"}, question)
    assert short < prompt_tokens(question)
    assert plm.generate("Is there a 4?", system="Hi").timings.prompt_tokens == short


def test_options_beside_messages(plm: prt.Generator) -> None:
    with pytest.raises(prt.InputError, match="images cannot be given beside messages"):
        plm.chat([user(text("a"))], images=[picture("read")])
    with pytest.raises(prt.InputError, match="system must be a string, not 3"):
        plm.generate("a", system=3)


def test_an_answer_has_the_format_that_is_asked_for(plm: prt.Generator) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    named = {"type": "json_schema", "json_schema": {"name": "ones", "schema": schema}}
    messages = [user(text("Is there a 4?"))]
    assert plm.chat(messages, response_format=named).text == "[1, 1]"
    plain = plm.chat(messages, response_format={"type": "text"}, max_new_tokens=4)
    assert plain.tokens == plm.chat(messages, max_new_tokens=4).tokens
    request = prt.chat_request(messages, response_format={"type": "json_object"})
    assert request.json_schema == {"type": "object"}
    with pytest.raises(prt.InputError, match="beside response_format"):
        prt.chat_request(messages, response_format=named, json_schema=schema)


@pytest.mark.parametrize("value", ["text", {}, {"type": "xml"}, {"type": ["text"]}])
def test_unknown_response_formats_are_refused(value: object) -> None:
    with pytest.raises(prt.InputError, match="text, json_object or json_schema"):
        parse_response_format(value)


@pytest.mark.parametrize("value", [None, {}, {"schema": "x"}, {"schema": None}])
def test_a_response_format_needs_its_schema(value: object) -> None:
    with pytest.raises(prt.InputError, match='must have "json_schema"'):
        parse_response_format({"type": "json_schema", "json_schema": value})
